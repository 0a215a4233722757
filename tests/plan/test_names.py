"""Recipes over one model under several names, and over experts stored in several ways; the bytes are those of the same
recipe over models that agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import call
from raw_tensors import Stored, read_checkpoint, stored, widened, write_checkpoint
from running import make_plan, run

from deltamerge.errors import DeltamergeError

H, INNER, E, LAYERS = 4, 6, 3, 2
Model = dict[str, Stored]


def text_model(seed: int, base: Model | None = None) -> Model:
    """A text model with experts one by one."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, H)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.input_layernorm.weight": (H,), f"{start}.self_attn.q_proj.weight": (H, H),
                   f"{start}.mlp.gate.weight": (E, H)}  # fmt: skip
        for e in range(E):
            expert = f"{start}.mlp.experts.{e}"
            shapes |= {f"{expert}.{part}.weight": (INNER, H) for part in ("gate_proj", "up_proj")}
            shapes[f"{expert}.down_proj.weight"] = (H, INNER)
    shapes |= {"model.norm.weight": (H,), "lm_head.weight": (8, H)}
    return drawn(shapes, seed, base)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int, base: Model | None = None) -> Model:
    generator = np.random.default_rng(seed)
    values = {
        n: generator.normal(size=s) * 0.1 + (0 if base is None else 10 * widened(base[n])) for n, s in shapes.items()
    }
    return {name: stored(value * 0.1 if base else value, "BF16") for name, value in values.items()}


TOWER = drawn({"vision_tower.patch.weight": (6, 3), **{f"vision_tower.layers.{i}.fc.weight": (6, 6) for i in range(3)},
               "multi_modal_projector.linear.weight": (H, 6)}, 9)  # fmt: skip


def before(model: Model) -> Model:
    """As transformers before 4.52 saved a Llava: its text model whole under `language_model`."""
    return {f"language_model.{name}" if name not in TOWER else name: tensor for name, tensor in model.items()}


def after(model: Model) -> Model:
    """As a Llava is in memory since 4.52."""
    head = {"lm_head.weight"}
    return {
        n if n in head else f"model.{n}" if n in TOWER else n.replace("model.", "model.language_model.", 1): t
        for n, t in model.items()
    }


def same(model: Model) -> Model:
    return dict(model)


def fused(model: Model) -> Model:
    """Experts as transformers 5 has them in memory: (E, 2 I, H) and (E, H, I)."""
    result = {name: tensor for name, tensor in model.items() if ".experts." not in name}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.mlp.experts"
        parts = {
            p: np.stack([model[f"{start}.{e}.{p}.weight"][1] for e in range(E)])
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        result[f"{start}.gate_up_proj"] = "BF16", np.concatenate([parts["gate_proj"], parts["up_proj"]], 1)
        result[f"{start}.down_proj"] = "BF16", parts["down_proj"]
    return result


def turned(model: Model) -> Model:
    """Experts as Qwen3-VL and Llama 4 store them: (E, H, 2 I) and (E, I, H)."""
    return {
        n: (code, np.ascontiguousarray(array.swapaxes(1, 2))) if ".experts." in n else (code, array)
        for n, (code, array) in fused(model).items()
    }


def as_mixtral(model: Model) -> Model:
    new = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp.": "block_sparse_moe."}
    result = {}
    for name, tensor in model.items():
        for old, word in new.items():
            name = name.replace(old, word)
        result[name] = tensor
    return result


BASE = text_model(0)
TUNES = {name: text_model(seed, BASE) for seed, name in enumerate("ab", 1)}
CONFIG = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
          "text_config": {"num_hidden_layers": LAYERS}, "vision_config": {"num_hidden_layers": 3}}  # fmt: skip
Form = Callable[[Model], Model]


def write(folder: Path, base: Model, a: Model, b: Model) -> None:
    for name, model in (("base", base), ("a", a), ("b", b)):
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder / name, model, CONFIG)


ONE = "base_model: ./base\nmodels: [{model: ./a, prune: {method: magnitude, density: 0.5}}]\n"
TWO = """\
base_model: ./base
merge_method: task_arithmetic
models: [{model: ./a, prune: {method: dare, density: 0.5}}, {model: ./b}]
parameters: {weight: [0.3, 0.7]}
"""


LINEAR = {
    1: "base_model: ./base\nmerge_method: task_arithmetic\nmodels: [{model: ./a}]\nparameters: {weight: 0.5}\n",
    2: TWO.replace(", prune: {method: dare, density: 0.5}", ""),
}


def merged(folder: Path, text: str, out: str = "out") -> Model:
    (folder / "r.yaml").write_text(text)
    run(folder / "r.yaml", folder / out)
    return read_checkpoint(folder / out)


def equal(got: Model, want: Model) -> None:
    assert got.keys() == want.keys()
    for name, (code, array) in got.items():
        assert code == want[name][0], name
        np.testing.assert_array_equal(array, want[name][1], err_msg=name)


@pytest.mark.parametrize(
    ("towers", "count"), [((False, False), 1), ((True, False), 2), ((False, True), 2), ((True, True), 1)]
)
@pytest.mark.parametrize("forms", [(same, before), (before, after), (after, same)])
def test_merged_under_any_names_as_under_one(
    tmp_path: Path, forms: tuple[Form, Form], towers: tuple[bool, bool], count: int
) -> None:
    """The output is that of models that all have the template's names; a tower that some lack is the template's."""
    base, tune = forms
    in_base, in_tune = (TOWER if there else {} for there in towers)
    first = count == 1 or (bool(in_tune) and not in_base)  # the template is a fine-tune
    template, tower = (tune, in_tune) if first else (base, in_base)
    recipe = ONE if count == 1 else TWO
    both = TOWER if all(towers) else {}  # gradients count its layers too
    write(tmp_path / "plain", template(BASE | both), template(TUNES["a"] | both), template(TUNES["b"] | both))
    want = merged(tmp_path / "plain", recipe)
    write(tmp_path, base(BASE | in_base), tune(TUNES["a"] | in_tune), tune(TUNES["b"] | in_tune))
    equal(merged(tmp_path, recipe), want | template(tower))


@pytest.mark.parametrize(
    ("base", "tune", "count"),
    [
        (same, fused, 1),
        (same, turned, 2),
        (turned, same, 1),
        (fused, turned, 2),
        (turned, fused, 1),
        (as_mixtral, fused, 2),
    ],
)
def test_experts_apart_fused_or_transposed(tmp_path: Path, base: Form, tune: Form, count: int) -> None:
    """A merge without masks is the same entry by entry, so the plain output in the template's form is the judge."""
    recipe = LINEAR[count]
    write(tmp_path / "plain", BASE, TUNES["a"], TUNES["b"])
    plain = merged(tmp_path / "plain", recipe)
    write(tmp_path, base(BASE), tune(TUNES["a"]), tune(TUNES["b"]))
    equal(merged(tmp_path, recipe), (tune if count == 1 else base)(plain))
    notes = make_plan(tmp_path / "r.yaml").notes
    assert any("experts are read as the output stores them" in note for note in notes)


@pytest.mark.parametrize(("base", "tune"), [(same, fused), (fused, same), (turned, fused), (before, after)])
def test_deltas_of_other_names_and_layouts(tmp_path: Path, capsys, base: Form, tune: Form) -> None:
    """extract, apply, diff and inspect; a delta has the base's layout and gives the fine-tune's values."""
    write(tmp_path, base(BASE), tune(TUNES["a"]), tune(TUNES["b"]))
    names = {"delta": tmp_path / "delta", "back": tmp_path / "back"}
    assert call(capsys, "extract", tmp_path / "a", "--base", tmp_path / "base", "--out", names["delta"])[0] == 0
    code, _, err = call(capsys, "apply", names["delta"], "--base", tmp_path / "base", "--out", names["back"])
    assert code == 0, err
    back = read_checkpoint(names["back"])
    equal(back, (base if base is not before else tune)(TUNES["a"]))
    for other in ("a", "back"):
        code, out, _ = call(capsys, "diff", tmp_path / "a", tmp_path / other, "--json")
        assert json.loads(out)["changed"] == 0
        assert json.loads(out)["added"] == json.loads(out)["removed"] == []
    code, out, _ = call(capsys, "inspect", tmp_path / "a", "--base", tmp_path / "base", "--json")
    assert code == 0


def test_slices_of_models_under_other_names(tmp_path: Path) -> None:
    write(tmp_path, before(BASE | TOWER), after(TUNES["a"] | TOWER), TUNES["b"])
    text = """\
merge_method: passthrough
modules:
  language_model:
    slices:
      - sources: [{model: ./base, layer_range: [0, 2]}]
      - sources: [{model: ./a, layer_range: [1, 2]}]
      - sources: [{model: ./b, layer_range: [0, 1]}]
  vision_tower: {models: [{model: ./base}]}
  multi_modal_projector: {models: [{model: ./base}]}
"""
    got = merged(tmp_path, text)
    for number, (model, layer) in enumerate([(BASE, 0), (BASE, 1), (TUNES["a"], 1), (TUNES["b"], 0)]):
        own = {n.split(f".{layer}.", 1)[1]: t for n, t in model.items() if n.startswith(f"model.layers.{layer}.")}
        start = f"language_model.model.layers.{number}."
        equal({n.removeprefix(start): t for n, t in got.items() if n.startswith(start)}, own)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["num_hidden_layers"] == 3


def test_two_places_for_one_model_are_refused(tmp_path: Path, capsys) -> None:
    omni = {f"{part}.{name}": tensor for part in ("talker", "thinker") for name, tensor in BASE.items()}
    write(tmp_path, omni, TUNES["a"], TUNES["b"])
    (tmp_path / "r.yaml").write_text(ONE)
    code, _, err = call(capsys, "check", "-v", tmp_path / "r.yaml")
    assert code == 1
    assert "./a and ./base: names match in two ways, * as talker.* or * as thinker.*" in err
    with pytest.raises(DeltamergeError):
        make_plan(tmp_path / "r.yaml")


def test_the_mapping_is_named(tmp_path: Path, capsys) -> None:
    write(tmp_path, before(BASE | TOWER), after(TUNES["a"] | TOWER), TUNES["b"])
    (tmp_path / "r.yaml").write_text(TWO)
    notes = make_plan(tmp_path / "r.yaml").describe()["notes"]
    assert [note for note in notes if "names are matched" in note] == [
        "./a: names are matched: model.language_model.* as language_model.model.*, "
        "model.multi_modal_projector.* as multi_modal_projector.*, model.vision_tower.* as vision_tower.*",
        "./b: names are matched: model.* as language_model.model.*",
    ]
    run(tmp_path / "r.yaml", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "./b: names are matched: model" in card
    code, _, err = call(capsys, "check", "-v", tmp_path / "r.yaml")
    assert (code, "./b: names are matched" in err) == (0, True)
