"""Files of several documents: order, results, and what is made again when something changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import load_tensors, tiny_llama
from running import calibrate, make_plans, run

from deltamerge import cli
from deltamerge.errors import DeltamergeError, OutputError, RecipeError, VerifyError
from deltamerge.files.journal import Journal
from deltamerge.files.work_folder import mark
from deltamerge.recipe.file import read_recipe
from deltamerge.run.lock import verify

CHAIN = """\
# the output's parts come after it
merge_method: passthrough
slices:
  - sources: [{model: second, layer_range: [0, 2]}]
  - sources: [{model: first, layer_range: [1, 2]}]
---
name: second
merge_method: linear
models: [{model: first}, {model: ./b}]   # é
parameters: {weight: 1}
---
name: first
merge_method: linear
models: [{model: ./a}, {model: ./b}]
parameters: {weight: 1}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed, name in enumerate("ab"):
        tiny_llama(tmp_path / name, seed=seed, dtype=torch.float32, tokenizer=True)
    (tmp_path / "r.yaml").write_text(CHAIN)
    return tmp_path


def made(folder: Path) -> dict[str, bool]:
    return {path.name: new for path, new in run(folder / "r.yaml", force=True).intermediate.items()}


def test_documents_are_made_in_the_order_of_need(folder):
    result = run(folder / "r.yaml")
    assert result.folder == folder / "r-merged"
    a, b, merged = (load_tensors(folder / name) for name in ("a", "b", "r-merged"))
    name = "model.layers.{}.mlp.up_proj.weight"
    first = [(a[name.format(i)] + b[name.format(i)]) / 2 for i in range(2)]
    for i in range(2):
        torch.testing.assert_close(merged[name.format(i)], (first[i] + b[name.format(i)]) / 2)
    torch.testing.assert_close(merged[name.format(2)], first[1])
    beside = folder / "r-merged-intermediate"
    assert list(result.intermediate) == [beside / "first", beside / "second"]
    assert all(verify(path, 1) for path in (*result.intermediate, result.folder))
    assert (result.folder / "recipe.yaml").read_text() == CHAIN
    again = read_recipe(beside / "second" / "recipe.yaml").documents
    assert [document.name for document in again] == ["first", "second"]
    assert "é" in again[1].recipe.source.text
    assert set(result.lock["inputs"]) == {"second", "first"}


def test_a_plan_promises_what_the_run_makes(folder):
    promised = make_plans(folder / "r.yaml")
    run(folder / "r.yaml")
    kept = make_plans(folder / "r.yaml")
    for before, after in zip(promised, kept, strict=True):
        assert before.describe() == after.describe()
        assert [m.checkpoint.tensors for m in before.inputs.all] == [m.checkpoint.tensors for m in after.inputs.all]
        assert [m.checkpoint.config for m in before.inputs.all] == [m.checkpoint.config for m in after.inputs.all]


def test_only_what_changed_is_made_again(folder):
    assert made(folder) == {"first": True, "second": True}
    assert made(folder) == {"first": False, "second": False}
    (folder / "r.yaml").write_text(CHAIN.replace("# é", "# another comment"))
    assert made(folder) == {"first": False, "second": False}
    changed = CHAIN.replace("{weight: 1}", "{weight: 2}", 1)  # which normalising takes out again
    (folder / "r.yaml").write_text(changed)
    assert made(folder) == {"first": False, "second": True}
    tiny_llama(folder / "a", seed=5, dtype=torch.float32, tokenizer=True)
    assert made(folder) == {"first": True, "second": True}
    first = folder / "r-merged-intermediate" / "first"
    with (first / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    assert made(folder) == {"first": True, "second": False}


def test_files_that_are_copied_count_too(folder):
    made(folder)
    for name in ("config.json", "tokenizer.json"):
        with (folder / "a" / name).open("a") as file:
            file.write("\n")
        assert made(folder) == {"first": True, "second": True}
        assert made(folder) == {"first": False, "second": False}


def test_a_locked_chain_wants_the_same_intermediate_results(folder):
    out = run(folder / "r.yaml").folder
    (folder / "r.lock").write_bytes((out / "recipe.lock").read_bytes())
    before = (out / "model.safetensors").read_bytes()
    run(folder / "r.yaml", folder / "elsewhere", locked=True)  # makes them again, to the same bytes
    assert (folder / "elsewhere" / "model.safetensors").read_bytes() == before
    tiny_llama(folder / "b", seed=9, dtype=torch.float32, tokenizer=True)
    with pytest.raises(VerifyError, match=r"first: model\.safetensors differs"):
        run(folder / "r.yaml", folder / "third", locked=True)


def test_a_document_may_say_where_its_result_lies(folder):
    (folder / "r.yaml").write_text(CHAIN.replace("name: first", "name: first\noutput: {path: kept}"))
    run(folder / "r.yaml", folder / "elsewhere" / "out")
    assert verify(folder / "kept", 1)
    assert verify(folder / "elsewhere" / "out-intermediate" / "second", 1)


def test_a_folder_that_is_not_ours_stays(folder):
    mine = folder / "r-merged-intermediate" / "first" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        run(folder / "r.yaml")
    assert mine.read_text() == "precious"
    assert not (folder / "r-merged").exists()


OUTSIDE = {"absolute": "{home}/elsewhere/first", "above": "../first", "the folder itself": ".", "a link": "away/first"}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_result_outside_the_recipes_folder_takes_force(tmp_path, case):
    folder = tmp_path / "repo"
    for seed, name in enumerate("ab"):
        tiny_llama(folder / name, seed=seed, dtype=torch.float32, tokenizer=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    place = OUTSIDE[case].format(home=tmp_path)
    (folder / "r.yaml").write_text(CHAIN.replace("name: first", f"name: first\noutput: {{path: {place}}}"))
    with pytest.raises(RecipeError, match=r"r\.yaml:13:16: output\.path: leaves the recipe's folder, to /") as caught:
        run(folder / "r.yaml")
    assert "--force" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "away", "b", "r.yaml"]
    assert not list((tmp_path / "elsewhere").iterdir())
    if case != "the folder itself":
        kept = next(iter(run(folder / "r.yaml", force=True).intermediate))
        assert verify(kept, 1)
        assert kept.resolve().is_relative_to(tmp_path)
        assert not kept.resolve().is_relative_to(folder)


def test_a_result_replaces_only_what_its_document_made(folder):
    """Not a run's folder of another name; not even its own, with something in it."""
    text = CHAIN.replace("name: first", "name: first\noutput: {path: kept}")
    (folder / "one.yaml").write_text("name: other\n" + ONE)
    run(folder / "one.yaml", folder / "kept")
    (folder / "r.yaml").write_text(text)
    with pytest.raises(OutputError, match="kept: not empty"):
        run(folder / "r.yaml")
    shutil.rmtree(folder / "kept")
    run(folder / "r.yaml", folder / "whole")  # of several documents, the last of which is named first
    shutil.rmtree(folder / "kept")
    (folder / "whole").rename(folder / "kept")
    with pytest.raises(OutputError, match="kept: not empty"):
        run(folder / "r.yaml")
    shutil.rmtree(folder / "kept")
    run(folder / "r.yaml")
    shutil.rmtree(folder / "r-merged")
    changed = text.replace("{weight: 1}", "{weight: [1, 2]}")
    (folder / "r.yaml").write_text(changed)
    (folder / "kept" / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"kept: (not empty|--force replaces only .* would delete thesis.txt)"):
            run(folder / "r.yaml", force=force)
    assert (folder / "kept" / "thesis.txt").read_text() == "mine"
    (folder / "kept" / "thesis.txt").unlink()
    assert list(run(folder / "r.yaml").intermediate.values()) == [True, True]


def test_a_published_recipe_writes_beside_the_target_only(folder):
    """Of a stranger's recipe, as `run hf://` fetches it, no output.path is followed, with --force neither."""
    (folder / "home").mkdir()
    places = {"first": f"{folder}/home/precious", "second": "../elsewhere"}
    text = CHAIN
    for name, place in places.items():
        text = text.replace(f"name: {name}", f"name: {name}\noutput: {{path: {place}}}")
    (folder / "r.yaml").write_text(text)
    run(folder / "r.yaml", folder / "home" / "out", pins={}, force=True)
    assert sorted(path.name for path in (folder / "home").iterdir()) == ["out", "out-intermediate"]
    assert not (folder.parent / "elsewhere").exists()


def test_a_chain_killed_after_a_rename_is_tidied(folder):
    result = run(folder / "r.yaml")
    for made in (*result.intermediate, result.folder):
        state = made.parent / f".{made.name}.partial"
        state.mkdir()
        mark(state)
        journal = Journal(state / "journal")
        journal.append({"run": {}, "force": False})
        journal.append({"done": {"model.safetensors": [[0, 9]]}})
        journal.close()
    again = run(folder / "r.yaml", resume=True)
    assert list(again.intermediate.values()) == [False, False]
    assert not list(folder.rglob(".*.partial"))


def test_a_fault_in_the_last_document_stops_the_first(folder):
    (folder / "r.yaml").write_text(CHAIN.replace("[1, 2]", "[1, 9]"))
    message = r"r\.yaml:5:43: slices\[1\]\.sources\[0\]\.layer_range: is \[1, 9\), first has 2"
    with pytest.raises(RecipeError, match=message):
        run(folder / "r.yaml")
    assert not (folder / "r-merged-intermediate").exists()


ONE = "merge_method: passthrough\nmodels: [{model: ./a}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ONE}---\n{ONE}", r"r\.yaml:4:1: a second document without a name"),
        (f"name: x\n{ONE}---\nname: x\n{ONE}", r"r\.yaml:5:7: name: another document is named 'x'"),
        (f"name: ../x\n{ONE}---\n{ONE}", r"r\.yaml:1:7: name: must be letters"),
        (
            f"name: x\n{ONE}---\nname: y\n{ONE}".replace("./a", "y", 1).replace("./a", "x"),
            r"name: documents need each other: [xy] → [xy] → [xy]",
        ),
        (
            f"{ONE}---\nmerge_method: passthroug\nmodels: [{{model: ./a}}]\nname: x\n",
            r"r\.yaml:4:15: merge_method: unknown",
        ),
        ("---\n", "empty"),
    ],
)
def test_faults_of_documents(folder, text, message):
    (folder / "r.yaml").write_text(text)
    with pytest.raises(DeltamergeError, match=message):
        make_plans(folder / "r.yaml")


def test_an_empty_document_is_none_and_names_need_no_order(folder):
    (folder / "r.yaml").write_text(f"name: x\n{ONE}---\nname: y\n{ONE.replace('./a', 'x')}---\n")
    assert [plan.recipe.name for plan in make_plans(folder / "r.yaml")] == ["x", "y"]


def test_calibrate_wants_one_document(folder):
    with pytest.raises(DeltamergeError, match="has several documents"):
        calibrate(folder / "r.yaml")


def test_the_commands_speak_of_every_document(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runner = CliRunner()
    assert "r.yaml: ok, 3 documents, 30 tensors" in runner.invoke(cli.commands, ["check", "r.yaml"]).output
    planned = runner.invoke(cli.commands, ["plan", "r.yaml"]).output
    assert [line for line in planned.splitlines() if line.startswith("document")] == [
        "document first",
        "document second",
    ]
    assert "3 layers of model.layers, of 2 before: second 0-1, first 1-1" in planned
    assert set(json.loads(runner.invoke(cli.commands, ["plan", "--json", "r.yaml"]).output)["intermediate"]) == {
        "first",
        "second",
    }
    assert "second: made" in runner.invoke(cli.commands, ["run", "r.yaml"]).output
    assert "second: up to date" in runner.invoke(cli.commands, ["run", "--force", "r.yaml"]).output
