"""What a command may replace: what the same recipe or command made; no version that others follow, no store's delta."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calls import call
from conftest import make_checkpoint

from deltamerge.apps.chain.extract import Link
from deltamerge.errors import OutputError
from deltamerge.files import ownership, work_folder
from deltamerge.files.descriptors import files_of
from deltamerge.files.ownership import read_lock
from deltamerge.models.chain import folder as folders
from deltamerge.models.chain.publish import one_writer, publishing
from deltamerge.run import runner
from deltamerge.run.lock import verify

QUICK = ("-q", "--workers", "1")
RECIPE = "base_model: {base}\nmerge_method: task_arithmetic\nmodels:\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, 30, generator=generator).bfloat16(), "norm": torch.zeros(9)}
    make_checkpoint(tmp_path / "base", base)
    for number, name in enumerate(("a", "b", "c"), 1):
        changed = base["w"].clone()
        changed.view(-1)[number * 100 : number * 100 + 50] += number
        make_checkpoint(tmp_path / name, {"w": changed, "norm": base["norm"] + number})
    return tmp_path


def recipe(path: Path, *models: str, weight: float = 0.5, above: str = ".", more: str = "") -> Path:
    lines = "".join(f"  - {{model: {above}/{one}, parameters: {{weight: {weight}}}}}\n" for one in models)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(base=f"{above}/base") + lines + more)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_of(folder).items() if not name.endswith("ing.lock")}


def told(capsys: Any, *words: object) -> str:
    """What is said where a command is refused, in one line and a hint."""
    code, out, err = call(capsys, *map(str, words))
    assert (code, out, "Traceback" in err) == (1, "", False), err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    return err


def done(capsys: Any, *words: object) -> str:
    code, _, err = call(capsys, *map(str, words))
    assert code == 0, err
    return err


def extract(model: str, out: str, *more: object) -> tuple[object, ...]:
    return ("extract", model, "--base", "base", "--out", out, *more, *QUICK)


def chain(capsys: Any) -> None:
    done(capsys, *extract("a", "chain/01"))
    done(capsys, *extract("b", "chain/02", "--after", "chain/01"))
    done(capsys, *extract("c", "chain/03", "--after", "chain/02"))


INTO_A_VERSION: dict[str, Callable[[str], tuple[object, ...]]] = {
    "extract": lambda out: extract("c", out),
    "the same model, pruned": lambda out: extract("a", out, "--density", 0.5),
    "run": lambda out: ("run", "r.yaml", "--out", out, *QUICK),
    "run a delta": lambda out: ("run", "d.yaml", "--out", out, *QUICK),
    "convert": lambda out: ("convert", "a", out, *QUICK),
    "apply": lambda out: ("apply", "lone", "--base", "base", "--out", out, *QUICK),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", INTO_A_VERSION)
def test_a_version_that_others_follow_stays(here: Path, capsys: Any, case: str, force: bool) -> None:
    chain(capsys)
    done(capsys, *extract("c", "lone"))
    recipe(here / "r.yaml", "a", "b")
    recipe(here / "d.yaml", "a", "b", more="output: {kind: delta}\n")
    (here / "link").symlink_to(here / "chain")
    before = content(here / "chain")
    for out in ("chain/01", "chain/02", "link/01"):
        words = (*INTO_A_VERSION[case](out), *(["--force"] if force else []))
        said = told(capsys, *words)
        follower = {"1": "02", "2": "03"}[out[-1]]
        assert f"{out}: is a version of a chain that {follower} comes after, and is never replaced" in said
        assert "deltamerge squash" in said
    assert content(here / "chain") == before
    assert [path.name for path in (here / "chain").iterdir() if path.name.endswith(".partial")] == []
    done(capsys, "verify", "chain", "--base", "base")
    assert "up to date" in done(capsys, *[word for word in extract("a", "chain/01") if word != "-q"])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", INTO_A_VERSION)
def test_a_delta_of_a_store_stays(here: Path, capsys: Any, case: str, force: bool) -> None:
    done(capsys, "extract", "a", "b", "--base", "base", "--out", "store", *QUICK)
    done(capsys, *extract("c", "lone"))
    recipe(here / "r.yaml", "a", "b")
    recipe(here / "d.yaml", "a", "b", more="output: {kind: delta}\n")
    before = content(here / "store")
    said = told(capsys, *INTO_A_VERSION[case]("store/a"), *(["--force"] if force else []))
    assert "store/a: is a delta of the store " in said
    assert "deltamerge remove store/a" in said
    assert content(here / "store") == before
    done(capsys, "remove", "store/a")
    done(capsys, *extract("c", "store/a"))
    assert verify(here / "store" / "a", 1)


def test_a_store_is_known_by_what_it_shares(here: Path, capsys: Any) -> None:
    """Deltas in a folder of work are no store; those that share files are, whatever lies beside them."""
    for name in "ab":
        (here / name / "tokenizer.json").write_text("{}")
    done(capsys, "extract", "a", "b", "--base", "base", *QUICK)
    done(capsys, "extract", "a", "--base", "base", "--density", 0.5, *QUICK)  # the same command on the same model
    assert verify(here / "a-delta", 1)
    done(capsys, "extract", "a", "b", "--base", "base", "--out", "store", *QUICK)
    (here / "store" / "notes.txt").write_text("mine")
    assert "is a delta of the store" in told(capsys, *extract("c", "store/a", "--force"))


MAKERS: dict[str, Callable[[str], tuple[object, ...]]] = {
    "a recipe": lambda out: ("run", "r.yaml", "--out", out, *QUICK),
    "another recipe": lambda out: ("run", "other.yaml", "--out", out, *QUICK),
    "a recipe of the same name": lambda out: ("run", "deep/er/r.yaml", "--out", out, *QUICK),
    "extract": lambda out: extract("a", out),
    "extract another": lambda out: extract("b", out),
    "convert": lambda out: ("convert", "a", out, *QUICK),
    "convert another": lambda out: ("convert", "b", out, *QUICK),
    "apply": lambda out: ("apply", "lone/delta", "--base", "base", "--out", out, *QUICK),
}
SAID = {
    "a recipe": "made by run r.yaml of ./a, ./b, ./base",
    "another recipe": "made by run other.yaml of ./a, ./b, ./base",
    "a recipe of the same name": "made by run r.yaml of ../../a, ../../b, ../../base",
    "extract": "made by extract of a, base", "extract another": "made by extract of b, base",
    "convert": "made by convert of a", "convert another": "made by convert of b",
    "apply": "made by apply of base, lone/delta",
}  # fmt: skip


@pytest.mark.parametrize("first", MAKERS)
def test_what_another_made_takes_force(here: Path, capsys: Any, first: str) -> None:
    recipe(here / "r.yaml", "a", "b")
    recipe(here / "other.yaml", "a", "b", weight=0.25)
    recipe(here / "deep" / "er" / "r.yaml", "a", "b", above="../..", weight=0.25)
    done(capsys, *extract("c", "lone/delta"))
    done(capsys, *MAKERS[first]("out"))
    before = content(here / "out")
    for second, words in MAKERS.items():
        if second == first:
            continue
        said = told(capsys, *words("out"))
        assert f"out: not empty: the result there was {SAID[first]}" in said
        assert "choose another folder with --out, or replace it with --force" in said
        assert content(here / "out") == before
    done(capsys, *MAKERS["another recipe" if first == "a recipe" else "a recipe"]("out"), "--force")
    assert content(here / "out") != before
    assert verify(here / "out", 1)


def test_a_changed_recipe_or_command_replaces_its_own(here: Path, capsys: Any) -> None:
    def changes(*words: object) -> None:
        before = content(here / "out")
        done(capsys, *words, "--out", "out", *QUICK)
        assert content(here / "out") != before
        assert verify(here / "out", 1)

    path = recipe(here / "r.yaml", "a", "b")
    done(capsys, "run", path, "--out", "out", *QUICK)
    recipe(path, "a", "b", weight=0.25)
    changes("run", path)
    recipe(path, "c")  # other models, even
    changes("run", Path("r.yaml"))
    changes("run", path, "--set", "models.0.parameters.weight=0.125")
    (here / "out" / "README.md").write_text("mine")
    assert "out: README.md changed since a run made it" in told(capsys, "run", path, "--out", "out", *QUICK)
    shutil.rmtree("out")
    done(capsys, *extract("a", "out"))
    changes("extract", "a", "--base", "base", "--density", 0.5)
    changes("extract", here / "a", "--base", here / "base")  # the same models, by other words
    shutil.rmtree("out")
    done(capsys, "convert", "a", "out", *QUICK)
    before = content(here / "out")
    done(capsys, "convert", "a", "out", "--dtype", "float32", *QUICK)
    assert content(here / "out") != before


def test_recipes_from_stdin_are_known_by_their_models(here: Path, capsys: Any, monkeypatch: Any) -> None:
    def text(*models: str, weight: float) -> io.TextIOWrapper:
        return io.TextIOWrapper(recipe(here / "x.yaml", *models, weight=weight).open("rb"))

    monkeypatch.setattr(sys, "stdin", text("a", weight=0.5))
    done(capsys, "run", "-", *QUICK)
    monkeypatch.setattr(sys, "stdin", text("a", weight=0.25))
    done(capsys, "run", "-", *QUICK)
    monkeypatch.setattr(sys, "stdin", text("b", weight=0.25))
    assert "the result there was made by run - of ./a, ./base" in told(capsys, "run", "-", *QUICK)


@pytest.mark.parametrize("earlier", [False, True])
def test_without_a_note_the_models_tell(here: Path, capsys: Any, monkeypatch: Any, earlier: bool) -> None:
    """Where the file system has no attributes, or an earlier version made it, whose lock names no maker."""
    monkeypatch.setattr(ownership, "_noted", lambda folder: "")

    def age(out: str) -> None:
        path = here / out / "recipe.lock"
        lock = yaml.safe_load(path.read_text())
        if earlier:
            del lock["made_by"]
        path.write_text(yaml.safe_dump(lock, sort_keys=True))

    path, far = recipe(here / "r.yaml", "a", "b"), recipe(here / "x" / "r.yaml", "c", above="..")
    done(capsys, "run", path, "--out", "out", *QUICK)
    age("out")
    recipe(path, "a", "c")
    done(capsys, "run", path, "--out", "out", *QUICK)  # two models are still there
    age("out")
    words = "an earlier version" if earlier else "run r.yaml"
    assert f"made by {words} of ./a, ./base, ./c" in told(capsys, "run", far, "--out", "out", *QUICK)
    done(capsys, "run", path, *QUICK)
    age("r-merged")
    recipe(path, "b")
    done(capsys, "run", path, *QUICK)  # where it goes unasked
    done(capsys, *extract("a", "delta"))
    age("delta")
    done(capsys, *extract("a", "delta", "--density", 0.5))
    assert "of a, base" in told(capsys, *extract("b", "delta"))


def test_the_place_of_a_recipe_is_in_no_file(here: Path, capsys: Any) -> None:
    """The same recipe gives the same bytes, locks among them, wherever it and its output lie."""
    for home, out in (("one", "out"), ("two", "deep/out")):
        shutil.copytree(here / "base", here / home / "base")
        shutil.copytree(here / "a", here / home / "a")
        done(capsys, "run", recipe(here / home / "r.yaml", "a"), "--out", here / home / out, *QUICK)
    assert content(here / "one" / "out") == content(here / "two" / "deep" / "out")
    assert read_lock(here / "one" / "out" / "recipe.lock")["made_by"] == {"command": "run", "recipe": "r.yaml"}


@pytest.mark.parametrize("second", ["the same, pruned", "another model", "a recipe", "apply", "by force"])
def test_who_comes_second_is_told(here: Path, capsys: Any, monkeypatch: Any, second: str) -> None:
    """Another command finishes at the target after this one began, before it takes the lock; or while it works."""
    done(capsys, *extract("c", "lone"))
    recipe(here / "r.yaml", "a", "b")
    words = {
        "the same, pruned": extract("a", "out", "--density", 0.5),
        "another model": extract("b", "out"),
        "a recipe": ("run", "r.yaml", "--out", "out", *QUICK),
        "apply": ("apply", "lone", "--base", "base", "--out", "out", *QUICK),
        "by force": extract("b", "out", "--force"),
    }[second]
    from deltamerge.run import apply

    before: dict[str, bytes] = {}
    original = work_folder.workspace

    def late(*arguments: Any, **options: Any) -> Any:
        if not before:
            before["begun"] = b""
            first = subprocess.run(
                [sys.executable, "-m", "deltamerge", *map(str, extract("a", "out"))], capture_output=True, text=True
            )
            assert first.returncode == 0, first.stderr
            before.update(content(here / "out"))
        return original(*arguments, **options)

    for module in (runner, apply):
        monkeypatch.setattr(module, "workspace", late)
    said = told(capsys, *words)
    assert "out: not empty: the result there was made by extract of a, base, since this command began" in said
    assert before.pop("begun") == b""
    assert content(here / "out") == before


def test_two_at_once_lose_nothing(here: Path) -> None:
    """Of two processes that make one target, both of which saw none, one ends well and the other says what it met."""
    for _ in range(2):
        shutil.rmtree("out", ignore_errors=True)
        pairs = [
            (name, subprocess.Popen([sys.executable, "-m", "deltamerge", *map(str, words)], stderr=subprocess.PIPE))
            for name, words in (("a", extract("a", "out")), ("b", extract("b", "out")))
        ]
        ends = {name: (process.communicate()[1].decode(), process.returncode) for name, process in pairs}
        won = [name for name, (_, code) in ends.items() if code == 0]
        assert len(won) == 1, ends
        assert sorted(read_lock(here / "out" / "recipe.lock")["inputs"]) == [won[0], "base"]
        assert next(said for said, code in ends.values() if code == 1).startswith("error: out: ")
        assert verify(here / "out", 1)


@pytest.mark.parametrize("began", ["nothing", "its own"])
def test_what_comes_in_the_last_moment_stays(here: Path, capsys: Any, monkeypatch: Any, began: str) -> None:
    """Another folder gets the target's name between the last look and the exchange of the names."""
    done(capsys, *extract("b", "other"))
    if began == "its own":
        done(capsys, *extract("a", "out"))
    before = content(here / "other")
    original = work_folder.stamp

    def late(target: Path) -> Any:
        found = original(target)
        if Path("other").exists():
            if target.exists():
                os.rename(target, "moved")
            os.rename("other", target)
        return found

    monkeypatch.setattr(work_folder, "stamp", late)
    assert "out: not empty any more" in told(capsys, *extract("a", "out", "--density", 0.5))
    assert content(here / "out") == before


@pytest.mark.parametrize("work", ["adding", "folding"])
def test_a_version_is_not_replaced_while_its_chain_is_written(here: Path, capsys: Any, work: Any) -> None:
    chain(capsys)
    before = content(here / "chain" / "03")
    words = extract("c", "chain/03", "--after", "chain/02", "--density", 0.5)
    with one_writer(here / "chain", work):
        said = told(capsys, *words)
        assert f"another process is {work} versions" in said
        assert f"another process is {work} versions" in told(capsys, *extract("a", "chain/03", "--force"))
    assert content(here / "chain" / "03") == before
    done(capsys, *words)  # its own, when nobody is there
    assert content(here / "chain" / "03") != before


def test_a_version_is_not_added_to_what_was_replaced_meanwhile(here: Path, capsys: Any, monkeypatch: Any) -> None:
    done(capsys, *extract("a", "chain/01"))
    done(capsys, *extract("c", "elsewhere"))
    original = Link.finish

    def late(self: Link, folder: Path) -> None:
        shutil.rmtree("chain/01")
        os.rename("elsewhere", "chain/01")
        original(self, folder)

    monkeypatch.setattr(Link, "finish", late)
    said = told(capsys, *extract("b", "chain/02", "--after", "chain/01"))
    assert "chain/01: was replaced by another process meanwhile" in said
    assert folders.names(here / "chain") == ["01"]


def test_a_trainer_overwrites_no_version_that_came_meanwhile(here: Path, capsys: Any) -> None:
    chain(capsys)
    with ExitStack() as held:
        made = held.enter_context(publishing(here / "chain", "04", "adding"))
        (made / "file").write_text("new")
        done(capsys, "convert", "a", "chain/04", *QUICK)
        before = content(here / "chain" / "04")
        with pytest.raises(OutputError, match="chain/04: cannot be written"):
            held.close()
    assert content(here / "chain" / "04") == before


def test_a_chain_gets_no_second_beginning(here: Path, capsys: Any) -> None:
    """A delta without --after in a chain's folder would be a second end of it; the name of a folded one is taken."""
    chain(capsys)
    recipe(here / "d.yaml", "a", "b", more="output: {kind: delta}\n")
    before = content(here / "chain")
    for words in (
        extract("a", "chain/04"),
        ("run", "d.yaml", "--out", "chain/04", *QUICK),
        extract("a", "chain/03", "--force"),  # in the place of the newest
    ):
        said = told(capsys, *words)
        assert "is a chain, in which it would come after no version" in said
        assert "--after" in said
    assert content(here / "chain") == before
    done(capsys, "squash", "chain", "--keep", 1, "--base", "base", *QUICK)
    assert folders.names(here / "chain") == ["02", "03"]
    assert "was folded into 02" in told(capsys, *extract("a", "chain/01", "--force"))
    assert folders.names(here / "chain") == ["02", "03"]
    done(capsys, "verify", "chain")


@pytest.mark.parametrize("case", INTO_A_VERSION)
def test_no_output_goes_into_another(here: Path, capsys: Any, case: str) -> None:
    """In which it would be a file that the lock does not list; a folder with a recipe's lock is none."""
    chain(capsys)
    done(capsys, *extract("c", "lone"))
    recipe(here / "r.yaml", "a", "b")
    recipe(here / "d.yaml", "a", "b", more="output: {kind: delta}\n")
    done(capsys, "run", "r.yaml", "--out", "made", *QUICK)
    (here / "link").symlink_to("made")
    before = {name: content(here / name) for name in ("chain", "made")}
    for outer in ("chain/01", "chain/03", "made", "link", "made/deep"):
        said = told(capsys, *INTO_A_VERSION[case](f"{outer}/sub"), "--force")
        assert f"{outer}/sub: lies in " in said
        assert "an output" in said
    assert {name: content(here / name) for name in before} == before
    (here / "recipe.lock").write_bytes((here / "made" / "recipe.lock").read_bytes())
    done(capsys, *INTO_A_VERSION[case]("beside"))


def test_remove_takes_the_newest_alone(here: Path, capsys: Any) -> None:
    chain(capsys)
    before = content(here / "chain")
    said = told(capsys, "remove", "chain/02")
    assert "chain/02: 03 comes after it" in said
    (here / "chain" / "03" / "thesis.txt").write_text("mine")
    assert "holds files that no run wrote: thesis.txt" in told(capsys, "remove", "chain/03")
    (here / "chain" / "03" / "thesis.txt").unlink()
    assert "is no delta" in told(capsys, "remove", "a")
    assert "is no delta" in told(capsys, "remove", "chain")
    with one_writer(here / "chain", "folding"):
        assert "another process is folding versions" in told(capsys, "remove", "chain/03")
    assert content(here / "chain") == before
    done(capsys, "remove", "chain/03")
    done(capsys, "remove", "chain/02")
    assert folders.names(here / "chain") == ["01"]
    done(capsys, *extract("c", "chain/02", "--after", "chain/01"))
    done(capsys, "verify", "chain", "--base", "base")


def test_an_intermediate_result_of_another_recipe_stays(here: Path, capsys: Any) -> None:
    text = "name: half\nmerge_method: passthrough\nmodels: [{model: ./a}]\noutput: {path: kept}\n---\n" + (
        "merge_method: passthrough\nmodels: [{model: half}]\n"
    )
    (here / "one.yaml").write_text(text)
    (here / "two.yaml").write_text(text.replace("./a", "./b"))
    done(capsys, "run", "one.yaml", *QUICK)
    before = content(here / "kept")
    said = told(capsys, "run", "two.yaml", *QUICK)
    assert "kept: not empty: the result there was made by run one.yaml of ./a" in said
    assert content(here / "kept") == before
    (here / "one.yaml").write_text(text.replace("./a", "./c"))
    done(capsys, "run", "one.yaml", *QUICK)
    assert content(here / "kept") != before


def test_parts_replace_their_own_alone(here: Path, capsys: Any) -> None:
    path = recipe(here / "r.yaml", "a", "b")
    for part in ("--part=1/1", "--finish"):
        done(capsys, "run", path, "--out", "out", part, *QUICK)
    recipe(path, "a", "b", weight=0.25)
    for part in ("--part=1/1", "--finish"):
        done(capsys, "run", path, "--out", "out", part, *QUICK)
    before = content(here / "out")
    other = recipe(here / "other.yaml", "a", "b")
    assert "made by run r.yaml" in told(capsys, "run", other, "--out", "out", "--part", "1/1", *QUICK)
    assert content(here / "out") == before
