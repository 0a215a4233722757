"""A writer, a reader and a server of a chain, killed at any moment: fifty times each."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from safetensors.torch import save_file
from test_chain import same

import deltamerge as dm
from deltamerge.apps.chain.squash import verify_chain
from deltamerge.models.chain.folder import head, line, names
from deltamerge.models.chain.publish import pin

pytestmark = pytest.mark.slow
KILLS = 50


def child(work: Callable[[], None]) -> int:
    """A process that does `work`; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(1)


def killed(work: Callable[[], None], seen: Callable[[], object], after: float) -> None:
    """Kill a process that does `work`, some seconds after what is `seen` of it has changed."""
    before, end = seen(), time.monotonic() + 20
    pid = child(work)
    while seen() == before and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])  # it had not ended, and so had not failed


def states(seed: int) -> dict[str, torch.Tensor]:
    """The weights of a step, the same whoever computes them."""
    generator = torch.Generator().manual_seed(seed % 7)
    base = torch.randn(200, 300, generator=torch.Generator().manual_seed(99)).bfloat16()
    at = torch.randint(0, base.numel(), (900,), generator=generator)
    base.view(-1)[at] += 0.01 * (seed % 5)
    return {"w": base, "n": torch.tensor([seed])}


def listed(chain: Path) -> list[str]:
    return names(chain) if chain.exists() else []


def write_on(folder: Path) -> None:
    with dm.DeltaWriter(folder / "chain", base=folder / "base") as writer:
        number = 0 if writer.last is None else int(writer.last)
        while True:
            number += 1
            writer.write(states(number), step=number)


def test_a_killed_writer_leaves_a_chain(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", states(0))
    draw, most = random.Random(0), 0
    for _ in range(KILLS):
        killed(lambda: write_on(tmp_path), lambda: listed(tmp_path / "chain"), 0.1 * draw.random())
        newest = head(tmp_path / "chain")
        assert int(newest) >= most  # what was published stays
        most = int(newest)
        state = load_tensors(tmp_path / "base")
        dm.load_delta(tmp_path / "chain").apply_(state)
        assert same(state, states(most))
    assert most >= KILLS // 2
    verify_chain(tmp_path / "chain", str(tmp_path / "base"), 1)
    with dm.DeltaWriter(tmp_path / "chain", base=tmp_path / "base") as writer:
        writer.write(states(most + 1)).result()
    assert not [p for p in (tmp_path / "chain").iterdir() if p.name.startswith(".") and p.is_dir()]
    assert len(line(tmp_path / "chain" / head(tmp_path / "chain"))) == most + 1


def read_on(folder: Path) -> None:
    """Apply versions as they come, from where the last reader was; say which are done, and what comes out is kept."""
    begun = (folder / "served" / "model.safetensors").exists()
    state = load_tensors(folder / ("served" if begun else "base"))
    for version in dm.follow(folder / "chain", poll=0.001, marker=folder / "marker"):
        version.apply_(state)
        assert same(state, states(int(version.name)))
        (folder / "served").mkdir(exist_ok=True)
        save_file(state, folder / "served" / "new")
        os.replace(folder / "served" / "new", folder / "served" / "model.safetensors")


def test_a_killed_reader_goes_on(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", states(0))
    writer, draw = child(lambda: write_on(tmp_path)), random.Random(1)
    seen, marker = set(), tmp_path / "marker"
    try:
        for _ in range(KILLS):
            killed(lambda: read_on(tmp_path), lambda: marker.exists() and marker.read_text(), 0.05 * draw.random())
            seen.add(marker.read_text())
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert len(seen) > 10
    state = load_tensors(tmp_path / "base")
    for version in dm.follow(tmp_path / "chain", timeout=0):
        version.apply_(state)
    assert same(state, states(int(head(tmp_path / "chain"))))


def shared(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in memory that outlives a process."""
    return {
        name: torch.from_file(str(folder / name), shared=True, size=one.numel(), dtype=one.dtype).view(one.shape)
        for name, one in states(0).items()
    }


def serve_on(folder: Path) -> None:
    weights = shared(folder)
    for version in dm.follow(folder / "chain", poll=0.001, marker=folder / "marker"):
        version.apply_(weights, base=folder / "base")


def test_a_killed_server_goes_to_the_pinned_version(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", states(0))
    for name, tensor in states(0).items():
        (tmp_path / name).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    with dm.DeltaWriter(tmp_path / "chain", base=tmp_path / "base") as writer:
        for number in range(1, 9):
            writer.write(states(number))
    draw, marker, between = random.Random(2), tmp_path / "marker", 0
    for _ in range(KILLS):
        pin(tmp_path / "chain" / f"{draw.randint(1, 8):06d}")
        killed(lambda: serve_on(tmp_path), lambda: marker.exists() and marker.read_text(), 0.02 * draw.random())
        between += len(marker.read_text().split()) == 2
        wanted = draw.randint(1, 8)
        pin(tmp_path / "chain" / f"{wanted:06d}")
        weights = shared(tmp_path)
        for version in dm.follow(tmp_path / "chain", timeout=0, marker=marker):
            version.apply_(weights, base=tmp_path / "base")
        assert same(weights, states(wanted))
    assert between > KILLS // 10  # it died on its way
