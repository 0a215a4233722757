"""Kinds of output: each is one object, which alone knows that it is of its kind."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from running import make_plan, run
from safetensors.torch import save_file

import deltamerge
from deltamerge.outputs.output import RunOutput, output_of
from deltamerge.plan.planner import PRUNED_ADAPTER, output_kind
from deltamerge.recipe.output_keys import KINDS, Output
from deltamerge.run.lock import read_lock

PACKAGE = Path(deltamerge.__file__).parent
WHERE_KINDS_ARE_TOLD_APART = ("outputs/", "recipe/output_keys.py")
ASKED: dict[str, dict[str, object]] = {
    "checkpoint": {},
    "delta": {"kind": "delta"},
    "lora": {"kind": "peft", "rank": 2},
    "shira": {"kind": "peft"},
    "gguf": {"gguf": "f16"},
    "running_sum": {"kind": "sum"},
}


def told_apart(source: str) -> Iterator[int]:
    """The lines that compare the kind of an output, as `output.kind` or under a name of its own."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare | ast.Match):
            continue
        sides = [node.subject] if isinstance(node, ast.Match) else [node.left, *node.comparators]
        texts = [ast.unparse(side) for side in sides]
        named = any(text.endswith("output.kind") for text in texts)
        words = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
        if named or (
            words & {"delta", "peft"} and any(text.rpartition(".")[2] in ("kind", "result") for text in texts)
        ):
            yield node.lineno


def test_no_module_outside_outputs_tells_kinds_apart() -> None:
    found = [
        f"{name}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith(WHERE_KINDS_ARE_TOLD_APART)
        for line in told_apart(path.read_text())
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        'if plan.recipe.output.kind != "model": pass',
        'kind = recipe.output.kind\nif kind == "peft": pass',
        'x = 1 if recipe.output.kind in ("model", "sum") else 2',
        "match recipe.output.kind:\n    case 'delta': pass",
    ],
)
def test_a_test_of_a_kind_is_seen(source: str) -> None:
    assert [*told_apart(source)]


def test_a_nodes_kind_is_no_outputs() -> None:
    assert not [*told_apart('if node.kind == "sum" or entry.kind == entry.base_kind: pass')]


@pytest.mark.parametrize("form", ASKED)
def test_each_kind_is_the_object_of_its_file(form: str) -> None:
    found = output_kind(Output.model_validate(ASKED[form]))
    assert found is importlib.import_module(f"deltamerge.outputs.{form}").OUTPUT
    assert isinstance(found, RunOutput)


def test_every_kind_of_a_recipe_has_a_file() -> None:
    assert {Output.model_validate({"kind": kind}).form for kind in KINDS} <= ASKED.keys()
    own = output_kind(Output.model_validate({"kind": "peft"}), own_weights=True)
    assert own is importlib.import_module(f"deltamerge.outputs.{PRUNED_ADAPTER}").OUTPUT
    assert own is not output_kind(Output.model_validate({"kind": "peft"}))


def models(folder: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"model.layers.0.mlp.up_proj.weight": torch.from_numpy(rng.standard_normal((16, 8)).astype(np.float32))}
    for name, step in (("base", 0.0), ("a", 0.5)):
        (folder / name).mkdir()
        save_file({key: value + step for key, value in base.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))


@pytest.mark.parametrize(
    ("recipe", "words", "step", "library"),
    [
        ("task_arithmetic\nbase_model: base", "1 tensors", "AutoModelForCausalLM.from_pretrained", "transformers"),
        ("task_arithmetic\nbase_model: base\noutput: {kind: delta}", "1 tensors", "deltamerge apply", "deltamerge"),
        ("linear\noutput: {kind: sum}", "1 tensors", "merge_method: linear", "transformers"),
    ],
)
def test_a_run_says_of_its_output_what_the_kind_says(
    tmp_path: Path, recipe: str, words: str, step: str, library: str
) -> None:
    models(tmp_path)
    (tmp_path / "r.yaml").write_text(f"models: [{{model: a}}]\nmerge_method: {recipe}\n")
    result = run(tmp_path / "r.yaml", tmp_path / "the merge")
    assert result.name == words
    assert step in result.next_steps[0]
    if step.startswith("deltamerge"):
        assert f" '{tmp_path / 'the merge'}' --base base " in result.next_steps[0]
    assert result.next_steps[1] == f"verify  deltamerge verify '{tmp_path / 'the merge'}'"
    assert result.remarks == ()
    assert f"library_name: {library}\n" in (tmp_path / "the merge" / "README.md").read_text()


def test_a_kind_of_output_adds_what_it_has_to_say_to_lock_card_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind that nobody has thought of needs a file of its own, and no other place."""
    from deltamerge.outputs.checkpoint import OUTPUT, CheckpointOutput
    from deltamerge.outputs.output import Account, Weights, WriteJob
    from deltamerge.plan.planner import Plan

    class Told(Account):
        def describe(self) -> dict[str, object]:
            return {"quantization": {"relative_error": 0.25, "tensors": {}}}

        def card(self, plan: Plan) -> list[str]:
            return ["## Above the search", ""]

        def table(self) -> list[str]:
            return ["## Below it", ""]

    class Other(CheckpointOutput):
        def describe(self, plan: Plan) -> dict[str, object]:
            return {"other": len(plan.outputs)}

        def write(self, plan: Plan, job: WriteJob) -> Weights:
            made = OUTPUT.write(plan, job)
            return Weights(made.plan, made.values, made.hashed, made.nonfinite, made.seals, Told())

        def add(self, plan: Plan, folder: Path) -> tuple[str, ...]:
            (folder / "other.txt").write_text("other")
            return ("other.txt: other",)

    monkeypatch.setattr("deltamerge.outputs.checkpoint.OUTPUT", Other())
    models(tmp_path)
    (tmp_path / "r.yaml").write_text("models: [{model: a}]\nmerge_method: linear\n")
    assert make_plan(tmp_path / "r.yaml").describe()["other"] == 1
    result = run(tmp_path / "r.yaml", tmp_path / "out")
    assert isinstance(output_of(result.plan), Other)
    lock, card = read_lock(tmp_path / "out" / "recipe.lock"), (tmp_path / "out" / "README.md").read_text()
    assert lock["quantization"] == {"relative_error": 0.25, "tensors": {}}
    assert "other.txt" in lock["outputs"]
    assert card.index("## Above the search") < card.index("## Below it")
    assert "- other.txt: other" in card


def test_a_plain_run_imports_no_other_output_and_no_other_command(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "r.yaml").write_text("models: [{model: a}]\nmerge_method: linear\n")
    code = (
        "import sys; from pathlib import Path; from deltamerge.recipe.file import read_recipe\n"
        "from deltamerge.run.runner import run; run(read_recipe(Path('r.yaml')))\n"
        "print(*sorted(name.removeprefix('deltamerge.') for name in sys.modules"
        " if name.startswith(('deltamerge.outputs.', 'deltamerge.run.', 'deltamerge.apps.'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    needed = {f"outputs.{name}" for name in ("assets", "checkpoint", "output")}
    needed |= {
        f"run.{name}" for name in ("card", "hashes", "lock", "options", "partition", "plans", "reading", "runner")
    }
    assert set(done.stdout.split()) == needed
