"""The graph's names as modules outside of `tensors/` import them."""

from deltamerge.tensors.schedule import REDUCTIONS as REDUCTIONS
from deltamerge.tensors.schedule import TILED as TILED
from deltamerge.tensors.schedule import Schedule as Schedule
from deltamerge.tensors.schedule import depth_first as depth_first
from deltamerge.tensors.schedule import last_uses as last_uses
from deltamerge.tensors.schedule import peak_tiles as peak_tiles
from deltamerge.tensors.schedule import schedule as schedule
from deltamerge.tensors.tensor import Function as Function
from deltamerge.tensors.tensor import Graph as Graph
from deltamerge.tensors.tensor import Kind as Kind
from deltamerge.tensors.tensor import Node as Node
from deltamerge.tensors.tensor import function_of as function_of
from deltamerge.tensors.tensor import name_of as name_of
