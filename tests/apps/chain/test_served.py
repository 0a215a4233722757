"""What a server writes to become another fine-tune of its base: in any order the fine-tune's own bits."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint
from test_switch import bits, extract, tuned

from deltamerge.apps.serve.fine_tunes import ServedModel
from deltamerge.apps.serve.sglang import EngineSwitch
from deltamerge.errors import InputError, OutputError

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
    served, state, whole = (
        ServedModel(made / "base", keep=keep),
        load_tensors(made / "base"),
        load_tensors(made / "base"),
    )
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
    served = ServedModel(made / "few")
    with pytest.raises(InputError, match="the base's tensor is not the one"):
        served.changes(made / "store" / "more")
    assert served.at == {}
    with pytest.raises(InputError, match="is a delta"):
        ServedModel(made / "store" / "few")


class Engine:
    """Takes weights as sglang.Engine 0.5.23 does: within a session, named tensors, whole; answers with success and a
    message (`entrypoints/engine.py`, `managers/scheduler_components/weight_updater.py`)."""

    def __init__(
        self, weights: dict[str, torch.Tensor], quantization: str | None = None, *, prefixes: bool = False
    ) -> None:
        self.server_args = SimpleNamespace(quantization=quantization, disable_radix_cache=not prefixes)
        self.weights, self.open, self.sent = weights, False, 0
        self.refuses = 0  # updates

    def begin_weight_update(self) -> tuple[bool, str]:
        was_open, self.open = self.open, True
        return not was_open, "a weight-update session is already open"

    def update_weights_from_tensor(
        self, named_tensors: list[tuple[str, torch.Tensor]], load_format: str | None = None, flush_cache: bool = True
    ) -> tuple[bool, str]:
        assert self.open
        assert not flush_cache  # which may fail when the weights are written
        refuses, self.refuses = self.refuses > 0, self.refuses - 1
        for name, tensor in named_tensors[: 1 if refuses else None]:
            self.weights[name].copy_(tensor)
            self.sent += 1
        return not refuses, "no memory is left"

    def end_weight_update(self) -> tuple[bool, str]:
        was_open, self.open = self.open, False
        return was_open, "no weight-update session is open"


def test_an_sglang_engine_is_switched(made: Path) -> None:
    wanted = {made / "store" / n: bits(load_tensors(made / n)) for n in ("few", "many")}
    wanted |= {None: bits(load_tensors(made / "base"))}
    engine = Engine(load_tensors(made / "base"))
    switch = EngineSwitch(engine, made / "base")
    for delta in (*wanted, made / "store" / "few"):
        switch.to(delta)
        assert bits(engine.weights) == wanted[delta], delta
        assert not engine.open
    sent = engine.sent
    with pytest.raises(InputError, match=r"has no delta\.json"):
        switch.to(made / "base")
    assert engine.sent == sent
    engine.refuses = 1
    with pytest.raises(OutputError, match="SGLang: no memory is left"):
        switch.to(made / "store" / "many")
    assert not engine.open
    assert bits(engine.weights) == wanted[made / "store" / "few"]  # what it held is sent again
    engine.refuses = 2
    with pytest.raises(OutputError, match="SGLang: no memory is left"):
        switch.to(None)
    assert not engine.open
    sent, engine.refuses = engine.sent, 0
    switch.to(None)  # every tensor
    assert bits(engine.weights) == wanted[None]
    assert engine.sent == sent + len(engine.weights)
    with pytest.raises(InputError, match="are packed, fp8"):
        EngineSwitch(Engine({}, "fp8"), made / "base")
    with pytest.raises(InputError, match="keeps cached prompts of other weights"):
        EngineSwitch(Engine({}, prefixes=True), made / "base")
