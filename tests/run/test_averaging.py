"""Averages of checkpoints: series, schedules, and running sums that go on."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_choice import available, computed_by
from raw_tensors import read_checkpoint as read
from raw_tensors import stored, widened, write_checkpoint
from running import make_plans, run
from tolerance import after_rounding

from deltamerge.errors import DeltamergeError, InputError, RecipeError
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.recipe import series
from deltamerge.recipe.load import loads

STEPS = (9, 10, 100, 200, 1000)
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 6}
CODES = {"model.embed_tokens.weight": "BF16", "model.layers.0.mlp.up_proj.weight": "BF16", "model.norm.weight": "F32"}


def checkpoint(folder: Path, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    tensors = {name: stored(draw.normal(0, 0.3, (6, 700) if "norm" not in name else (700,)), code)
               for name, code in CODES.items()}  # fmt: skip
    return write_checkpoint(folder, tensors, CONFIG)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for step in STEPS:
        checkpoint(tmp_path / "run" / f"step-{step}", step)
    return tmp_path


def made(home: Path, text: str, name: str = "r") -> Path:
    (home / f"{name}.yaml").write_text(text)
    return run(home / f"{name}.yaml", home / f"{name}-out").folder


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights and config."""
    names = sorted(path.name for path in a.glob("*.safetensors"))
    return bool(names) and all((a / n).read_bytes() == (b / n).read_bytes() for n in [*names, "config.json"])


def reference(schedule: str, count: int, decay: float = 0.0) -> list[float]:
    """Weights from their definitions: of minus_sqrt by the decay of each update, of ema by its recursion."""
    if schedule == "minus_sqrt":
        left = [1 - np.sqrt(i / count) for i in range(count + 1)]
        return [a - b for a, b in pairwise(left)]
    weights = [1.0]
    for n in range(1, count):
        keep = decay if schedule == "ema" else n / (n + 1)
        weights = [keep * w for w in weights] + [1 - keep]
    return weights


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize(
    ("keys", "steps", "schedule", "decay"),
    [
        ("", STEPS, "constant", 0.0),
        ("window: 3, schedule: minus_sqrt", STEPS[-3:], "minus_sqrt", 0.0),
        ("schedule: ema, decay: 0.7", STEPS, "ema", 0.7),
        ("window: 1, schedule: minus_sqrt", STEPS[-1:], "minus_sqrt", 0.0),
    ],
)
def test_an_average_is_the_weighted_mean_of_its_checkpoints(home, keys, steps, schedule, decay, backend):
    with computed_by(backend):
        out = made(home, f"merge_method: linear\nmodels: {{model: run/step-*, {keys}}}\n")
    weights = reference(schedule, len(steps), decay)
    inputs = [read(home / "run" / f"step-{step}") for step in steps]
    for name, (code, values) in read(out).items():
        wanted = sum(w * widened(one[name]) for w, one in zip(weights, inputs, strict=True))
        assert code == CODES[name]
        tolerance = {"F32": 1e-6, "BF16": after_rounding(torch.bfloat16)}[code]
        np.testing.assert_allclose(widened((code, values)), wanted, rtol=tolerance, atol=tolerance / 10)


def test_weights_in_the_running_form_are_in_proportion_to_the_shares():
    for schedule, decay in (("constant", None), ("ema", 0.3), ("ema", 0.95)):
        for count in (1, 2, 7, 40):
            shares = np.array(series.shares(schedule, count, decay))
            np.testing.assert_allclose(shares, reference(schedule, count, decay or 0.0), rtol=1e-12)
            running = series.running(schedule, 0, count, decay)
            np.testing.assert_allclose(np.array(running) / sum(running), shares, rtol=1e-12)
            assert running == series.running(schedule, 0, count + 3, decay)[:count]
    np.testing.assert_allclose(series.shares("minus_sqrt", 9), reference("minus_sqrt", 9), rtol=1e-12)
    assert series.running("minus_sqrt", 0, 3) is None
    assert series.running("ema", 0, 400, 0.5) is None


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("keys", ["schedule: constant", "schedule: ema, decay: 0.6"])
def test_one_more_checkpoint_costs_one_read_and_gives_the_bytes_of_all_anew(home, keys, backend):
    """The sum of 3, two more added one after another, and every average of a sum: equal to the average of all."""
    for step in STEPS[3:]:
        (home / "run" / f"step-{step}").rename(home / f"step-{step}")
    document = "merge_method: linear\nmodels: {models}\noutput: {{kind: sum, path: {path}}}\nname: added\n---\n"
    document += "merge_method: linear\nmodels: added\n"
    with computed_by(backend):
        out = made(home, document.format(models=f"{{model: run/step-*, {keys}}}", path="sum-3"), "first")
        anew = made(home, f"merge_method: linear\nmodels: {{model: run/step-*, {keys}}}\n", "anew-3")
        assert same(out, anew)
        for count, step in ((4, STEPS[3]), (5, STEPS[4])):
            (home / f"step-{step}").rename(home / "run" / f"step-{step}")
            earlier = [
                path.rename(home / path.name) for path in (home / "run").iterdir() if path.name != f"step-{step}"
            ]
            text = document.format(models=f"[sum-{count - 1}, run/step-{step}]", path=f"sum-{count}")
            out = made(home, text, f"added-{count}")
            for path in earlier:
                path.rename(home / "run" / path.name)
            anew = made(home, f"merge_method: linear\nmodels: {{model: run/step-*, {keys}}}\n", f"anew-{count}")
            assert same(out, anew)
    said = json.loads((home / "sum-5" / "running_sum.json").read_text())
    assert said["models"] == [f"run/step-{step}" for step in STEPS]
    first, second = make_plans(home / "added-5.yaml")
    weights = sum(np.prod(info.shape, dtype=int) for info in open_checkpoint(anew).tensors.values())
    assert first.read_bytes <= weights * (4 + 2) + 2 * 700
    assert second.read_bytes == weights * 4


def test_a_running_sum_is_no_model(home):
    made(home, "merge_method: linear\nmodels: run/step-*\noutput: {kind: sum}\n", "sum")
    with pytest.raises(InputError, match="running sum"):
        open_checkpoint(home / "sum-out")
    for text, match in (
        ("merge_method: slerp\nbase_model: sum-out\nmodels: [run/step-9]\nparameters: {t: 0.5}", "running sum of 5"),
        ("merge_method: linear\nmodels: [more, sum-out]", "stands first"),
        ("merge_method: linear\nmodels: [sum-out]\nparameters: {normalize: false}", "weight is 1"),
        ("merge_method: linear\nmodels: [sum-out, {model: more, parameters: {weight: 3}}]", "weights of its schedule"),
        ("merge_method: linear\nmodels: [sum-out, run/step-10]", "run/step-10 is in the running sum already"),
        ("merge_method: linear\nmodels: [sum-out, {model: more, schedule: minus_sqrt}]", "sum is of schedule constant"),
        ("merge_method: linear\nmodels: [sum-out, {model: mor*, window: 1}]", "a window leaves out models"),
    ):
        if not (home / "more").exists():
            checkpoint(home / "more", 77)
        (home / "x.yaml").write_text(text)
        with pytest.raises(DeltamergeError, match=match):
            make_plans(home / "x.yaml")
    for damage in ('{"format": 1}', '{"format": 9}', "[]", '{"format": 1, "total": -1}'):
        (home / "sum-out" / "running_sum.json").write_text(damage)
        (home / "x.yaml").write_text("merge_method: linear\nmodels: [sum-out]")
        with pytest.raises(DeltamergeError, match=r"running_sum\.json"):
            make_plans(home / "x.yaml")


def test_tensors_that_only_some_checkpoints_have_are_refused_in_a_sum(home):
    tensors = read(home / "run" / "step-9")
    write_checkpoint(home / "run" / "step-9", {**tensors, "extra.weight": stored(np.ones(3), "F32")}, CONFIG)
    (home / "x.yaml").write_text("merge_method: linear\nmodels: run/step-*\noutput: {kind: sum}\n")
    with pytest.raises(InputError, match=r"extra\.weight: missing in run/step-10"):
        make_plans(home / "x.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("models: run/stop-*\nmerge_method: linear", "run/stop-\\* matches no folder"),
        ("models: run/**/step-*\nmerge_method: linear", "\\*\\* is not read"),
        ("models: {model: run/step-*, schedule: ema}\nmerge_method: linear", "ema needs decay"),
        ("models: {model: run/step-*, decay: 0.5}\nmerge_method: linear", "is of schedule: ema"),
        ("models: {model: run/step-*, schedule: cosine}\nmerge_method: linear", "one of constant, minus_sqrt, ema"),
        ("models: {model: run/step-9, window: 2}\nmerge_method: linear", "is of a series of models"),
        ("models: {model: run/step-*, window: 0}\nmerge_method: linear", "at least 1"),
        ("models: {model: run/step-*, schedule: constant}\nmerge_method: model_stock\nbase_model: a", "gives weights"),
        ("models: run/step*\nmerge_method: linear", "run/step-best has no number"),
        ("models: {model: run/step-*0, window: 2}\nmerge_method: linear\noutput: {kind: sum}", "has no window"),
        ("models: {model: run/step-*0, schedule: minus_sqrt}\nmerge_method: linear\noutput: {kind: sum}", "minus_sqrt"),
        ("models: {model: run/*-*0, schedule: ema, decay: 1e-20}\nmerge_method: linear\noutput: {kind: sum}", "range"),
        ("models: run/step-*0\nmerge_method: linear\noutput: {kind: sum}\ndtype: float16", "is not for a running sum"),
        ("models: run/step-*0\nmerge_method: linear\noutput: {kind: sum}\nparameters: {weight: 1}", "its schedule"),
        ("models: run/step-*0\nmerge_method: ties\nbase_model: run/step-9\noutput: {kind: sum}", "of linear, not ties"),
    ],
)  # fmt: skip
def test_faults_of_a_series_are_told(home, text, match):
    if "step*" in text:
        checkpoint(home / "run" / "step-best", 1)
    with pytest.raises(RecipeError, match=match):
        loads(text, str(home / "r.yaml"))


def test_a_series_is_of_finished_folders_in_the_order_of_their_numbers(home):
    runs = home / "run"
    (runs / "tmp-step-1200").mkdir()
    (runs / ".step-7").mkdir()
    (runs / "step-1").write_text("a file")
    (runs / "step-2000").symlink_to("step-1000")
    recipe = loads("models: run/*step-*\nmerge_method: linear", str(home / "r.yaml"))
    assert recipe.names == tuple(f"run/step-{step}" for step in STEPS)
    said = "\n".join(line for one in recipe.series for line in one.describe())
    assert "5 models, constant 0.2 each" in said
    assert "unfinished, by their names: run/tmp-step-1200" in said
    assert "links to others of them: run/step-2000" in said
    (home / "r.yaml").write_text("models: {model: run/step-*, window: 2, schedule: minus_sqrt}\nmerge_method: linear")
    (plan,) = make_plans(home / "r.yaml")
    assert "the last 2 of 5 models, minus_sqrt: run/step-200 0.7071, run/step-1000 0.2929" in plan.notes[0]
    (runs / "step-1000" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="run/step-1000: "):
        make_plans(home / "r.yaml")


def test_a_schedule_beside_other_models_adds_up_to_the_weight_of_its_item(home):
    first = "{model: run/step-?00, parameters: {weight: 0.5}, schedule: minus_sqrt}"
    text = f"merge_method: linear\nmodels: [{first}, {{model: run/step-9, parameters: {{weight: 0.5}}}}]"
    recipe = loads(text, str(home / "r.yaml"))
    weights = [model.parameters["weight"] for model in recipe.models]
    np.testing.assert_allclose(weights, [0.5 * 0.5**0.5, 0.5 * (1 - 0.5**0.5), 0.5])
    shutil.rmtree(home / "run")
