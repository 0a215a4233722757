"""What a server writes to become another fine-tune of its base: in any order the fine-tune's own bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint
from test_switch import bits, extract, tuned

from deltamerge.delta.chain.served import Served
from deltamerge.errors import InputError

SHAPES = {"x.1": (40, 9), "x.2": (130,), "y": (), "n": (5,)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("served"), np.random.default_rng(1)
    base = {f"{n}.{d}": torch.randn(s).to(d) for n, s in SHAPES.items() for d in (torch.bfloat16, torch.float32)}
    base["whole"] = torch.arange(7)
    make_checkpoint(folder / "base", base)
    for name, share in (("few", 0.05), ("more", 0.07), ("many", 0.9)):
        state = {n: t.nan_to_num() if t.is_floating_point() else t for n, t in tuned(base, share, generator).items()}
        make_checkpoint(folder / name, state | {"n.torch.bfloat16": base["n.torch.bfloat16"]})
    extract(folder / "few", folder / "more", folder / "many", "--base", folder / "base", "--out", folder / "store")
    return folder


@pytest.mark.parametrize("keep", [None, 1])
def test_patches_and_weights_make_the_fine_tune(made: Path, keep: int | None) -> None:
    wanted = {name: bits(load_tensors(made / name)) for name in ("few", "more", "many")} | {
        None: bits(load_tensors(made / "base"))
    }
    served, state, whole = Served(made / "base", keep=keep), load_tensors(made / "base"), load_tensors(made / "base")
    for name in [*itertools.chain(*itertools.permutations(wanted, 2)), "unknown", "few"]:
        if name == "unknown":  # a write has failed amid
            served.at = None
            state = {n: torch.zeros_like(t) for n, t in state.items()}
            continue
        changes = served.changes(None if name is None else made / "store" / name)
        touched = served.touched(changes)
        assert "n.torch.bfloat16" not in touched or served.at is None
        for patch in served.patches(changes):
            where = slice(None) if patch.indices is None else patch.indices.long()
            assert patch.indices is None or len(patch.indices.unique()) == len(patch.indices)
            state[patch.name].view(-1)[where] = patch.values
        whole.update(served.weights(changes, touched))
        served.at = changes
        assert bits(state) == bits(whole) == wanted[name], name


def test_another_base_and_no_base_are_refused(made: Path) -> None:
    served = Served(made / "few")
    with pytest.raises(InputError, match="the base's tensor is not the one"):
        served.changes(made / "store" / "more")
    assert served.at == {}
    with pytest.raises(InputError, match="is a delta"):
        Served(made / "store" / "few")
