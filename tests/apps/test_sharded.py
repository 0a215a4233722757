"""Shards' changes, written without gathering: the bytes of a gathered write. By torchrun, on gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_training
import torch
from conftest import make_checkpoint
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import deltamerge as dm
from deltamerge.apps.train.sharded import ShardedDeltaWriter, places_of
from deltamerge.errors import InputError, OutputError
from deltamerge.models.chain.folder import names

TESTS = Path(__file__).parents[1]


def prepare(folder: Path) -> None:
    state = {
        n: t.detach().bfloat16() if t.is_floating_point() else t
        for n, t in sharded_training.made().state_dict().items()
    }
    make_checkpoint(folder / "base", state)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize(("how", "processes"), [("fsdp", 2), ("fsdp", 4), ("tensor", 2), ("both", 4)])
def test_the_bytes_are_those_of_a_gathered_write(tmp_path: Path, how: str, processes: int) -> None:
    prepare(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(TESTS / "apps" / "sharded_training.py"), str(tmp_path), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for steps in ("2", "1"):  # the second run goes on
        if steps == "1":
            command[-1] = how
        done = subprocess.run([*command, steps], env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        assert files(tmp_path / "sharded") == files(tmp_path / "gathered")
        assert not [p for p in (tmp_path / "sharded").iterdir() if p.name.startswith(".") and p.is_dir()]
    assert len(names(tmp_path / "sharded")) == (5 if how == "fsdp" else 3)


@pytest.fixture
def alone(tmp_path: Path) -> object:
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_process_writes_what_a_plain_writer_does(tmp_path: Path, alone: object) -> None:
    prepare(tmp_path)
    model = sharded_training.sharded("fsdp")
    assert isinstance(model.first.weight, DTensor)
    plain = dm.DeltaWriter(tmp_path / "gathered", base=tmp_path / "base")
    with ShardedDeltaWriter(tmp_path / "sharded", model, base=tmp_path / "base") as writer, plain:
        for step in (3, 5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.view(-1)[::step] *= 1.01
            assert writer.write(step=step).result().path.name == f"{step:06d}"
            plain.write(sharded_training.full(model), step=step)
        with pytest.raises(OutputError, match="another process is adding"):
            ShardedDeltaWriter(tmp_path / "sharded", model, base=tmp_path / "base")
    assert files(tmp_path / "sharded") == files(tmp_path / "gathered")
    with pytest.raises(InputError, match="the model has no seen"):
        ShardedDeltaWriter(tmp_path / "sharded", torch.nn.Linear(7, 10), base=tmp_path / "base")


def test_places_of_a_shard(alone: object) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    whole = torch.arange(12).view(3, 4)
    for placement in (Shard(0), Shard(1), Replicate()):
        places = places_of(distribute_tensor(whole, mesh, [placement]), 0)
        assert places is not None
        assert [place.tolist() for place in places] == [[0, 1, 2], [0, 1, 2, 3]]
    assert places_of(whole, 1) is None  # the same everywhere: the first process writes it
    partial = DTensor.from_local(whole.float(), mesh, [torch.distributed.tensor.Partial()])
    with pytest.raises(InputError, match="is placed as P"):
        places_of(partial, 0)
