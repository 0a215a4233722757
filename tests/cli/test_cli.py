"""The command line: what it prints, where, its exit codes, and what it does not import or read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama

import deltamerge.cli
from deltamerge.cli import FILE_OF, HELP, commands
from deltamerge.methods.registry import MERGE, PRUNE

RECIPE = """\
base_model: ./base
merge_method: {method}
models:
  - {{model: ./a, parameters: {{weight: 0.5}}}}
  - {{model: ./b, parameters: {{weight: 0.5}}}}
parameters: {{density: 0.5}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "a", seed=1, base=base)
    tiny_llama(folder / "b", seed=2, base=base)
    (folder / "good.yaml").write_text(RECIPE.format(method="dare_ties"))
    return folder


ERRORS = {
    "typo": (
        RECIPE.format(method="dare_ties").replace("density", "densty"),
        "bad.yaml:6:14: parameters.densty:",
        "density",
    ),
    "method": (RECIPE.format(method="dare_tie"), "bad.yaml:2:15: merge_method:", "dare_ties"),
    "range": (RECIPE.format(method="ties").replace("0.5}\n", "1.5}\n"), "must be in [0, 1], got 1.5", ""),
    "missing model": (
        RECIPE.format(method="ties").replace("./b,", "./nowhere,"),
        "./nowhere: no such folder",
        "hint: ",
    ),
    "no recipe": (None, "bad.yaml", ""),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("command", ["run", "check", "plan"])
def test_bad_input_is_one_clear_line_and_exit_1(folder, capsys, case, command):
    text, wanted, hint = ERRORS[case]
    recipe = folder / "bad.yaml"
    recipe.unlink(missing_ok=True)
    if text is not None:
        recipe.write_text(text)
    before = sorted(p.name for p in folder.iterdir())
    code, out, err = call(capsys, command, recipe)
    assert (code, out) == (1, "")
    assert wanted in err
    assert hint in err
    assert "Traceback" not in err
    assert sorted(p.name for p in folder.iterdir()) == before


BROKEN = {
    "truncated": lambda data: data[: len(data) // 2],
    "garbage": lambda data: b"\xff" * 64,
    "lying": lambda data: data.replace(b'"shape":[96,32]', b'"shape":[96,33]', 1),
    "oversized": lambda data: data + b"\0" * 8,
    "header length": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_refused_with_the_file(folder, tmp_path, capsys, case):
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    victim = tmp_path / "b" / "model.safetensors"
    data = victim.read_bytes()
    victim.write_bytes(BROKEN[case](data))
    if case == "lying" and victim.read_bytes() == data:
        pytest.fail("the test's tensor is not in the header")
    (tmp_path / "r.yaml").write_text(RECIPE.format(method="ties"))
    code, out, err = call(capsys, "run", tmp_path / "r.yaml")
    assert (code, out) == (1, "")
    assert "model.safetensors" in err
    assert "./b" in err
    assert not (tmp_path / "r-merged").exists()


def test_run_prints_only_what_was_asked_for(folder, tmp_path, capsys):
    code, out, err = call(capsys, "run", folder / "good.yaml", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert err == ""
    summary = json.loads(out)
    assert summary["out"] == str(tmp_path / "out")
    assert summary["bytes"] == sum(t.numel() * 2 for t in load_tensors(tmp_path / "out").values())
    code, out, err = call(capsys, "run", folder / "good.yaml", "--out", tmp_path / "out", "-q", "--force")
    assert (code, out, err) == (0, "", "")
    code, out, err = call(capsys, "verify", tmp_path / "out")
    assert (code, out) == (0, "")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"gone")
    code, out, err = call(capsys, "verify", tmp_path / "out")
    assert code == 1
    assert "model.safetensors: 4 bytes, the lock says" in err


def test_plan_names_every_tensor(folder, capsys):
    code, out, err = call(capsys, "plan", folder / "good.yaml", "--json", "--workers", "2")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    tensors = load_tensors(folder / "base")
    assert {t["name"] for t in plan["tensors"]} == tensors.keys()
    assert plan["output_bytes"] == sum(t.numel() * 2 for t in tensors.values())
    assert plan["peak_bytes"] > 0
    code, out, _ = call(capsys, "plan", folder / "good.yaml")
    assert "dare_ties" in out
    assert "./a: weight=0.5 dare density=0.5 q=0.5" in out


def test_memory_is_a_cap(folder, tmp_path, capsys):
    code, _, err = call(capsys, "plan", folder / "good.yaml", "--memory", "1MB")
    assert code == 1
    assert "--memory" in err
    code, out, _ = call(capsys, "plan", folder / "good.yaml", "--memory", "1GB", "--json")
    assert json.loads(out)["peak_bytes"] <= 10**9


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["schema"],
        ["methods"],
        ["methods", "dare", "--json"],
        ["check", "good.yaml"],
        ["plan", "good.yaml"],
    ],
    ids=" ".join,
)
def test_neither_torch_nor_numpy_is_imported_to_look(folder, arguments):
    script = (
        "import sys\nfrom deltamerge.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'scipy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("triton", [False, True])
def test_what_lives_to_the_end_is_not_collected_unless_triton_would_complain(triton):
    script = (
        "import atexit, gc, sys, types\nfrom deltamerge.cli import main\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0))\n"
        f"if {triton}: sys.modules['triton'] = types.ModuleType('triton')\n"
        "main(['methods', 'ties', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"frozen {not triton}"


def test_methods_are_listed_with_their_parameters(capsys):
    code, out, err = call(capsys, "methods")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [*MERGE, *PRUNE]
    found = json.loads(call(capsys, "methods", "--json")[1])
    assert [m["name"] for m in found["merge"]] == list(MERGE)
    assert [m["name"] for m in found["prune"]] == list(PRUNE)


def test_a_method_is_shown_with_defaults_ranges_and_source(capsys):
    out = call(capsys, "methods", "dare")[1]
    assert out.splitlines()[2:4] == ["  arXiv 2311.03099, 2410.09344", ""]
    assert [line.split()[:6] for line in out.splitlines()[4:6]] == [
        ["density", "must", "be", "given", "in", "(0,"],
        ["q", "density", "in", "(0,", "1]", "kept"],
    ]
    both = json.loads(call(capsys, "methods", "della", "--json")[1])
    assert [m["name"] for m in both["merge"] + both["prune"]] == ["della", "della"]
    weight = both["merge"][0]["parameters"]["weight"]
    assert (weight["default"], weight["required"], weight["alone"]) == (None, True, 1.0)
    epsilon = both["prune"][0]["parameters"]["epsilon"]
    assert (epsilon["default"], epsilon["low"], epsilon["high"], epsilon["range"]) == (0.15, 0, 1, "in [0, 1]")


def test_a_method_that_is_none_gets_a_suggestion(capsys):
    code, out, err = call(capsys, "methods", "magnitud")
    assert (code, out) == (2, "")
    assert err == "error: unknown method 'magnitud'\nhint: did you mean 'magnitude'?\n"


def test_planning_reads_no_weights(folder, capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    for name in ("pread", "preadv", "copy_file_range"):
        monkeypatch.setattr(os, name, refuse)
    assert call(capsys, "plan", folder / "good.yaml")[0] == 0
    assert call(capsys, "check", folder / "good.yaml")[0] == 0


FLAGS = {
    "run": "--out --device --workers --memory --part --finish --ray --resume --force --locked --lock "
    "--mergekit-exact --allow-nonfinite --set --allow-pickles --pictures --probe --track --json --quiet "
    "--verbose, --verbosity --help",
    "check": "--offline --mergekit-exact --set --allow-pickles --output-format --json --verbose --help",
    "plan": "--device --workers --memory --diff --graph --tensors --mergekit-exact --set --allow-pickles --json --help",
    "lock": "--check --device --workers --memory --mergekit-exact --set --allow-pickles --force --help",
    "remove": "--quiet --help",
    "pin": "--release --quiet --help",
    "serve": "--vllm --model --store --watch --undo --workers --json --quiet --help",
    "apply": "--base --out --workers --memory --force --allow-pickles --json --quiet --help",
    "extract": "--base --out --after --as --quantized --density --method --q --values --lora --budget --ratio --for "
    "--whole --target --dora --calibration --text --sequences --length --device --workers --memory --resume --force "
    "--allow-nonfinite --allow-pickles --json --quiet --verbose --help",
    "diff": "--workers --allow-pickles --json --help",
    "verify": "--base --workers --allow-pickles --json --help",
    "list": "--json --help",
    "squash": "--keep --base --workers --allow-pickles --json --quiet --help",
    "schema": "--help",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen_knobs_go_in_the_recipe(command, capsys):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    options = [line for line in out.splitlines() if line.startswith("  -")]
    assert [w for line in options for w in line.split() if w.startswith("--")] == FLAGS[command].split()


def test_usage_errors_exit_2(capsys):
    assert call(capsys, "run")[0] == 2
    assert call(capsys, "no-such-command")[0] == 2
    assert call(capsys, "run", "r.yaml", "--workers", "0")[0] == 2


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:0:1", "cuda:0,", "cuda:all,1", ""])
def test_a_device_that_cannot_be_is_a_usage_error(folder, capsys, command, device):
    code, out, err = call(capsys, command, folder / "good.yaml", "--device", device)
    assert (code, out) == (2, "")
    assert "no such device" in err
    assert "cuda:N" in err


def test_a_gpu_that_is_not_there_is_said_and_leaves_nothing(folder, tmp_path, capsys):
    code, out, err = call(capsys, "run", folder / "good.yaml", "--out", tmp_path / "out", "--device", "cuda:99")
    assert (code, out) == (1, "")
    assert "cuda:99" in err
    assert "--device cpu" in err
    assert list(tmp_path.iterdir()) == []


def test_a_bug_exits_3_and_says_what_to_report(folder, tmp_path, capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("deltamerge.run.plans.plan", broken)
    code, _, err = call(capsys, "run", folder / "good.yaml", "--out", tmp_path / "out")
    assert code == 3
    assert "ZeroDivisionError: oops" in err
    assert "report" in err


@pytest.mark.filterwarnings("ignore")
def test_output_loads_in_transformers_with_no_key_missing(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    base, tune = tiny_bert_pair(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base_model: {base}\nmodels: [{{model: {tune}, prune: {{method: dare, density: 0.1}}}}]\n")
    assert call(capsys, "run", recipe)[0] == 0
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r-merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged, tuned = load_tensors(tmp_path / "r-merged"), load_tensors(tune)
    assert torch.equal(merged["classifier.weight"], tuned["classifier.weight"])


def test_pickled_weights_are_refused_with_the_way_out(folder, tmp_path, capsys):
    make_checkpoint(tmp_path / "old", {"w": torch.zeros(2)})
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "r.yaml").write_text(
        f"models: [{{model: {folder}/a}}, {{model: ./old}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    )
    code, _, err = call(capsys, "check", tmp_path / "r.yaml")
    assert code == 1
    assert "pickle" in err
    assert "hint: " in err


@pytest.mark.parametrize("name", HELP)
def test_the_table_has_each_command_as_its_file_says_it(name):
    """The line of help is written twice, so that `--help` imports no command."""
    found = commands.get_command(click.Context(commands), name)
    assert found.name == name
    assert found.get_short_help_str(200).rstrip(".") == HELP[name].rstrip(".")
    assert found.callback.__module__ == f"deltamerge.cli.{FILE_OF.get(name, name)}"


def test_every_file_of_a_command_is_in_the_table():
    files = {path.stem for path in Path(deltamerge.cli.__file__).parent.glob("*.py")}
    shared = {"__init__", "layout", "mergekit_flags", "options", "output", "progress", "result", "streams"}
    assert files - shared == {FILE_OF.get(name, name) for name in HELP}


def test_a_command_is_imported_when_it_is_called():
    script = (
        "import sys\nfrom deltamerge.cli import FILE_OF, HELP, main\n"
        "files = {FILE_OF.get(name, name) for name in HELP}\n"
        "def loaded(): return {m for m in sys.modules if m[:15] == 'deltamerge.cli.' and m[15:] in files}\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    print(*sorted(loaded()), file=sys.stderr)\n"
    )

    def imports(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        return done.stderr.strip()

    assert imports("--help") == ""
    assert imports("schema") == "deltamerge.cli.methods"
    assert imports("verify", "--help") == "deltamerge.cli.folders"
