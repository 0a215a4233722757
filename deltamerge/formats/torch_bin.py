"""Headers of torch's own files (`pytorch_model.bin`), read without torch and without unpickling.

torch.save writes a pickle that names tensors, and their storages as plain bytes: in a zip archive (torch 1.6 and
later; members are stored, not compressed) or behind the pickle (before). The pickle is read by `formats.pickle_reader`,
which knows the operations that a table of tensors needs and can call nothing; bytes are then read from the file, range
by range, as of a safetensors file. What torch.load(weights_only=True) reads differently is refused here by name:
tensors that are not contiguous, quantised or sparse tensors, classes.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import refuse_link
from deltamerge.formats.pickle_reader import PickledTensor, Storage, read_pickle
from deltamerge.formats.safetensors import LARGEST, MAX_DIMENSIONS, MAX_HEADER, MAX_TENSORS, Header
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
"""Of each storage, by its key: the offset of its first byte in the file, and its bytes."""


def read_torch_header(path: Path) -> Header:
    """The tensors of the file at `path`, a table of tensors by name as torch.save writes it; errors name the file.

    Of several names for the same tensor the embedding's is kept, else the first, as in transformers' safetensors.
    InputError: unreadable, a link that leaves its folder, no such file of torch, or one that holds anything else.
    """
    refuse_link(path)
    with errors.context(path.name):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError("is not a regular file")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(8)
                file.seek(0)
                if start == b"version ":
                    raise InputError("is a git-lfs pointer, not the weights", hint="fetch them with `git lfs pull`")
                table, places = _zipped(file, size) if start[:4] == b"PK\x03\x04" else _legacy(file, size)
        except FileNotFoundError as error:
            raise InputError("no such file") from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error
        tensors = _tensors(table, places, path)
        return Header(tensors, {}, 0, size, frozenset(table) - tensors.keys())


def read_torch_tensor(file: BinaryIO, path: Path, begin: int, nbytes: int) -> TensorInfo:
    """The tensor that torch.save wrote by itself at the bytes [begin, begin + nbytes) of the open file at `path`.

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
    """The pickle's table, and the places of storages, of a zip archive."""
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
    """An archive's members by their names. InputError: what torch refuses, or finds another member for."""
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
    """A name as torch's reader of archives compares it: without the case of A to Z."""
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
    """The offset of a member's first byte."""
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
    """The same of a file as torch wrote it before 1.6: pickles one after another, then the storages."""
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
