"""Packages that add commands and methods by entry points: used where they are named, left out where they are broken."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from conftest import make_checkpoint

from deltamerge.cli import HELP, commands, main
from deltamerge.errors.plugins import PluginWarning
from deltamerge.methods import registry

GRADE = """\
import click
@click.command("grade")
@click.argument("name")
def grade(name):
    "Grade NAME."
    if name == "bad":
        raise ValueError("no grade for bad")
    click.echo(f"{name}: A")
"""
TWICE = """\
from deltamerge.methods.registry import delta_method
@delta_method("base + 2 * the deltas")
def twice(base, *deltas, tile):
    raise KeyError("lost")
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lays a package out as pip does: a module of its name, and its entry points by group."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def lay(package: str, code: str, **points: str) -> None:
        (site / f"{package}.py").write_text(code)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        groups = "".join(f"[deltamerge.{group}]\n{line}\n" for group, line in points.items())
        (info / "entry_points.txt").write_text(groups)
        forget()

    def forget() -> None:
        importlib.invalidate_caches()
        for name in [name for name, module in sys.modules.items() if _is_in(site, module)]:
            del sys.modules[name]
        vars(commands).pop("others", None)
        for name in commands.commands.keys() - HELP.keys():
            del commands.commands[name]
        registry._third_party.cache_clear()

    yield lay
    forget()


def _is_in(folder: Path, module: object) -> bool:
    return str(getattr(module, "__file__", None)).startswith(str(folder))


def exits(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def test_a_command_of_another_package(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists it without importing it; called, it runs; its error is its own."""
    install("grader", GRADE, commands="grade = grader:grade")
    assert exits("--help") == 0
    said = capsys.readouterr().out
    assert "Of other packages:\n  grade" in said
    assert "A command of grader." in said
    assert "grader" not in sys.modules
    assert exits("grade", "ann") == 0
    assert capsys.readouterr().out == "ann: A\n"
    assert exits("grade", "bad") == 3
    said = capsys.readouterr().err
    assert "bug in grader: ValueError: no grade for bad" in said
    assert "at grader.py:7 in grade" in said
    assert "authors of grader" in said
    assert "bug in deltamerge" not in said


@pytest.mark.parametrize(
    ("code", "point", "why"),
    [
        ("raise RuntimeError('of old')", "grade = broken:grade", "left out: RuntimeError: of old"),
        ("grade = 1", "grade = broken:grade", "left out: it is no command of click"),
        (
            GRADE.replace("grade(name)", "grade()"),
            "grade = broken:grade",
            r"grade\(\) cannot be called as grade\(name=…\)",
        ),
    ],
)
def test_a_broken_command_is_left_out(install: Install, code: str, point: str, why: str) -> None:
    install("broken", code, commands=point)
    assert commands.list_commands(click.Context(commands))[-1] == "grade"
    with pytest.warns(PluginWarning, match=why):
        assert exits("grade") == 2


def test_a_command_of_a_taken_name_is_left_out(install: Install) -> None:
    install("second", GRADE, commands="run = second:grade")
    with pytest.warns(PluginWarning, match="there is another command run"):
        assert "run" not in commands.others


def test_a_warning_is_one_line(install: Install) -> None:
    """As the command line prints it."""
    install("missing", "import nothing_like_this", commands="grade = missing:grade")
    with pytest.warns(PluginWarning) as caught:
        assert exits("grade") == 2
    (one,) = caught
    assert warnings.formatwarning(one.message, one.category, one.filename, one.lineno) == (
        "warning: entry point missing:grade of missing is left out: ModuleNotFoundError: No module named "
        "'nothing_like_this'; update or remove missing\n"
    )


def models(folder: Path, method: str) -> Path:
    for seed, name in enumerate(("base", "a")):
        make_checkpoint(folder / name, {"w": torch.full((4, 4), float(seed))})
    path = folder / "r.yaml"
    path.write_text(f"base_model: ./base\nmodels: [{{model: ./a}}]\nmerge_method: {method}\n")
    return path


def test_a_broken_method_stops_no_run_that_names_another(install: Install, tmp_path: Path) -> None:
    install("broken", "raise RuntimeError('of old')", methods="twice = broken:twice")
    path = models(tmp_path, "task_arithmetic\nparameters: {weight: 1}")

    def codes() -> list[int]:
        ran = exits("run", str(path), "--out", str(tmp_path / "out"), "-q")
        return [ran, exits("check", str(models(tmp_path, "twice")))]

    with pytest.warns(PluginWarning, match="entry point broken:twice of broken is left out: RuntimeError: of old"):
        found = codes()
    assert found == [0, 1]


@pytest.mark.parametrize(
    ("signature", "decorator", "why"),
    [
        (
            "twice(base, *deltas)",
            "delta_method('base + 2 * the deltas')",
            "twice(base, *deltas) cannot be called as twice(base, delta, tile=…): "
            "got an unexpected keyword argument 'tile'",
        ),
        (
            "twice(base, *deltas, tile, limit)",
            "delta_method('base + 2 * the deltas')",
            "twice(base, *deltas, tile, limit) cannot be called as twice(base, delta, tile=…): "
            "missing a required argument: 'limit'",
        ),
        (
            "twice(delta, *, tile, density)",
            "prune_method('none of it', random=True)",
            "twice(delta, *, tile, density) cannot be called as twice(delta, tile=…, density=…, key=…): "
            "got an unexpected keyword argument 'key'",
        ),
        (
            "twice(masking, limit)",
            "prune_method('none of it')",
            "twice(masking, limit) cannot be called as twice(masking): missing a required argument: 'limit'",
        ),
        (
            "twice(base, *deltas, tile)",
            "delta_method('base + 2 * the deltas', loop=loop)",
            "loop(node) cannot be called as loop(assembly, node): too many positional arguments",
        ),
    ],
)
def test_a_method_that_cannot_be_called_is_left_out(
    install: Install,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    signature: str,
    decorator: str,
    why: str,
) -> None:
    imports = "from deltamerge.methods.registry import delta_method, prune_method"
    code = f"{imports}\ndef loop(node): ...\n@{decorator}\ndef {signature}: ...\n"
    install("twices", code, methods="twice = twices:twice")
    recipe = models(tmp_path, "twice" if "base" in signature else "task_arithmetic\nprune: {method: twice}")
    with pytest.warns(PluginWarning) as caught:
        assert exits("check", str(recipe)) == 1
    left_out = f"entry point twices:twice of twices is left out: {why}; update or remove twices"
    assert {str(one.message) for one in caught} == {left_out}
    assert "bug" not in capsys.readouterr().err


def test_the_package_s_own_methods_can_be_called() -> None:
    methods = [*registry.MERGE.values(), *registry.PRUNE.values()]
    assert [registry._misfit(one) for one in methods] == [None] * len(methods)


def test_an_error_of_a_method_is_its_package_s(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("twices", TWICE, methods="twice = twices:twice")
    assert exits("run", str(models(tmp_path, "twice")), "--out", str(tmp_path / "out"), "-q") == 3
    said = capsys.readouterr().err
    assert "bug in twices: KeyError: 'lost'" in said
    assert "at twices.py:4 in twice" in said
    assert not (tmp_path / "out").exists()
