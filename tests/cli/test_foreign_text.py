"""What strangers wrote, in recipes, file names, tensor names, locks: no control character, no command to a CI runner,
no markup of theirs leaves a command."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from calls import call
from conftest import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from deltamerge.errors import InputError, Problem, RecipeError
from deltamerge.errors.shown import LONGEST, code, fenced, label, plain, printed, shown

NASTY = {
    "escape": "\x1b]0;gone\x07\x1b[2J",
    "lines": "\n::add-mask::x\n::set-env name=A::b\r\nok",
    "old command": "##[set-env name=A]b",
    "first": "::error::x",
    "direction": "\u202egnp.exe\u2066\u200b\u2028",
    "eight bits": "\x9b31m\x85",
    "markdown": "|`</code><img src=x onerror=y>[a](javascript:b)```",
    "mermaid": '"]; click a href "x" ``` %%{init: {}}%% <script>',
}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def assert_harmless(*texts: str) -> None:
    for text in texts:
        bad = [c for c in text if c not in "\n\t" and unicodedata.category(c) in UNSEEN]
        assert not bad, (bad, text)
        assert not [line for line in text.split("\n") if line.lstrip().startswith("::")], text
        assert "##[" not in text


@given(st.text(st.characters(), max_size=60))
def test_what_is_shown_is_one_line_of_what_is_seen(text: str) -> None:
    assert_harmless(printed(shown(text)), printed(text))
    assert "\n" not in shown(text)
    assert code(text).count("`") in (0, 2)
    assert not re.search(r'["<>`]', label(text))
    assert not re.search(r"(?<!\\)(\\\\)*[|<`]", plain(text))
    fence, *body, end = fenced(text)
    assert fence == end
    assert not any(line.strip().startswith(fence) for line in body)


def test_what_is_plain_stays_as_it_is() -> None:
    for text in ("./models/a_b-c.d@main+lora", "モデル/é", "model.layers.0.mlp.up_proj.weight"):
        assert shown(text) == printed(text) == text
        assert code(text) == f"`{text}`"
    assert len(shown("x" * 10**6)) < LONGEST + 10


@pytest.mark.parametrize("case", NASTY)
def test_errors_say_names_that_are_shown(case: str) -> None:
    name = NASTY[case]
    error = InputError(name, hint=name, where=name, also=[name] * 1000)
    assert str(error).count("\n") < 60
    problem = RecipeError(name, [Problem(name, name, 1, 2, name)] * 1000)
    assert len(str(problem)) < 300_000
    assert_harmless(printed(str(error)), printed(str(problem)))
    assert all(": 1:2" in line or line for line in str(problem).split("\n"))


def file_name(nasty: str) -> str:
    return nasty.replace("/", "_")


@pytest.fixture(params=NASTY)
def nasty(request: pytest.FixtureRequest) -> str:
    return NASTY[request.param]


@pytest.fixture
def recipe(tmp_path: Path, nasty: str) -> Path:
    """Model folders, tensors, the recipe and names in it called so."""
    folder = tmp_path / file_name(nasty)
    tensor = "".join(filter(str.isprintable, f"{nasty.strip()}.layers.0.weight"))  # others the header's reader refuses
    weights = {tensor: torch.ones(4, 4), "w": torch.ones(3)}
    make_checkpoint(folder / "base", weights)
    make_checkpoint(folder / f"a{file_name(nasty)}", {name: x + torch.rand(x.shape) for name, x in weights.items()})
    path = folder / f"{file_name(nasty)}.yaml"
    path.write_text(
        yaml.safe_dump(
            {"base_model": "./base", "merge_method": "task_arithmetic", "models": [{"model": f"./a{file_name(nasty)}"}]}
        )
    )
    return path


def test_every_command(
    recipe: Path, nasty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    base, tune = "./base", f"./a{file_name(nasty)}"
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text() + "parameters: {weight: 0.5}\n")
    out = tmp_path / f"out{file_name(nasty)}"
    commands = [
        ["check", recipe.name, f"./no{nasty}.yaml"],
        ["plan", recipe],
        ["plan", recipe, "--diff", other],
        ["plan", recipe, "--graph"],
        ["inspect", tune, "--base", base, "--tensors", "--report", tmp_path / "page.html"],
        ["recommend", tune, "--base", base, "--density", "0.1"],
        ["diff", base, tune],
        ["methods", nasty],
        ["run", recipe, "--out", out],
        ["verify", out],
        ["verify", out, "--base", base],
        ["run", nasty],
        ["run", recipe, f"more{file_name(nasty)}"],
        ["plan", recipe, "--memory", nasty],
        ["plan", recipe, f"--{nasty}"],
        [nasty],
        ["extract", tune, "--base", base, "--out", tmp_path / f"delta{file_name(nasty)}"],
        ["apply", tmp_path / f"delta{file_name(nasty)}", "--base", base, "--out", tmp_path / "applied"],
        ["init", tune, "--base", base, "--out", "-"],
    ]
    failing = []
    for arguments in commands:
        code, *texts = call(capsys, *arguments)
        assert code != 3, texts
        failing += [(arguments[0], texts[1])] if code else []
        assert_harmless(*texts)
    assert [command for command, _ in failing] == ["check", "methods", "run", "plan", "plan", nasty], failing
    for arguments in (["plan", recipe], ["inspect", tune, "--base", base], ["diff", base, tune]):
        code, text, _ = call(capsys, *arguments, "--json")
        assert_harmless(text)
        assert isinstance(json.loads(text), dict)
    for folder in (out, tmp_path / "applied"):
        assert_harmless((folder / "README.md").read_text().replace("##[", ""))
    assert_harmless((tmp_path / "page.html").read_text().replace("##[", ""))


@pytest.mark.parametrize("case", ["markdown", "lines", "mermaid"])
def test_the_card_and_the_graph_have_no_markup_but_ours(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = file_name(NASTY[case])
    make_checkpoint(tmp_path / "base", {"w": torch.ones(3)})
    make_checkpoint(tmp_path / name, {"w": torch.zeros(3)})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "./base", "models": [{"model": f"./{name}"}]}) + "# ```\n# ````\n")
    assert call(capsys, "run", recipe, "--out", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    body, _, block = card.partition("## Recipe")
    assert not re.search(r"(?<!\\)<(?!br>|/?code>)", body.partition("---\n\n")[2])
    assert "\n`````yaml\n" in block
    assert block.count("\n`````\n") == 1
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    code, graph, _ = call(capsys, "plan", recipe, "--graph")
    assert (code, '"' in graph) == (0, True)
    assert all(line.count('"') in (0, 2) for line in graph.splitlines())
