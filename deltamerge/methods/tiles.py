"""The names of `tensors.tiles`, for packages of methods that import them from here."""

from deltamerge.tensors.tiles import Kept as Kept
from deltamerge.tensors.tiles import Make as Make
from deltamerge.tensors.tiles import Patched as Patched
from deltamerge.tensors.tiles import Tile as Tile
from deltamerge.tensors.tiles import Whole as Whole
from deltamerge.tensors.tiles import block_elements as block_elements
from deltamerge.tensors.tiles import row_length as row_length
