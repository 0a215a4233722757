"""dm.Switch: every delta in any order, bit for bit, and the base again; what cannot be is refused before a write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint

import deltamerge as dm
from deltamerge.apps.chain.live import Write
from deltamerge.cli import main
from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import CODES

DTYPES = [getattr(torch, name) for name in CODES]
SHAPES = {"scalar": (), "empty": (0, 3), "row": (130,), "wide": (33, 67), "kept": (4, 5)}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
Tensors = dict[str, torch.Tensor]


def drawn(dtype: torch.dtype, shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Random bits: NaN, infinities, both zeros."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = generator.integers(0, 2 if dtype == torch.bool else 256, (int(np.prod(shape)), width), np.uint8)
    return torch.from_numpy(raw).reshape(-1).view(dtype).reshape(shape)


def tuned(base: Tensors, share: float, generator: np.random.Generator) -> Tensors:
    """A share of the entries drawn anew."""
    found = {}
    for name, tensor in base.items():
        where = torch.from_numpy(np.asarray(generator.random(tuple(tensor.shape)) < share * (name[:4] != "kept")))
        new = drawn(tensor.dtype, tuple(tensor.shape), generator)
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        found[name] = torch.where(where, new.view(width), tensor.view(width)).view(tensor.dtype)
    return found


def bits(state: Tensors) -> dict[str, bytes]:
    return {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in state.items()}


def extract(*words: object) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["extract", *map(str, words), "--workers", "1", "-q", "--allow-nonfinite"])
    assert not leaving.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; few (sparse), many (whole tensors) and close (steps), and their deltas in store/; a chain of two; sum."""
    folder, generator = tmp_path_factory.mktemp("switch"), np.random.default_rng(0)
    base = {f"{n}.{d}": drawn(d, s, generator) for d in DTYPES for n, s in SHAPES.items()}
    base |= {f"near.{d}": torch.randn(64, 70).to(d) for d in FLOATS}
    make_checkpoint(folder / "base", base)
    steps = {n: t * (1 + torch.from_numpy(generator.random(tuple(t.shape)) < 0.02).to(t.dtype) / 64).to(t.dtype)
             for n, t in base.items() if n.startswith("near")}  # fmt: skip
    models = {"few": tuned(base, 0.05, generator), "many": tuned(base, 0.6, generator), "close": base | steps}
    for name, state in models.items():
        make_checkpoint(folder / name, state)
    extract(*(folder / name for name in models), "--base", folder / "base", "--out", folder / "store")
    extract(folder / "few", folder / "base", "--out", folder / "chain" / "1")
    extract(folder / "many", folder / "base", "--out", folder / "chain" / "2", "--after", folder / "chain" / "1")
    make_checkpoint(folder / "floats", {n: base[n] for n in steps})
    make_checkpoint(folder / "moved", {n: steps[n] for n in steps})
    extract(folder / "moved", folder / "floats", "--density", "0.01", "--values", "sign", "--out", folder / "sum")
    return folder


def test_every_dtype_comes_and_goes_exactly(made: Path) -> None:
    state = load_tensors(made / "base")
    base, addresses = bits(state), [t.data_ptr() for t in state.values()]
    turned = {name: state[name].t() for name in state if name.startswith("wide")}  # not contiguous
    state |= {name: tensor.contiguous().t() for name, tensor in turned.items()}
    addresses = [t.data_ptr() for t in state.values()]
    wanted = {f"store/{name}": bits(load_tensors(made / name)) for name in ("few", "many", "close")}
    wanted |= {"chain/1": wanted["store/few"], "chain": wanted["store/many"], "chain/2": wanted["store/many"]}
    switch = dm.Switch(state, keep=2)
    for name in [*wanted, "store/few", "store/few", "store/many", "chain/1"]:
        switch.to(made / name)
        assert (switch.at, bits(state)) == (made / name, wanted[name]), name
    switch.to(dm.load_delta(made / "store" / "close"))
    assert bits(state) == wanted["store/close"]
    switch.to(None)
    assert (switch.at, bits(state), [t.data_ptr() for t in state.values()]) == (None, base, addresses)


def test_a_module_and_values_to_add(made: Path, tmp_path: Path) -> None:
    tensors = load_tensors(made / "floats")
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor.clone()))
    base = bits(tensors)
    with pytest.raises(InputError, match=r"sum: near.* is not there, the delta was made from"):
        dm.Switch(module).to(made / "sum")
    state = {name: module.state_dict()[name.replace(".", "_")] for name in tensors}
    switch = dm.Switch(state)
    switch.to(made / "sum")
    with pytest.raises(SystemExit):
        main(["apply", str(made / "sum"), "--base", str(made / "floats"), "--out", str(tmp_path / "x"), "-q"])
    assert bits(state) == bits(load_tensors(tmp_path / "x")) != base
    switch.to(None)
    assert bits({name: module.state_dict()[name.replace(".", "_")] for name in tensors}) == base
    for wrong in (3, [tensors]):
        with pytest.raises(InputError, match="a module or a state dict"):
            dm.Switch(wrong)


def refusals(made: Path, tmp_path: Path) -> list[tuple[Path, Callable[[Tensors], Any], str]]:
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "store" / "few", damaged)
    file = damaged / "delta.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    few, row, kept = made / "store" / "few", "row.torch.bfloat16", "kept.torch.int32"
    return [
        (few, lambda s: s[row].view(torch.int16).bitwise_xor_(1), "the base's tensor is not the one"),
        (few, lambda s: s[kept].add_(1), "the base's tensor is not the one"),
        (few, lambda s: s.pop(row), f"{row} is not there"),
        (few, lambda s: s.update({row: s[row].float()}), f"{row} is F32 .*made from BF16"),
        (few, lambda s: s.update({row: s[row][:1].expand(130)}), "shares memory|not the one"),
        (damaged, lambda s: None, "damaged|not the tensor this delta was made for"),
        (made / "store" / "none", lambda s: None, "none: is not there"),
        (made / "base", lambda s: None, "base: has no delta.json"),
        (made / "store", lambda s: None, "3 ends"),
    ]


@pytest.mark.parametrize("case", range(9))
def test_what_does_not_fit_is_refused_before_a_write(made: Path, tmp_path: Path, case: int) -> None:
    delta, spoil, message = refusals(made, tmp_path)[case]
    state = load_tensors(made / "base")
    spoil(state)
    before, switch = bits(state), dm.Switch(state)
    for _ in range(2):
        with pytest.raises(InputError, match=message) as refusal:
            switch.to(delta)
        assert refusal.value.hint
        assert (switch.at, bits(state)) == (None, before)


@pytest.mark.parametrize("at", [None, "few"])
def test_any_failure_leaves_what_was_there(made: Path, monkeypatch: pytest.MonkeyPatch, at: str | None) -> None:
    state = load_tensors(made / "base")
    switch, held = dm.Switch(state, keep=1), None if at is None else made / "store" / at
    switch.to(held)
    before = bits(state)
    with pytest.raises(InputError):
        switch.to(made / "store" / "none")
    assert (switch.at, bits(state)) == (held, before)
    put, left = Write.put, [0]

    def failing(write: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            write.line.view(-1)[:3] = 1 if write.where is None else write.line.view(-1)[:3]
            raise KeyboardInterrupt
        put(write)

    monkeypatch.setattr(Write, "put", failing)
    for after in (1, 2, 9, 40):
        left[0] = after
        with pytest.raises(KeyboardInterrupt):
            switch.to(made / "store" / "many")
        assert (switch.at, bits(state)) == (held, before)
    if held is not None:
        left[0] = 3
        with pytest.raises(KeyboardInterrupt):
            switch.to(None)
        assert (switch.at, bits(state)) == (held, before)
    left[0] = 0
    switch.to(made / "store" / "many")
    assert bits(state) == bits(load_tensors(made / "many"))


def test_a_tensor_that_would_be_another_object_is_refused(tmp_path: Path) -> None:
    base = {"a": torch.ones(3, 4), "b": torch.ones(2)}
    make_checkpoint(tmp_path / "base", base)
    others = {"cast": base | {"a": base["a"].half()}, "new": base | {"c": torch.ones(2)}, "less": {"a": base["a"]}}
    for name, state in others.items():
        make_checkpoint(tmp_path / name, state)
        extract(tmp_path / name, tmp_path / "base", "--out", tmp_path / f"{name}-delta")
        with pytest.raises(InputError, match=r"a becomes F16|c is new|b is dropped") as refusal:
            dm.Switch(base).to(tmp_path / f"{name}-delta")
        assert "apply_" in (refusal.value.hint or "")


def test_a_renamed_fine_tune_with_a_head(tmp_path: Path) -> None:
    base = {"a": torch.randn(9, 4), "b": torch.randn(6)}
    head = torch.randn(2, 4)
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "tuned", {"bert.a": base["a"] + 1, "bert.b": base["b"], "classifier.weight": head})
    extract(tmp_path / "tuned", tmp_path / "base", "--out", tmp_path / "delta")
    with pytest.raises(InputError, match=r"classifier.weight is new, F32 \[2, 4\]"):
        dm.Switch(base).to(tmp_path / "delta")
    blank = torch.zeros(2, 4)
    for prefix in ("", "bert."):
        state = {prefix + name: tensor.clone() for name, tensor in base.items()} | {"classifier.weight": blank.clone()}
        switch = dm.Switch(state)
        switch.to(tmp_path / "delta")
        assert torch.equal(state[prefix + "a"], base["a"] + 1)
        assert torch.equal(state["classifier.weight"], head)
        switch.to(None)
        assert torch.equal(state[prefix + "a"], base["a"])
        assert torch.equal(state["classifier.weight"], blank)


def test_a_delta_that_was_replaced_is_read_anew(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "store" / "few", tmp_path / "now")
    state = load_tensors(made / "base")
    switch = dm.Switch(state)
    switch.to(tmp_path / "now")
    shutil.rmtree(tmp_path / "now")
    shutil.copytree(made / "store" / "close", tmp_path / "now")
    switch.to(tmp_path / "now")
    assert bits(state) == bits(load_tensors(made / "close"))
