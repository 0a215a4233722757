"""Calibration as a stage of the graph, on tiny real checkpoints: choice, lock, card, plan, command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import yaml
from calibration_rows import rows
from conftest import load_tensors, tiny_bert_pair, tiny_llama, write_tokenizer
from running import activations_of, calibrate, make_plan, run
from safetensors.numpy import load_file

from deltamerge.calibrate import spec as specs
from deltamerge.calibrate.spec import BASELINE_BYTES, WAITING_BYTES, Share, memory
from deltamerge.cli import main
from deltamerge.cli.plan import calibration_seconds
from deltamerge.errors import InputError, OutputError, RecipeError, VerifyError
from deltamerge.methods.prune import rescale, select, wanda
from deltamerge.run.lock import verify
from deltamerge.tensors.tiles import Kept, Tile

DATA = "calibration: {{data: calib.jsonl, sequences: 8, length: 12, seeds: 2{more}}}\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    tiny_bert_pair(folder / "bert", dtype=torch.float32, sigma=0.05, tokenizer=True)
    base = tiny_llama(folder / "llama" / "base", seed=0, dtype=torch.float32)
    tiny_llama(folder / "llama" / "tuned", seed=1, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    for name in ("bert", "llama"):
        rows(folder / name / "calib.jsonl")
    return folder


def recipe(folder: Path, name: str, prune: str, more: str = "", extra: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"base_model: ./base\nmodels: [{{model: ./tuned, name: t, prune: {prune}}}]\n" + DATA.format(more=more) + extra
    )
    return path


def entry(result: Any) -> dict[str, Any]:
    return result.lock["calibration"]["t"]


MAGNITUDE = "{method: magnitude, density: 0.05, q: %s}"
RUNS = {
    "global": "{method: dare, density: 0.05, q: output_change}",
    "grid": "{method: dare, density: 0.2, q: {objective: output_change, search: grid}}",
    "layer": "{method: dare, density: 0.05, q: {objective: output_change, scope: layer}}",
    "row": "{method: structured, a: 0.5, b: 0.1, q: {objective: output_change, scope: row}}",
    "magnitude": MAGNITUDE % "output_change",
    "magnitude-layer": MAGNITUDE % "{objective: output_change, scope: layer}",
    "magnitude-row": MAGNITUDE % "{objective: output_change, scope: row}",
    "least-squares": MAGNITUDE % "layer_mse",
    "least-squares-row": MAGNITUDE % "{objective: layer_mse, scope: row}",
    "least-squares-global": MAGNITUDE % "{objective: layer_mse, scope: global}",
    "learned": MAGNITUDE % "{objective: output_change, scope: layer, search: gradient}",
    "learned-row": MAGNITUDE % "{objective: output_change, scope: row, search: gradient}",
    "wanda": "{method: wanda, density: 0.1, q: output_change}",
    "wanda-least-squares": "{method: wanda, density: 0.1, q: {objective: layer_mse, scope: row}}",
    "importance": "{method: dare, density: 0.05, sampling: magnitude, q: output_change}",
}


SAME = {
    "module": ("modules: {default: {models: [", "}]}}"),
    "slice": ("slices: [{sources: [{layer_range: [0, 2], ", "}]}]"),
}


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("name", ["magnitude", "wanda-least-squares"])
def test_a_module_and_a_slice_are_calibrated_as_whole_models_are(models: Path, tmp_path: Path, name: str, form: str):
    path = recipe(models / "bert", f"{form}-{name}", RUNS[name])
    whole = run(path, tmp_path / "whole")
    begin, end = SAME[form]
    text = path.read_text().replace("models: [{" if form == "slice" else "models: [", begin, 1)
    path.write_text(text.replace("}]\n", f"{end}\n", 1))
    parted = run(path, tmp_path / "parted")
    assert (parted.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert entry(parted)["q"] == entry(whole)["q"]


def test_a_layer_that_is_stacked_has_the_q_that_it_has_in_its_own_model(models: Path, tmp_path: Path) -> None:
    pruned = r"{method: magnitude, density: 0.02, q: layer_mse, include: ['layer\.%d\.', pooler]}"
    path = recipe(models / "bert", "stacked", pruned % 1)
    whole = run(path, tmp_path / "whole")
    path.write_text(
        "base_model: ./base\nmerge_method: task_arithmetic\nslices:\n"
        "- sources: [{model: ./tuned, layer_range: [0, 2], name: first}]\n"
        f"- sources: [{{model: ./tuned, layer_range: [1, 2], name: t, prune: {pruned % 2}}}]\n" + DATA.format(more="")
    )
    stacked = run(path, tmp_path / "stacked")
    assert len(entry(whole)["q"]) == 7
    assert {n.replace("layer.2.", "layer.1."): q for n, q in entry(stacked)["q"].items()} == entry(whole)["q"]
    before, after = load_tensors(whole.folder), load_tensors(stacked.folder)
    layer = [name for name in before if "layer.1." in name]
    assert all(torch.equal(after[name.replace("layer.1.", "layer.2.")], before[name]) for name in layer)
    path.write_text(
        path.read_text().replace("name: first", "name: t, prune: {method: magnitude, density: 0.1, q: layer_mse}")
    )
    with pytest.raises(RecipeError, match="calibrates a model of the same name, 't'"):
        make_plan(path)


def test_each_module_has_its_own_q(models: Path, tmp_path: Path) -> None:
    path = recipe(models / "bert", "two-modules", RUNS["magnitude-layer"])
    head, data = path.read_text().split("models: ", 1)
    listed, data = data.split("\n", 1)
    path.write_text(
        f"{head}merge_method: task_arithmetic\nmodules:\n  encoder: {{models: {listed}}}\n"
        f"  pooler: {{models: {listed.replace('name: t', 'name: e')}}}\n{data}"
    )
    result = run(path, tmp_path / "out")
    of_encoder, of_pooler = (result.lock["calibration"][name]["q"] for name in ("t", "e"))
    assert of_encoder.keys() == {name for name in of_encoder if "encoder." in name}
    assert of_pooler.keys() == {name for name in of_pooler if "pooler." in name}
    path.with_suffix(".lock").write_text((result.folder / "recipe.lock").read_text())
    again = run(path, tmp_path / "again", locked=True)
    assert (again.folder / "model.safetensors").read_bytes() == (result.folder / "model.safetensors").read_bytes()
    path.write_text(path.read_text().replace("name: e", "name: t"))
    with pytest.raises(RecipeError, match="calibrates a model of the same name, 't'"):
        make_plan(path)


EACH = [(name, family) for name in RUNS for family in ("bert", "llama")]
# every day half of them, each on one of the two
TURNS = [pytest.param(*one, marks=[pytest.mark.slow] if i % 8 not in (0, 3, 4) else []) for i, one in enumerate(EACH)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "family"), TURNS)
def test_runs_and_repeats_from_the_lock(models: Path, tmp_path: Path, family: str, name: str) -> None:
    path = recipe(models / family, name, RUNS[name])
    result = run(path, tmp_path / "out")
    found, merged = entry(result), load_tensors(tmp_path / "out")
    assert all(torch.isfinite(t.float()).all() for t in merged.values())
    assert found["chosen"] in ("calibrated", "plain")
    assert math.isfinite(found["value"])
    held = found["held_out"]
    assert (held["calibrated"] < held["plain"]) == (found["chosen"] == "calibrated")
    stage = make_plan(path).describe()["stages"][0]
    assert 0 < found["forward_passes"] <= stage["forward_passes"]
    assert stage["blocks"] == 2
    assert "## Calibration" in (tmp_path / "out" / "README.md").read_text()
    assert set(verify(tmp_path / "out", 1)) >= {"model.safetensors"} | ({found["rows"]} if "rows" in found else set())
    # the same again with the q's of the lock, other workers and tiles, and without the data
    for file in (tmp_path / "out").glob("recipe.*"):
        (models / family / file.name.replace("recipe.", f"{name}.")).write_bytes(file.read_bytes())
    path.write_text((tmp_path / "out" / "recipe.yaml").read_text())
    lock = yaml.safe_load((models / family / f"{name}.lock").read_text())
    if "rows" in found:
        lock["calibration"]["t"]["rows"] = f"{name}.rows"
    (models / family / f"{name}.lock").write_text(yaml.safe_dump(lock))
    again = run(path, tmp_path / "again", locked=True, workers=1, memory=10**9)
    assert load_tensors(again.folder).keys() == merged.keys()
    assert (again.folder / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "name", "most"),
    [("bert", "global", 24), ("llama", "global", 24), ("bert", "wanda", 12), ("bert", "magnitude", 12)],
)
@pytest.mark.parametrize("little", [-1.0, math.inf, None])
def test_one_q_takes_few_passes(models: Path, tmp_path: Path, monkeypatch, family, name, most, little) -> None:
    """Of 50 sequences, with 4 masks where they are random; the comparison on held-out rows is counted. By predictions
    always, never, or where the output change says little."""
    if little is not None:
        monkeypatch.setattr("deltamerge.calibrate.q.choices.HARDLY_LESS", little)
    rows(models / family / "many.jsonl", 250)
    path = recipe(models / family, f"few-{name}", RUNS[name])
    text = path.read_text().replace("calib.jsonl, sequences: 8", "many.jsonl, sequences: 50")
    path.write_text(text.replace("seeds: 2", "seeds: 4"))
    (found,) = calibrate(path).values()
    stage = make_plan(path).describe()["stages"][0]
    assert found["forward_passes"] <= stage["forward_passes"] <= most
    assert stage["head_passes"] < stage["forward_passes"]
    assert len([step for step in found["path"] if step[0] == "few rows"]) == 8
    later = [step for step in found["path"] if step[0] != "few rows"]
    assert little is None or bool(later) == (little > 0)
    if later:
        assert found["mask_seeds"] in ((2, 4) if name == "global" else (1,))
        assert [step[0] for step in later] == ["q"] * 3
        (modelled,) = (one for one in found["candidates"] if later[0][1] <= one["q"] <= later[2][1])
        assert found["searched"]["q"] in [one["q"] for one in found["candidates"]]
        few = {step[2]: step[3] for step in found["path"] if step[0] == "few rows"}
        if name != "global":  # the plain choice is the last point of the first round
            on_all = few[1.0] * modelled["value"] / min(few.values())
            assert found["plain"]["value"] == pytest.approx(on_all, rel=1e-4)
    else:
        assert found["mask_seeds"] == 1
        compared = [one for one in found["candidates"] if "rows" not in one]
        assert found["searched"]["q"] == min(compared, key=lambda one: one["held_out"])["q"]


def test_calibrated_runs_do_not_depend_on_workers(models: Path, tmp_path: Path) -> None:
    path = recipe(models / "bert", "workers", MAGNITUDE % "{objective: output_change, scope: row}")
    first, second = run(path, tmp_path / "a", workers=1), run(path, tmp_path / "b", workers=3)
    assert entry(first) == entry(second)
    for name in ("model.safetensors", "recipe.rows"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_q_divides_the_weights_of_linear_layers_alone(models: Path, tmp_path: Path) -> None:
    """Each tensor is that of a run with this q as a number, or with q = 1."""
    folder, mask = models / "bert", "{method: dare, density: 0.05, q: %s}"
    result = run(recipe(folder, "linear", mask % "output_change"), tmp_path / "out")
    q = entry(result)["q"]
    assert entry(result)["chosen"] == "calibrated"
    assert len(set(q.values())) == 1
    assert all(name.endswith(("query.weight", "key.weight", "value.weight", "dense.weight")) for name in q)
    numbers = {value: load_tensors(run(recipe(folder, "number", mask % value), tmp_path / str(value)).folder)
               for value in (1, next(iter(q.values())))}  # fmt: skip
    for name, tensor in load_tensors(result.folder).items():
        assert torch.equal(tensor, numbers[q.get(name, 1)][name])


def test_rows_of_the_lock_are_what_was_applied(models: Path, tmp_path: Path) -> None:
    path = recipe(models / "bert", "rows", MAGNITUDE % "{objective: layer_mse, scope: row}")
    result = run(path, tmp_path / "out")
    assert entry(result)["chosen"] == "calibrated"
    arrays = load_file(tmp_path / "out" / "recipe.rows")
    assert arrays
    assert all(name.startswith("t:") for name in arrays)
    base, merged = load_tensors(models / "bert" / "base"), load_tensors(result.folder)
    tuned = load_tensors(models / "bert" / "tuned")
    for key, q in arrays.items():
        name = key.removeprefix("t:")
        start = base[name.removeprefix("bert.")].double().numpy()
        kept = reference.magnitude(tuned[name].double().numpy() - start, 0.05)
        assert q.shape == (len(start), 1)
        np.testing.assert_allclose(merged[name].double().numpy(), start + kept / q, rtol=1e-5, atol=2e-6)


def test_validation_compares_by_the_metric(models: Path, tmp_path: Path) -> None:
    q = "{method: dare, density: 0.2, q: validation}"
    found = entry(run(recipe(models / "bert", "validation", q), tmp_path / "a"))
    assert found["held_out"]["measure"] == "accuracy"
    assert 0 <= found["held_out"]["plain"] <= 1
    loss = entry(run(recipe(models / "llama", "validation", q), tmp_path / "b"))
    assert loss["held_out"]["measure"] == "loss"
    q = "{method: dare, density: 0.2, q: output_change}"
    found = entry(run(recipe(models / "bert", "guard", q, ", metric: f1"), tmp_path / "c"))
    assert found["held_out"]["measure"] == "f1"


def test_the_plain_choice_stays_where_the_search_is_no_better(models: Path, tmp_path: Path) -> None:
    """q is forced far from anything sensible: held-out rows see it, and plain DARE is written."""
    q = "{method: dare, density: 0.9, q: {objective: output_change, bounds: [0.01, 0.02]}}"
    path = recipe(models / "bert", "harmful", q)
    result = run(path, tmp_path / "out")
    assert entry(result)["chosen"] == "plain"
    assert "no better" in entry(result)["why"]
    assert set(entry(result)["q"].values()) == {0.9}
    plain = run(recipe(models / "bert", "vanilla", "{method: dare, density: 0.9}"), tmp_path / "plain")
    assert (result.folder / "model.safetensors").read_bytes() == (plain.folder / "model.safetensors").read_bytes()


def test_several_fine_tunes_are_each_calibrated(models: Path, tmp_path: Path) -> None:
    folder = models / "llama"
    tiny_llama(folder / "other", seed=2, base=folder / "base", dtype=torch.float32, sigma=0.05, tokenizer=True)
    path = folder / "two.yaml"
    path.write_text(
        "base_model: ./base\nmerge_method: task_arithmetic\n"
        "models:\n  - {model: ./tuned, name: t, parameters: {weight: 0.5}}\n"
        "  - {model: ./other, name: o, parameters: {weight: 0.5}}\n"
        "prune: {method: magnitude, density: 0.05, q: output_change}\n" + DATA.format(more="")
    )
    result = run(path, tmp_path / "out")
    assert set(result.lock["calibration"]) == {"t", "o"}


@pytest.mark.parametrize(
    ("method", "prune"),
    [
        ("task_arithmetic", "{method: dare, density: 0.6, q: output_change}"),
        ("ties", "{method: magnitude, density: 0.2, group: model}"),
        ("task_arithmetic", "{method: none}"),
    ],
)
def test_the_lambda_of_a_merge(models: Path, tmp_path: Path, method: str, prune: str) -> None:
    """Both fine-tunes' objectives are summed, and the result is that of a recipe with the lambda that was found."""
    folder = models / "llama"
    tiny_llama(folder / "third", seed=3, base=folder / "base", dtype=torch.float32, sigma=0.05, tokenizer=True)
    text = (
        "base_model: ./base\nmerge_method: %s\nparameters: {lambda: %s}\n"
        "models:\n  - {model: ./tuned, name: t, parameters: {weight: 0.5}}\n"
        "  - {model: ./third, name: o, parameters: {weight: 0.7}}\n"
    )
    path = folder / "lambda.yaml"
    path.write_text(text % (method, 0.1) + f"prune: {prune}\n" + DATA.format(more=", per: merge"))
    stage = make_plan(path).describe()["stages"][0]
    result = run(path, tmp_path / "out")
    found = result.lock["calibration"]["merge"]
    assert found["models"] == ["t", "o"]
    assert found["chosen"] == "calibrated"
    assert found["held_out"]["calibrated"] < found["held_out"]["plain"]
    assert 0 < found["forward_passes"] <= stage["forward_passes"]
    assert len(set(found["q"].values())) == 1
    assert "λ" in (result.folder / "README.md").read_text()
    path.write_text(
        text % (method, 0.1 / next(iter(found["q"].values())))
        + f"prune: {prune.replace(', q: output_change', '')}\n"
        + DATA.format(more="")
    )
    fixed = load_tensors(run(path, tmp_path / "fixed").folder)
    for name, tensor in load_tensors(result.folder).items():
        torch.testing.assert_close(tensor, fixed[name], rtol=1e-5, atol=1e-6)


def test_exact_match_of_answers(models: Path, tmp_path: Path) -> None:
    """Rows are labelled with what the fine-tune says, so that only pruning loses answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models / "llama"
    tuned, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "tuned"),
        AutoTokenizer.from_pretrained(folder / "tuned"),
    )
    lines = []
    for i in range(20):
        prompt = " ".join(f"w{4 + (5 * i + 3 * j) % 90}" for j in range(3 + i % 4))
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        made = tuned.generate(**tokens, do_sample=False, max_new_tokens=4)[:, tokens["input_ids"].shape[1] :]
        answer = tokenizer.batch_decode(made, skip_special_tokens=True)[0].split()[-1]
        lines.append(json.dumps({"text": prompt, "label": answer}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = recipe(folder, "exact", "{method: magnitude, density: 0.3, q: validation}")
    text = path.read_text().replace("calib.jsonl", "prompts.jsonl")
    path.write_text(text.replace("seeds: 2", "seeds: 2, metric: exact_match, answer: 'w\\d+', new_tokens: 4"))
    found = entry(run(path, tmp_path / "out"))
    assert found["held_out"]["measure"] == "exact_match"
    assert 0.0 <= found["held_out"]["plain"] <= 1.0
    assert 0.0 <= found["value"] < 1.0
    path.write_text(text.replace("seeds: 2", "seeds: 2, metric: exact_match, new_tokens: 400"))
    with pytest.raises(InputError, match="12 tokens and 400 new tokens, but the model has"):
        run(path, tmp_path / "long")
    path.write_text(text.replace("seeds: 2", "seeds: 2, metric: exact_match, task: causal-lm"))
    with pytest.raises(InputError, match="does not fit the head"):
        make_plan(path)


def test_calibrate_command_writes_the_lock_that_run_uses(models: Path, tmp_path: Path, capsys) -> None:
    path = recipe(models / "bert", "command", MAGNITUDE % "output_change")
    with pytest.raises(SystemExit) as leaving:
        main(["calibrate", str(path)])
    assert leaving.value.code == 0
    assert "search path" in capsys.readouterr().out
    locked = run(path, tmp_path / "locked", locked=True)
    fresh = run(path, tmp_path / "fresh")
    assert (locked.folder / "model.safetensors").read_bytes() == (fresh.folder / "model.safetensors").read_bytes()
    assert calibrate(path) == fresh.lock["calibration"]
    path.write_text(path.read_text().replace("output_change", "layer_mse"))
    with pytest.raises(VerifyError, match=r"changed after .* was written"):
        run(path, tmp_path / "other", locked=True)
    with pytest.raises(InputError, match="no q is calibrated"):
        calibrate(recipe(models / "bert", "none", "{method: dare, density: 0.1}"))


@pytest.mark.slow
def test_memory_bounds_the_cache(models: Path, tmp_path: Path) -> None:
    """With room for hardly a tensor the same q's come out; with less than one block there is an error."""
    path = recipe(models / "bert", "memory", MAGNITUDE % "output_change")
    whole = make_plan(path)
    least = whole.peak_bytes - whole.sources[0].cache
    assert whole.sources[0].cache == 2**31
    with pytest.raises(InputError, match="too little to calibrate t") as error:
        make_plan(path, memory=10_000_000)
    enough = int(str(error.value.hint).split()[3].rstrip(","))
    assert least < enough
    planned = make_plan(path, memory=enough + 1000)
    assert planned.sources[0].cache == 1000
    assert planned.peak_bytes <= enough + 1000
    small = run(path, tmp_path / "small", memory=enough + 1000)
    assert entry(small) == entry(run(path, tmp_path / "large"))


def test_memory_counts_masks_and_the_largest_while_it_is_drawn(models: Path) -> None:
    plan = make_plan(recipe(models / "bert", "counted", RUNS["global"]))
    (spec,) = plan.specs.values()
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in spec.source.tensors}
    masks = sum(2 * 8 * 0.05 * sizes[pruned.stored] for pruned in spec.pruned)
    more = spec.memory - memory(Share(replace(spec.source, pairs=())))
    drawn = 5 * max(sizes[pruned.stored] for pruned in spec.pruned)
    assert more == pytest.approx(masks + 1.5 * drawn, abs=3)  # half as much waits in the heap
    assert plan.peak_bytes >= BASELINE_BYTES + spec.memory
    # of two fine-tunes side by side: twice what comes and goes, and what waits in one heap
    rows = spec.source.calibration
    one, large = (Share(replace(spec.source, calibration=rows.model_copy(update={"sequences": n}))) for n in (8, 10**6))
    assert memory(one, one) == pytest.approx(2 * memory(one), abs=2)
    assert memory(large, large) == 2 * memory(large) - WAITING_BYTES


def test_wanda_on_weights_stored_in_out(tmp_path: Path) -> None:
    """GPT-2: the kept entries are those of a float64 reference per column of the stored weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=48, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(tmp_path / "tuned")
    write_tokenizer(tmp_path / "tuned", 96)
    rows(tmp_path / "calib.jsonl")
    name = "transformer.h.1.mlp.c_fc.weight"
    plain = recipe(tmp_path, "gpt2", "{method: wanda, density: 0.1}")
    x_norm = activations_of(plain)[name].norm
    base, tuned = load_tensors(tmp_path / "base"), load_tensors(tmp_path / "tuned")
    start = base[name].double().numpy()
    delta = tuned[name].double().numpy() - start
    wanted = np.zeros_like(delta)
    order = np.argsort(-np.abs(delta * x_norm[:, None]), axis=0, kind="stable")[: round(0.1 * 32)]
    np.put_along_axis(wanted, order, np.take_along_axis(delta, order, 0), 0)
    merged = load_tensors(run(plain, tmp_path / "out").folder)
    np.testing.assert_allclose(merged[name].double().numpy(), start + wanted, rtol=1e-5, atol=1e-6)
    found = entry(run(recipe(tmp_path, "q", "{method: wanda, density: 0.1, q: output_change}"), tmp_path / "q"))
    assert math.isfinite(found["value"])


@pytest.mark.parametrize("density", [0.001, 0.1, 0.3, 0.97])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tile_blocks", [1, 3])
def test_the_best_of_columns_whatever_the_tiles(density: float, ties: bool, tile_blocks: int) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    shape = (200, 1000)  # 65 rows a block
    delta = generator.standard_normal(shape).astype(np.float32)
    norms = generator.lognormal(0, 2, 200).astype(np.float32)
    if ties:
        delta, norms = np.round(delta), np.round(np.minimum(norms, 2.0)) + np.float32(1.0)
    step = tile_blocks * 65 * 1000
    tiles = [Tile(at, min(at + step, delta.size), shape) for at in range(0, delta.size, step)]
    flat = torch.from_numpy(delta.reshape(-1))
    parts = [flat[t.start : t.stop] for t in tiles]
    best = [wanda.best_of_columns(p, norms, tile=t, density=density) for p, t in zip(parts, tiles, strict=True)]
    cut = wanda.pick_columns(np.concatenate(best), density=density, rows=200)
    counts = None
    if cut.more.any():
        counted = [wanda.equal_columns(p, norms, cut, tile=t) for p, t in zip(parts, tiles, strict=True)]
        counts = np.concatenate(counted)
    ranks = wanda.column_ranks(counts)
    kept = [wanda.keep_best_of_columns(p, norms, cut, ranks, tile=t) for p, t in zip(parts, tiles, strict=True)]
    order = np.argsort(-(np.abs(delta) * norms[:, None]), axis=0, kind="stable")[: round(density * 200)]
    wanted = np.zeros_like(delta)
    np.put_along_axis(wanted, order, np.take_along_axis(delta, order, 0), 0)
    np.testing.assert_array_equal(torch.cat(kept).numpy().reshape(shape), wanted)


def test_plan_and_check_import_no_torch(models: Path) -> None:
    path = recipe(models / "bert", "light", RUNS["wanda"])
    code = (
        "import sys; from deltamerge import load_recipe\n"
        f"plan = load_recipe({str(path)!r}, device='cpu')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(plan.describe()['stages'][0]['model'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "t\n"


@pytest.mark.parametrize(
    ("q", "more", "message"),
    [
        ("output_change", ", text: body", "no field 'body'"),
        ("validation", ", label: score", "no field 'score'"),
        ("validation", ", metric: pearson_spearman", "does not fit the head"),
        ("validation", ", task: causal-lm", "needs a model"),
    ],
)
def test_data_is_checked_with_the_plan(models: Path, q: str, more: str, message: str) -> None:
    path = recipe(models / "bert", "bad", MAGNITUDE % q, more)
    with pytest.raises(InputError, match=message):
        make_plan(path)


def test_too_little_data_and_none(models: Path, tmp_path: Path) -> None:
    folder = models / "bert"
    path = recipe(folder, "few", MAGNITUDE % "output_change")
    path.write_text(path.read_text().replace("sequences: 8", "sequences: 50"))
    with pytest.raises(InputError, match="20 rows, but 50 needed"):
        make_plan(path)
    path.write_text(path.read_text().replace("calib.jsonl", "absent.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        make_plan(path)
    path.write_text(path.read_text().split("calibration:")[0])
    with pytest.raises(RecipeError, match="needs calibration"):
        make_plan(path)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_divide_rows(transposed: bool, sparse: bool) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    shape = (40, 30)
    delta = (generator.standard_normal(shape) * (generator.random(shape) < 0.3)).astype(np.float32)
    q = generator.uniform(0.01, 3, (1, 30) if transposed else (40, 1)).astype(np.float32)
    start, stop = 300, 1110
    flat = torch.from_numpy(delta.reshape(-1)[start:stop].copy())
    positions = flat.nonzero().flatten()
    value: Any = Kept(positions, flat[positions]) if sparse else flat
    got = rescale.divide_rows(value, q, tile=Tile(start, stop, shape))
    wanted = (delta.astype(np.float64) / q).reshape(-1)[start:stop]
    whole = torch.zeros(len(flat)).index_put((positions,), got.values) if isinstance(got, Kept) else got
    np.testing.assert_allclose(whole.double().numpy(), wanted, rtol=2**-23)
    one = rescale.divide_rows(flat, 0.3, tile=Tile(start, stop, shape))
    assert torch.equal(one, rescale.divide(flat, 0.3, tile=Tile(start, stop, shape)))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_wanda_scores_by_the_norms_of_the_inputs(density: float) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    delta = generator.standard_normal((31, 50)).astype(np.float32)
    norms = generator.lognormal(0, 2, 50).astype(np.float32)
    flat = torch.from_numpy(delta.reshape(-1))
    kept = select.keep_largest_rows_scored(flat, norms, tile=Tile(0, delta.size, delta.shape), density=density)
    score = np.abs(delta) * norms
    order = np.argsort(-score, axis=1, kind="stable")[:, : round(density * 50)]
    wanted = np.zeros_like(delta)
    np.put_along_axis(wanted, order, np.take_along_axis(delta, order, 1), 1)
    np.testing.assert_array_equal(kept.numpy().reshape(delta.shape), wanted)


@pytest.mark.slow
def test_the_order_of_methods_on_a_real_fine_tune(shared_data: Path, tmp_path: Path) -> None:
    """At density 0.01, on plain English: DARE < DAREx-q < magnitude with a calibrated q, by the output change."""
    docs = Path(__file__).parents[2] / "docs"
    lines = [line for file in sorted(docs.rglob("*.md")) for line in file.read_text().splitlines()]
    texts = tmp_path / "lines.txt"
    texts.write_text("\n".join(line for line in lines if line[:1].isalpha() and len(line) > 60))
    change = {}
    for name, q in (("dare", "output_change"), ("magnitude", "output_change")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"base_model: {shared_data / 'base'}\n"
            f"models: [{{model: {shared_data / 'sentiment'}, name: t, "
            f"prune: {{method: {name}, density: 0.01, q: {q}}}}}]\n"
            f"calibration: {{data: {texts.name}, sequences: 24, length: 40, seeds: 2}}\n"
        )
        change[name] = calibrate(path)["t"]["held_out"]
    assert change["magnitude"]["calibrated"] < change["dare"]["calibrated"] < change["dare"]["plain"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_q_moves_little_with_bfloat16(models: Path, tmp_path: Path, family: str) -> None:
    """`auto` is float32 for a small model; the statistics of layer_mse are float32 whatever is asked."""
    found = {}
    for asked in ("auto", "float32", "bfloat16"):
        path = recipe(models / family, asked, "{method: dare, density: 0.3, q: output_change}", f", precision: {asked}")
        assert make_plan(path).describe()["stages"][0]["precision"] == asked.replace("auto", "float32")
        (found[asked],) = calibrate(path).values()
    stage = make_plan(path).describe()["stages"][0]
    tokens = 8 * 12
    assert stage["operations"] % (2 * tokens) == 0
    if family == "llama":  # whose head takes part in the targets and the comparison, and not in the search
        assert stage["head_operations"] == 2 * tokens * 96 * 32
    gradient = "{method: dare, density: 0.3, q: {objective: output_change, scope: layer, search: gradient}}"
    learned = make_plan(recipe(models / family, "learned", gradient)).describe()["stages"][0]
    assert stage["head_passes"] < stage["forward_passes"]
    assert learned["head_passes"] == learned["forward_passes"]
    assert calibration_seconds(stage) < calibration_seconds({**stage, "forward_passes": 1000 * stage["forward_passes"]})
    assert found["auto"] == found["float32"]
    assert found["bfloat16"]["precision"] == "bfloat16"
    assert found["bfloat16"]["value"] != found["float32"]["value"]
    q, half = (found[asked]["searched"]["q"] for asked in ("float32", "bfloat16"))
    assert half == pytest.approx(q, rel=0.05)
    closed = MAGNITUDE % "layer_mse"
    same = [calibrate(recipe(models / family, "m", closed, f", precision: {p}")) for p in ("float32", "bfloat16")]
    assert same[0]["t"]["q"] == same[1]["t"]["q"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("processor: 0\nflags\t\t: fpu avx512_bf16 sse\n", "bfloat16"),
        ("flags\t\t: amx_bf16\n\nflags\t\t: fpu\n", "bfloat16"),
        ("Features\t: fp asimd bf16\n", "bfloat16"),
        ("flags\t\t: fpu avx512f\n", "float32"),
        ("", "float32"),
        (None, "float32"),
    ],
)
def test_auto_is_bfloat16_for_large_models_on_processors_that_have_it(tmp_path, monkeypatch, text, wanted) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(specs, "CPU_INFO", file)
    large, small = [np.empty((0, 0))] * 3, [np.zeros(7)]
    monkeypatch.setattr(specs, "LARGE", 0)
    assert specs.precision_of("auto", "cpu", large) == wanted
    assert specs.precision_of("auto", "cuda", large) == "bfloat16"
    monkeypatch.setattr(specs, "LARGE", 8)
    assert specs.precision_of("auto", "cpu", small) == "float32"
    assert specs.precision_of("bfloat16", "cpu", small) == "bfloat16"
    assert specs.precision_of("float32", "cuda", small) == "float32"


def test_a_plot_and_a_lock_leave_what_is_not_theirs(models, tmp_path, capsys):
    path, plot = recipe(models / "bert", "plotted", MAGNITUDE % "output_change"), tmp_path / "plot.svg"
    lock = path.with_suffix(".lock")

    def ended(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["calibrate", str(path), "--plot", str(plot), "--workers", "1", "--device", "cpu", *more])
        return int(leaving.value.code or 0), capsys.readouterr().err

    for file in (plot, lock):
        file.write_text("<svg>mine</svg>\n")
        code, err = ended()
        assert (code, f"{file}: is there, and was not written for plotted.yaml" in err) == (1, True), err
        assert file.read_text() == "<svg>mine</svg>\n"
        assert not lock.exists() or file == lock
        file.unlink()
    assert ended()[0] == 0
    assert ended()[0] == 0  # both its own
    rowed = recipe(models / "bert", "rowed", MAGNITUDE % "{objective: output_change, scope: row}")
    rowed.with_suffix(".rows").write_text("mine")
    with pytest.raises(OutputError, match=r"rowed\.rows: is there, and was not written for rowed\.yaml"):
        calibrate(rowed)
    assert rowed.with_suffix(".rows").read_text() == "mine"
    assert not rowed.with_suffix(".lock").exists()
    rowed.with_suffix(".rows").unlink()
    calibrate(rowed)
    calibrate(rowed)
    plot.write_text(plot.read_text().replace("<svg", "<svg id='mine'", 1))
    code, err = ended()
    assert (code, f"{plot}: was changed since it was written" in err) == (1, True), err
    assert ended("--force")[0] == 0
