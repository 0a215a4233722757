"""slime's directories of weight versions, read and written: `weight_v000001/`, `weight_v000002/`, … over a base.

Defined by THUDM/slime at 624b824 (update_weight_from_disk_delta.py, disk_delta.py write them;
docker/patch/latest/sglang-pull_weights.patch has SGLang read them). A version is a checkpoint's folder. Either its
weights are plain: it stands for itself. Or `metadata` of model.safetensors.index.json has

    version, base_version    numbers as text, "000002"; 0 is the base
    delta_encoding           "xor" or "overwrite": as in `diffs`
    compression_format       "zstd", of each tensor by itself
    checksum_format          "xxh3-128", "blake3" or "adler32": hex, of the new tensor's bytes, by name in
                             `__metadata__` of the file that has the tensor

No dtype or shape is stored: they are the base's. A version is there once every file of its index is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import writing
from deltamerge.files.strict_json import read_json
from deltamerge.formats.safetensors import read_header
from deltamerge.formats.weight_files import INDEX, read_index
from deltamerge.models.chain.dialect import Dialect, ForeignVersion
from deltamerge.models.chain.diffs import Diff, DiffFile

KEYS = ("version", "base_version", "delta_encoding", "compression_format", "checksum_format")
CHECKED = ("xxh3-128", "blake3", "adler32")
STATE = "deltamerge_state"


class Slime(Dialect):
    """slime's layout."""

    name = "slime"
    pattern = re.compile(r"weight_v(\d{6,12})")
    index = INDEX
    encodings = ("xor", "overwrite")

    def title(self, number: int) -> str:
        return f"weight_v{number:06d}"

    def is_complete(self, path: Path) -> bool:
        """Return whether all files that a version's index names are there; slime renames each into place."""
        if not (path / INDEX).is_file():
            return (path / "model.safetensors").is_file()
        return all((path / file).is_file() for file in {*read_index(path / INDEX, empty=True).values()})

    def open(self, path: Path) -> ForeignVersion:
        with errors.context(str(path)):
            if not self.is_complete(path):
                raise InputError(
                    "is not whole: a file that its index names is missing", hint="wait until it is written"
                )
            said = read_json(path / INDEX).get("metadata") if (path / INDEX).is_file() else None
            if not isinstance(said, dict) or "delta_encoding" not in said:
                return ForeignVersion(path, None)
            with errors.context(INDEX):
                values = {key: said.get(key) for key in KEYS}
                if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
                    raise InputError(f"metadata.{wrong[0]} is missing, or no text")
                for key, known in {
                    "delta_encoding": self.encodings, "compression_format": ("zstd",), "checksum_format": CHECKED
                }.items():  # fmt: skip
                    if values[key] not in known:
                        raise InputError(f"{key} is {str(values[key])[:40]!r}, known: {', '.join(known)}")
                numbers = [int(str(values[key])) if str(values[key]).isdigit() else -1 for key in KEYS[:2]]
                if numbers[0] != self.number(path) or not 0 <= numbers[1] < numbers[0]:
                    raise InputError(
                        f"is version {values['version']} after {values['base_version']}, in {path.name}",
                        hint="the version was renamed, or put in from elsewhere",
                    )
                weight_map = read_index(path / INDEX, empty=True)
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
            return ForeignVersion(path, diffs, numbers[1], said.get(STATE))

    def payload(self) -> str:
        return "model-00000-of-00001.safetensors"

    def finish(self, file: DiffFile, number: int, encoding: str, algorithm: str, notes: Mapping[str, str]) -> int:
        said = {
            "version": f"{number:06d}",
            "base_version": f"{number - 1:06d}",
            "delta_encoding": encoding,
            "compression_format": "zstd",
            "checksum_format": algorithm,
            **notes,
        }
        size = file.finish({tensor.name: tensor.checksum for tensor in file.tensors})
        weight_map = {tensor.name: file.path.name for tensor in file.tensors}
        text = json.dumps({"metadata": said, "weight_map": weight_map}).encode()
        with writing(file.path.parent):
            (file.path.parent / INDEX).write_bytes(text)
        return size + len(text)


SLIME = Slime()
