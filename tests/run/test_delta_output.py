"""Delta artifacts through the command line: written, applied, extracted, named in recipes, compared; damage refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running as runner
import torch
import yaml
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama

from deltamerge.methods.registry import MERGE
from deltamerge.tensors.reader import Reader, RecentParts

OWN = {"README.md", "recipe.yaml", "recipe.lock"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Tensors = dict[str, torch.Tensor]


def run(folder: Path, name: str, text: str, **output: object) -> Path:
    """The folder that a recipe of `text` leaves, run by the command line in a quiet process of its own thread."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(text + f"output: {json.dumps(output)}\n")
    return succeed("run", recipe, "--out", folder / name, "--force", "-q") and folder / name


def succeed(*arguments: object) -> bool:
    from deltamerge.cli import main

    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    assert leaving.value.code == 0
    return True


def content(folder: Path) -> dict[str, bytes]:
    """Weights, index, config and tokenizer by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in OWN}


def assert_same_model(applied: Path, model: Path) -> None:
    assert content(applied) == content(model)
    assert succeed("verify", applied)


def models(folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """base, a and b in `folder`."""
    base = tiny_llama(folder / "base", seed=0, dtype=dtype, tokenizer=True, **options)
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, dtype=dtype, base=base, tokenizer=True, **options)
    return folder


ONE = "base_model: ./base\nmodels: [{model: ./a}]\n"
TWO = "base_model: ./base\nmodels: [{model: ./a, parameters: {weight: 0.6}}, {model: ./b, parameters: {weight: 0.4}}]\n"
RECIPES = {
    "whole": ONE,
    "dare": ONE + "prune: {method: dare, density: 0.05}\n",
    "dare dense": ONE + "prune: {method: dare, density: 0.5, exclude: []}\n",
    "magnitude": ONE + "prune: {method: magnitude, density: 0.1, q: 0.5}\n",
    "ties": TWO + "merge_method: ties\nparameters: {density: 0.2, lambda: 1.1}\n",
    "dare_ties": TWO + "merge_method: dare_ties\nparameters: {density: 0.05, normalize: true}\n",
    "task_arithmetic": TWO + "merge_method: task_arithmetic\n",
    "float16": TWO + "merge_method: task_arithmetic\nout_dtype: float16\n",
    "linear": TWO + "merge_method: linear\n",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_apply_makes_the_files_of_kind_model(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    models(tmp_path, dtype)
    model = run(tmp_path, "model", RECIPES[name], kind="model", shard_size="20KB")
    delta = run(tmp_path, "delta", RECIPES[name], kind="delta", shard_size="20KB")
    assert succeed("verify", delta)
    assert len(list(model.glob("*.safetensors"))) > 1
    succeed("apply", delta, "--base", tmp_path / "base", "--out", tmp_path / "applied", "--workers", 2)
    assert_same_model(tmp_path / "applied", model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dare", "dare dense", "magnitude", "ties", "dare_ties", "task_arithmetic"])
def test_added_float32_values_make_it_too(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    models(tmp_path, dtype)
    model = run(tmp_path, "model", RECIPES[name], kind="model")
    delta = run(tmp_path, "delta", RECIPES[name], kind="delta", semantics="add", values="float32")
    succeed("apply", delta, "--base", tmp_path / "base", "--out", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", model)


@pytest.mark.parametrize("name", ["dare", "ties", "task_arithmetic"])
def test_methods_of_which_nothing_is_known_add_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not known to be base + something: float32(merged) - float32(base), one rounding from what `adds` gives."""
    models(tmp_path, torch.float32)
    known = run(tmp_path, "known", RECIPES[name], kind="delta", values="float32")
    method = "ties" if name == "ties" else "task_arithmetic"
    others = {**MERGE, method: replace(MERGE[method], adds=False)}
    for module in ("recipe.checks", "methods.registry", "recipe.schema"):
        monkeypatch.setattr(f"deltamerge.{module}.MERGE", others)
    plain = run(tmp_path, "plain", RECIPES[name], kind="delta", values="float32")
    for (_, got, base), (_, wanted, _) in zip(added(tmp_path, plain), added(tmp_path, known), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-22, atol=0)
        assert bool((got != base).any()) is bool((wanted != base).any())


def test_protected_columns_are_stored_whole(tmp_path: Path) -> None:
    models(tmp_path, torch.bfloat16)
    protect = "prune: {method: magnitude, density: 0.1, protect: {columns: {up_proj: [1, 5]}}}\n"
    model, delta = (run(tmp_path, kind, ONE + protect, kind=kind) for kind in ("model", "delta"))
    succeed("apply", delta, "--base", tmp_path / "base", "--out", tmp_path / "applied")
    assert_same_model(tmp_path / "applied", model)
    succeed("extract", tmp_path / "a", "--base", tmp_path / "base", "--values", "float32", "--out", tmp_path / "whole")
    again = run(tmp_path, "again", (ONE + protect).replace("./a", "./whole"), kind="model")
    got, wanted = load_tensors(again), load_tensors(model)
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


@pytest.mark.sampled(3)
def test_same_bytes_whatever_the_workers_and_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path, torch.bfloat16)
    text = RECIPES["dare_ties"]
    for values in (None, "float32", "int8"):
        output = {"kind": "delta"} | ({} if values is None else {"values": values})
        first = content(run(tmp_path, "one", text, **output))
        with monkeypatch.context() as patch:
            patch.setattr("deltamerge.engine.execute.TILE_ELEMENTS", 1 << 8)
            patch.setattr("deltamerge.engine.execute.JOB_ELEMENTS", 1 << 9)
            patch.setattr("deltamerge.engine.execute.default_workers", lambda: 4)
            assert content(run(tmp_path, "two", text, **output)) == first
            patch.setattr("deltamerge.engine.backends.fused_available", lambda: False)
            assert content(run(tmp_path, "three", text, **output)) == first


LOSSY = {"float32": 0.0, "bfloat16": 0.004, "int8": 0.02, "sign": 0.7}


@pytest.mark.parametrize("values", LOSSY)
def test_the_error_of_a_coding_is_measured_told_and_kept(tmp_path: Path, capsys: Any, values: str) -> None:
    models(tmp_path, torch.float32)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPES["magnitude"] + f"output: {{kind: delta, values: {values}}}\n")
    code, _, err = call(capsys, "run", recipe, "--out", tmp_path / "delta")
    assert code == 0
    told = float(re.search(rf"{values} values, relative error (\S+)", err)[1])
    exact = run(tmp_path, "exact", RECIPES["magnitude"], kind="delta", values="float32")
    assert ("relative error" in (tmp_path / "delta" / "README.md").read_text()) is (values != "float32")
    got, wanted = (
        {n: t.double() - base.double() for n, t, base in added(tmp_path, folder)}
        for folder in (tmp_path / "delta", exact)
    )
    lost = sum(float((got[n] - wanted[n]).square().sum()) for n in wanted if "lm_head" not in n)
    whole = sum(float(wanted[n].square().sum()) for n in wanted if "lm_head" not in n)
    assert (lost / whole) ** 0.5 == pytest.approx(told, rel=0.02, abs=1e-4)
    assert told <= LOSSY[values]
    assert json.loads((tmp_path / "delta" / "delta.json").read_text())["semantics"] == "add"


def added(folder: Path, delta: Path) -> Any:
    out = folder / f"{delta.name}-applied"
    succeed("apply", delta, "--base", folder / "base", "--out", out, "-q")
    base = load_tensors(folder / "base")
    return [(name, tensor, base[name]) for name, tensor in load_tensors(out).items()]


def test_what_pruning_leaves_whole_is_kept_exactly(tmp_path: Path) -> None:
    models(tmp_path, torch.bfloat16)
    delta = run(tmp_path, "delta", RECIPES["magnitude"], kind="delta", values="sign")
    tensors = {name: tensor for name, tensor, _ in added(tmp_path, delta)}
    assert torch.equal(tensors["lm_head.weight"], load_tensors(tmp_path / "a")["lm_head.weight"])


def test_a_whole_fine_tune_may_be_stored_as_signs(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    delta = run(tmp_path, "delta", ONE, kind="delta", values="sign")
    record = json.loads((delta / "delta.json").read_text())["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert (record["values"], record["encoding"]) == ("sign", "dense")


def change(name: str) -> Callable[[Tensors], Tensors]:
    def more_rows(tensors: Tensors) -> Tensors:
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.cat([tensors[key], torch.full((3, 32), 9.0, dtype=tensors[key].dtype)])
        return tensors

    def head(tensors: Tensors) -> Tensors:
        return {**{n: t for n, t in tensors.items() if n != "lm_head.weight"}, "score.weight": torch.ones(2, 32)}

    def odd(tensors: Tensors) -> Tensors:
        return tensors | {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "ids": torch.arange(7)}

    return {"more rows": more_rows, "added and removed": head, "odd": odd, "tied": lambda t: t}[name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["more rows", "added and removed", "odd", "tied"])
def test_tensors_that_only_one_of_the_two_has(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    models(tmp_path, dtype, tied=name == "tied")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    make_checkpoint(tmp_path / "a", change(name)(load_tensors(tmp_path / "a")), config=config)
    if name == "odd":
        make_checkpoint(tmp_path / "base", change(name)(load_tensors(tmp_path / "base")), config=config)
    text = ONE + "prune: {method: dare, density: 0.1}\ntokenizer_source: ./a\n"
    for values in ({}, {"semantics": "add", "values": "float32"}):
        model = run(tmp_path, "model", text, kind="model")
        delta = run(tmp_path, "delta", text, kind="delta", **values)
        succeed("apply", delta, "--base", tmp_path / "base", "--out", tmp_path / "applied", "--force")
        assert_same_model(tmp_path / "applied", model)


def test_prefixed_fine_tune_with_a_head(tmp_path: Path) -> None:
    tiny_bert_pair(tmp_path, tokenizer=True)
    text = "base_model: ./base\nmodels: [{model: ./tuned, prune: {method: dare, density: 0.1}}]\n"
    model, delta = (run(tmp_path, kind, text, kind=kind) for kind in ("model", "delta"))
    succeed("apply", delta, "--base", tmp_path / "base", "--out", tmp_path / "applied", "--memory", "100MB")
    assert_same_model(tmp_path / "applied", model)
    records = json.loads((delta / "delta.json").read_text())["tensors"]
    assert records["bert.pooler.dense.weight"]["base_name"] == "pooler.dense.weight"
    assert "base" not in records["classifier.weight"]


def test_verify_may_look_at_the_base(tmp_path: Path, capsys: Any) -> None:
    models(tmp_path, torch.bfloat16)
    delta = run(tmp_path, "delta", RECIPES["dare"], kind="delta")
    model = run(tmp_path, "model", RECIPES["dare"], kind="model")
    for folder, message in ((delta, "21 tensors, from"), (model, "is its input ./base")):
        code, _, err = call(capsys, "verify", folder, "--base", tmp_path / "base")
        assert (code, message in err) == (0, True)
        code, _, err = call(capsys, "verify", folder, "--base", tmp_path / "b" if folder is delta else delta)
        assert code == 1
        assert "./base" in err


# ---- extract


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_extract_stores_what_changed_exactly(tmp_path: Path, dtype: torch.dtype, capsys: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(40, 64, generator=generator).to(dtype) for i in range(3)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for i in (3, 70, 2000):
        tuned["layers.1.w"].view(-1).view(torch.int8)[i] ^= 1
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "a", tuned)
    code, out, _ = call(
        capsys, "extract", tmp_path / "a", "--base", tmp_path / "base", "--out", tmp_path / "delta", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert (found["entries"], found["relative_error"], found["tensors"]) == (3, 0.0, 3)
    succeed("apply", tmp_path / "delta", "--base", tmp_path / "base", "--out", tmp_path / "applied")
    assert content(tmp_path / "applied")["model.safetensors"] == content(tmp_path / "a")["model.safetensors"]


def test_extract_prunes_as_a_recipe_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    models(tmp_path, torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    how = ("--density", "0.1", "--method", "dare", "--q", "0.3")
    succeed("extract", "a", "--base", "base", *how, "-q")
    text = "base_model: base\nmodels: [{model: a}]\nprune: {method: dare, density: 0.1, q: 0.3}\n"
    assert content(tmp_path / "a-delta") == content(run(tmp_path, "delta", text, kind="delta"))
    recipe = yaml.safe_load((tmp_path / "a-delta" / "recipe.yaml").read_text())
    assert recipe["prune"] == {"method": "dare", "density": 0.1, "q": 0.3}
    code, _, err = call(capsys, "extract", "a", "--base", "base", "--method", "dare")
    assert (code, err.splitlines()[0]) == (2, "error: --method and --q need --density")
    code, _, err = call(capsys, "extract", "a", "--base", "base", "--density", "1.5", "--out", "x")
    assert code == 1
    assert err.startswith("extract: prune.density: must be in (0, 1], got 1.5")
    code, _, err = call(capsys, "extract", "a", "--base", "base", "--density", "0.1", "--method", "rand", "--out", "x")
    assert (code, err.splitlines()[0]) == (1, "extract: prune.method: unknown pruning method 'rand'")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(("x", "partial"))) == []


# ---- a delta as a model of a recipe


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "models: [{model: ./A}]\n",
        "models: [{model: ./A, parameters: {weight: 0.3}}]\n",
        "merge_method: ties\nmodels: [{model: ./A}, {model: ./b}]\nparameters: {weight: 1, density: 0.3}\n",
        "merge_method: dare_ties\nmodels: [{model: ./A, name: x}, {model: ./b}]\n"
        "parameters: {weight: 1, density: 0.05}\n",
        "merge_method: linear\nmodels: [{model: ./A}, {model: ./b}]\nparameters: {weight: 1}\n",
        "models: [{model: ./A, name: x}]\nprune: {method: magnitude, density: 0.1}\n",
    ],
)
def test_a_delta_stands_for_its_fine_tune(tmp_path: Path, text: str, dtype: torch.dtype) -> None:
    models(tmp_path, dtype)
    succeed("extract", tmp_path / "a", "--base", tmp_path / "base", "--out", tmp_path / "delta", "-q")
    text = "base_model: ./base\n" + text
    wanted = content(run(tmp_path, "wanted", text.replace("./A", "./a"), kind="model"))
    assert content(run(tmp_path, "got", text.replace("./A", "./delta"), kind="model")) == wanted


def test_added_values_are_merged_without_being_rounded_to_the_base(tmp_path: Path) -> None:
    """Δ is what the artifact adds, not (base + Δ, in bfloat16) − base; in dense and in sparse masks."""
    models(tmp_path, torch.bfloat16)
    run(tmp_path, "delta", RECIPES["magnitude"], kind="delta", values="float32")
    twice = "base_model: ./base\nmodels: [{model: ./delta, parameters: {weight: 0.5}}]\n"
    once = RECIPES["magnitude"].replace("./a}", "./a, parameters: {weight: 0.5}}")
    got, wanted = (load_tensors(run(tmp_path, n, text, kind="model")) for n, text in (("g", twice), ("w", once)))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted if name != "lm_head.weight")
    masked = run(tmp_path, "masked", twice + "prune: {method: dare, density: 0.05, q: 1}\n", kind="model")
    base = load_tensors(tmp_path / "base")
    for name, tensor in load_tensors(masked).items():
        moved = tensor != base[name]
        assert torch.equal(tensor[moved], wanted[name][moved]) or name == "lm_head.weight"


def test_calibration_reads_a_delta_as_its_fine_tune(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    words = np.random.default_rng(0)
    lines = [" ".join(f"w{w}" for w in words.integers(4, 96, 12)) for _ in range(40)]
    (tmp_path / "rows.txt").write_text("\n".join(lines) + "\n")
    succeed("extract", tmp_path / "a", "--base", tmp_path / "base", "--out", tmp_path / "delta", "-q")
    text = (
        "base_model: ./base\nmodels: [{model: ./MODEL, name: x}]\n"
        "prune: {method: magnitude, density: 0.1, q: layer_mse}\n"
        "calibration: {data: rows.txt, sequences: 8, length: 12}\n"
    )
    wanted = content(run(tmp_path, "wanted", text.replace("MODEL", "a"), kind="model"))
    assert content(run(tmp_path, "got", text.replace("MODEL", "delta"), kind="model")) == wanted


@pytest.mark.parametrize("prune", ["method: magnitude, density: 0.1", "method: budget, bytes: 12kB"])
def test_a_plan_counts_what_a_reader_keeps_of_a_delta(tmp_path: Path, prune: str) -> None:
    models(tmp_path, torch.bfloat16)
    run(tmp_path, "delta", ONE + f"prune: {{{prune}}}\n", kind="delta", semantics="add")
    (tmp_path / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./delta}]\n")
    planned = runner.make_plan(tmp_path / "r.yaml")
    kept: dict[str, RecentParts] = {}
    with Reader() as reader:
        for info in planned.inputs.tunes[0].tensors.values():
            reader.read_into(info, 0, np.empty(info.nbytes, np.uint8))
        for kind in ("parts", "positions"):
            kept[kind] = reader.once(f"{kind} of deltas", lambda: RecentParts(1, int))
    assert planned.memory.parts["delta_inputs"] == sum(one._weight for one in kept.values()) > 0
    assert planned.memory.parts["delta_inputs"] <= planned.peak_bytes


REFUSED = {
    "no base": (
        "merge_method: linear\nmodels: [{model: ./delta}, {model: ./b}]\nparameters: {weight: 1}\n",
        "needs base",
    ),
    "another base": ("base_model: ./b\nmodels: [{model: ./delta}]\n", "the base's tensor is not the one"),
    "another shape": ("base_model: ./small\nmodels: [{model: ./delta}]\n", "the delta was made from BF16"),
    "as the base": ("base_model: ./delta\nmodels: [{model: ./b}]\n", "cannot be the base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_deltas_over_the_wrong_base_are_refused(tmp_path: Path, capsys: Any, case: str) -> None:
    models(tmp_path, torch.bfloat16)
    tiny_llama(tmp_path / "small", seed=0, vocab_size=90)
    run(tmp_path, "delta", RECIPES["dare"], kind="delta")
    text, message = REFUSED[case]
    (tmp_path / "r.yaml").write_text(text)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = call(capsys, "run", tmp_path / "r.yaml")
    assert (code, out) == (1, "")
    assert message in err
    assert "./base" in err.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- damage


def damage_record(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "delta.json").read_text())
        record = next(r for r in manifest["tensors"].values() if r["count"] > 3)
        record.update(fields)
        (folder / "delta.json").write_text(json.dumps(manifest))

    return damage


def truncate(folder: Path) -> None:
    data = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(data[:-8])


def flip(values: bool) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / "delta.safetensors").read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        begin, end = max(
            (a["data_offsets"] for n, a in header.items() if n.endswith(".values") is values), key=lambda o: o[1] - o[0]
        )
        data[start + begin + (end - begin) // 4] ^= 1
        (folder / "delta.safetensors").write_bytes(data)

    return damage


OTHER_RESULT = "the result is not the tensor this delta was made for\nhint: the delta is damaged"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "truncated"),
    "values": (flip(True), OTHER_RESULT),
    "positions": (flip(False), "lm_head.weight: bitmask lists 2667 entries, not 2668\nhint: the delta is damaged"),
    "steps": (flip(False), "the delta is damaged"),
    "result": (damage_record(result="0" * 32), OTHER_RESULT),
    "base": (damage_record(base="0" * 32), "the base's tensor is not the one"),
    "count": (damage_record(count=2), "not"),
    "no manifest": (lambda f: (f / "delta.json").unlink(), "not a delta artifact"),
    "no weights": (lambda f: (f / "delta.safetensors").unlink(), "neither delta.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "garbage": (lambda f: (f / "delta.json").write_text("{"), "delta.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_artifacts_are_refused_and_nothing_is_written(tmp_path: Path, capsys: Any, case: str) -> None:
    models(tmp_path, torch.bfloat16)
    delta = run(tmp_path, "delta", RECIPES["dare"], kind="delta")
    damage, message = DAMAGE[case]
    if case in ("values", "positions"):
        delta = run(tmp_path, "delta", RECIPES["dare"], kind="delta", steps=False)
    damage(delta)
    capsys.readouterr()
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = call(capsys, "apply", delta, "--base", tmp_path / "base", "--out", tmp_path / "applied")
    assert (code, out) == (1, "")
    assert message in err
    assert len([line for line in err.splitlines() if not line.startswith("hint: ")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ["values", "positions", "steps", "result", "base"])
def test_damage_is_met_wherever_a_delta_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, case: str
) -> None:
    monkeypatch.chdir(models(tmp_path, torch.bfloat16))
    damage, message = DAMAGE[case]
    damage(run(tmp_path, "delta", RECIPES["dare"], kind="delta", steps=case == "steps"))
    (tmp_path / "r.yaml").write_text(TWO.replace("./a", "./delta") + "merge_method: ties\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    for command, name in (("run r.yaml --out x", "./delta"), ("diff base delta", "delta")):
        code, out, err = call(capsys, *command.split())
        assert (code, out, err.count("\n")) == (1, "", 2)
        assert err.startswith(f"error: {name}: ")
        assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_calibrate_checks_a_delta_too(tmp_path: Path, capsys: Any) -> None:
    models(tmp_path, torch.bfloat16)
    damage, message = DAMAGE["steps"]
    damage(run(tmp_path, "delta", RECIPES["dare"], kind="delta"))
    (tmp_path / "rows.txt").write_text("w4 w5 w6\n" * 8)
    (tmp_path / "r.yaml").write_text(
        "base_model: ./base\nmodels: [{model: ./delta}]\nprune: {method: magnitude, density: 0.1, q: layer_mse}\n"
        "calibration: {data: rows.txt, sequences: 8, length: 12}\n"
    )
    code, out, err = call(capsys, "calibrate", tmp_path / "r.yaml")
    assert (code, out) == (1, "")
    assert err.startswith("error: ./delta: ")
    assert message in err
    assert not (tmp_path / "r.lock").exists()


@pytest.mark.parametrize("kind", ["model", "delta", "delta, semantics: add", "delta, semantics: add, values: sign"])
def test_progress_ends_at_the_bytes_of_the_result(tmp_path: Path, kind: str) -> None:
    models(tmp_path, torch.bfloat16)
    (tmp_path / "r.yaml").write_text(TWO + f"merge_method: ties\noutput: {{kind: {kind}}}\n")
    told: list[int] = []
    made = runner.run(tmp_path / "r.yaml", tmp_path / "out", watch=lambda _: told.append)
    assert sum(told) == made.plan.nbytes > 0


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_extract_of_the_model_of_parts_stores_the_same(tmp_path: Path, method: str) -> None:
    models(tmp_path, torch.bfloat16)
    text = RECIPES[method]
    whole = run(tmp_path, "whole", text, kind="delta")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text + "output: {kind: model, shard_size: 20KB}\n")
    for last in (["--part", "1/2"], ["--part", "2/2"], ["--finish"]):
        succeed("run", recipe, "--out", tmp_path / "model", "-q", *last)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    succeed("extract", tmp_path / "model", "--base", tmp_path / "base", "--out", tmp_path / "delta", "-q")
    assert (tmp_path / "delta" / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()
    one, other = (json.loads((f / "delta.json").read_text())["tensors"] for f in (tmp_path / "delta", whole))
    assert one == other


def test_apply_refuses_what_is_no_pair(tmp_path: Path, capsys: Any) -> None:
    models(tmp_path, torch.bfloat16)
    delta = run(tmp_path, "delta", RECIPES["dare"], kind="delta")
    out = tmp_path / "applied"
    for arguments, message in (
        ((tmp_path / "a", "--base", tmp_path / "base"), "is not a delta artifact"),
        ((delta, "--base", delta), "is a delta too"),
        ((delta, "--base", tmp_path / "b"), "the base's tensor is not the one this delta was made from"),
        ((delta, "--base", tmp_path / "base", "--memory", "1MB"), "too little"),
        ((delta, "--base", tmp_path / "nowhere"), "nowhere"),
    ):
        code, _, err = call(capsys, "apply", *arguments, "--out", out)
        assert code == 1
        assert message in err
        assert not out.exists()
    code, _, err = call(capsys, "apply", delta, "--base", tmp_path / "b", "--out", out)
    assert err.splitlines()[-1] == "hint: this delta was made from ./base"
    code, _, err = call(capsys, "apply", delta, "--base", tmp_path / "base", "--out", delta, "--force")
    assert (code, "holds the input" in err) == (1, True)


# ---- plan, check, recipes


def test_plan_estimates_the_size(tmp_path: Path, capsys: Any) -> None:
    base = {f"layers.{i}.w": torch.randn(200, 300) for i in range(4)}
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "a", {n: t + 0.01 * torch.randn_like(t) for n, t in base.items()})
    for output in ("{kind: delta}", "{kind: delta, values: int8}", "{kind: delta, semantics: add}"):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(ONE + f"prune: {{method: dare, density: 0.05}}\noutput: {output}\n")
        _, out, _ = call(capsys, "plan", recipe, "--json")
        estimate = json.loads(out)["delta"]["estimated_bytes"]
        succeed("run", recipe, "--out", tmp_path / "out", "--force", "-q")
        assert estimate == pytest.approx((tmp_path / "out" / "delta.safetensors").stat().st_size, rel=0.1)
    assert "as a delta bfloat16 values to add, about" in call(capsys, "plan", recipe)[1]
    assert "a delta of about" in call(capsys, "check", recipe)[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "models: [{model: a}]\nmerge_method: linear\nparameters: {weight: 1}\noutput: {kind: delta}\n",
            "needs base_model",
        ),
        (ONE + "output: {values: int8}\n", "output.values: is of delta artifacts"),
        (ONE + "output: {kind: delta, semantics: replace, values: int8}\n", "replace stores final values"),
        (TWO + "merge_method: linear\noutput: {kind: delta, semantics: add}\n", "linear adds nothing to the base"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, capsys: Any, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    code, _, err = call(capsys, "check", tmp_path / "r.yaml")
    assert code == 1
    assert message in err


# ---- diff


def test_diff_counts_and_measures(tmp_path: Path, capsys: Any) -> None:
    base = {"layers.0.w": torch.ones(4, 8), "layers.1.w": torch.ones(3), "ids": torch.arange(4), "zero": torch.zeros(2)}
    other = {name: tensor.clone() for name, tensor in base.items() if name != "layers.1.w"}
    other["layers.0.w"][0, :2] += torch.tensor([0.5, -0.25])
    other["ids"][1] = 9
    other["zero"] += 1
    other["head"] = torch.ones(1)
    make_checkpoint(tmp_path / "x", base)
    make_checkpoint(tmp_path / "y", other)
    code, out, err = call(capsys, "diff", tmp_path / "x", tmp_path / "y", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    changes = {t["name"]: t for t in found["tensors"]}
    w = changes["layers.0.w"]
    assert (w["changed"], w["elements"], w["max_abs"], w["mean_abs"]) == (2, 32, 0.5, 0.75 / 32)
    assert w["norm"] == pytest.approx((0.3125 / 32) ** 0.5)
    assert (changes["ids"]["changed"], changes["ids"]["norm"], changes["zero"]["norm"]) == (1, None, None)
    assert (found["added"], found["removed"], found["same"]) == (["head"], ["layers.1.w"], 0)
    _, out, _ = call(capsys, "diff", tmp_path / "x", tmp_path / "y")
    assert "3 tensors differ, 0 are the same; 5 of 38 entries changed" in out
    half = {n: t.half() if t.is_floating_point() else t for n, t in base.items()}
    make_checkpoint(tmp_path / "z", half | {"zero": torch.zeros(3)})
    found = json.loads(call(capsys, "diff", tmp_path / "x", tmp_path / "z", "--json")[1])
    kinds = {t["name"]: (t["changed"], t["a"], t["b"]) for t in found["tensors"]}
    assert kinds == {
        "layers.0.w": (0, "F32 [4, 8]", "F16 [4, 8]"),
        "layers.1.w": (0, "F32 [3]", "F16 [3]"),
        "zero": (3, "F32 [2]", "F32 [3]"),
    }


def test_diff_reads_a_delta_over_its_base(tmp_path: Path, capsys: Any) -> None:
    models(tmp_path, torch.bfloat16)
    succeed("extract", tmp_path / "a", "--base", tmp_path / "base", "--out", tmp_path / "delta", "-q")
    capsys.readouterr()
    whole, delta = (
        json.loads(call(capsys, "diff", tmp_path / "base", tmp_path / name, "--json")[1]) for name in ("a", "delta")
    )
    del whole["b"], delta["b"]
    assert whole == delta


def test_diff_of_locks_names_what_was_resolved_differently(tmp_path: Path, capsys: Any) -> None:
    models(tmp_path, torch.bfloat16)
    first = run(tmp_path, "first", RECIPES["dare"], kind="model")
    tiny_llama(tmp_path / "a", seed=9, base=tmp_path / "base")
    second = run(tmp_path, "second", RECIPES["dare"] + "seed: 3\n", kind="model")
    locks = first / "recipe.lock", second / "recipe.lock"
    changes = json.loads(call(capsys, "diff", *locks, "--json")[1])["changes"]
    assert changes["seed"] == [0, 3]
    assert {"inputs: ./a: files: model.safetensors", "outputs: model.safetensors"} <= changes.keys()
    assert not any("./base" in key for key in changes)
    assert "seed: 0 -> 3" in call(capsys, "diff", *locks)[1]
    assert call(capsys, "diff", locks[0], locks[0])[1] == "nothing differs\n"
    code, _, err = call(capsys, "diff", locks[0], first)
    assert (code, "one is a lock" in err) == (2, True)


# ---- loaders


def receive(weights: Tensors, patches: list[Any]) -> None:
    """What vLLM 0.33's load_checkpoint_weight_patches demands of its patches and does with them, in our words: all
    dense or all sparse; of sparse ones a checkpoint tensor that is NaN where nothing changes, copied where it is not.
    """
    assert len({patch.indices is None for patch in patches}) == 1
    for patch in patches:
        size = math.prod(patch.shape)
        assert isinstance(patch.name, str)
        assert isinstance(patch.dtype, torch.dtype)
        assert patch.values.ndim == 1
        assert patch.values.dtype == patch.dtype
        if patch.indices is None:
            assert patch.values.numel() == size
            weights[patch.name].copy_(patch.values.view(patch.shape))
            continue
        assert patch.dtype.is_floating_point
        assert patch.indices.ndim == 1
        assert patch.indices.dtype in (torch.int32, torch.int64)
        assert patch.indices.numel() == patch.values.numel()
        assert not patch.values.isnan().any()
        assert (patch.indices >= 0).all()
        assert (patch.indices < size).all()
        assert (patch.indices[1:] > patch.indices[:-1]).all()
        whole = torch.full((size,), math.nan, dtype=patch.dtype)
        whole.index_copy_(0, patch.indices.long(), patch.values)
        target = weights[patch.name]
        torch.where(whole.view(patch.shape).isnan(), target, whole.view(patch.shape), out=target)


@pytest.mark.parametrize("name", ["whole", "dare", "ties"])
def test_patches_are_what_vllm_takes(tmp_path: Path, name: str) -> None:
    models(tmp_path, torch.bfloat16)
    import deltamerge

    patches = list(deltamerge.load_delta(run(tmp_path, "delta", RECIPES[name], kind="delta"), tmp_path / "base"))
    plain = deltamerge.load_delta(run(tmp_path, "plain", RECIPES[name], kind="delta", steps=False))
    for patch, other in zip(patches, plain, strict=True):
        assert (patch.name, patch.shape, torch.equal(patch.values, other.values)) == (other.name, other.shape, True)
        assert patch.indices is other.indices is None or torch.equal(patch.indices, other.indices)
    assert patches[0]._fields == ("name", "shape", "dtype", "values", "indices")
    result = load_tensors(tmp_path / "base")
    for sparse in (True, False):
        if chosen := [patch for patch in patches if (patch.indices is not None) is sparse]:
            receive(result, chosen)
    wanted = load_tensors(run(tmp_path, "model", RECIPES[name], kind="model"))
    assert all(torch.equal(result[name], wanted[name]) for name in wanted)


def test_load_delta_is_lazy_and_needs_a_base_to_add_to(tmp_path: Path) -> None:
    models(tmp_path, torch.bfloat16)
    delta = run(tmp_path, "delta", RECIPES["dare"], kind="delta")
    code = "import sys, deltamerge; deltamerge.load_delta; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    import deltamerge

    result = load_tensors(tmp_path / "base")
    for name, shape, dtype, values, indices in deltamerge.load_delta(delta, result):
        assert (tuple(result[name].shape), result[name].dtype, values.dtype) == (shape, dtype, dtype)
        result[name].view(-1)[slice(None) if indices is None else indices.long()] = values
    wanted = load_tensors(run(tmp_path, "model", RECIPES["dare"], kind="model"))
    assert all(torch.equal(result[name], wanted[name]) for name in wanted)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deltamerge.nothing  # noqa: B018  # the access is the test
    shutil.rmtree(delta)
    run(tmp_path, "delta", RECIPES["dare"], kind="delta", values="bfloat16")
    with pytest.raises(deltamerge.errors.InputError, match="base"):
        list(deltamerge.load_delta(delta))


@pytest.mark.parametrize("command", ["apply", "extract"])
def test_force_keeps_what_no_run_made(tmp_path: Path, capsys: Any, command: str) -> None:
    base = {"w": torch.randn(20, 30)}
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "a", {"w": base["w"] + 0.01})
    made = ("extract", tmp_path / "a", "--base", tmp_path / "base", "--density", "0.5")
    succeed(*made, "--out", tmp_path / "delta", "-q")
    arguments = made if command == "extract" else ("apply", tmp_path / "delta", "--base", tmp_path / "base")
    out = tmp_path / "out"
    succeed(*arguments, "--out", out, "-q")
    succeed(*arguments, "--out", out, "--force", "-q")
    (out / "thesis.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = call(capsys, *arguments, "--out", out, "--force")
    assert (code, "would delete thesis.txt\nhint: " in err) == (1, True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".*"))
