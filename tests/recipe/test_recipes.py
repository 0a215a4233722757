"""Every recipe that ships is checked, planned and run on tiny models under the names it uses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from conftest import load_tensors, tiny_llama, tiny_pipeline, tiny_vlm
from running import make_plan, run
from transformers import AutoModelForCausalLM

from deltamerge.run.apply import apply

RECIPES = Path(__file__).parents[2] / "recipes"
# below, in tests/run/ of quantised and packed merges, of quantised outputs, rounding, mixtures, in tests/apps/search/
ELSEWHERE = {"moe.yaml", "diffusers.yaml", "fp8.yaml", "fp8-keep.yaml", "mxfp4.yaml", "search.yaml", "sweep.yaml",
             "int4-inputs.yaml"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    base = tiny_llama(folder / "models" / "base", seed=0, tokenizer=True)
    for seed, name in enumerate(("math", "code", "chat"), 1):
        tiny_llama(folder / "models" / name, seed=seed, base=base, tokenizer=True)
    tiny_vlm(folder / "models" / "vlm", base)
    deep = tiny_llama(folder / "models" / "base40", seed=4, layers=40)
    for seed, name in enumerate(("orca", "platypus"), 5):
        tiny_llama(folder / "models" / name, seed=seed, layers=40, base=deep)
    for seed, step in enumerate((900, 1000, 1100), 7):
        tiny_llama(folder / "models" / "run" / f"step-{step}", seed=seed, base=base, tokenizer=True)
    for seed, name in enumerate(("pipeline", "pipeline-anime", "pipeline-ink")):
        tiny_pipeline(folder / "models" / name, seed, folder / "models" / "pipeline" if seed else None)
    for seed, name in enumerate(("math", "code"), 1):
        write_adapter(folder / "adapters" / name, seed)
    texts = (" ".join(f"w{4 + (7 * row + word) % 92}" for word in range(6)) for row in range(80))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("calib", "math", "code", "chat", "text"):
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def test_the_pipeline_s_recipe_merges_what_it_names(folder):
    text = (RECIPES / "diffusers.yaml").read_text()
    (folder / "diffusers.yaml").write_text(text)
    plan, out = make_plan(folder / "diffusers.yaml"), run(folder / "diffusers.yaml").folder
    assert any("copied from ./models/pipeline" in note and "vae/" in note for note in plan.notes)
    for part in ("unet", "text_encoder", "vae"):
        merged, base = load_tensors(out / part), load_tensors(folder / "models" / "pipeline" / part)
        assert merged.keys() == base.keys()
        assert all(torch.equal(merged[n], base[n]) for n in base) == (part == "vae")


def test_the_mixture_s_recipe_makes_what_transformers_loads(folder):
    (folder / "moe.yaml").write_text((RECIPES / "moe.yaml").read_text())
    made = AutoModelForCausalLM.from_pretrained(run(folder / "moe.yaml").folder)
    assert (made.config.model_type, made.config.num_local_experts) == ("mixtral", 2)


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml") if path.name not in ELSEWHERE))
def test_recipe_runs_as_written(folder, name):
    text = (RECIPES / name).read_text()
    assert "sequences: 256" in text or "sequences" not in text
    # tiny models have 48 positions, and this many rows are enough for them
    (folder / name).write_text(
        re.sub(r"(\w+\.jsonl)", r"\1, length: 32, sequences: 12", text.replace(", sequences: 256", ""))
    )
    plan = make_plan(folder / name)
    out = run(folder / name).folder
    if plan.recipe.output.kind == "delta":
        out = apply(str(out), str(folder / "models" / "base"), folder / f"{name}-applied", workers=1).folder
    if plan.recipe.output.kind == "peft":
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in out.iterdir()}
        return
    like = "base40" if "orca" in text else "vlm" if name == "vlm.yaml" else "base"  # the model whose names it has
    merged, base = load_tensors(out), load_tensors(folder / "models" / like)
    assert merged.keys() == {output.name for output in plan.outputs}
    stacked = r"model\.layers\.4[0-3]\." if name == "layer-stack.yaml" else "(?!)"
    assert {n for n in merged if not re.match(stacked, n)} == base.keys()
    assert any(not torch.equal(merged[n].float(), base[n].float()) for n in base)
    assert all(torch.isfinite(tensor.float()).all() for tensor in merged.values())
