"""Slips that a recipe or a command was silent about, or answered with a wrong hint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from calls import call
from conftest import tiny_llama
from running import make_plan, run
from safetensors.torch import load_file

import deltamerge
from deltamerge.errors import InputError, OutputError, RecipeError, UsageError
from deltamerge.files.work_folder import state_of, workspace
from deltamerge.models.chain.publish import pin, release
from deltamerge.recipe.yaml_source import dumped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slips")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.bfloat16, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.bfloat16, tokenizer=True)
    return folder


def recipe(path: Path, folder: Path, **keys: object) -> Path:
    models = [{"model": str(folder / "a"), "parameters": {"weight": 1.0}}]
    path.write_text(dumped({"base_model": str(folder / "base"), "merge_method": "ties", "models": models, **keys}))
    return path


def test_a_density_that_another_hides_is_said(folder: Path, tmp_path: Path) -> None:
    models = [{"model": str(folder / "a"), "parameters": {"weight": 1.0, "density": 0.5}}]
    for density, hidden in ((0.2, True), ([{"filter": "q_proj", "value": 0.2}], False), (None, False)):
        prune = {"method": "magnitude"} | ({} if density is None else {"density": density})
        plan = make_plan(recipe(tmp_path / "r.yaml", folder, models=models, prune=prune))
        found = [one for one in plan.warnings if "has no effect beside prune.density" in one]
        assert len(found) == hidden
        assert not hidden or "models[0].parameters.density" in found[0]


def test_a_pattern_that_finds_nothing_is_said(folder: Path, tmp_path: Path) -> None:
    prune = {"method": "magnitude", "density": 0.2, "include": ["nosuch", "q_proj"], "exclude": ["lm_haed"]}
    found = [one for one in make_plan(recipe(tmp_path / "r.yaml", folder, prune=prune)).warnings if "finds" in one]
    assert [one.partition(": ")[2] for one in found] == [
        "prune.include[0]: 'nosuch' finds no tensor of the merge",
        "prune.exclude[0]: 'lm_haed' finds no tensor of the merge",
    ]
    lines = (tmp_path / "r.yaml").read_text().splitlines()
    for one, word in zip(found, ("nosuch", "lm_haed"), strict=True):
        assert word in lines[int(one.split()[1].removesuffix(":")) - 1]


def test_two_documents_are_not_written_to_one_place(folder: Path, tmp_path: Path) -> None:
    text = "name: {}\nmerge_method: linear\nmodels: [{}, {}]\nparameters: {{weight: 1}}\noutput: {{path: {}}}\n"
    path = tmp_path / "two.yaml"
    first, second = (
        text.format("one", folder / "a", folder / "b", "out"),
        text.format("two", "one", folder / "b", "./out"),
    )
    path.write_text(f"{first}---\n{second}")
    with pytest.raises(RecipeError, match=r"two.yaml:11:\d+: output.path: another document is written to './out'"):
        make_plan(path)


def test_python_s_slips_are_one_line(folder: Path, tmp_path: Path) -> None:
    both, path = [str(folder / "a"), str(folder / "b")], recipe(tmp_path / "r.yaml", folder)
    for said, ask in (
        ("is one path", lambda: deltamerge.merge(both[0], tmp_path / "x", method="linear")),
        (r"0\.5\)?: is no value of a recipe",
         lambda: deltamerge.merge(both, tmp_path / "x", method="linear", parameters={"weight": np.float32(0.5)})),
        ("bfloat16: is no value of a recipe",
         lambda: deltamerge.merge(both, tmp_path / "x", method="linear", dtype=torch.bfloat16)),
        ("memory='2GB': must be bytes", lambda: deltamerge.load_recipe(path, memory="2GB")),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            ask()


@pytest.mark.parametrize("scheme", ["int4", "nvfp4", "mxfp4", "int8"])
def test_packed_weights_keep_their_bytes(folder: Path, tmp_path: Path, capsys, scheme: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(capsys, "convert", folder / "a", one, "--quantization", scheme, "-q")[0] == 0
    code, _, err = call(capsys, "convert", one, two, "--quantization", "keep", "-q")
    assert code == 0, err
    before, after = (load_file(path / "model.safetensors") for path in (one, two))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_a_chain_of_one_version_takes_none_that_follows_nothing(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype="auto")
    with deltamerge.DeltaWriter("run", model, base=str(folder / "base")) as writer:
        with torch.no_grad():
            next(model.parameters()).view(-1)[:3] += 0.5
        writer.write(step=1)
    asked = ["extract", folder / "a", "--base", folder / "base", "-q"]
    code, _, err = call(capsys, *asked, "--out", "run/x")
    assert (code, "--after run/000001" in err.replace(f"{tmp_path}/", "")) == (1, True), err
    code, _, err = call(capsys, *asked, "--out", "run/000002", "--after", "run")  # its newest version
    assert code == 0, err
    code, _, err = call(capsys, *asked, "--out", "run/000009")
    assert (code, "--after run/000002" in err.replace(f"{tmp_path}/", "")) == (1, True), err
    with pytest.raises(InputError, match="has no version 000007"):
        pin(Path("run/000007"))
    with pytest.raises(InputError, match="no version of a chain") as caught:
        pin(Path("run"))
    assert str(caught.value.hint).endswith("run/000002")


def test_a_pinned_folder_is_a_chain(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["extract", folder / "a", "--base", folder / "base", "-q"]
    assert call(capsys, *asked, "--out", "c/000001")[0] == 0
    assert call(capsys, *asked, "--out", "c/other")[0] == 0  # a store
    with pytest.raises(InputError, match="is no chain"):
        release(Path("c"))
    assert call(capsys, *asked, "--out", "d/000001")[0] == 0
    pin(Path("d/000001"))
    code, _, err = call(capsys, *asked, "--out", "d/b")
    assert (code, "is a chain" in err) == (1, True)
    release(Path("d"))
    assert call(capsys, *asked, "--out", "d/b")[0] == 0


def test_a_run_that_fails_leaves_no_empty_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    def fail(target: Path) -> None:
        with workspace(target) as work:
            assert work.folder.is_dir()
            raise OutputError("it failed")

    for target in (tmp_path / "x" / "y" / "out", tmp_path / "there" / "z" / "out"):
        with pytest.raises(OutputError, match="it failed"):
            fail(target)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())
    made = run(recipe(tmp_path / "r.yaml", folder), tmp_path / "x" / "y" / "out").folder
    assert (made / "model.safetensors").exists()
    assert not state_of(made).exists()


def test_parts_of_another_count_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    """They would bar the way of a whole set of parts."""
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in "ab"]
    path = recipe(tmp_path / "r.yaml", folder, merge_method="linear", models=models, output={"shard_size": "20kB"})
    asked = ["run", path, "--out", tmp_path / "out", "-q"]
    assert call(capsys, *asked, "--part", "1/3")[0] == 0
    code, _, err = call(capsys, *asked, "--part", "2/2")
    assert "parts of another count are there: 1-of-3" in err, err
    assert code == 1
    for part in ("2/3", "3/3"):
        assert call(capsys, *asked, "--part", part)[0] == 0
    code, _, err = call(capsys, *asked, "--finish")
    assert code == 0, err
    assert (tmp_path / "out" / "recipe.lock").exists()
