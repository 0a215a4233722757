"""Installs of the package with and without a compiler: what each says, and that their bytes are the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from deltamerge.engine import kernels

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
merge_method: ties
parameters: {weight: 1, density: 0.3}
base_model: ./base
models: [{model: ./a}, {model: ./b}]
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        make_checkpoint(tmp_path / name, {"w": torch.randn(300, 400, generator=generator).bfloat16()})
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def installed(folder: Path, **environment: str) -> Path:
    """An environment with the packages of this one, and deltamerge as pip builds it from the sources; its Python."""
    sources, env = folder / "sources", folder / "env"
    sources.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "deltamerge", sources / "deltamerge", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    site = next((env / "lib").glob("python*/site-packages"))
    (site / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", env / "bin" / "python", "install", "--quiet", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed", sources]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    return env / "bin" / "python"


def deltamerge(python: Path | str, folder: Path, *arguments: str, switch: str = "") -> tuple[str, str]:
    """What a command of an installation says to stdout and stderr."""
    environment = {**os.environ, kernels.SWITCH: switch}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, "-m", "deltamerge", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def merged(folder: Path, name: str) -> bytes:
    return (folder / name / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_install_without_a_compiler_goes_on_and_says_so(work: Path) -> None:
    pytest.importorskip("pip")
    without = installed(work / "without", CC="false", CXX="false")
    assert kernels.WITHOUT in deltamerge(without, work, "run", "r.yaml", "--out", "torch")[1].splitlines()
    assert kernels.WITHOUT not in deltamerge(without, work, "run", "r.yaml", "--out", "quiet", "--quiet")[1]
    assert "kernels not compiled, torch computes" in deltamerge(without, work, "doctor")[0].splitlines()
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return
    compiled = installed(work / "with")
    assert kernels.WITHOUT not in deltamerge(compiled, work, "run", "r.yaml", "--out", "compiled")[1]
    assert merged(work, "compiled") == merged(work, "torch")
    assert "not compiled" not in deltamerge(compiled, work, "doctor")[0]


def test_the_switch_leaves_everything_to_torch(work: Path) -> None:
    """In processes that are told by the environment; without a line, for it was asked for."""
    for asked, name in (("", "compiled"), ("off", "torch")):
        said = deltamerge(sys.executable, work, "run", "r.yaml", "--out", name, switch=asked)[1]
        assert kernels.WITHOUT not in said or not kernels.available()
    assert merged(work, "compiled") == merged(work, "torch")
    assert f"kernels off ({kernels.SWITCH})" in deltamerge(sys.executable, work, "doctor", switch="off")[0]
