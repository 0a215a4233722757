"""Statistics of one pass against the same sums in float64 over inputs caught from the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import batches, make

from deltamerge.calibrate.model.blocks import BlockModel, from_reader
from deltamerge.calibrate.q.statistics import collect
from deltamerge.tensors.tiles import Kept


def caught(
    reference: Any, data: list[dict[str, torch.Tensor]], names: dict[str, str]
) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs (N, n) in float64 of every layer, padding left out."""
    modules = dict(reference.named_modules())
    found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in names}
    mask: torch.Tensor | None = None
    for name, state in names.items():

        def note(module: Any, args: Any, name: str = name) -> None:
            x = args[0].double()
            real = mask.bool() if mask is not None and mask.shape == x.shape[:-1] else ...
            found[name].append(x[real].reshape(-1, x.shape[-1]).numpy())

        modules[state.removesuffix(".weight")].register_forward_pre_hook(note)
    with torch.no_grad():
        for inputs in data:
            mask = inputs.get("attention_mask")
            reference(**inputs)
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    "architecture",
    ["BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM", "ViTForImageClassification"],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_float64(architecture: str, sparse: bool, tmp_path: Path) -> None:
    reference, tensors = make(architecture, tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    generator = torch.Generator().manual_seed(2)
    deltas = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in tensors.items()}
    layers = {layer.name: layer for part in model.layers for layer in part}
    head = list(layers)[-1]
    del deltas[head]
    masked = {n: d * (torch.rand(d.shape, generator=generator) < 0.3) for n, d in deltas.items()}

    def draw(name: str) -> torch.Tensor | Kept:
        flat = masked[name].flatten()
        positions = flat.nonzero()[:, 0]
        return Kept(positions, flat[positions]) if sparse else masked[name]

    data = batches(architecture)
    found = collect(model, from_reader(tensors.__getitem__), data, deltas.get, draw=draw)
    assert found.keys() == layers.keys() - {head}
    states = {stored: state for state, stored in model.checkpoint_name.items()}
    truth = caught(reference, data, {name: states[name] for name in found})
    for name, got in found.items():
        x, delta, kept = truth[name], deltas[name].double().numpy(), masked[name].double().numpy()
        if layers[name].transposed:
            delta, kept = delta.T, kept.T
        bias_name = layers[name].bias
        bias = deltas[bias_name].double().numpy() if bias_name else np.zeros(len(delta))
        y, kept_y, c = x @ delta.T, x @ kept.T, delta * x.mean(0)
        close: Any = {"rtol": 2e-4, "atol": 1e-6}
        assert got.cross is not None
        assert got.power is not None
        assert got.tokens == len(x)
        np.testing.assert_allclose(got.norm, np.linalg.norm(x, axis=0), **close)
        np.testing.assert_allclose(got.mean, x.mean(0), **close)
        np.testing.assert_allclose(got.mean_abs, np.abs(x).mean(0), **close)
        np.testing.assert_allclose(got.energy, (y**2).mean(0), **close)
        np.testing.assert_allclose(got.diagonal, delta**2 @ (x**2).mean(0), **close)
        np.testing.assert_allclose(got.c1, c.sum(1) + bias, **close)
        np.testing.assert_allclose(got.c2, (c**2).sum(1) + bias**2, **close)
        np.testing.assert_allclose(got.influence, c.mean(1), **close)
        np.testing.assert_allclose(got.mean_influence, (np.abs(delta) * np.abs(x).mean(0)).mean(), **close)
        np.testing.assert_allclose(got.mean_delta, np.abs(delta).mean(), **close)
        np.testing.assert_allclose(got.cross, (y * kept_y).mean(0), **close)
        np.testing.assert_allclose(got.power, (kept_y**2).mean(0), **close)


def test_without_a_mask_each_block_runs_once(tmp_path: Path) -> None:
    _, tensors = make("BertModel", tmp_path)
    model = BlockModel(transformers.AutoConfig.from_pretrained(tmp_path), tensors)
    asked: list[str] = []

    def delta(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name] * 0.1

    found = collect(model, from_reader(tensors.__getitem__), batches("Bert"), delta)
    assert all(layer.cross is None for layer in found.values())
    assert len(asked) == len(set(asked))
