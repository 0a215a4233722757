"""The names of `engine.tiles`, for packages of methods that import them from here."""

from deltamerge.engine.tiles import Kept as Kept
from deltamerge.engine.tiles import Make as Make
from deltamerge.engine.tiles import Patched as Patched
from deltamerge.engine.tiles import Tile as Tile
from deltamerge.engine.tiles import Whole as Whole
from deltamerge.engine.tiles import block_elements as block_elements
from deltamerge.engine.tiles import row_length as row_length
