"""Headers of torch's own files (`pytorch_model.bin`), read without torch and without unpickling.

torch.save writes a pickle that names tensors, and their storages as plain bytes: in a zip archive (torch 1.6 and
later; members are stored, not compressed) or behind the pickle (before). Bytes are read from the file, range by range,
as from a safetensors file. Contents that torch.load(weights_only=True) would read differently are refused by name:
tensors that are not contiguous, quantised or sparse tensors, classes.

Python's unpickler runs code from a file. The `Machine` here knows some thirty operations that build tables, lists,
texts and numbers, and four names of functions: torch's _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter, and
OrderedDict. For these it records a tensor's storage, shape and strides instead of calling anything. Every other name
and operation is refused. It accepts only what torch.load(weights_only=True) accepts too.
Operations: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.safetensors import LARGEST, MAX_DIMENSIONS, MAX_HEADER, MAX_TENSORS, Header, opened_weights
from deltamerge.tensors.dtypes import DTYPES, ITEMSIZE
from deltamerge.tensors.names import TOKEN_EMBEDDING
from deltamerge.tensors.tensor import TensorInfo, stored

MAGIC = 0x1950A86A20F9469CFC6C  # of files before torch 1.6
PROTOCOL = 1001
LOCAL_HEADER = 30  # bytes, before the name and the extra field of a zip's member
FOLDER = 0x10  # of a zip member's attributes
END, END_BYTES, MEMBER = b"PK\x05\x06", 22, b"PK\x01\x02"
MAX_MEMBERS, MAX_DIRECTORY = MAX_TENSORS + 1000, 64_000_000
VERSIONS = range(1, 11)  # of an archive, that torch reads
CONVERT = "or convert it: load it with torch where you trust it, and save_file of safetensors.torch"

BY_TORCH = {dtype.torch: code for code, dtype in DTYPES.items() if dtype.torch is not None} | {
    "complex64": "C64", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip

Places = Mapping[str, tuple[int, int]]
"""The offset in the file and the number of bytes of each storage, by its key."""


def read_torch_header(path: Path) -> Header:
    """Return the tensors of the file at `path`, a table of tensors by name as torch.save writes it; errors name the
    file.

    Among several names for the same tensor the embedding's is kept, otherwise the first, as in transformers'
    safetensors. InputError: it is unreadable, a link out of its folder, no file of torch, or holds anything else.
    """
    with opened_weights(path) as (file, size):
        start = file.read(8)
        file.seek(0)
        if start == b"version ":
            raise InputError("is a git-lfs pointer, not the weights", hint="fetch them with `git lfs pull`")
        table, places = _zipped(file, size) if start[:4] == b"PK\x03\x04" else _legacy(file, size)
        tensors = _tensors(table, places, path)
        return Header(tensors, {}, size, frozenset(table) - tensors.keys())


def read_torch_tensor(file: BinaryIO, path: Path, begin: int, nbytes: int) -> TensorInfo:
    """Return the tensor that torch.save wrote by itself at the bytes [begin, begin + nbytes) of the open file at
    `path`.

    InputError: they hold anything else.
    """
    window = _Window(file, begin, nbytes)
    table, places = _zipped(window, nbytes)
    if not isinstance(table, PickledTensor):
        raise InputError("is no single tensor")
    info = _tensor("tensor", table, places, path)
    return replace(info, tensor=stored(info.path, begin + info.begin, info.shape, info.dtype, info.name))


class _Window(io.RawIOBase, BinaryIO):
    """A range of an open file's bytes as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, nbytes: int) -> None:
        self.file, self.begin, self.nbytes, self.at = file, begin, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.nbytes}[whence]
        if start + offset < 0:
            raise ValueError("a place before the file")
        self.at = start + offset
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.nbytes - self.at)
        count = left if size is None or size < 0 else min(size, left)
        self.file.seek(self.begin + self.at)
        data = self.file.read(count)
        self.at += len(data)
        return data


def _tensors(table: Any, places: Places, path: Path) -> dict[str, TensorInfo]:
    if not isinstance(table, dict):
        raise InputError("is no table of tensors", hint="save the model's state_dict() alone")
    if len(table) > MAX_TENSORS:
        raise InputError(f"has more than {MAX_TENSORS:,} tensors")
    found: dict[str, TensorInfo] = {}
    known: dict[tuple[str, int, tuple[int, ...], str], str] = {}
    for name, tensor in table.items():
        if not isinstance(name, str) or not (0 < len(name) <= 1000 and name.isprintable()):
            raise InputError(f"{str(name)[:80]!r}: a name must have 1 to 1000 printable characters")
        if not isinstance(tensor, PickledTensor):
            raise InputError(f"{name[:80]} is no tensor", hint="save the model's state_dict() alone")
        with errors.context(name[:80]):
            info = _tensor(name, tensor, places, path)
        key = (tensor.storage.key, info.begin, info.shape, info.dtype)
        twin = known.setdefault(key, name) if info.nbytes else name
        if twin == name:
            found[name] = info
        elif TOKEN_EMBEDDING.search(name) and not TOKEN_EMBEDDING.search(twin):
            del found[twin]
            found[name], known[key] = info, name
    return found


def _tensor(name: str, tensor: PickledTensor, places: Places, path: Path) -> TensorInfo:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    code = BY_TORCH.get(tensor.dtype)
    if code is None:
        raise InputError(f"dtype {tensor.dtype[:40]} is not one of safetensors")
    if len(shape) > MAX_DIMENSIONS or len(shape) != len(strides):
        raise InputError(f"has {len(shape)} dimensions and {len(strides)} strides")
    if not all(0 <= n < LARGEST for n in (*shape, *strides, tensor.offset, storage.nbytes)):
        raise InputError("has sizes that are no natural numbers below 2**63")
    count, expected = math.prod(shape), 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected and count:
            raise InputError(f"is not contiguous: strides {list(strides)} of shape {list(shape)}", hint=CONVERT[3:])
        expected *= size
    item = ITEMSIZE[code]
    if storage.key not in places:
        raise InputError(f"its storage {storage.key[:40]!r} is not in the file")
    begin, there = places[storage.key]
    if storage.nbytes != there:
        raise InputError(f"its storage has {there} bytes, not {storage.nbytes}", hint="download it again")
    if (tensor.offset + count) * item > there:
        raise InputError(f"ends at byte {(tensor.offset + count) * item} of a storage of {there}")
    return TensorInfo(name, stored(path, begin + tensor.offset * item, tuple(shape), code, name))


def _zipped(file: BinaryIO, size: int) -> tuple[Any, Places]:
    """Return the pickle's table, and the places of storages, of a zip archive."""
    _check_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            names = _names(archive.infolist())
            top = f"{next(iter(names), '').partition('/')[0]}/"
            known = {_folded(name): name for name in names}  # torch looks up names without regard to case
            pickle = f"{top}data.pkl"
            if _folded(f"{top}constants.pkl") in known or (pickle not in names and any("/code/" in n for n in names)):
                hint = "save the model's state_dict() alone"
                raise InputError("is TorchScript, a program: no table of tensors", hint=hint)
            if pickle not in names:
                what = f"has no data.pkl in {top[:80]}, where its archive begins: no table of tensors"
                raise InputError(what, hint="save the model's state_dict() alone")
            order = known.get(_folded(f"{top}byteorder"))
            if order is not None and _content(file, names[order], size, 16) != b"little":
                raise InputError("is not in little-endian order")
            version = known.get(_folded(f"{top}.data/version")) or known.get(_folded(f"{top}version"))
            _check_version(b"" if version is None else _content(file, names[version], size, 16))
            text = _content(file, names[pickle], size, MAX_HEADER)
            start = f"{top}data/"
            places = {
                name.removeprefix(start): (_place(file, member, size), member.file_size)
                for name, member in names.items()
                if name.startswith(start)
            }
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, EOFError) as error:
        raise InputError(f"is a damaged zip archive: {str(error)[:80]}", hint="download it again") from error
    return read_pickle(io.BytesIO(text)), places


def _names(members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members by their names. InputError: torch refuses a member, or would find another one."""
    if min((member.header_offset for member in members), default=0):
        raise InputError("has bytes before its zip archive", hint="download it again")
    top = members[0].filename.partition("/")[0] if members else ""
    names: dict[str, zipfile.ZipInfo] = {}
    folded: set[bytes] = set()
    for member in members:
        name = member.filename
        if name != member.orig_filename:
            raise InputError(f"{name[:80]!r}: a name in the archive has a zero byte")
        if "/" not in members[0].filename:
            what = f"has no data.pkl in a folder, but {name[:80]!r} outside of any"
            raise InputError(what, hint="save the model's state_dict() alone")
        if not name.startswith(f"{top}/"):
            what = f"{name[:80]!r} of the archive is not in {top[:80]!r}, the folder of the first"
            raise InputError(what, hint="torch.save writes one folder, and torch.load reads no other")
        if (key := _folded(name)) in folded:
            raise InputError(f"{name[:80]!r}: two members of the archive have one name, as torch compares them")
        folded.add(key)
        names[name] = member
    return names


def _folded(name: str) -> bytes:
    """Return a name as torch's reader of archives compares it: without the case of A to Z."""
    return name.encode("utf-8", "surrogatepass").lower()


def _check_version(text: bytes) -> None:
    """InputError: torch does not read archives of this version."""
    if not text.strip().isdigit() or int(text) not in VERSIONS:
        shown = text.decode("ascii", "replace").strip()
        what = f"its archive has version {shown!r}" if text else "its archive has no version"
        hint = f"torch.save writes one, and torch.load reads {VERSIONS[0]} to {VERSIONS[-1]}"
        raise InputError(what, hint=hint)


def _check_directory(file: BinaryIO, size: int) -> None:
    """InputError: the archive's directory is too large to be read, or not there."""
    file.seek(max(0, size - END_BYTES - (1 << 16)))
    tail = file.read(END_BYTES + (1 << 16))
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < END_BYTES:
        raise InputError("the file is truncated: its zip archive has no end", hint="download it again")
    # 2**32 - 1 where a 64-bit record has the size; zipfile checks both against the file
    stated = int.from_bytes(tail[at + 12 : at + 16], "little")
    wide = tail[max(0, at - 76) : at]
    if stated == 0xFFFFFFFF and (found := wide.find(b"PK\x06\x06")) >= 0:
        stated = int.from_bytes(wide[found + 40 : found + 48], "little")
    if stated > MAX_DIRECTORY:
        raise InputError(f"its zip archive has a directory of {stated:,} bytes, more than {MAX_DIRECTORY:,}")
    file.seek(max(0, size - len(tail) + at - stated - 76))  # the records that may lie between: 76 bytes
    if (members := file.read(stated + 76).count(MEMBER)) > MAX_MEMBERS:
        raise InputError(f"its zip archive has {members:,} members, more than {MAX_MEMBERS:,}")
    file.seek(0)


def _place(file: BinaryIO, member: zipfile.ZipInfo, size: int) -> int:
    """Return the offset of a member's first byte."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
        raise InputError(f"{member.filename[:80]} is compressed or encrypted, which torch never writes")
    if member.is_dir() or member.external_attr & FOLDER:  # torch would take it for empty
        raise InputError(f"{member.filename[:80]} is a folder of the archive, not data")
    file.seek(member.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise InputError(f"{member.filename[:80]} is not where the archive says", hint="download it again")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = member.header_offset + LOCAL_HEADER + lengths
    if begin + member.file_size > size:
        raise InputError(f"the file is truncated: {member.filename[:80]} ends at {begin + member.file_size} of {size}")
    return begin


def _content(file: BinaryIO, member: zipfile.ZipInfo, size: int, most: int) -> bytes:
    begin = _place(file, member, size)
    if member.file_size > most:
        raise InputError(f"{member.filename[:80]} has {member.file_size:,} bytes, more than {most:,}")
    file.seek(begin)
    return file.read(member.file_size)


def _legacy(file: BinaryIO, size: int) -> tuple[Any, Places]:
    """Return the same of a file as torch wrote it before 1.6: pickles one after another, then the storages."""
    try:
        magic = read_pickle(file)
    except InputError as error:
        hint = f"name a file that torch.save wrote, {CONVERT}"
        raise InputError("is no file of torch.save", hint=hint) from error
    if magic != MAGIC or read_pickle(file) != PROTOCOL:
        raise InputError("is no file of torch.save that holds a table of tensors", hint=CONVERT[3:])
    system = read_pickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError("is not in little-endian order")
    storages: dict[str, Storage] = {}
    table, keys = read_pickle(file, storages), read_pickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError("has no list of storages")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in storages or key in places:
            raise InputError(f"its storage {key[:40]!r} is unknown, or there twice")
        stated, begin = int.from_bytes(file.read(8), "little"), file.tell()
        nbytes = storages[key].nbytes
        if stated * storages[key].itemsize != nbytes or begin + nbytes > size:
            raise InputError(f"the file is truncated: storage {key[:40]!r} has not {nbytes} bytes")
        places[key] = begin, nbytes
        file.seek(begin + nbytes)
    return table, places


# Pickles.


MAX_TEXT = 10_000  # characters of a name
MAX_STRING = 1_000_000  # bytes of a text
MAX_OPERATIONS = 20_000_000


@dataclass(frozen=True, slots=True)
class Bound:
    """How many of a kind a pickle may have: `FREE`, and one more for every `each` bytes of it that were read so far."""

    each: float
    most: int


# A tensor of torch.save takes 80 to 150 bytes, with 10 entries of the memo and 9 containers (one is its module's
# table). On the stack it takes two places until a thousand are put into their table. A pickle that makes more is
# refused at once, whatever bytes follow.
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
    """Return the value of the next pickle in `file`. Its storages are added to `storages`.

    InputError: it is damaged, or does anything that a table of tensors does not need.
    """
    return run(Machine(file, {} if storages is None else storages))


def run(machine: Machine) -> Any:
    """Return the value of a machine's pickle. InputError: it is damaged, or uses an unknown operation."""
    try:
        return machine.run()
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise InputError("its pickle is damaged or ends early", hint="download it again") from error


class Machine:
    """The stack machine of one pickle. `operations` and `functions` are allowed; `what` names the object in errors."""

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
        """Return the top of the stack, of that kind."""
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
        item = ITEMSIZE[BY_TORCH[dtype]]
        storage = Storage(key, "" if kind.name == "UntypedStorage" else dtype, item, count * item)
        if self.storages.setdefault(key, storage) != storage:
            raise InputError(f"its pickle describes storage {key[:40]!r} in two ways")
        self.push(storage)

    def call(self) -> tuple[PickledName, tuple[Any, ...]]:
        """Pop a call from the stack: an allowed function and its arguments."""
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
                raise InputError("its pickle makes a parameter of an object that is no tensor")
            self.push(arguments[0])
        else:
            self.push(_rebuilt(function.name, arguments))

    def build(self) -> None:
        """The attributes of a table (`_metadata`) are of no use here; no other object has any."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise InputError("its pickle sets attributes of an object that is no table", hint=HINT)


def _rebuilt(function: str, arguments: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks), of v3 also the dtype; a last entry may say more."""
    least = 7 if function == "_rebuild_tensor_v3" else 6
    storage, offset, shape, strides = (*arguments, None, None, None, None)[:4]
    if len(arguments) < least or not isinstance(storage, Storage) or type(offset) is not int:
        raise InputError("its pickle makes a tensor of an object that is no storage")
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
