"""SkyRL's directories of weight versions, read and written: `delta-00000001/`, `delta-00000002/`, … over a base.

Defined by NovaSky-AI/SkyRL at a956457 (skyrl/backends/skyrl_train/weight_sync/delta_checkpoint.py, delta_payload.py).
manifest.json of a version has its number, `base_version` (0: the base), and for each tensor that changes its name,
dtype (torch's name), shape, sizes, the safetensors file and key of its compressed diff, and the new tensor's checksum:
"xxh3-128", or of old versions "sha256". A diff is an XOR, as in `diffs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import writing
from deltamerge.files.strict_json import read_json
from deltamerge.formats.safetensors import Header, read_header
from deltamerge.models.chain.dialect import Dialect, ForeignVersion
from deltamerge.models.chain.diffs import Diff, DiffFile
from deltamerge.models.chain.folder import NAME
from deltamerge.tensors.dtypes import TORCH_NAMES

MANIFEST = "manifest.json"
STATE = "deltamerge_state"
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class SkyrlEntry(BaseModel):
    """The used fields of a tensor in a manifest."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: str
    uncompressed_num_bytes: Count
    payload_file: str
    payload_key: str
    checksum: str | None = None
    checksum_algorithm: str = "xxh3-128"
    sha256: str | None = None


class SkyrlManifest(BaseModel):
    """The used fields of manifest.json."""

    model_config = ConfigDict(extra="ignore", strict=True)
    version: Count
    base_version: Count
    tensors: Annotated[list[SkyrlEntry], Field(max_length=1_000_000)] = Field(default_factory=list)
    deltamerge_state: str | None = None


class SkyRL(Dialect):
    """SkyRL's layout."""

    name = "skyrl"
    pattern = re.compile(r"delta-(\d{8,12})")
    index = MANIFEST
    encodings = ("xor",)

    def title(self, number: int) -> str:
        return f"delta-{number:08d}"

    def resolve(self, path: Path) -> Path | None:
        found = super().resolve(path)
        return found if found is not None and (found / MANIFEST).is_file() else None

    def is_complete(self, path: Path) -> bool:
        """Return whether a version is whole; SkyRL writes its manifest last."""
        return (path / MANIFEST).is_file()

    def open(self, path: Path) -> ForeignVersion:
        with errors.context(str(path)):
            raw = read_json(path / MANIFEST)
            with errors.context(MANIFEST):
                try:
                    manifest = SkyrlManifest.model_validate(raw)
                except ValidationError as error:
                    first = error.errors(include_url=False, include_input=False)[0]
                    raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
                if manifest.version != self.number(path) or manifest.base_version >= manifest.version:
                    raise InputError(
                        f"is version {manifest.version} after {manifest.base_version}, in {path.name}",
                        hint="the version was renamed, or put in from elsewhere",
                    )
            headers: dict[str, Header] = {}
            diffs = {}
            for entry in manifest.tensors:
                with errors.context(entry.name):
                    algorithm = "sha256" if entry.checksum is None else entry.checksum_algorithm
                    checksum = entry.sha256 if entry.checksum is None else entry.checksum
                    if algorithm not in ("xxh3-128", "sha256") or checksum is None:
                        raise InputError("has no checksum of a known kind", hint="known: xxh3-128, sha256")
                    if not NAME.fullmatch(entry.payload_file):
                        raise InputError(f"payload_file {entry.payload_file[:80]!r} is no name of a file")
                    if entry.payload_file not in headers:
                        headers[entry.payload_file] = read_header(path / entry.payload_file)
                    stored = headers[entry.payload_file].tensors.get(entry.payload_key)
                    if stored is None or stored.dtype != "U8" or len(stored.shape) != 1:
                        raise InputError(f"{entry.payload_file} has no compressed diff of it")
                    if entry.name in diffs:
                        raise InputError("is there twice")
                    diffs[entry.name] = Diff(path.name, stored, "xor", algorithm, checksum)
            return ForeignVersion(path, diffs, manifest.base_version, manifest.deltamerge_state)

    def payload(self) -> str:
        return "delta-rank00000-file000000.safetensors"

    def finish(self, file: DiffFile, number: int, encoding: str, algorithm: str, notes: Mapping[str, str]) -> int:
        sizes, records = file.sizes, list[dict[str, Any]]()
        for tensor in file.tensors:
            if tensor.dtype not in TORCH_NAMES:
                raise InputError(f"{tensor.name} is {tensor.dtype}, which torch does not have")
            records.append(
                {
                    "name": tensor.name,
                    "dtype": TORCH_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "uncompressed_num_bytes": tensor.nbytes,
                    "compressed_num_bytes": sizes[tensor.name],
                    "payload_file": file.path.name,
                    "payload_key": tensor.name,
                    "checksum": tensor.checksum,
                    "checksum_algorithm": algorithm,
                }
            )
        said = {
            "version": number,
            "base_version": number - 1,
            "tensors": records,
            "total_uncompressed_num_bytes": sum(tensor.nbytes for tensor in file.tensors),
            "total_compressed_num_bytes": sum(sizes.values()),
            "payload_files": [file.path.name] if records else [],
            **notes,
        }
        size, text = file.finish({}), json.dumps(said).encode()
        with writing(file.path.parent):
            (file.path.parent / MANIFEST).write_bytes(text)
        return size + len(text)


SKYRL = SkyRL()
