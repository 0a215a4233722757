"""Tensors that only some models have: blocks for the prediction of several tokens, old buffers, whole towers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_llama
from running import make_plan, run

from deltamerge.errors import InputError


def block(number: int) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{number}.eh_proj.weight": torch.ones(4, 8),
        f"model.layers.{number}.enorm.weight": torch.ones(4),
    }


MORE: dict[str, dict[str, torch.Tensor]] = {
    "a block behind the layers": block(2),
    "two blocks behind the layers": block(2) | block(3),
    "mtp": {
        "mtp.fc.weight": torch.ones(4, 8),
        "mtp.layers.0.w.weight": torch.ones(4),
        "mtp.norm.weight": torch.ones(4),
    },
    "buffers of every layer": {
        f"model.layers.{i}.{name}": value
        for i in range(2)
        for name, value in {
            "self_attn.rotary_emb.inv_freq": torch.ones(4),
            "self_attn.bias": torch.ones(1, 1, 8, 8).tril(),
            "self_attn.masked_bias": torch.tensor(-1e4),
            "self_attn.causal": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        }.items()
    },
    "a tower": {f"visual.blocks.{i}.w.weight": torch.ones(4, 4) for i in range(2)},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lacking")
    base = tiny_llama(folder / "base", seed=0)
    for seed, name in enumerate(("a", "b"), 1):
        tiny_llama(folder / name, seed=seed, base=base)
    config = json.loads((base / "config.json").read_text())
    for case, more in MORE.items():
        make_checkpoint(folder / case, load_tensors(base) | more, config=config | {"num_nextn_predict_layers": 1})
    return folder


ONE = "base_model: ./{}\nmodels: [{{model: ./a}}]\n"
TWO = (
    "base_model: ./{}\nmerge_method: task_arithmetic\nmodels: [{{model: ./a}}, {{model: ./b}}]\n"
    "parameters: {{weight: 0.5}}\n"
)


@pytest.mark.parametrize("case", MORE)
def test_one_fine_tune_leaves_them_out(models, tmp_path, capsys, case):
    (models / "r.yaml").write_text(ONE.format(case))
    result = run(models / "r.yaml", tmp_path / "out")
    expected = load_tensors(models / "a")
    assert load_tensors(tmp_path / "out").keys() == expected.keys()
    (note,) = (note for note in result.plan.notes if note.startswith(f"left out, only in ./{case}: "))
    assert note in (tmp_path / "out" / "README.md").read_text()
    code, _, err = call(capsys, "check", "-v", models / "r.yaml")
    assert code == 0
    assert note in err
    assert note in make_plan(models / "r.yaml").describe()["notes"]


@pytest.mark.parametrize("case", MORE)
def test_several_fine_tunes_copy_them(models, tmp_path, case):
    (models / "r.yaml").write_text(TWO.format(case))
    result = run(models / "r.yaml", tmp_path / "out")
    merged, base = load_tensors(tmp_path / "out"), load_tensors(models / case)
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], base[name]) for name in MORE[case])
    assert any(note.startswith(f"copied from ./{case}, not merged: ") for note in result.plan.notes)
    (models / "r.yaml").write_text(TWO.format("base"))
    run(models / "r.yaml", tmp_path / "plain")
    plain = load_tensors(tmp_path / "plain")
    assert all(torch.equal(merged[name], tensor) for name, tensor in plain.items())


def test_a_note_names_blocks_and_not_each_tensor(models):
    (models / "r.yaml").write_text(ONE.format("a block behind the layers"))
    notes = make_plan(models / "r.yaml").notes
    assert "left out, only in ./a block behind the layers: model.layers.2 (2 tensors)" in notes


def test_gradients_do_not_count_blocks_behind_the_layers(models, tmp_path):
    for case in ("base", "a block behind the layers"):
        (models / "r.yaml").write_text(TWO.format(case).replace("0.5", "[0, 1]"))
        run(models / "r.yaml", tmp_path / case)
    plain, merged = (load_tensors(tmp_path / case) for case in ("base", "a block behind the layers"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in plain.items())


def test_slices_leave_blocks_behind_the_layers_out(models, tmp_path):
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: ./a block behind the layers, layer_range: [0, 2]}]
  - sources: [{model: ./a, layer_range: [1, 2]}]
"""
    (models / "r.yaml").write_text(text)
    result = run(models / "r.yaml", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert not any("eh_proj" in name for name in load_tensors(tmp_path / "out"))
    note = "left out, behind the layers of ./a block behind the layers: model.layers.2 (2 tensors)"
    assert note in result.plan.notes
    (models / "r.yaml").write_text(text.replace("[0, 2]", "[1, 3]"))
    with pytest.raises(Exception, match=r"is \[1, 3\), ./a block behind the layers has 2 layers"):
        make_plan(models / "r.yaml")


def without(tensors: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


@pytest.mark.parametrize("case", ["a layer", "a part of a layer", "other names", "a bias"])
def test_what_models_must_share_is_still_an_error(models, tmp_path, case):
    base = load_tensors(models / "base")
    config = json.loads((models / "base" / "config.json").read_text())
    changed = {
        "a layer": without(base, "model.layers.1."),
        "a part of a layer": without(base, "model.layers.1.mlp"),
        "other names": {name.replace("model.layers", "decoder.stack"): tensor for name, tensor in base.items()},
        "a bias": base | {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(2)},
    }[case]
    counted = config | ({"num_hidden_layers": 1} if case == "a layer" else {})
    make_checkpoint(tmp_path / "odd", changed, config=counted)
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(models / name)
    for text in (ONE.format("odd"), TWO.format("odd"), ONE.format("base").replace("./a", "./odd")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(InputError, match=r"missing in"):
            make_plan(tmp_path / "r.yaml")


def adapter_of(folder: Path) -> Path:
    if not folder.exists():
        write_adapter(folder, 5)
    return folder


@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("owner", ["base", "fine-tune"])
def test_deltas_adapters_and_peft_do_without_them(models, tmp_path, capsys, case, owner):
    """extract, apply and an adapter, where the base has them and where the fine-tune has."""
    tuned = tmp_path / "tuned"
    more = MORE[case] if owner == "fine-tune" else {}
    config = json.loads((models / case / "config.json").read_text())
    make_checkpoint(tuned, load_tensors(models / "a") | more, config=config)
    base = models / (case if owner == "base" else "base")
    assert call(capsys, "extract", tuned, "--base", base, "--out", tmp_path / "delta")[0] == 0
    assert call(capsys, "apply", tmp_path / "delta", "--base", base, "--out", tmp_path / "back")[0] == 0
    back, want = load_tensors(tmp_path / "back"), load_tensors(tuned)
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in want.items())
    if owner == "base":
        recipe = tmp_path / "r.yaml"
        adapter = adapter_of(models / "adapter")
        recipe.write_text(
            f"base_model: {base}\nmerge_method: task_arithmetic\nmodels: [{{model: {base}+{adapter}}}]\n"
            "parameters: {weight: 1.0}\n"
        )
        run(recipe, tmp_path / "adapted")
        adapted = load_tensors(tmp_path / "adapted")
        assert adapted.keys() == load_tensors(base).keys()
        assert all(torch.equal(adapted[name], tensor) for name, tensor in MORE[case].items())
        pruned = f"base_model: {base}\nmodels: [{{model: {tuned}, prune: {{method: magnitude, density: 0.02}}}}]\n"
        recipe.write_text(pruned + "output: {kind: peft}\n")
        assert call(capsys, "check", recipe)[0] == 0
        assert call(capsys, "run", recipe, "--out", tmp_path / "peft")[0] == 0


def test_a_block_of_another_kind_behind_the_layers_that_no_config_counts(models, tmp_path):
    """The config tells nothing: a last block is spare if it holds what no layer has, a usual layer is not."""
    more = load_tensors(models / "base") | block(2)
    usual = {n.replace("layers.1.", "layers.2."): t for n, t in more.items() if "layers.1." in n}
    for name, tensors in (("odd", more), ("longer", load_tensors(models / "base") | usual)):
        make_checkpoint(tmp_path / name, tensors, config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    (tmp_path / "a").symlink_to(models / "a")
    (tmp_path / "r.yaml").write_text(ONE.format("odd"))
    assert "left out, only in ./odd: model.layers.2 (2 tensors)" in make_plan(tmp_path / "r.yaml").notes
    (tmp_path / "r.yaml").write_text(ONE.format("longer"))
    with pytest.raises(InputError, match="missing in"):
        make_plan(tmp_path / "r.yaml")
