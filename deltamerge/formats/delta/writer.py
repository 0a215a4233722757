"""Writes a delta artifact: tensors arrive in pieces, in any order, from any thread; sizes are known only at the end.

The stored arrays of a tensor wait in a file of its own. When the last tensor is finished, headers are known and the
files are joined.
"""

from __future__ import annotations

import bz2
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltamerge import errors
from deltamerge.files.descriptors import copy_at, write_at, writing
from deltamerge.files.journal import Journal
from deltamerge.formats.audit import NonFinite
from deltamerge.formats.components import Component
from deltamerge.formats.delta.folder import INDEX, MANIFEST
from deltamerge.formats.delta.manifest import (
    ENCODINGS,
    SHARD_SIZE,
    Base,
    Encoding,
    Manifest,
    Record,
    parts_of,
    version_of,
)
from deltamerge.formats.delta.parts import TABLE
from deltamerge.formats.delta.tensor_writer import BaseTensor, Spool, StoredTensor, Storing, TensorWriter
from deltamerge.formats.delta.values import Values, relative_error
from deltamerge.formats.safetensors import FileLayout, Layout, plan_layout
from deltamerge.tensors.dtypes import ITEMSIZE


@dataclass(frozen=True, slots=True)
class Summary:
    """The written artifact: bytes of its files, number of entries, ‖v − stored v‖ / ‖v‖ over all added values, and
    the counts of the result's values that are not finite; bytes of stored arrays by encoding."""

    nbytes: int
    entries: int
    error: float
    nonfinite: Mapping[str, NonFinite] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)


class ArtifactWriter:
    """Writes `delta.json` and `delta.safetensors` (or shards) into `folder`.

        semantics    "replace": final values; "add": tensors may also have float32 values to add, coded as `values`
        codings      of positions, and steps, to choose from; dense and indices are always allowed
        removed      tensors of the base that the result lacks
        shard_size   of the artifact's own files, and of the checkpoint that is made from it
        components   the folders of the checkpoint that is made from it
        journal      lists the finished tensors, which are kept beside it, so that a run can be resumed after a crash
        kept         states of tensors that other processes have finished in the spool in `folder`

    The bytes depend only on the tensors and on the order of the calls of `tensor`. OutputError: the disk.
    """

    def __init__(
        self,
        folder: Path,
        base: Base,
        *,
        semantics: Literal["replace", "add"] = "replace",
        values: Values = "bfloat16",
        codings: Collection[Encoding] = ENCODINGS,
        shard_size: int = SHARD_SIZE,
        removed: Sequence[str] = (),
        components: Sequence[Component] = (Component(),),
        journal: Journal | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._manifest = Manifest(
            semantics=semantics,
            base=base,
            shard_size=shard_size,
            removed=list(removed),
            components=parts_of(components),
            tensors={},
        )
        self._shard_size = shard_size
        self._tensors: dict[str, TensorWriter] = {}
        self._finished = False
        with errors.context(str(folder)):
            spool = Spool(folder, journal, kept)
        self.storing = Storing(values, frozenset({*codings, "dense", "indices"}), spool)

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the spool, unless there is a journal; the artifact exists only after `finish`."""
        for tensor in self._tensors.values():
            tensor.close()
        self.storing.spool.close(done=self._finished)

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], base: BaseTensor | None) -> TensorWriter:
        """Return the writer of the next tensor of the result; `base` is None if the base has none.

        A base tensor with fewer rows counts as one whose further rows are zero; one of another shape as none.
        """
        if name in self._tensors:
            raise ValueError(f"two tensors have the name {name}")
        path = self.storing.spool.folder / f"{len(self._tensors):06d}"
        self._tensors[name] = TensorWriter(self.storing, name, dtype, shape, base, path)
        return self._tensors[name]

    def finish(self) -> Summary:
        """Write the files, once every tensor is finished. RuntimeError: one is not (a bug)."""
        tensors = self._tensors.values()
        records = {name: tensor.record for name, tensor in self._tensors.items()}
        version = version_of(records.values())
        has_parts = version > 2
        manifest = self._manifest.model_copy(update={"version": version, "tensors": records})
        stored = [array for tensor in tensors for array in tensor.stored]
        if has_parts:
            stored.append(self._table(records))
        lengths: dict[tuple[str, str], int] = {}
        for array in stored:
            lengths[array.name, array.dtype] = lengths.get((array.name, array.dtype), 0) + array.length
        layout = plan_layout([(*kind, (length,)) for kind, length in lengths.items()], self._shard_size)
        with errors.context(str(self._folder)), writing():
            files = [self._write_file(file, layout, stored) for file in layout.files]
            if layout.indexes:
                index = {
                    "metadata": {"total_size": layout.total_size},
                    "weight_map": {name: _renamed(place.file) for name, place in layout.tensors.items()},
                }
                files.append(self._folder / INDEX)
                files[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            files.append(self._folder / MANIFEST)
            files[-1].write_text(_manifest_text(manifest, table=not has_parts), encoding="utf-8")
        self._finished = True
        return Summary(
            sum(file.stat().st_size for file in files),
            sum(tensor.record.count for tensor in tensors),
            relative_error(sum(t.squares[0] for t in tensors), sum(t.squares[1] for t in tensors)),
            {name: tensor.nonfinite for name, tensor in self._tensors.items() if any(tensor.nonfinite)},
            _stored_bytes(tensors),
        )

    def _table(self, records: Mapping[str, Record]) -> StoredTensor:
        """Write the records into the spool: JSON in a bzip2 stream."""
        path = self.storing.spool.folder / "table"
        # zlib's bytes differ by version, bzip2's do not.
        data = bz2.compress(("{" + _records_text(records, ",") + "}").encode(), 9)
        with errors.context(str(self._folder)), writing():
            path.write_bytes(data)
        return StoredTensor(TABLE, "U8", len(data), path, 0)

    def _write_file(self, file: FileLayout, layout: Layout, stored: Sequence[StoredTensor]) -> Path:
        path = self._folder / _renamed(file.name)
        with path.open("xb", buffering=0) as target:
            write_at(target.fileno(), 0, memoryview(file.header))
            done: Counter[str] = Counter()  # of an array that several tensors share
            for array in stored:
                place, nbytes = layout.tensors[array.name], array.length * ITEMSIZE[array.dtype]
                if place.file == file.name and nbytes:
                    at = place.offset + done[array.name]
                    with array.path.open("rb", buffering=0) as source:
                        copy_at(source.fileno(), array.offset, nbytes, target.fileno(), at)
                    done[array.name] += nbytes
        return path


def _stored_bytes(tensors: Iterable[TensorWriter]) -> dict[str, int]:
    """Return the bytes of stored arrays, by the encoding of their tensors."""
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.stored:
            nbytes[tensor.record.encoding] += sum(a.length * ITEMSIZE[a.dtype] for a in tensor.stored)
    return dict(sorted(nbytes.items()))


def _renamed(file: str) -> str:
    return file.replace("model", "delta", 1)


def _manifest_text(manifest: Manifest, *, table: bool) -> str:
    """Return the manifest with a line for each field and tensor, so that artifacts can be compared by line; without
    defaults.

    Without `table` it has no records.
    """
    fields = manifest.model_dump(exclude_defaults=True, exclude={"tensors"})
    fields = {"format": manifest.format, "version": manifest.version} | fields
    lines = [f"{_compact(key)}: {_compact(value)}" for key, value in fields.items()]
    if table:
        lines.append('"tensors": {\n' + _records_text(manifest.tensors, ",\n") + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _records_text(records: Mapping[str, Record], between: str) -> str:
    """Return names and records as JSON, without defaults."""
    dumped = {name: record.model_dump(exclude_defaults=True) for name, record in records.items()}
    colon = ": " if "\n" in between else ":"
    return between.join(f"{_compact(name)}{colon}{_compact(record)}" for name, record in dumped.items())


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
