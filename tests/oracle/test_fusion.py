"""The same weights through fusion-bench 0.2.33 and deltamerge: equal to 1e-5 in float32, for every method both have.

With rows it is 2e-5, because fusion-bench inverts inner products in float32 there.

Off by default: `make oracle`, or `pytest -m oracle` with FUSION_PYTHON the interpreter of an environment that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_llama
from running import run
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHAPES = {
    "embed_tokens.weight": (60, 48),
    "lm_head.weight": (60, 48),
    "layers.0.q.weight": (48, 64),
    "layers.0.up.weight": (200, 48),
    "layers.0.down.weight": (48, 200),
    "layers.0.square.weight": (64, 64),
    "layers.0.norm.weight": (48,),
}
METHODS = {
    "task_arithmetic": "{weight: 0.4}",
    "ties": "{weight: 1, density: 0.3}",
    "iso_c": "{lambda: 0.9}",
    "iso_cts": "{}",
    "tsv_m": "{}",
    "svc": "{lambda: 1}",
    "wudi": "{steps: 300}",
    "consensus": "{}",
    "tall_masks": "{task: 2}",
    "emr": "{task: 2}",
}

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A folder with the models and what fusion-bench made of them."""
    python = Path(os.environ.get("FUSION_PYTHON", ROOT / ".bench" / "fusion" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"no fusion-bench at {python}: make oracle, or set FUSION_PYTHON")
    folder, generator = tmp_path_factory.mktemp("oracle"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in SHAPES.items()}
    make_checkpoint(folder / "base", base)
    for name in "abc":
        noise = {key: torch.randn(value.shape, generator=generator) * 0.01 for key, value in base.items()}
        make_checkpoint(folder / name, {key: value + noise[key] for key, value in base.items()})
    llamas(folder / "rows")
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([python, HERE / "fusion_side.py", folder], check=True, capture_output=True, env=quiet)
    return folder


def llamas(folder: Path) -> None:
    """Write a base and two fine-tunes, a row of 40 words of each, three times, and its tokens.

    Rows are alike, because deltamerge keeps some of them to judge by.
    """
    from transformers import AutoTokenizer

    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    tokens = {}
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
        text = " ".join(f"w{45 * seed - 41 + 7 * i % 45}" for i in range(40))
        (folder / f"{name}.jsonl").write_text(3 * (json.dumps({"text": text}) + "\n"))
        tokens[name] = AutoTokenizer.from_pretrained(base)([text] * 3, return_tensors="pt")["input_ids"]
    save_file(tokens, folder / "tokens.safetensors")


def ours(folder: Path, method: str, parameters: str) -> dict[str, torch.Tensor]:
    models = "".join(f"  - model: ./{name}\n" for name in "abc")
    recipe = folder / f"{method}.yaml"
    recipe.write_text(f"merge_method: {method}\nbase_model: ./base\nmodels:\n{models}parameters: {parameters}\n")
    return load_tensors(run(recipe, folder / f"out-{method}", force=True).folder)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_weights_give_the_same_model(merged, method):
    theirs, found = load_file(merged / f"{method}.safetensors"), ours(merged, method, METHODS[method])
    assert theirs.keys() == found.keys()
    for name, tensor in found.items():
        apart = (tensor.double() - theirs[name]).abs()
        if method in ("consensus", "tall_masks"):  # they compare rounded weights, we deltas: entries at the threshold
            assert (apart > 1e-5).double().mean() <= 2e-3, name
        else:
            assert apart.max() <= 1e-5, f"{name}: {apart.max():.2g} apart"


def test_emr_rescales_by_sums_over_the_model_where_fusion_bench_sums_means(merged):
    ours_, theirs = load_file(merged / "emr.safetensors"), load_file(merged / "emr_means.safetensors")
    base = load_tensors(merged / "base")
    (quotient,) = {round(float((ours_[n] - base[n]).abs().sum() / (theirs[n] - base[n]).abs().sum()), 6) for n in base}
    assert 0.9 < quotient < 1.1
    assert quotient != 1


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_the_same_rows_give_the_same_model(merged, method):
    """The head is left out: fusion-bench's RegMean weighs it by its inputs, its RegMean++ and ours take the mean."""
    folder = merged / "rows"
    own = "".join(
        f"  - {{model: ./{name}, calibration: {{data: {name}.jsonl, sequences: 3, length: 40}}}}\n" for name in "ab"
    )
    path = folder / f"{method}.yaml"
    path.write_text(f"base_model: ./base\nmerge_method: {method}\nmodels:\n{own}parameters: {{off_diagonal: 0.9}}\n")
    theirs = load_file(merged / f"{method}.safetensors")
    found = load_tensors(run(path, folder / f"out-{method}").folder)
    assert theirs.keys() == found.keys()
    base = load_tensors(folder / "base")
    for name, tensor in found.items():
        if name != "lm_head.weight":
            assert (tensor - base[name]).abs().max() > 1e-3
            assert (tensor - theirs[name]).abs().max() <= 2e-5, name
