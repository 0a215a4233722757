"""Passes that run by themselves from file to file: the bytes of the torch path, and that they are what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint, needs_kernels
from running import run

from deltamerge.engine import backends
from deltamerge.engine.backends import FusedBackend
from deltamerge.errors import OutputError
from deltamerge.methods.prune import select

pytestmark = needs_kernels

# vectors, rows that no block is made of whole, more than one block, more than one piece of a block
SHAPES = [(7,), (100_003,), (300, 333), (3, 5, 7), (2, 70_000), (1, 1)]
TWO = "models: [{model: ./a, parameters: {weight: 0.7}}, {model: ./b, parameters: {weight: 0.4}}]\n"
BASED = "base_model: ./base\n" + TWO
RECIPES = {
    "linear": "merge_method: linear\n" + TWO,
    "linear, no sum of weights": "merge_method: linear\nparameters: {normalize: false}\n" + TWO,
    "task_arithmetic": "merge_method: task_arithmetic\nparameters: {lambda: 0.5, normalize: true}\n" + BASED,
    "dare_linear": "merge_method: dare_linear\nparameters: {density: 0.3}\n" + BASED,
    "dare_linear, sparse": "merge_method: dare_linear\nparameters: {density: 0.01}\n" + BASED,
    "dare_ties, sparse": "merge_method: dare_ties\nparameters: {density: 0.05, normalize: true, lambda: 2}\n" + BASED,
    "one sparse model": "base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.02}}]\n",
    "ties": "merge_method: ties\nparameters: {density: 0.2}\n" + BASED,
    "magnitude": "base_model: ./base\nmodels: [{model: ./a, prune: {method: magnitude, density: 0.3, q: 0.5}}]\n",
    "slerp": "merge_method: slerp\nparameters: {t: 0.3}\nbase_model: ./base\nmodels: [{model: ./a}]\n",
    "model_stock": "merge_method: model_stock\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\n",
    "task_arithmetic, one pruned to nothing": "merge_method: dare_linear\nbase_model: ./base\nmodels: [{model: ./a, "
    "parameters: {density: 0, weight: 0.5}}, {model: ./b, parameters: {weight: 0.4}}]\n",
    "dare of two regimes": "merge_method: dare_ties\nbase_model: ./base\nmodels: [{model: ./a, "
    "parameters: {density: 0.01, weight: 0.5}}, {model: ./b, parameters: {density: 0.5, weight: 0.4}}]\n",
    "linear of three": "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}, "
    "{model: ./b, parameters: {weight: 2}}, {model: ./base, parameters: {weight: -0.5}}]\n",
    "ties of three": "merge_method: ties\nparameters: {density: 0.4, weight: 1, normalize: true}\nbase_model: ./base\n"
    "models: [{model: ./a}, {model: ./b}, {model: ./a, name: c, parameters: {weight: -0.3}}]\n",
    "breadcrumbs": "merge_method: breadcrumbs\nparameters: {density: 0.4, gamma: 0.05}\n" + BASED,
    "breadcrumbs, matched": "merge_method: breadcrumbs_ties\n"
    "parameters: {density: 0.4, gamma: 0.05, rescale: true}\n" + BASED,
    "della": "merge_method: della\nparameters: {density: 0.5, epsilon: 0.2}\n" + BASED,
    "della_linear, not rescaled": "merge_method: della_linear\nparameters: {density: 0.3, rescale: false}\n" + BASED,
    "sce": "merge_method: sce\nparameters: {select_topk: 0.2}\nbase_model: ./base\n"
    "models: [{model: ./a}, {model: ./b}]\n",
    "sce of all": "merge_method: sce\nbase_model: ./base\n"
    "models: [{model: ./a}, {model: ./b}, {model: ./a, name: c}]\n",
    "multislerp": "merge_method: multislerp\n" + BASED,
    "passthrough": "merge_method: passthrough\nmodels: [{model: ./a, parameters: {scale: 0.3}}]\n",
}
for norm in ("l1", "l2", "linf"):
    for name, prune in {"dare, sparse": "dare, density: 0.02", "magnitude": "magnitude, density: 0.3"}.items():
        text = f"base_model: ./base\nmodels: [{{model: ./a, prune: {{method: {prune}, rescale: {norm}}}}}]\n"
        RECIPES[f"{name}, {norm}"] = text
DTYPES = [
    (torch.bfloat16, torch.bfloat16, "bfloat16"),
    (torch.float32, torch.bfloat16, "float32"),
    (torch.float16, torch.float32, "float16"),
    (torch.bfloat16, torch.float16, "float32"),
]


def models(folder: Path, base_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """A base with both zeros; deltas that are multiples of 2**-9, so that many are equal."""
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(shape, generator=generator).to(base_dtype) for i, shape in enumerate(SHAPES)}
    for tensor in base.values():
        tensor.view(-1)[::11] = 0.0
        tensor.view(-1)[::13] = -0.0
    make_checkpoint(folder / "base", base)
    for name in "ab":
        steps = {n: torch.randint(-9, 10, t.shape, generator=generator) * 2.0**-9 for n, t in base.items()}
        make_checkpoint(folder / name, {n: (t.float() + steps[n]).to(dtype) for n, t in base.items()})


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(map(str, d)).replace("torch.", ""))
@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_those_of_torch(
    name: str, dtypes: tuple[torch.dtype, torch.dtype, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, *dtypes[:2])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"dtype: {dtypes[2]}\n{RECIPES[name]}")
    made: list[Any] = []
    whole = FusedBackend.whole

    def seen(*arguments: Any) -> Any:
        made.append(whole(*arguments))
        return made[-1]

    monkeypatch.setattr(FusedBackend, "whole", seen)
    ours = run(recipe, tmp_path / "fused")
    assert made
    assert None not in made
    count = len(made)
    monkeypatch.setattr(backends, "fused_available", lambda: False)
    theirs = run(recipe, tmp_path / "torch", workers=1)
    assert len(made) == count
    read = [(r.folder / "model.safetensors").read_bytes() for r in (ours, theirs)]
    assert read[0] == read[1]


@pytest.mark.parametrize("name", ["ties", "magnitude"])
def test_brackets_too_large_to_be_listed_are_counted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, torch.bfloat16, torch.bfloat16)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"dtype: bfloat16\n{RECIPES[name]}")
    listed = run(recipe, tmp_path / "listed")
    for most in (0, 5000):  # all are counted; some are, some not
        monkeypatch.setattr(select, "MOST", most)
        counted = run(recipe, tmp_path / str(most))
        read = [(r.folder / "model.safetensors").read_bytes() for r in (listed, counted)]
        assert read[0] == read[1]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_pass_that_only_one_model_needs(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deltas of one value are listed however little may be; those of all values are then counted, in passes of their
    own, before or after which the graph has the other model's."""
    generator = torch.Generator().manual_seed(2)
    base = {"w": torch.zeros(400, 500)}
    few = {"w": (torch.rand(400, 500, generator=generator) < 0.4) * 2.0**-9}
    many = {"w": torch.randn(400, 500, generator=generator)}
    for folder, tensors in zip(("base", *names), (base, few, many), strict=True):
        make_checkpoint(tmp_path / folder, tensors)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"dtype: float32\n{RECIPES['ties']}")
    listed = run(recipe, tmp_path / "listed")
    monkeypatch.setattr(select, "MOST", 0)
    made: list[Any] = []
    whole = FusedBackend.whole
    monkeypatch.setattr(FusedBackend, "whole", lambda *a: made.append(whole(*a)) or made[-1])
    counted = run(recipe, tmp_path / "counted")
    assert len(made) == 5  # sample, list, two that count, the merge
    assert None not in made
    assert [len(program.sources) for program in made] == [3, 2, 2, 2, 3]
    monkeypatch.setattr(backends, "fused_available", lambda: False)
    torchs = run(recipe, tmp_path / "torch")
    read = [(r.folder / "model.safetensors").read_bytes() for r in (listed, counted, torchs)]
    assert read[0] == read[1] == read[2]


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_linear, sparse"])
def test_what_is_not_finite_is_counted_behind_compiled_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and an infinity that not all models hold, and a sum too large for bfloat16."""
    base = {"fine": torch.ones(300, 40), "nan": torch.ones(300, 300), "sum": torch.zeros(3, 5)}
    tunes = [{n: t + 1 for n, t in base.items()} for _ in "ab"]
    for model in (base, tunes[1]):
        model["nan"][299, 299] = torch.nan
        model["nan"][0, 1] = -torch.inf
    for tune in tunes:
        tune["sum"][:] = 3.3e38
    for folder, tensors in zip(("base", "a", "b"), (base, *tunes), strict=True):
        make_checkpoint(tmp_path / folder, {n: t.bfloat16() for n, t in tensors.items()})
    recipe = tmp_path / "r.yaml"
    text = RECIPES[name].replace("normalize: true", "normalize: false").replace("lambda: 0.5", "lambda: 3")
    recipe.write_text(f"dtype: bfloat16\n{text}")
    made: list[Any] = []
    whole = FusedBackend.whole
    monkeypatch.setattr(FusedBackend, "whole", lambda *a: made.append(whole(*a)) or made[-1])
    with pytest.raises(OutputError, match=r"values that are not finite in ") as caught:
        run(recipe, tmp_path / "out")
    assert made
    assert None not in made
    found = run(recipe, tmp_path / "out", allow_nonfinite=True).nonfinite
    monkeypatch.setattr(backends, "fused_available", lambda: False)
    assert found == run(recipe, tmp_path / "torch", allow_nonfinite=True, workers=1).nonfinite
    assert found["nan"].nan + found["nan"].inf == 2
    assert "nan (" in str(caught.value)
    assert found["sum"].inf
    assert "fine" not in found
