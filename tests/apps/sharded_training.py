"""A training run of several processes, for torchrun: `sharded_training.py FOLDER HOW STEPS`.

HOW is fsdp (fully_shard over all), tensor (columns and rows), or both (a mesh of two dimensions). Each process writes
its shards' changes to FOLDER/sharded; the first one writes the gathered weights to FOLDER/gathered.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import deltamerge as dm
from deltamerge.apps.train.sharded import ShardedDeltaWriter
from deltamerge.errors import DeltamergeError


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(10, 24), torch.nn.Linear(24, 10)
        self.norm = torch.nn.LayerNorm(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
        return out


class Model(torch.nn.Module):
    """Odd sizes, and a count that no shard has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = torch.nn.Linear(7, 10), torch.nn.ModuleList(Block() for _ in range(2))
        self.last = torch.nn.Linear(10, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        self.seen += 1
        out: torch.Tensor = self.last(x)
        return out


def made() -> Model:
    torch.manual_seed(0)
    return Model()


def sharded(how: str) -> Model:
    world, model = torch.distributed.get_world_size(), made()
    if how in ("tensor", "both"):
        size = 2 if how == "both" else world
        mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if how == "both":
            for block in model.blocks:
                fully_shard(block, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])
        return model
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(model: Model) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = model.state_dict()
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in state.items()}


def train(folder: Path, how: str, steps: int) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = sharded(how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    gathered = dm.DeltaWriter(folder / "gathered", base=folder / "base") if not rank else None
    with ShardedDeltaWriter(folder / "sharded", model, base=folder / "base") as writer:
        for step in range(1, steps + 1):
            data = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()
            writer.write(step=step)
            state = full(model)  # while the version is written
            if gathered is not None:
                gathered.write(state, step=step)
        writer.flush()
        if how == "fsdp":  # one process fails: no version, and the next one has all
            real, newest = writer._coded, writer.last
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
            if rank == torch.distributed.get_world_size() - 1:
                writer._coded = None  # type: ignore[assignment, method-assign]
            writer.write(step=steps + 1)
            try:
                writer.flush()
                raise AssertionError("nothing failed")
            except (DeltamergeError, TypeError) as error:
                failure = f"{error} {getattr(error, 'hint', '')}"
            if not rank:
                assert "process" in failure, failure
                assert "no version was written" in failure, failure
            assert writer.last == newest
            writer._coded = real  # type: ignore[method-assign]
            writer.write(step=steps + 1)
            state = full(model)
            if gathered is not None:
                gathered.write(state, step=steps + 1)
    if gathered is not None:
        gathered.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
