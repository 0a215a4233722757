"""The same YAML through mergekit 0.1.5 and deltamerge: equal to 1e-6 in float32, or a difference that is named.

Off by default: `make conformance`, or `pytest -m conformance` with MERGEKIT_PYTHON the interpreter of an environment
that has mergekit, which is started once for all recipes of an architecture.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import load_tensors
from running import run

from .cases import CASES, ELSEWHERE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DIFFERENCES = ROOT / "docs" / "howto" / "from-mergekit.md"
WANTED = [("llama", name) for name in CASES]
WANTED += [(architecture, name) for architecture in ("mistral", "qwen2", "gpt2", "bert") for name in ELSEWHERE]

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A folder with `<architecture>/<case>.yaml` and what mergekit made of each."""
    python = Path(os.environ.get("MERGEKIT_PYTHON", ROOT / ".bench" / "mergekit" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"no mergekit at {python}: make conformance, or set MERGEKIT_PYTHON")
    from .models import make_models

    folder = tmp_path_factory.mktemp("conformance")
    for architecture in {architecture for architecture, _ in WANTED}:
        make_models(folder / architecture, architecture)
        recipes = [f"{name}.yaml" for wanted, name in WANTED if wanted == architecture]
        for recipe in recipes:
            (folder / architecture / recipe).write_text(CASES[Path(recipe).stem].text)
        subprocess.run(
            [python, HERE / "mergekit_side.py", *recipes],
            cwd=folder / architecture,
            check=True,
            capture_output=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )
    return folder


@pytest.mark.parametrize(("architecture", "name"), WANTED, ids=["-".join(pair) for pair in WANTED])
def test_the_same_recipe_gives_the_same_model(merged, architecture, name):
    case, path = CASES[name], merged / architecture / f"{name}.yaml"
    refused = path.with_suffix(".refused")
    assert not refused.exists(), refused.read_text()
    theirs = load_tensors(path.with_suffix(".mergekit"))
    if case.ours is not None:
        path.write_text(case.ours)
    ours = load_tensors(run(path, path.with_suffix(".deltamerge"), mergekit_exact=case.exact).folder)
    assert ours.keys() == theirs.keys()
    apart = {key: (ours[key] - theirs[key]).abs() for key in ours}
    assert all(ours[key].dtype == theirs[key].dtype == torch.float32 for key in ours)
    if case.differs is None:
        worst = max(apart, key=lambda key: float(apart[key].max()))
        assert float(apart[worst].max()) <= 1e-6, worst
    else:
        assert f"| {case.differs} |" in DIFFERENCES.read_text(encoding="utf-8")
        shares = {key: float((difference > 1e-6).float().mean()) for key, difference in apart.items()}
        assert 0 < max(shares.values()) <= case.share
    if case.same_norm:
        base = load_tensors(merged / architecture / "base")
        for key in ours:
            moved = [float((model[key] - base[key]).double().abs().sum()) for model in (ours, theirs)]
            assert moved[0] == pytest.approx(moved[1], rel=1e-5), key


def test_every_method_is_compared(merged):
    from deltamerge.methods.registry import MERGE

    theirs = set((merged / "llama" / "methods.txt").read_text().split())
    assert {case.text.split()[1] for case in CASES.values()} == theirs & set(MERGE)
    assert not theirs - set(MERGE)
