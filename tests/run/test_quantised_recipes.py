"""Recipes over quantised models: every method makes what it makes of the same values stored as float32, whose results
tests/run/test_random_recipes.py compares with float64; what is lent by other models stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from backend_choice import available, computed_by
from calls import call
from conftest import load_tensors, make_checkpoint, needs_kernels, tiny_llama, write_json
from kept_recipes import MERGES, PRUNES, stage_value, text
from made_up_stages import run_with_stages
from quantised_models import PACKED, fp8, fp8_checkpoint, packed
from running import make_plan, run
from safetensors.torch import save_file
from tolerance import after_rounding

from deltamerge.run.hashes import hash_input

W, NORM = "layers.0.q.weight", "layers.0.norm.weight"
SHAPE = (37, 40)
MODELS = ("base", "a", "b", "c")
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def drawn(seed: int) -> torch.Tensor:
    base = 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return base + 0.01 * bool(seed) * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """base (FP8 in blocks), a (FP8 by row), b (bfloat16) and c (4 bits); below `plain` their values in float32."""
    folder = tmp_path_factory.mktemp("mixed")
    norm = {NORM: torch.linspace(0.5, 1.5, 37)}
    made = {
        "base": (*fp8(W, drawn(0), (16, 16)), BLOCKS),
        "a": (*fp8(W, drawn(1), (1, 40), suffix="_scale"), {"quant_method": "fbgemm_fp8"}),
        "b": ({W: drawn(2).bfloat16()}, drawn(2).bfloat16().double(), None),
        "c": (*packed(W, drawn(3), 8), PACKED),
    }
    for name, (stored, values, settings) in made.items():
        config = {"model_type": "test"} | ({"quantization_config": settings} if settings else {})
        make_checkpoint(folder / name, stored | norm, config=config)
        make_checkpoint(folder / "plain" / name, {W: values.float()} | norm)
    for place in (folder, folder / "plain"):
        (place / "rows.txt").write_text("a row\n" * 50)
    return folder


CALIBRATED = "calibration: {data: rows.txt, task: causal-lm}"
TASKS = {name: text(name, "abc") for name in ("iso_c", "iso_cts", "tsv_m", "wudi", "consensus")}
TASKS |= {name: text(name, "abc", "task: 2") for name in ("tall_masks", "emr")}
RECIPES = (
    MERGES
    | TASKS
    | {f"pruned by {name}": text("task_arithmetic", "abc", prune=prune) for name, prune in PRUNES.items()}
    | {
        "pruned by wanda": text("task_arithmetic", "ab", prune="method: wanda, density: 0.2", more=CALIBRATED),
        "q of rows": text(
            "task_arithmetic", "a", prune="method: dare, density: 0.1, q: {objective: layer_mse, scope: row}",
            more=CALIBRATED,
        ),
        "delta": text("ties", "ab", "density: 0.3", more="output: {kind: delta}"),
        "delta to add": text("dare_linear", "ab", "density: 0.3", more="output: {kind: delta, semantics: add}"),
    }
)  # fmt: skip


def made(folder: Path, recipe: str, out: Path) -> dict[str, bytes]:
    """The bytes of the weight files that a recipe makes."""
    path = folder / "recipe.yaml"
    path.write_text(recipe + "dtype: bfloat16\n")
    shutil.rmtree(out, ignore_errors=True)
    if "calibration:" in recipe:
        run_with_stages(path, out, stage_value)
    else:
        run(path, out, workers=1)
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}


def compare(models: Path, out: Path, names: list[str]) -> None:
    wrong = []
    for name in names:
        recipe = RECIPES[name]
        if made(models, recipe, out) != made(models / "plain", recipe, out):
            wrong.append(name)
    assert not wrong


def test_methods_make_of_codes_what_they_make_of_values(models, tmp_path):
    compare(models, tmp_path / "out", list({**dict.fromkeys(list(RECIPES)[::5]), **TASKS}))


@pytest.mark.slow
@pytest.mark.parametrize("backend", available())
def test_every_method_makes_of_codes_what_it_makes_of_values(models, tmp_path, backend):
    with computed_by(backend):
        compare(models, tmp_path / "out", list(RECIPES))


@needs_kernels
def test_many_pieces_by_either_backend_and_hashed_as_they_are_read(tmp_path):
    """Tensors of several pieces, some of which begin within a byte or a row; the lock's hashes are the files' own."""
    made, generator = {}, torch.Generator().manual_seed(7)
    for name, shape in {"a": (900, 333), "b": (1, 150_001), "c": (40_001, 7), "d": (600, 512)}.items():
        base = 0.05 * torch.randn(shape, generator=generator)
        made[name] = base, base + 0.01 * torch.randn(shape, generator=generator)
    fp8s = {k: v for name, (base, _) in made.items() for k, v in fp8(f"{name}.weight", base, (64, 96))[0].items()}
    int4 = {k: v for name, (_, tune) in made.items() for k, v in packed_rows(f"{name}.weight", tune).items()}
    by_row = {**PACKED, "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}
    for name, tensors, settings in (
        ("fp8", fp8s, {"quant_method": "fp8", "weight_block_size": [64, 96]}), ("int4", int4, by_row),
    ):  # fmt: skip
        make_checkpoint(tmp_path / name, tensors, config={"model_type": "test", "quantization_config": settings})
    outputs = []
    (tmp_path / "r.yaml").write_text(
        text("ties", "b", "density: 0.3").replace("base\n", "fp8\n").replace("./b,", "./int4,")
    )
    for backend in available():
        with computed_by(backend):
            result = run(tmp_path / "r.yaml", tmp_path / backend, workers=2)
        outputs.append((tmp_path / backend / "model.safetensors").read_bytes())
        for name in ("fp8", "int4"):
            file = tmp_path / name / "model.safetensors"
            assert result.lock["inputs"][f"./{name}"]["files"][file.name]["hash"] == hash_input(file)
    assert outputs[0] == outputs[1]


def packed_rows(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in 4 bits, a scale a row, whose last word may be filled in part."""
    rows, columns = weight.shape
    wide = torch.zeros(rows, -(-columns // 8) * 8)
    wide[:, :columns] = weight
    stored, _ = packed(name, wide, wide.shape[1])
    return stored | {name.removesuffix("weight") + "weight_shape": torch.tensor([rows, columns])}


MIXED = {
    "FP8 base": ("base", "b"), "FP8 fine-tune": ("b", "a"), "both": ("base", "a", "c"),
    "4-bit base": ("c", "b", "a"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_mixed_recipes_are_right_by_the_formula(models, tmp_path, case):
    base, *tunes = MIXED[case]
    values = {name: load_tensors(models / "plain" / name)[W].double().numpy() for name in MODELS}
    deltas = [values[name].astype(np.float32) - values[base].astype(np.float32) for name in tunes]
    listed = ", ".join(f"{{model: ./{name}}}" for name in tunes)
    for method, wanted in (
        ("task_arithmetic", reference.task_arithmetic(values[base], deltas, [0.5] * len(tunes))),
        ("ties", reference.ties(values[base], deltas, [0.5] * len(tunes))),
    ):
        (models / "r.yaml").write_text(
            f"merge_method: {method}\nbase_model: ./{base}\nmodels: [{listed}]\nparameters: {{weight: 0.5}}\n"
        )
        run(models / "r.yaml", tmp_path / method)
        found = load_tensors(tmp_path / method)
        assert found[W].dtype is torch.bfloat16
        assert np.allclose(found[W].double().numpy(), wanted, rtol=after_rounding(torch.bfloat16), atol=1e-7)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> Path:
    """`base`, `tune` and `fp8`, the base in FP8; `values`, the base as FP8 has it in float32; `lora`, an adapter."""
    folder = tmp_path_factory.mktemp("llamas")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "tune", seed=1, base=base)
    config = json.loads((base / "config.json").read_text())
    values = fp8_checkpoint(folder / "fp8", base, (16, 16), config)
    make_checkpoint(folder / "values", {name: value.float() for name, value in values.items()}, config=config)
    (folder / "lora").mkdir()
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["up_proj"],
        "base_model_name_or_path": "",
    }
    write_json(folder / "lora" / "adapter_config.json", adapter)
    start, generator = "base_model.model.model.layers.0.mlp.up_proj.lora_", torch.Generator().manual_seed(5)
    factors = {"A": torch.randn(2, 32, generator=generator), "B": 0.01 * torch.randn(48, 2, generator=generator)}
    save_file(
        {f"{start}{name}.weight": value for name, value in factors.items()},
        folder / "lora" / "adapter_model.safetensors",
    )
    return folder


def test_what_a_plan_says_from_headers_alone(llamas, tmp_path, capsys):
    (llamas / "r.yaml").write_text("base_model: ./fp8\nmodels: [{model: ./tune, parameters: {weight: 0.5}}]\n")
    planned = make_plan(llamas / "r.yaml")
    said = "./fp8: quantised (fp8, blocks of 16×16), read as float32, written as bfloat16"
    dropped = "config.json: quantization_config (fp8) is dropped: the output is not quantised"
    assert said in planned.notes
    sizes = [
        sum(t.numel() * t.element_size() for t in load_tensors(llamas / name).values()) for name in ("base", "fp8")
    ]
    assert planned.nbytes == sizes[0]
    assert sum(sizes) - 4000 < planned.read_bytes <= sum(sizes)  # not the scales
    code, _, err = call(capsys, "check", "-v", llamas / "r.yaml")
    assert code == 0
    assert said in err
    run(llamas / "r.yaml", tmp_path / "out")
    card, lock = ((tmp_path / "out" / name).read_text() for name in ("README.md", "recipe.lock"))
    assert said in card
    assert "quantised:" in lock
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    quantised_template = "base_model: ./tune\nmerge_method: linear\nmodels: [{model: ./fp8, parameters: {weight: 1}}]\n"
    (llamas / "r.yaml").write_text(quantised_template)
    assert {said, dropped} <= set(make_plan(llamas / "r.yaml").notes)


def test_an_adapter_on_a_quantised_base(llamas, tmp_path):
    """The base's values in float32 plus s B A, rounded once, as PEFT merges into a dequantised base."""
    (llamas / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: ./fp8+./lora}]\n")
    run(llamas / "r.yaml", tmp_path / "out")
    factors = load_tensors(llamas / "lora")
    a, b = (next(value.double() for name, value in factors.items() if f"lora_{part}" in name) for part in "AB")
    name = "model.layers.0.mlp.up_proj.weight"
    values = load_tensors(llamas / "values")
    found = load_tensors(tmp_path / "out")
    wanted = values[name].double() + 2 * (b @ a)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert (found[name].double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    for other in values.keys() - {name}:
        assert torch.equal(found[other], values[other].bfloat16())


def test_commands_over_a_quantised_base(llamas, tmp_path, capsys, monkeypatch):
    """extract, apply, verify, diff, inspect and recommend take it as the model of its values."""
    monkeypatch.chdir(llamas)
    for more in ([], ["--values", "float32"]):
        delta, full = tmp_path / f"delta{len(more)}", tmp_path / f"full{len(more)}"
        for command in (
            ["extract", "tune", "--base", "fp8", "--out", delta, *more],
            ["apply", delta, "--base", "fp8", "--out", full], ["verify", delta, "--base", "fp8"], ["verify", full],
        ):  # fmt: skip
            code, _, err = call(capsys, *command)
            assert (code, command[0]) == (0, command[0]), err
        found, tune = load_tensors(full), load_tensors(llamas / "tune")
        assert all(torch.equal(found[name], tune[name]) for name in tune)
        assert len(found) == len(tune)
    code, out, _ = call(capsys, "diff", "fp8", "values", "--json")
    assert (code, json.loads(out)["changed"]) == (0, 0)
    for command in (["inspect", "tune"], ["recommend", "tune", "--density", "0.1"]):
        answers = []
        for base in ("fp8", "values"):
            code, out, _ = call(capsys, *command, "--base", base, "--json")
            assert code == 0
            answers.append(out.replace(base, "BASE"))
        assert answers[0] == answers[1]


def test_a_damaged_scale_ends_a_run_in_a_line_and_leaves_nothing(models, tmp_path, capsys):
    stored, _ = fp8(W, drawn(0), (16, 16))
    stored[W + "_scale_inv"][2, 1] = float("nan")
    make_checkpoint(
        models / "damaged",
        stored | {NORM: torch.ones(37)},
        config={"model_type": "test", "quantization_config": BLOCKS},
    )
    (models / "r.yaml").write_text("base_model: ./damaged\nmodels: [{model: ./b}]\n")
    code, _, err = call(capsys, "run", models / "r.yaml", "--out", tmp_path / "out")
    assert code == 1
    assert f"damaged/model.safetensors: {W}_scale_inv: the scale at row 2, column 1 is nan" in err
    assert len(err.strip().splitlines()) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", ["fp8", "compressed-tensors"])
def test_transformers_loads_the_same_weights(llamas, tmp_path, scheme):
    """The output of passthrough is what transformers makes of the checkpoint when it dequantises as it loads."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    base = llamas / "base"
    if scheme == "fp8":
        folder = llamas / "fp8"
        how = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    else:
        pytest.importorskip("compressed_tensors")
        config = json.loads((base / "config.json").read_text())
        stored = {}
        for name, tensor in load_tensors(base).items():
            stored |= packed(name, tensor, 8)[0] if "proj" in name else {name: tensor}
        settings = PACKED | {"ignore": ["lm_head"], "quantization_status": "compressed"}
        folder = make_checkpoint(tmp_path / "int4", stored, config=config | {"quantization_config": settings})
        how = CompressedTensorsConfig(dequantize=True)
    (tmp_path / "r.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: {folder}}}]\n")
    run(tmp_path / "r.yaml", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16).state_dict()
    ours = load_tensors(tmp_path / "out")
    assert {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])} == set()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype is torch.bfloat16
    assert not hasattr(again.config, "quantization_config")
