"""A reader of the pickles that torch.save writes of a table of tensors; it calls nothing that a pickle names.

Python's unpickler runs what a file says. This reader knows some thirty operations that build tables, lists, texts and
numbers, and four names of functions, for which it notes a tensor's storage, shape and strides instead of calling
anything: torch's _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter, and OrderedDict. Every other name and
operation is refused. It is narrower than torch.load(weights_only=True), which is the judge of what it accepts.
Operations: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from deltamerge.errors import InputError
from deltamerge.formats.safetensors import MAX_HEADER

MAX_TEXT = 10_000  # characters of a name
MAX_STRING = 1_000_000  # bytes of a text
MAX_OPERATIONS = 20_000_000


@dataclass(frozen=True, slots=True)
class Bound:
    """How many of a kind a pickle may have: `FREE`, and one more for every `each` bytes of it that were read so far."""

    each: float
    most: int


# A tensor of torch.save takes 80 to 150 bytes, and in them 10 entries of the memo and 9 containers, of which one is a
# table (of its module). On the stack it takes two places until a thousand are put into their table. A pickle that makes
# more than that is refused when it does so, whatever bytes follow.
FREE = 20_000
BOUNDS = {
    "operations": Bound(1.5, MAX_OPERATIONS),
    "entries in its memo": Bound(6, 3_000_000),
    "tables, lists and tuples": Bound(5, 3_000_000),
    "tables and lists": Bound(20, 500_000),
    "places on its stack": Bound(16, 500_000),
}
CONTAINERS = frozenset(b"}]()tR\x85\x86\x87\x81")  # operations that make one, or a mark
TABLES = frozenset(b"}]")
EVERY = 1024  # operations between two looks
HINT = "a checkpoint is a table of tensors: torch.save of a model's state_dict()"

# torch's class of a typed storage -> the name of its dtype
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8",
}  # fmt: skip
ITEMSIZE = {"float64": 8, "int64": 8, "complex64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
FUNCTIONS = frozenset({
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class PickledName:
    """A function, class or dtype that a pickle names."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of tensors: `key` names them, `itemsize` is of the elements that `nbytes` was counted in."""

    key: str
    dtype: str
    itemsize: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor of a storage, from element `offset` on; strides count elements. `dtype` is torch's name."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value of the next pickle in `file`; `storages` is told of those that it names.

    InputError: it is damaged, or does anything that a table of tensors does not need.
    """
    return run(Machine(file, {} if storages is None else storages))


def run(machine: Machine) -> Any:
    """The value of a machine's pickle. InputError: it is damaged, or does what the machine does not know."""
    try:
        return machine.run()
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise InputError("its pickle is damaged or ends early", hint="download it again") from error


class Machine:
    """The stack machine of one pickle: `operations` and `functions` are those that it knows, which a `what` needs."""

    operations: Mapping[int, Callable[[Any], None]]
    functions = FUNCTIONS
    bounds: Mapping[str, Bound] = BOUNDS
    what = "table of tensors"
    hint = HINT

    def __init__(self, file: BinaryIO, storages: dict[str, Storage]) -> None:
        self.file, self.storages = file, storages
        self.left = MAX_HEADER
        self.containers = self.tables = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for done in range(MAX_OPERATIONS):
            code = self.read(1)[0]
            if code == ord("."):
                return self.pop()
            operation = self.operations.get(code)
            if operation is None:
                raise InputError(f"its pickle has operation 0x{code:02x}, which a {self.what} has no use for")
            operation(self)
            self.containers += code in CONTAINERS
            self.tables += code in TABLES
            if done % EVERY == 0:
                self.check_size(done)
        raise InputError(f"its pickle has more than {MAX_OPERATIONS:,} operations")

    def check_size(self, operations: int) -> None:
        """InputError: the pickle does or makes more than the bytes read so far can be for."""
        so_far = MAX_HEADER - self.left
        counts = (operations, len(self.memo), self.containers, self.tables, len(self.stack))
        for (what, bound), count in zip(self.bounds.items(), counts, strict=True):
            if count > min(FREE + so_far / bound.each, bound.most):
                raise InputError(f"its pickle has {count:,} {what} in {so_far:,} bytes: no {self.what}", hint=self.hint)

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise InputError(f"its pickle has more than {MAX_HEADER:,} bytes")
        data = self.file.read(count)
        if len(data) < count:
            raise IndexError
        return data

    def number(self, count: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.read(count), "little", signed=signed)

    def line(self) -> str:
        raw = self.file.readline(MAX_TEXT)
        self.left -= len(raw)
        if not raw.endswith(b"\n"):
            raise IndexError
        return raw[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def top(self, kind: type) -> Any:
        """What is on top of the stack, of that kind."""
        if not isinstance(self.stack[-1], kind):
            raise InputError("its pickle is damaged or ends early", hint="download it again")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                found = self.stack[at + 1 :]
                del self.stack[at:]
                return found
        raise IndexError

    def tuple_of(self, count: int) -> None:
        found = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(found)))

    def put(self, key: int) -> None:
        self.memo[key] = self.top(object)

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise IndexError
        self.push(self.memo[key])

    def text(self, width: int) -> None:
        count = self.number(width)
        if count > MAX_STRING:
            raise InputError(f"its pickle has a text of {count:,} bytes, more than {MAX_STRING:,}")
        self.push(self.read(count).decode("utf-8", "surrogatepass"))

    def set_items(self, found: list[Any]) -> None:
        table = self.top(dict)
        for key, value in zip(found[::2], found[1::2], strict=True) if len(found) % 2 == 0 else [(None, None)]:
            if not isinstance(key, str):
                raise InputError(f"its pickle has a table whose keys are no texts but {_kind(key)}", hint=HINT)
            table[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self, found: list[Any]) -> None:
        self.top(list).extend(found)

    def named(self, module: str, name: str) -> None:
        """A name is looked at, never up."""
        dtype = module == "torch" and name in TORCH_DTYPES
        if not (dtype or (module, name) in self.functions or self.is_class(module, name)):
            shown = "".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:120])
            raise InputError(f"its pickle asks for {shown}, which no {self.what} needs", hint=self.hint)
        self.push(PickledName(module, name))

    def is_class(self, module: str, name: str) -> bool:
        return module in ("torch", "torch.storage") and name in STORAGES

    def persistent(self) -> None:
        """("storage", class, key, device, elements), and in old files a view of another storage, always None."""
        found = self.pop()
        if (
            not isinstance(found, tuple)
            or len(found) not in (5, 6)
            or found[0] != "storage"
            or found[5:] != (None,) * (len(found) - 5)
        ):
            raise InputError("its pickle names data that is no storage of a tensor")
        kind, key, count = found[1], found[2], found[4]
        if (
            not isinstance(kind, PickledName)
            or kind.name not in STORAGES
            or not isinstance(key, str)
            or type(count) is not int
        ):
            raise InputError("its pickle names data that is no storage of a tensor")
        dtype = STORAGES[kind.name]
        item = ITEMSIZE.get(dtype, 1)
        storage = Storage(key, "" if kind.name == "UntypedStorage" else dtype, item, count * item)
        if self.storages.setdefault(key, storage) != storage:
            raise InputError(f"its pickle describes storage {key[:40]!r} in two ways")
        self.push(storage)

    def call(self) -> tuple[PickledName, tuple[Any, ...]]:
        """A function that is known, and what it would be called with."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, PickledName) or not isinstance(arguments, tuple):
            raise IndexError
        if (function.module, function.name) not in self.functions:
            raise InputError(f"its pickle calls {function.module}.{function.name}", hint=self.hint)
        return function, arguments

    def reduce(self) -> None:
        """The value of a call that is known, without the call."""
        function, arguments = self.call()
        if function.name == "OrderedDict":
            if arguments:
                raise InputError("its pickle makes a table of a list", hint=HINT)
            self.push({})
        elif function.name == "_rebuild_parameter":
            if not (arguments and isinstance(arguments[0], PickledTensor)):
                raise InputError("its pickle makes a parameter of what is no tensor")
            self.push(arguments[0])
        else:
            self.push(_tensor(function.name, arguments))

    def build(self) -> None:
        """The attributes of a table (`_metadata`) are of no use here; no other object has any."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise InputError("its pickle sets attributes of what is no table", hint=HINT)


def _tensor(function: str, arguments: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks), of v3 also the dtype; a last entry may say more."""
    least = 7 if function == "_rebuild_tensor_v3" else 6
    storage, offset, shape, strides = (*arguments, None, None, None, None)[:4]
    if len(arguments) < least or not isinstance(storage, Storage) or type(offset) is not int:
        raise InputError("its pickle makes a tensor of what is no storage")
    if not all(isinstance(sizes, tuple) and {int}.issuperset(map(type, sizes)) for sizes in (shape, strides)):
        raise InputError("its pickle makes a tensor whose shape or strides are no integers")
    if any(arguments[least:]):
        raise InputError("its pickle makes a tensor with attributes (conjugate or negative)")
    dtype = storage.dtype
    if least == 7:
        named = arguments[6]
        if not isinstance(named, PickledName) or named.name not in TORCH_DTYPES:
            raise InputError("its pickle makes a tensor without a dtype")
        dtype = named.name
    elif not dtype:
        raise InputError("its pickle makes a tensor without a dtype")
    return PickledTensor(storage, dtype, offset, shape, strides)


def _kind(value: Any) -> str:
    return "more than one" if value is None else type(value).__name__.lower()


TORCH_DTYPES = frozenset({
    *STORAGES.values(), "complex128", "complex32", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
    "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
})  # fmt: skip

OPERATIONS: dict[int, Callable[[Any], None]] = {
    0x80: lambda r: _protocol(r.number(1)),
    ord("c"): lambda r: r.named(r.line(), r.line()),
    ord("q"): lambda r: r.put(r.number(1)),
    ord("r"): lambda r: r.put(r.number(4)),
    ord("h"): lambda r: r.get(r.number(1)),
    ord("j"): lambda r: r.get(r.number(4)),
    ord("}"): lambda r: r.push({}),
    ord("]"): lambda r: r.push([]),
    ord(")"): lambda r: r.push(()),
    ord("("): lambda r: r.push(_MARK),
    ord("t"): lambda r: r.push(tuple(r.since_mark())),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    ord("J"): lambda r: r.push(r.number(4, signed=True)),
    ord("K"): lambda r: r.push(r.number(1)),
    ord("M"): lambda r: r.push(r.number(2)),
    0x8A: lambda r: r.push(r.number(r.number(1), signed=True)),
    ord("G"): lambda r: r.push(struct.unpack(">d", r.read(8))[0]),
    ord("N"): lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    ord("X"): lambda r: r.text(4),
    ord("T"): lambda r: r.text(4),  # texts of Python 2
    ord("U"): lambda r: r.text(1),
    ord("s"): Machine.set_item,
    ord("u"): lambda r: r.set_items(r.since_mark()),
    ord("a"): lambda r: r.append([r.pop()]),
    ord("e"): lambda r: r.append(r.since_mark()),
    ord("Q"): Machine.persistent,
    ord("R"): Machine.reduce,
    ord("b"): Machine.build,
}
Machine.operations = OPERATIONS


def _protocol(version: int) -> None:
    if version != 2:
        raise InputError(f"its pickle has protocol {version}: torch.save writes 2, and torch.load takes no other")
