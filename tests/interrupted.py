"""A merge in several shards, and how it is stopped on its way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import make_checkpoint, tiny_llama

from deltamerge.files.hashes import hash_output
from deltamerge.files.journal import has_work, read_journal
from deltamerge.plan.planner import Plan

RECIPE = """\
base_model: ./base
merge_method: {method}
models:
  - {{model: ./a, parameters: {{weight: 0.5, density: 0.4}}}}
  - {{model: ./b, parameters: {{weight: 0.5, density: 0.4}}}}
output: {{shard_size: {shard}}}
"""


def models(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {f"layers.{i}.w": (200, 300) for i in range(6)}
    shapes |= {"embed.w": (70, 300), "head.w": (40, 300), "empty": (0, 3)}
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    for name in ("base", "a", "b"):
        noise = 0.0 if name == "base" else 1e-2
        tune = {n: t + noise * torch.randn(t.shape, generator=generator).to(dtype) for n, t in base.items()}
        make_checkpoint(folder / name, tune | {"ids": torch.arange(9)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop:
    """Stops a run after some bytes, once some of them are saved."""

    def __init__(self, out: Path, after: int, error: BaseException, part: str = "") -> None:
        self.journal = out.parent / f".{out.name}.partial" / f"journal{part}"
        self.after, self.error, self.bytes = after, error, 0
        self.lock = threading.Lock()

    def __call__(self, _: Plan) -> Callable[[int], None]:
        return self.count

    def count(self, nbytes: int) -> None:
        with self.lock:
            self.bytes += nbytes
            if self.bytes < self.after:
                return
        while not has_work(read_journal(self.journal)[0]):
            time.sleep(0.001)
        raise self.error


def calibrated(tmp_path: Path) -> Path:
    base = tiny_llama(tmp_path / "base", seed=0, tokenizer=True)
    tiny_llama(tmp_path / "a", seed=1, base=base, tokenizer=True)
    (tmp_path / "rows.txt").write_text("\n".join(f"w{5 + i % 80} w{6 + i % 70} w{7 + i % 60}" for i in range(30)))
    path = tmp_path / "r.yaml"
    path.write_text(
        "base_model: ./base\nmodels:\n  - {model: ./a, prune: {method: dare, density: 0.5, q: output_change}}\n"
        "calibration: {data: rows.txt, sequences: 8, length: 8}\noutput: {shard_size: 20KB}\n"
    )
    return path


def earlier(target: Path) -> None:
    """What an earlier run has made."""
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    lock(target)


def lock(folder: Path) -> dict[str, dict[str, str | int]]:
    """Give `folder` the lock that a run leaves; what it lists."""
    found = sorted(path for path in folder.iterdir() if path.name != "recipe.lock")
    outputs: dict[str, dict[str, str | int]] = {
        path.name: {"hash": hash_output(path), "size": path.stat().st_size} for path in found
    }
    (folder / "recipe.lock").write_text(yaml.safe_dump({"format": 1, "outputs": outputs}))
    return outputs


def killed(work: Callable[[], object], after: int, calls: Sequence[str], *others: tuple[Any, str]) -> bool:
    """Whether a process that does `work` was killed before its call number `after`: of the functions `calls` of os, and
    of `others` (module, name)."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(after))

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def made(*arguments: Any, **named: Any) -> Any:
                if next(left, None) is None:
                    os._exit(9)
                return call(*arguments, **named)

            return made

        for module, name in [*((os, name) for name in calls), *others]:
            setattr(module, name, dying(getattr(module, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
