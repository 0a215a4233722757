"""What is fuzzed: bytes from a stranger into a reader, which reads them or refuses them by a DeltamergeError.

test_fuzz.py feeds the targets with hypothesis, fuzz_atheris.py with bytes that coverage guides.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import make_checkpoint
from safetensors.torch import save

from deltamerge import hashes
from deltamerge import lock as locks
from deltamerge.calibrate.rows import read as read_rows
from deltamerge.chain import documents
from deltamerge.errors import DeltamergeError
from deltamerge.io.checkpoint import INDEX, open_checkpoint
from deltamerge.io.delta import DeltaFile
from deltamerge.io.delta_format import Base
from deltamerge.io.delta_tensor import BaseTensor
from deltamerge.io.delta_writer import DeltaWriter
from deltamerge.io.safetensors_file import read_header
from deltamerge.plans import make_plan
from deltamerge.runner import run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TENSORS = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(0, 2)}
BODY = bytes(sum(tensor.nbytes for tensor in TENSORS.values()))
CALIBRATION = {"./a": {"objective": "output_change", "scope": "global", "search": "grid", "chosen": 0.5, "why": "best",
                       "value": 0.1, "plain": {"value": 0.2}, "forward_passes": 3, "sequences": 2, "path": [[1, 2]],
                       "q": {"layers.0.w": 0.5}}}  # fmt: skip
ROWS = {
    "jsonl": b'{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n',
    "csv": b'text,label\n"a, b",1\nc,0\n',
    "txt": "a b\nc é\n".encode(),
}


def make_valid_files(folder: Path) -> None:
    """Valid files of every kind: base, a, a delta, an output with its lock."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(6, 8, generator=generator).bfloat16() for i in range(3)} | {
        "ids": torch.arange(4)
    }
    make_checkpoint(folder / "base", base, shards=2)
    make_checkpoint(folder / "a", {n: t + 1 for n, t in base.items()}, shards=2)
    (folder / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.5}}]\n")
    run(folder / "r.yaml", folder / "out")
    (folder / "delta").mkdir()
    with DeltaWriter(folder / "delta", Base(id="base")) as writer:
        for name, tensor in base.items():
            bits = tensor.reshape(-1).view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int64).numpy()
            code = "BF16" if tensor.dtype == torch.bfloat16 else "I64"
            old = BaseTensor(name, code, tuple(tensor.shape), lambda start, stop, bits=bits: bits[start:stop])
            out = writer.tensor(name, code, tuple(tensor.shape), old)
            new = bits.copy()
            new[::5] += 1
            out.write(0, new)
        writer.finish()


def tolerates(call: Callable[[], Any]) -> None:
    """The call ends well or with an error of ours that prints."""
    try:
        call()
    except DeltamergeError as error:
        said = str(error)
    else:
        return
    assert said


@dataclass(frozen=True)
class Targets:
    """The readers, over copies in `scratch` of the valid files in `place`."""

    place: Path
    scratch: Path

    def fresh(self, name: str) -> Path:
        """A fresh copy of one of the valid folders."""
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        return Path(shutil.copytree(self.place / name, self.scratch / name))

    @cached_property
    def _kept(self) -> dict[str, Path]:
        return {name: self.fresh(name) for name in ("a", "delta", "out")}

    @cached_property
    def _planned(self) -> Any:
        plan = make_plan(self.place / "r.yaml")
        return plan, hashes.describe_inputs(plan, 1)

    def recipe(self, data: bytes) -> None:
        path = self.scratch / "r.yaml"
        path.write_bytes(data)
        tolerates(lambda: documents(path))
        tolerates(lambda: documents(path, mergekit_exact=True))

    def header(self, data: bytes) -> None:
        """A file; or the text of a header, its length put before it and its tensors behind."""
        if data.startswith(b"{"):
            data = len(data).to_bytes(8, "little") + data + BODY
        path = self.scratch / "x.safetensors"
        path.write_bytes(data)
        tolerates(lambda: read_header(path))

    def index(self, data: bytes) -> None:
        (self._kept["a"] / INDEX).write_bytes(data)
        tolerates(lambda: open_checkpoint(self._kept["a"]))

    def delta(self, data: bytes, file: str = "delta.json") -> None:
        """The manifest, and what is stored of the tensors that it describes."""
        folder = self._kept["delta"]
        (folder / file).write_bytes(data)

        def read() -> None:
            delta = DeltaFile.open(folder)
            for entry in delta.entries.values():
                if entry.size < 1 << 16 or entry.index is not None:
                    sum(len(positions) for positions in entry.positions())
            if all(entry.size < 1 << 16 for entry in delta.entries.values()):
                list(delta.patches())

        tolerates(read)
        (folder / file).write_bytes((self.place / "delta" / file).read_bytes())

    def arrays(self, data: bytes) -> None:
        self.delta(data, "delta.safetensors")

    def lock(self, data: bytes) -> None:
        path = self._kept["out"] / locks.LOCK_NAME
        path.write_bytes(data)
        plan, inputs = self._planned
        tolerates(lambda: locks.verify(path.parent, 1))
        tolerates(lambda: locks.check_inputs(locks.read_lock(path), inputs, path))
        tolerates(lambda: locks.locked_calibration(plan, locks.read_lock(path), path))

    def rows(self, data: bytes) -> None:
        """Calibration rows; the first byte is the kind of file."""
        kind = list(ROWS)[data[0] % len(ROWS)] if data else "txt"
        path = self.scratch / f"rows.{kind}"
        path.write_bytes(data[1:])
        label = None if kind == "txt" else "label"
        tolerates(lambda: read_rows(path.name, folder=self.scratch, text="text", label=label))

    def seeds(self, name: str) -> list[bytes]:
        """Valid bytes for the target `name`."""
        lock = yaml.safe_load((self.place / "out" / locks.LOCK_NAME).read_bytes())
        known: dict[str, Callable[[], list[bytes]]] = {
            "recipe": lambda: [path.read_bytes() for path in RECIPES],
            "header": lambda: [save(TENSORS), save(TENSORS)[8 : -len(BODY)]],
            "index": lambda: [(self.place / "a" / INDEX).read_bytes()],
            "delta": lambda: [(self.place / "delta" / "delta.json").read_bytes()],
            "arrays": lambda: [(self.place / "delta" / "delta.safetensors").read_bytes()],
            "lock": lambda: [yaml.safe_dump({**lock, "calibration": CALIBRATION}).encode()],
            "rows": lambda: [bytes([i]) + data for i, data in enumerate(ROWS.values())],
        }
        return known[name]()


NAMES = ("recipe", "header", "index", "delta", "arrays", "lock", "rows")
