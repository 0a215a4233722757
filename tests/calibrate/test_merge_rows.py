"""Merges that measure rows of every model's own, beside a plain walk with hooks in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import load_tensors, tiny_llama
from running import make_plan, run

from deltamerge.errors import RecipeError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base and two fine-tunes; each fine-tune's rows use words of its own."""
    folder = tmp_path_factory.mktemp("rows")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
        lines = [" ".join(f"w{4 + 45 * (seed - 1) + (7 * i + 3 * j) % 45}" for j in range(3 + i % 6)) for i in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def recipe(folder: Path, name: str, method: str, more: str = "", parameters: str = "", shared: str = "") -> Path:
    path = folder / f"{name}.yaml"
    own = "{data: %s.jsonl, sequences: 6, length: 12%s}"
    listed = "".join(
        f"  - {{model: ./{m}, parameters: {{weight: {w}}}, calibration: {own % (m, shared)}}}\n" for m, w in WEIGHTS.items()
    )
    path.write_text(
        f"base_model: ./base\nmerge_method: {method}\nmodels:\n{listed}parameters: {{{parameters}}}\n{more}"
    )
    return path


WEIGHTS = {"a": 1.0, "b": 2.0}


def hooked(model: Any, batches: list[dict[str, torch.Tensor]], wanted: Any) -> dict[str, np.ndarray]:
    """E[x xᵀ] over real tokens of the linear layers whose names are wanted."""
    sums: dict[str, np.ndarray] = {}
    count = 0

    def hook(name: str, mask: torch.Tensor) -> Any:
        def see(module: Any, args: Any) -> None:
            x = args[0][mask].double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        return see

    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = [
            module.register_forward_pre_hook(hook(f"{name}.weight", mask))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and wanted(name)
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        count += int(mask.sum())
    return {name: total / count for name, total in sums.items()}


def expected(folder: Path, plan: Any, method: str) -> dict[str, np.ndarray]:
    """The merged tensors, from transformers' own forward of whole models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltamerge.calibrate.split import split

    base = {name: tensor.double() for name, tensor in load_tensors(folder / "base").items()}
    tunes = [{n: t.double() for n, t in load_tensors(folder / name).items()} for name in WEIGHTS]
    weights, deltas = list(WEIGHTS.values()), {n: [(t[n] - b).numpy() for t in tunes] for n, b in base.items()}
    merged = {n: b + torch.from_numpy(sum(w * d for w, d in zip(weights, deltas[n])) / sum(weights)) for n, b in base.items()}
    batches = []
    for name, source in zip(WEIGHTS, plan.sources, strict=True):
        config = json.loads((folder / name / "config.json").read_text())
        search, _ = split(source.calibration, folder, 0, config, labelled=False)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        batches.append([
            tokenizer(row.content, truncation=True, max_length=12, return_tensors="pt", return_token_type_ids=False)
            for row in search
        ])  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    blocks = range(model.config.num_hidden_layers)
    for block in [None] if method == "regmean" else blocks:
        grams = []
        for tune, some in zip(tunes, batches, strict=True):
            mine = f"layers.{block}."
            state = tune if block is None else {n: tune[n] if mine in n else t for n, t in merged.items()}
            model.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
            grams.append(hooked(model, some, lambda name, mine=mine: "layers" in name if block is None else mine in name))
        for name in grams[0]:
            found = reference.regmean(deltas[name], [g[name] for g in grams], weights)
            merged[name] = base[name] + torch.from_numpy(found)
    return {name: tensor.numpy() for name, tensor in merged.items()}


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_regmean_equals_a_plain_walk(models: Path, tmp_path: Path, method: str) -> None:
    path = recipe(models, method, method)
    wanted = expected(models, make_plan(path), method)
    folder = run(path, tmp_path / "out", workers=2).folder
    got = load_tensors(folder)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        error = np.abs(tensor.double().numpy() - wanted[name]).max()
        assert error < 2e-5, (name, error)
    again = run(path, tmp_path / "again", workers=1).folder
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not list((tmp_path).glob(".*"))


def test_rows_are_needed(models: Path) -> None:
    path = recipe(models, "lacking", "regmean")
    path.write_text(path.read_text().replace(", calibration: {data: b.jsonl, sequences: 6, length: 12}", ""))
    with pytest.raises(RecipeError, match="regmean needs rows of every model"):
        make_plan(path)
