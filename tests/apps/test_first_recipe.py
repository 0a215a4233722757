"""The first recipe, offline checks, shell completion and the versions of a bug report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calls import call
from click.shell_completion import ShellComplete
from conftest import tiny_llama

from deltamerge import version
from deltamerge.cli import commands, doctor
from deltamerge.recipe.load import loads

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    base = tiny_llama(tmp_path / "models" / "base", seed=0, tokenizer=True)
    tiny_llama(tmp_path / "models" / "math", seed=1, base=base, sigma=0.05, tokenizer=True)
    tiny_llama(tmp_path / "models" / "it's: code", seed=2, base=base, tokenizer=True)
    rows = (json.dumps({"text": " ".join(f"w{4 + (i * j) % 90}" for j in range(3, 9))}) for i in range(1, 31))
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("out", ["recipe.yaml", "recipes/first.yaml", "models/first.yaml"])
@pytest.mark.parametrize("models", [["models/math"], ["models/math", "models/it's: code"]])
def test_the_first_recipe_runs(folder, capsys, models, out):
    Path(out).parent.mkdir(exist_ok=True)
    code, printed, err = call(capsys, "init", *models, "--base", "models/base", "--out", out)
    assert (code, printed) == (0, "")
    assert out in err
    code, _, err = call(capsys, "run", out, "-q")
    assert (code, err) == (0, "")
    assert (Path(out).parent / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "models", [["models/math"], pytest.param(["models/math", "models/it's: code"], marks=pytest.mark.slow)]
)
def test_calibration_data_gives_what_recommend_says(folder, capsys, models):
    arguments = ["--base", "models/base", "--calibration", "text.jsonl", "--length", "8", "--sequences", "4"]
    code, text, _ = call(capsys, "init", *models, *arguments, "--density", "0.3", "--out", "-")
    assert code == 0
    recipe = loads(text)
    assert [model.model for model in recipe.models] == [f"./{model}" for model in models]
    for model, one in zip(models, recipe.models, strict=True):
        code, out, _ = call(capsys, "recommend", model, *arguments, "--density", "0.3", "--json")
        said = json.loads(out)
        (chosen,) = [candidate for candidate in said["candidates"] if candidate["name"] == said["method"]]
        assert one.prune.model_dump(include=chosen["prune"].keys()) == chosen["prune"]
        for candidate in said["candidates"]:
            assert f"# {candidate['name']:24}{candidate['lost']:>8.1%}" in text
        assert all(f"# {why}" in text for why in said["why"])
    assert not Path("recipe.yaml").exists()
    Path("advised.yaml").write_text(text)
    assert call(capsys, "run", "advised.yaml", "-q")[0] == 0


def test_a_density_is_in_the_first_recipe(folder, capsys):
    _, text, _ = call(capsys, "init", "models/math", "--base", "models/base", "--density", "0.03", "--out", "-")
    assert "density: 0.03" in text
    both = ["models/math", "models/it's: code"]
    _, text, _ = call(capsys, "init", *both, "--base", "models/base", "--density", "0.3", "--out", "-")
    assert [float(model.parameters["density"]) for model in loads(text).models] == [0.3, 0.3]


def test_quantised_models_have_the_dtype_that_they_are_read_in(folder, capsys):
    Path("q.yaml").write_text(
        "merge_method: passthrough\nmodels: [{model: models/base}]\noutput: {quantization: int8}\n"
    )
    assert call(capsys, "run", "q.yaml", "--out", "models/q", "--set", "dtype=bfloat16", "-q")[0] == 0
    _, text, _ = call(capsys, "init", "models/math", "--base", "models/q", "--out", "-")
    assert "dtype: bfloat16 " in text
    _, _, err = call(capsys, "extract", "models/q", "models/base", "--out", "delta")
    assert ": final values, rounded once\n" in err
    _, _, err = call(capsys, "extract", "models/math", "models/base", "--out", "exact")
    assert ": final values, exact\n" in err


def test_nothing_of_the_users_is_overwritten(folder, capsys):
    Path("recipe.yaml").write_text("mine")
    code, _, err = call(capsys, "init", "models/math", "--base", "models/base")
    assert code == 1
    assert "recipe.yaml: is there already" in err
    assert Path("recipe.yaml").read_text() == "mine"


def test_a_model_that_is_not_there_is_named(folder, capsys):
    code, _, err = call(capsys, "init", "./nowhere/at/all", "--base", "models/base")
    assert code == 1
    assert "./nowhere/at/all" in err
    assert not Path("recipe.yaml").exists()


def test_offline_checks_the_recipe_and_opens_no_model(folder, capsys):
    call(capsys, "init", "models/math", "--base", "models/base")
    shutil.rmtree("models")
    assert call(capsys, "check", "recipe.yaml")[0] == 1
    code, _, err = call(capsys, "check", "--offline", "recipe.yaml")
    assert (code, err) == (0, "recipe.yaml: ok\n")
    Path("recipe.yaml").write_text("merge_method: tie\n")
    assert call(capsys, "check", "--offline", "recipe.yaml")[0] == 1


def complete(folder: Path, *words: str) -> list[str]:
    shell = ShellComplete(commands, {}, "deltamerge", "_DELTAMERGE_COMPLETE")
    found = shell.get_completions(list(words[:-1]), words[-1])
    return [one.value if one.type == "plain" else f"{one.type},{one.value}" for one in found]


def test_completing_imports_no_torch(folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = {"_DELTAMERGE_COMPLETE": "bash_complete", "COMP_WORDS": "deltamerge extract --method m", "COMP_CWORD": "3"}
    code = (
        "import atexit, sys; from deltamerge.cli import main\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & sys.modules.keys())); main([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | words, capture_output=True, text=True, check=True, cwd=folder
    )
    assert done.stdout == "plain,magnitude\nplain,magnitude_outliers\nset()\n"


def test_the_shell_completes_commands_and_values(folder):
    (folder / "a.yaml").touch()
    (folder / "b.yml").touch()
    (folder / "c.txt").touch()
    (folder / "models" / "d.yaml").touch()
    cases = {
        ("pl",): ["plan"],
        ("plan", ""): ["a.yaml", "b.yml", "models/"],
        ("check", "a.yaml", "b"): ["b.yml"],
        ("plan", "--diff", "a"): ["a.yaml"],
        ("run", "models/d"): ["models/d.yaml"],
        ("run", "nowhere/d"): [],
        ("run", "--device", "c"): ["cpu", "cuda", "cuda:0", "cuda:all"],
        ("extract", "m", "--values", "b"): ["bfloat16"],
        ("extract", "m", "--method", "ma"): ["magnitude", "magnitude_outliers"],
        ("methods", "dare"): ["dare", "dare_linear", "dare_ties"],
        ("completion", ""): ["bash", "zsh", "fish"],
        ("inspect", "mo"): ["dir,mo"],
        ("inspect", "m", "--base", ""): ["dir,"],
        ("init", "m", "--calibration", "t"): ["file,t"],
        ("verify", "me"): ["dir,me"],
        ("diff", "a", "r"): ["file,r"],
    }
    assert {words: complete(folder, *words) for words in cases} == cases


SHELLS = {
    "bash": ("bash --norc -i", 'eval "$(ASKED=1 deltamerge completion bash)"; PS1="ready> "'),
    "zsh": (
        "zsh -f -i",
        'autoload -Uz compinit; compinit -u; eval "$(ASKED=1 deltamerge completion zsh)"; PS1="ready> "',
    ),
    "fish": (
        "fish --no-config -i",
        'function fish_prompt; echo "ready> "; end; env ASKED=1 deltamerge completion fish | source',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_real_shell_completes(folder, shell):
    pexpect = pytest.importorskip("pexpect")
    start, setup = SHELLS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (folder / "models" / "recipe.yaml").touch()
    program = folder / "bin" / "deltamerge"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ -n "$_DELTAMERGE_COMPLETE$ASKED" ] && exec {sys.executable} -m deltamerge "$@"\necho "ran[$*]"\n'
    )
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb",
           "HOME": str(folder)}  # fmt: skip
    child = pexpect.spawn(start, env=env, cwd=str(folder), encoding="utf-8", timeout=30, dimensions=(24, 160))
    child.sendline(setup)
    child.sendline("deltamerge ready")
    child.expect(r"ran\[ready\]")
    for typed, wanted in (
        ("extr\t", "extract"),
        ("run mod\trec\t", "run models/recipe.yaml"),
        ("methods karc\t", "methods karcher"),
        ("inspect models/ma\t", "inspect models/math"),
        ("extract m --values bfl\t", "extract m --values bfloat16"),
    ):
        for part in re.split("(\t)", f"deltamerge {typed}"):
            child.send(part)
            time.sleep(2.5 if part == "\t" else 0.2)
        child.send("\r")
        child.expect(r"ran\[(.*?)\]")
        assert child.match[1].strip().rstrip("/") == wanted  # zsh takes the slash back
    child.close(force=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_variable(capsys, shell):
    code, out, _ = call(capsys, "completion", shell)
    assert code == 0
    assert "_DELTAMERGE_COMPLETE" in out


def test_the_version_is_short_and_doctor_names_what_matters_in_a_bug_report(capsys):
    assert call(capsys, "--version")[:2] == (0, f"deltamerge {version.__version__}\n")
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"deltamerge", "python", "torch", "safetensors", "kernels"}
    assert json.loads(call(capsys, "doctor", "--json")[1])["deltamerge"] == version.__version__


def test_doctor_says_how_to_install_an_extra_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "requires", lambda name: ['nowhere-at-all>=1; extra == "gguf"', 'numpy; extra == "ray"']
    )
    out = call(capsys, "doctor")[1]
    assert "extra gguf lacks nowhere-at-all: pip install 'deltamerge[gguf]'\n" in out
    assert "extra ray installed\n" in out
