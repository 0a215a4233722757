"""Recipes run end to end on tiny real checkpoints, against the float64 reference and against themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import yaml
from conftest import load_tensors, make_checkpoint
from running import run

from deltamerge.engine import backends
from deltamerge.errors import InputError, OutputError, VerifyError
from deltamerge.methods.prune import bits
from deltamerge.recipe.file import read_recipe
from deltamerge.run.lock import verify
from deltamerge.run.partition import Part
from deltamerge.run.plans import make_plans
from deltamerge.run.reading import _files_read

SHAPES = {
    "embed.weight": (301, 24),
    "layers.0.q.weight": (24, 24),
    "layers.0.norm.weight": (24,),
    "layers.1.q.weight": (24, 24),
    "layers.1.norm.weight": (24,),
    "wide.weight": (3, 70_001),
    "scalar": (),
    "empty": (0, 4),
}


def weights(seed: int, dtype: torch.dtype, around: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator) * (0.05 if around is None else 0.004)
        tensors[name] = (noise if around is None else around[name].float() + noise).to(dtype)
    tensors["position_ids"] = torch.arange(7)
    return tensors


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def models(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = weights(0, request.param)
    make_checkpoint(folder / "base", base)
    for seed, name in enumerate(("a", "b", "c"), 1):
        make_checkpoint(folder / name, weights(seed, request.param, base), shards=seed)
    return folder


def merge(models: Path, tmp_path: Path, text: str, **options) -> dict[str, torch.Tensor]:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(text)
    return load_tensors(run(recipe, tmp_path / "out", force=True, **options).folder)


def load64(folder: Path) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in load_tensors(folder).items() if t.is_floating_point()}


def listed(parameters: str = "weight: 0.5") -> str:
    return "models:\n" + "".join(f"  - {{model: ./{m}, parameters: {{{parameters}}}}}\n" for m in "abc")


def assert_rounded_once(got: torch.Tensor, wanted: np.ndarray, inputs: np.ndarray) -> None:
    """Half an ulp of the output's dtype, and a few float32 roundings of what went in."""
    rounding = 0.5 * torch.finfo(got.dtype).eps * np.abs(wanted) + torch.finfo(got.dtype).smallest_normal * 1e-3
    np.testing.assert_array_less(np.abs(got.double().numpy() - wanted), rounding + 2.0**-21 * inputs + 1e-30)


METHODS = {
    "linear": (
        listed("weight: 0.5") + "merge_method: linear\n",
        lambda b, xs, ds: reference.linear(xs, [0.5] * 3),
    ),
    "linear-raw": (
        listed("weight: 0.3") + "merge_method: linear\nparameters: {normalize: false}\n",
        lambda b, xs, ds: reference.linear(xs, [0.3] * 3, normalize=False),
    ),
    "task_arithmetic": (
        listed("weight: 0.7") + "merge_method: task_arithmetic\nbase_model: ./base\nparameters: {lambda: 1.5}\n",
        lambda b, xs, ds: reference.task_arithmetic(b, ds, [0.7] * 3, lam=1.5),
    ),
    "task_arithmetic-normalized": (
        listed("weight: 2.0") + "merge_method: task_arithmetic\nbase_model: ./base\nparameters: {normalize: true}\n",
        lambda b, xs, ds: reference.task_arithmetic(b, ds, [2.0] * 3, normalize=True),
    ),
    "ties": (
        listed("weight: 1.0, density: 0.3") + "merge_method: ties\nbase_model: ./base\n",
        lambda b, xs, ds: reference.ties(b, [reference.keep_top(d, max(1, int(0.3 * d.size))) for d in ds], [1.0] * 3),
    ),
    "ties-negative": (
        "models:\n  - {model: ./a, parameters: {weight: 1.0}}\n  - {model: ./b, parameters: {weight: -0.5}}\n"
        "merge_method: ties\nbase_model: ./base\nparameters: {normalize: false, lambda: 0.5}\n",
        lambda b, xs, ds: reference.ties(b, ds[:2], [1.0, -0.5], normalize=False, lam=0.5),
    ),
    "magnitude": (
        listed() + "merge_method: task_arithmetic\nbase_model: ./base\n"
        "prune: {method: magnitude, density: 0.1, q: 0.5, exclude: []}\n",
        lambda b, xs, ds: reference.task_arithmetic(b, [reference.magnitude(d, 0.1) / 0.5 for d in ds], [0.5] * 3),
    ),
    "magnitude-rows": (
        listed() + "merge_method: task_arithmetic\nbase_model: ./base\n"
        "prune: {method: magnitude, density: 0.25, group: row}\n",
        lambda b, xs, ds: reference.task_arithmetic(
            b, [(reference.magnitude_rows if d.ndim > 1 else reference.magnitude)(d, 0.25) for d in ds], [0.5] * 3
        ),
    ),
    "magnitude-l2": (
        listed() + "merge_method: task_arithmetic\nbase_model: ./base\n"
        "prune: {method: magnitude, density: 0.1, rescale: l2}\n",
        lambda b, xs, ds: reference.task_arithmetic(
            b, [reference.match_norm(reference.magnitude(d, 0.1), d, "l2") for d in ds], [0.5] * 3
        ),
    ),
    "passthrough": (
        "models: [{model: ./b, parameters: {scale: 0.5}}]\nmerge_method: passthrough\n",
        lambda b, xs, ds: 0.5 * xs[1],
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_method_equals_the_float64_reference(models, tmp_path, monkeypatch, method, fused):
    if not fused:
        monkeypatch.setattr(backends, "fused_available", lambda: False)
    text, formula = METHODS[method]
    merged = merge(models, tmp_path, text)
    base, inputs = load64(models / "base"), [load64(models / m) for m in "abc"]
    assert merged.keys() == load_tensors(models / "base").keys()
    for name, b in base.items():
        xs = [x[name] for x in inputs]
        wanted = formula(b, xs, [x - b for x in xs])
        assert_rounded_once(merged[name], wanted, np.abs(b) + sum(map(np.abs, xs)))
    assert torch.equal(merged["position_ids"], torch.arange(7))


@pytest.mark.parametrize("density", [0.5, 0.01])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_rescales_the_entries_its_mask_keeps(models, tmp_path, method, density):
    text = listed(f"weight: 0.5, density: {density}") + f"merge_method: {method}\nbase_model: ./base\nseed: 7\n"
    merged = merge(models, tmp_path, text)
    base, inputs = load64(models / "base"), [load64(models / m) for m in "abc"]
    for name, b in base.items():
        kept = []
        for model, x in zip("abc", inputs, strict=True):
            key = bits.mask_key(7, f"./{model}", name)
            mask = np.zeros(b.size, bool)
            mask[bits.positions(key, 0, b.size, density)] = True
            kept.append(np.where(mask.reshape(b.shape), x[name] - b, 0) / density)
        combine = reference.task_arithmetic if method == "dare_linear" else reference.ties
        wanted = combine(b, kept, [0.5] * 3, normalize=False)
        assert_rounded_once(merged[name], wanted, np.abs(b) + sum(map(np.abs, kept)))


RECIPES = {
    "ties": listed("weight: 0.5, density: 0.3") + "merge_method: ties\nbase_model: ./base\n",
    "dare": listed("weight: 0.5, density: 0.5") + "merge_method: dare_ties\nbase_model: ./base\n",
    "sparse": listed("weight: 0.5, density: 0.02") + "merge_method: dare_linear\nbase_model: ./base\n",
    "structured": listed() + "merge_method: ties\nbase_model: ./base\nprune: {method: structured, a: 0.2, b: 0.3}\n",
    "l1": listed() + "merge_method: dare_linear\nbase_model: ./base\nprune: {density: 0.3, rescale: l1}\n",
    "mixed": "models:\n  - {model: ./a, prune: {method: dare, density: 0.01}}\n  - {model: ./b, prune: {method: dare, "
    "density: 0.9}}\nparameters: {weight: 0.4}\nmerge_method: task_arithmetic\nbase_model: ./base\n",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_bytes_whatever_the_workers_tiles_backend_and_order(models, tmp_path, monkeypatch, recipe):
    first = run_bytes(models, tmp_path, RECIPES[recipe], "first")
    assert run_bytes(models, tmp_path, RECIPES[recipe], "workers", workers=3) == first
    monkeypatch.setattr("deltamerge.engine.execute.TILE_ELEMENTS", 1 << 10)
    assert run_bytes(models, tmp_path, RECIPES[recipe], "tiles") == first
    monkeypatch.setattr(backends, "fused_available", lambda: False)
    assert run_bytes(models, tmp_path, RECIPES[recipe], "torch", workers=2) == first


def run_bytes(models: Path, tmp_path: Path, text: str, name: str, **options) -> bytes:
    recipe = models / f"{tmp_path.name}.yaml"
    recipe.write_text(text)
    return (run(recipe, tmp_path / name, **options).folder / "model.safetensors").read_bytes()


def test_an_unpruned_fine_tune_comes_back_byte_for_byte(models, tmp_path):
    text = "base_model: ./base\nmodels: [{model: ./a}]\n"
    assert run_bytes(models, tmp_path, text, "out") == (models / "a" / "model.safetensors").read_bytes()


def test_what_other_models_do_does_not_change_a_mask(models, tmp_path):
    alone = "base_model: ./base\nmodels: [{model: ./a, prune: {method: dare, density: 0.05}}]\n"
    beside = (
        "base_model: ./base\nmerge_method: task_arithmetic\nmodels:\n  - {model: ./b, parameters: {weight: 0.0}}\n"
        "  - {model: ./a, parameters: {weight: 1.0}, prune: {method: dare, density: 0.05}}\n"
    )
    one, two = merge(models, tmp_path, alone), merge(models, tmp_path, beside)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shards_index_and_files(models, tmp_path):
    (models / "a" / "tokenizer.json").write_text("{}")
    (models / "a" / "generation_config.json").write_text('{"top_k": 3}')
    (models / "a" / "notes.txt.bak").write_text("private")
    recipe = models / "sharded.yaml"
    recipe.write_text("base_model: ./base\nmodels: [{model: ./a}]\noutput: {shard_size: 200KB}\ndtype: float16\n")
    folder = run(recipe, tmp_path / "out").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {p.name for p in folder.iterdir()}
    assert set(index["weight_map"].values()) <= names
    assert {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "recipe.yaml",
        "recipe.lock",
    } <= names
    assert "notes.txt.bak" not in names
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    card = (folder / "README.md").read_text()
    matter = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in matter  # folders of this machine, which nobody else finds
    assert matter["base_model_relation"] == "finetune"
    assert verify(folder, 1)
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(VerifyError, match=r"config\.json"):
        verify(folder, 1)


def test_a_target_that_is_not_empty_stays_as_it_is(models, tmp_path):
    recipe = models / "kept.yaml"
    recipe.write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        run(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    with pytest.raises(OutputError, match="holds the input"):
        run(recipe, models, force=True)


def test_verify_names_what_the_lock_does_not_list(models, tmp_path):
    """But for what git and the hub's clients keep in a folder, which is hidden; a push sends what is listed."""
    recipe = models / "verified.yaml"
    recipe.write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    out = run(recipe, tmp_path / "out").folder
    for name in (".git", ".cache"):
        (out / name).mkdir()
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    names = verify(out, 1)
    (out / "model-00001-of-00001.safetensors").write_text("")
    (out / "runs").mkdir()
    with pytest.raises(VerifyError, match="verification failed") as caught:
        verify(out, 1)
    assert str(caught.value).splitlines()[1:] == [
        "model-00001-of-00001.safetensors: not in the lock",
        "runs: not in the lock",
    ]
    assert verify(out, 1, only_listed=True) == names


def test_locked_refuses_inputs_that_differ(tmp_path):
    base = weights(0, torch.float32)
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "a", weights(1, torch.float32, base))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    out = run(recipe, tmp_path / "out").folder
    (tmp_path / "recipe.lock").write_bytes((out / "recipe.lock").read_bytes())
    run(recipe, tmp_path / "again", locked=True)
    text = (tmp_path / "recipe.lock").read_text()
    (tmp_path / "recipe.lock").write_text(text.replace("xxh3-64k:", "xxh3:", 1))
    with pytest.raises(VerifyError, match="cannot be compared: the lock has xxh3, this run xxh3-64k"):
        run(recipe, tmp_path / "third", locked=True)
    (tmp_path / "recipe.lock").write_text(text)
    make_checkpoint(tmp_path / "a", weights(2, torch.float32, base))
    with pytest.raises(VerifyError, match=r"\./a: model.safetensors differs"):
        run(recipe, tmp_path / "third", locked=True)
    assert not (tmp_path / "third").exists()


BAD = {
    "layer missing": ({"layers.1.q.weight": None}, "layers.1.q.weight: missing in ./bad"),
    "shape differs": ({"layers.0.q.weight": (24, 23)}, "layers.0.q.weight: shapes differ"),
    "more rows": ({"embed.weight": (303, 24)}, "different numbers of rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_mismatched_models_are_named_before_anything_is_read(models, tmp_path, case):
    changes, message = BAD[case]
    tensors = load_tensors(models / "a")
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    make_checkpoint(models / "bad", tensors)
    recipe = models / "bad.yaml"
    recipe.write_text(listed().replace("./c", "./bad") + "base_model: ./base\nmerge_method: task_arithmetic\n")
    with pytest.raises(InputError, match=message):
        run(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_added_rows_follow_tokenizer_source(models, tmp_path):
    tensors = load_tensors(models / "a")
    extra = torch.full((2, 24), 9.0).to(tensors["embed.weight"].dtype)
    tensors["embed.weight"] = torch.cat([tensors["embed.weight"], extra])
    make_checkpoint(models / "more", tensors)
    text = listed().replace("./c", "./more") + "base_model: ./base\nmerge_method: task_arithmetic\n"
    longer = merge(models, tmp_path, text + "tokenizer_source: ./more\n")["embed.weight"]
    shorter = merge(models, tmp_path, text + "tokenizer_source: base\n")["embed.weight"]
    assert longer.shape == (303, 24)
    assert torch.equal(longer[301:], extra)
    assert torch.equal(longer[:301], shorter)


def test_the_template_may_be_named(models, tmp_path):
    tensors = {**load_tensors(models / "a"), "head.weight": torch.ones(2, 2)}
    make_checkpoint(models / "headed", tensors)
    text = "base_model: ./base\nmodels: [{model: ./headed}]\n"
    assert "head.weight" in merge(models, tmp_path, text)
    assert "head.weight" not in merge(models, tmp_path, text + "template: base\n")


def test_an_unlisted_base_may_lend_linear_its_tokenizer(models, tmp_path):
    (models / "base" / "vocab.txt").write_text("base's")
    (models / "a" / "vocab.txt").write_text("a's")
    recipe = models / "tokenizer.yaml"
    recipe.write_text(listed() + "merge_method: linear\nbase_model: ./base\ntokenizer: {source: base}\n")
    assert (run(recipe, tmp_path / "out").folder / "vocab.txt").read_text() == "base's"


def test_patterns_may_have_flags_of_their_own(models, tmp_path):
    prune = "{method: dare, density: 0.1, exclude: ['(?i)EMBED', norm]}"
    text = f"base_model: ./base\nmodels: [{{model: ./a, prune: {prune}}}]\n"
    merged, tune = merge(models, tmp_path, text), load_tensors(models / "a")
    same = {name for name in tune if torch.equal(merged[name], tune[name])}
    assert {"embed.weight", "layers.0.norm.weight"} <= same
    assert "layers.0.q.weight" not in same


def test_a_part_hashes_every_shard_that_a_fused_tensor_is_read_from(tmp_path: Path) -> None:
    """Experts one by one in many shards, merged with fused ones: each tensor is read from several files."""
    one_by_one = {
        f"model.layers.0.mlp.experts.{e}.{part}.weight": torch.ones(shape)
        for e in range(4)
        for part, shape in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4)))
    }
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 8, 6),
        "model.layers.0.mlp.experts.down_proj": torch.ones(4, 6, 4),
    }
    make_checkpoint(tmp_path / "apart", one_by_one, shards=6)
    make_checkpoint(tmp_path / "fused", fused)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {tmp_path}/fused, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {tmp_path}/apart, parameters: {{weight: 0.5}}}}\n"
    )
    (planned,) = make_plans(read_recipe(recipe))
    shards = {path for path in _files_read(planned, Part(1, 1), ()) if path.parent.name == "apart"}
    assert {path.name for path in shards if path.suffix == ".safetensors"} == {
        f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)
    }
