"""The core without its apps: it merges, checks, plans and helps; a command of an app says which one it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama

import deltamerge

PACKAGE = Path(deltamerge.__file__).parent
MERGE = """\
base_model: ./base
merge_method: ties
models: [{model: ./a}, {model: ./b}]
parameters: {density: 0.5, weight: 0.5}
"""
MIXTURE = """\
base_model: ./base
merge_method: moe
gate_mode: random
experts: [{model: ./a}, {model: ./b}]
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and recipes, with a copy of the package that lacks `apps/`."""
    place = tmp_path_factory.mktemp("core")
    shutil.copytree(PACKAGE, place / "deltamerge", ignore=shutil.ignore_patterns("apps", "__pycache__", "src"))
    base = tiny_llama(place / "base", seed=0)
    tiny_llama(place / "a", seed=1, base=base)
    tiny_llama(place / "b", seed=2, base=base)
    (place / "r.yaml").write_text(MERGE)
    (place / "moe.yaml").write_text(MIXTURE)
    (place / "study.yaml").write_text(MERGE.replace("density: 0.5", "density: {sweep: [0.5, 0.1]}"))
    return place


# An editable install would find the modules that the copy lacks.
ALONE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
)
MAIN = f"{ALONE}from deltamerge.cli import main; main(sys.argv[1:])"


def core(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MAIN, *arguments], cwd=place, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["--help", "check r.yaml", "plan r.yaml", "methods", "schema", "recommend --help"])
def test_the_core_works_without_its_apps(place: Path, command: str) -> None:
    done = core(place, *command.split())
    assert done.returncode == 0, done.stderr


def test_a_merge_without_apps_has_the_bytes_of_one_with_them(place: Path, tmp_path: Path) -> None:
    assert core(place, "run", "r.yaml", "--out", str(tmp_path / "core")).returncode == 0
    whole = [sys.executable, "-m", "deltamerge", "run", place / "r.yaml", "--out", tmp_path / "whole"]
    subprocess.run(whole, check=True, capture_output=True)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("core", "whole"))
    assert one == other
    assert core(place, "verify", str(tmp_path / "core")).returncode == 0


NEEDS = {
    "recommend a --base base --density 0.1": "recommend",
    "recommend a b --base base": "recommend",
    "merge a b --base base --out ab": "recommend",
    "init a --base base --out -": "recommend",
    "inspect a --base base": "inspect",
    "diff a b": "inspect",
    "extract a base": "chain",
    "squash a --keep 1": "chain",
    "eval a --calibration rows.jsonl": "search",
    "sweep study.yaml": "search",
    "bisect r.yaml --rows rows.jsonl": "search",
    "eval a --probe": "probe",
    "search study.yaml": "search",
    "plan study.yaml": "search",
    "check moe.yaml": "moe",
    "plan moe.yaml": "moe",
    "run moe.yaml --out moe": "moe",
    "run r.yaml --out drawn --pictures": "report",
}


@pytest.mark.parametrize("command", NEEDS)
def test_a_command_of_an_app_says_which_it_needs(place: Path, command: str) -> None:
    before = sorted(place.iterdir())
    done = core(place, *command.split())
    assert (done.returncode, done.stdout) == (1, "")
    said, hint = done.stderr.splitlines()[-2:]
    assert said.endswith(f"this needs deltamerge.apps.{NEEDS[command]}, which is not installed")
    assert hint == "hint: install all of deltamerge"
    assert sorted(place.iterdir()) == before


def test_one_app_alone_may_be_absent(place: Path, tmp_path: Path) -> None:
    """An app needs others: the one that is missing is named."""
    shutil.copytree(place, tmp_path / "core", symlinks=True)
    there = tmp_path / "core" / "deltamerge" / "apps"
    shutil.copytree(PACKAGE / "apps", there, ignore=shutil.ignore_patterns("inspect", "__pycache__"))
    done = core(tmp_path / "core", "inspect", "a", "--base", "base")
    assert "this needs deltamerge.apps.inspect, which is not installed" in done.stderr
    assert core(tmp_path / "core", "plan", "moe.yaml").returncode == 0


def test_a_plain_merge_imports_no_app(place: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom deltamerge.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "found = [m for m in sys.modules if m.startswith('deltamerge.apps')]\nassert not found, found\n"
    )
    for command in (["check"], ["plan"], ["run", "--out", str(tmp_path / "out"), "-q"]):
        arguments = [sys.executable, "-c", script, *command, str(place / "r.yaml")]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_python_has_the_core_without_apps(place: Path) -> None:
    script = (
        f"{ALONE}import deltamerge as dm\n"
        "planned = dm.load_recipe('r.yaml')\n"
        "planned.run('python')\n"
        "for ask in (lambda: planned.run('drawn', pictures=True), lambda: dm.load_recipe('moe.yaml')):\n"
        "    try:\n        ask()\n    except dm.DeltamergeError as error:\n        print(error)\n"
        "try:\n    dm.DeltaWriter\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "this needs deltamerge.apps.report, which is not installed",
        "this needs deltamerge.apps.moe, which is not installed",
        "No module named 'deltamerge.apps'",
    ]
