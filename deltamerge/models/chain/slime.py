"""slime's directories of weight versions, read as a chain: `weight_v000001/`, `weight_v000002/`, … over a base.

Defined by THUDM/slime at 624b824 (update_weight_from_disk_delta.py, disk_delta.py writes them;
docker/patch/latest/sglang-pull_weights.patch reads them). A version is a checkpoint's folder. Either its weights are
plain: it stands for itself. Or `metadata` of model.safetensors.index.json has

    version, base_version    numbers as text, "000002"; 0 is the base
    delta_encoding           "xor": new ^ old, byte by byte; or "overwrite": a count (uint32), so many byte positions
                             (uint32), and so many bytes to put there, little-endian
    compression_format       "zstd", of each tensor by itself
    checksum_format          "xxh3-128", "blake3" or "adler32": hex, of the new tensor's bytes, by name in
                             `__metadata__` of the file that has the tensor

Tensors that are not in the files are as before. No dtype or shape is stored: they are the base's. A version is there
once every file of its index is. To read it Python needs zstd: its own from 3.14 on, else the package zstandard.
"""

from __future__ import annotations

import importlib
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from xxhash import xxh3_128

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.files.strict_json import read_json
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.safetensors import read_header
from deltamerge.formats.weight_files import INDEX, read_index
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint
from deltamerge.tensors.reader import RecentParts
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, unique, view

NAME = re.compile(r"weight_v(\d{6,12})")
KEYS = ("version", "base_version", "delta_encoding", "compression_format", "checksum_format")
CHECKSUMS: dict[str, Callable[[Any], str]] = {
    "xxh3-128": lambda data: xxh3_128(data).hexdigest(),
    "blake3": lambda data: blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
}
ENCODINGS = ("xor", "overwrite")
KEPT = 4  # tensors, whole
MOST = 100_000


@dataclass(frozen=True, slots=True)
class Diff:
    """What a version says of a tensor: where its compressed diff lies, how it is coded, the new tensor's checksum."""

    version: str
    stored: TensorInfo
    encoding: str
    algorithm: str
    checksum: str


@dataclass(frozen=True, slots=True)
class SlimeVersion:
    """An open version: its folder, and the diffs of its tensors by name; None: its weights are plain."""

    path: Path
    diffs: Mapping[str, Diff] | None
    before: int = 0


def resolve(path: Path) -> Path | None:
    """The folder of the version that `path` means, of the newest that is there where it is a folder of them; None where
    it is none of slime's. InputError: it would be in such a folder, which does not have it."""
    if NAME.fullmatch(path.name):
        if path.is_dir():
            return path
        numbers = _numbers(path.parent)
        if numbers:
            listed = [numbers[number] for number in sorted(numbers)]
            raise InputError(f"{path.parent}: has no version {path.name}", hint=f"it has {listed[0]} to {listed[-1]}")
        return None
    numbers = _numbers(path)
    there = [path / numbers[number] for number in sorted(numbers, reverse=True)]
    return next((version for version in there if is_complete(version)), None)


def is_complete(path: Path) -> bool:
    """Whether all files that a version's index names are there; its writer renames each into place."""
    if not (path / INDEX).is_file():
        return (path / "model.safetensors").is_file()
    return all((path / file).is_file() for file in {*read_index(path / INDEX).values()})


def line(path: Path) -> list[SlimeVersion]:
    """The versions from the first over the base, or the last whose weights are plain, to the one in `path`.

    InputError: one is missing or not whole, does not come before the one that names it, or is coded in an unknown way.
    """
    found = [_open(path)]
    while found[-1].diffs is not None and found[-1].before:
        before = path.parent / f"weight_v{found[-1].before:06d}"
        if not before.is_dir():
            raise InputError(f"{path.parent}: has no version {before.name}, which {found[-1].path.name} comes after")
        if found[-1].before >= _number(found[-1].path) or len(found) >= MOST:
            raise InputError(f"{found[-1].path}: comes after {before.name}")
        found.append(_open(before))
    return found[::-1]


def over(path: Path, base: Checkpoint, reference: str) -> Checkpoint:
    """The checkpoint that a version makes of `base`. Each tensor is made whole when it is first read, and checked by
    the checksum of every version. InputError: as `line`; or a tensor that the base lacks."""
    versions = line(path)
    if versions[0].diffs is None:
        base = open_checkpoint(versions[0].path, reference=reference)
        versions = versions[1:]
    diffs: dict[str, list[Diff]] = {}
    for version in versions:
        for name, diff in (version.diffs or {}).items():
            if name not in base.tensors:
                raise InputError(f"{version.path}: has {name}, which the base lacks", hint="is it the base?")
            diffs.setdefault(name, []).append(diff)
    kept = RecentParts(KEPT)
    tensors = {
        name: replace(info, tensor=_patched(info, diffs[name], kept, path / INDEX)) if name in diffs else info
        for name, info in base.tensors.items()
    }
    files = {diff.stored.path for several in diffs.values() for diff in several}
    indexes = {version.path / INDEX for version in versions}
    return replace(base, reference=reference, tensors=tensors, files=(*base.files, *sorted(files | indexes)))


def _open(path: Path) -> SlimeVersion:
    with errors.context(str(path)):
        if not is_complete(path):
            raise InputError("is not whole: a file that its index names is missing", hint="wait until it is written")
        said = read_json(path / INDEX).get("metadata") if (path / INDEX).is_file() else None
        if not isinstance(said, dict) or "delta_encoding" not in said:
            return SlimeVersion(path, None)
        with errors.context(INDEX):
            values = {key: said.get(key) for key in KEYS}
            if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
                raise InputError(f"metadata.{wrong[0]} is missing, or no text")
            for key, known in {
                "delta_encoding": ENCODINGS, "compression_format": ("zstd",), "checksum_format": (*CHECKSUMS,)
            }.items():  # fmt: skip
                if values[key] not in known:
                    raise InputError(f"{key} is {str(values[key])[:40]!r}, known: {', '.join(known)}")
            numbers = [int(str(values[key])) if str(values[key]).isdigit() else -1 for key in KEYS[:2]]
            if numbers[0] != _number(path) or not 0 <= numbers[1] < numbers[0]:
                raise InputError(
                    f"is version {values['version']} after {values['base_version']}, in {path.name}",
                    hint="the version was renamed, or put in from elsewhere",
                )
            weight_map = read_index(path / INDEX)
        diffs = {}
        for file in sorted({*weight_map.values()}):
            header = read_header(path / file)
            for name, info in header.tensors.items():
                with errors.context(file), errors.context(name):
                    if info.dtype != "U8" or len(info.shape) != 1 or name not in header.metadata:
                        raise InputError("is no compressed diff with a checksum")
                diffs[name] = Diff(
                    path.name,
                    info,
                    str(values["delta_encoding"]),
                    str(values["checksum_format"]),
                    header.metadata[name],
                )
        if lost := weight_map.keys() ^ diffs.keys():
            raise InputError(f"{INDEX} and the files do not have the same tensors: {min(lost)}")
        return SlimeVersion(path, diffs, numbers[1])


def _numbers(folder: Path) -> dict[int, str]:
    try:
        return {int(found[1]): one.name for one in folder.iterdir() if (found := NAME.fullmatch(one.name))}
    except OSError:
        return {}


def _number(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _patched(info: TensorInfo, diffs: Sequence[Diff], kept: RecentParts, path: Path) -> Tensor:
    inputs = [info, *(diff.stored for diff in diffs)]
    return unique(diffed, inputs, info.shape, info.dtype, diffs=tuple(diffs), kept=kept, label=info.name, path=path)


@view()
def diffed(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, diffs: tuple[Diff, ...], kept: RecentParts, label: str,
    path: Path,
) -> None:  # fmt: skip
    """Apply the diffs of several versions to the base's tensor, the first input; the others are the stored diffs."""
    whole = kept.get(label, lambda: _made(read, tensor, diffs, label))
    begin = start * (tensor.nbytes // max(1, tensor.size))
    out[:] = flat(whole[begin : begin + len(out)])


def _made(read: Read, tensor: Tensor, diffs: Sequence[Diff], label: str) -> Array:
    made: Array = np.empty(tensor.nbytes, np.uint8)
    read.read_into(tensor.inputs[0], 0, made)
    for diff, source in zip(diffs, tensor.inputs[1:], strict=True):
        with errors.context(str(source.path)), errors.context(label):
            stored = np.empty(source.nbytes, np.uint8)
            read.read_into(source, 0, stored)
            _apply(made, decompressed(stored.tobytes(), _most(diff.encoding, made.size)), diff.encoding)
            if CHECKSUMS[diff.algorithm](flat(made)) != diff.checksum:
                raise InputError(
                    f"the result is not the tensor that {diff.version} has the checksum of",
                    hint="it is another base, or the version is damaged",
                )
    return made


def _most(encoding: str, size: int) -> int:
    return size if encoding == "xor" else 4 + 5 * size


def _apply(made: Array, diff: bytes, encoding: str) -> None:
    """Change a tensor's bytes. InputError: the diff is of another length, or has positions outside of it."""
    if encoding == "xor":
        if len(diff) != made.size:
            raise InputError(f"its diff has {len(diff)} bytes, the tensor {made.size}")
        made ^= np.frombuffer(diff, np.uint8)
        return
    count = int.from_bytes(diff[:4], "little")
    if len(diff) != 4 + 5 * count:
        raise InputError(f"its diff has {len(diff)} bytes, {count} entries take {4 + 5 * count}")
    positions = np.frombuffer(diff, "<u4", count, 4)
    if count and int(positions.max()) >= made.size:
        raise InputError(f"its diff has a position outside of the tensor's {made.size} bytes")
    made[positions] = np.frombuffer(diff, np.uint8, count, 4 + 4 * count)


def decompressed(data: bytes, most: int) -> bytes:
    """A zstd frame's content. InputError: damaged, longer than `most`, or there is nothing to read it with."""
    try:
        found = _reader(data).read(most + 1)
    except InputError:
        raise
    except Exception as error:  # each of the packages has its own
        raise InputError(f"is not a zstd frame: {error}") from error
    if len(found) > most:
        raise InputError(f"its diff has more than {most} bytes")
    return bytes(found)


def _reader(data: bytes) -> Any:
    try:
        return importlib.import_module("compression.zstd").ZstdFile(io.BytesIO(data))
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise InputError(
            "is compressed with zstd, which this Python cannot read", hint="pip install zstandard, or Python 3.14"
        ) from None
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data))
