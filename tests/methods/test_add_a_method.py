"""docs/howto/add-a-method.md, done as it says: a package with merge and pruning methods, installed and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint

from deltamerge.engine import kernels
from deltamerge.methods.prune import bits

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "add-a-method.md").read_text()
SHAPES = {"a.weight": (40, 24), "b.weight": (3, 70_001), "c.bias": (24,), "d": ()}


SPIKES = "prune: {method: spikes, density: 0.5, floor: 0.2, spread: 1.5}"
DECLARED = 'random=True, needs_activations=True, factors=("floor", "spread"))'


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's package as pip lays it out in site/, three models and the page's recipe."""
    folder = tmp_path_factory.mktemp("limits")
    project = tomllib.loads(block("toml"))
    name, version = project["project"]["name"], project["project"]["version"]
    info = folder / "site" / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = project["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in points.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    for number, module in enumerate(project["tool"]["setuptools"]["py-modules"]):
        (folder / "site" / f"{module}.py").write_text(block("python", number))
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    make_checkpoint(folder / "base", base)
    for model in ("math", "code"):
        noise = {name: torch.randn(shape, generator=generator) * 0.04 for name, shape in SHAPES.items()}
        make_checkpoint(folder / model, {name: base[name] + noise[name] for name in SHAPES})
    (folder / "recipe.yaml").write_text(block("yaml"))
    return folder


def deltamerge(folder: Path, *arguments: str, site: str = "site", **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **more, "PYTHONPATH": os.pathsep.join([str(folder / site), str(ROOT)])}
    command = [sys.executable, "-W", "error", "-m", "deltamerge", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_recipe_is_checked_and_its_faults_found(folder):
    done = deltamerge(folder, "check", "recipe.yaml")
    assert (done.returncode, done.stderr) == (0, "recipe.yaml: ok, 4 tensors, 844.0 kB\n")
    assert f"\n$ deltamerge check recipe.yaml\n{done.stderr}```" in PAGE
    faults = (
        ("limit: 0.06, ", "", "merge_method: needs a limit: limited has no default"),
        ("limit: 0.06", "limit: -1", "parameters.limit: must be at least 0, got -1"),
        ("cut: 0.03", "cut: -1", "prune.cut: must be at least 0, got -1"),
        ("cut: 0.03", "cutt: 1", "hint: did you mean 'cut'?"),
        ("method: spare", "method: dare", "prune.cut: has no effect with method dare"),
    )
    for number, (old, new, _) in enumerate(faults):
        (folder / f"bad{number}.yaml").write_text(block("yaml").replace(old, new))
    done = deltamerge(folder, "check", *(f"bad{number}.yaml" for number in range(len(faults))))
    assert done.returncode == 1
    said = re.split(r"(?m)^(?=bad\d)", done.stderr)[1:]
    assert len(said) == len(faults)
    for text, (_, _, wanted) in zip(said, faults, strict=True):
        assert wanted in text


@pytest.mark.slow
def test_a_pruning_parameter_without_a_default_must_be_given(folder):
    shutil.copytree(folder / "site", folder / "strict", dirs_exist_ok=True)
    (folder / "strict" / "limits.py").write_text(block("python").replace("cut: Cut = 0.05", "cut: Cut"))
    (folder / "bad.yaml").write_text(block("yaml").replace(", cut: 0.03", ""))
    done = deltamerge(folder, "check", "bad.yaml", site="strict")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "bad.yaml:6:12: models[0].prune: spare needs cut")
    assert deltamerge(folder, "check", "recipe.yaml", site="strict").returncode == 0


def test_the_methods_are_listed(folder):
    found = json.loads(deltamerge(folder, "methods", "spare", "--json").stdout)
    assert found["prune"][0]["parameters"]["cut"]["default"] == 0.05
    assert '"cut"' in deltamerge(folder, "schema").stdout


@pytest.mark.parametrize("cut", [0.03, None], ids=["given", "default"])
def test_the_merge_is_the_formula_in_float64(folder, cut):
    text = block("yaml") if cut else block("yaml").replace(", cut: 0.03", "")
    (folder / "one.yaml").write_text(text)
    done = deltamerge(folder, "run", "one.yaml", "--out", f"out-{cut}", "--quiet")
    assert done.returncode == 0, done.stderr
    base, math, code, merged = (load_tensors(folder / name) for name in ("base", "math", "code", f"out-{cut}"))
    for name, shape in SHAPES.items():
        b, m, c = (tensors[name].double().numpy() for tensors in (base, math, code))
        key = bits.mask_key(0, "./math", name)
        drawn = bits.keep(key, 0, int(np.prod(shape)), 0.5).reshape(shape)
        spared = np.where(drawn | (abs(m - b) >= (cut or 0.05)), m - b, 0) / 0.5
        wanted = b + 1.5 * (0.7 * np.clip(spared, -0.06, 0.06) + 0.4 * np.clip(c - b, -0.06, 0.06))
        np.testing.assert_allclose(merged[name].double().numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_pruning_method_of_several_passes_is_checked_planned_and_listed(folder):
    text = block("yaml").replace("prune: {method: spare, density: 0.5, cut: 0.03}", SPIKES)
    (folder / "spikes.yaml").write_text(text)
    done = deltamerge(folder, "check", "spikes.yaml")
    assert (done.returncode, done.stderr) == (0, "spikes.yaml: ok, 4 tensors, 844.0 kB\n")
    planned = json.loads(deltamerge(folder, "plan", "spikes.yaml", "--json").stdout)
    assert [tensor["passes"] for tensor in planned["tensors"]] == [2, 2, 2, 2]
    assert "spikes density=0.5" in planned["tensors"][0]["sources"][0]
    found = json.loads(deltamerge(folder, "methods", "spikes", "--json").stdout)
    assert found["prune"][0]["parameters"]["spread"]["default"] == 2.0
    for old, new, wanted in (
        ("floor: 0.2", "floor: -1", "prune.floor: must be at least 0, got -1"),
        ("density: 0.5, floor", "floor", "models[0].prune: spikes needs a density"),
        ("spread: 1.5", "group: row", "prune.group: has no effect with method spikes"),
    ):
        (folder / "bad.yaml").write_text(text.replace(old, new))
        done = deltamerge(folder, "check", "bad.yaml")
        assert done.returncode == 1
        assert wanted in done.stderr


def test_a_pruning_method_of_several_passes_is_the_formula_in_float64(folder):
    text = block("yaml").replace("prune: {method: spare, density: 0.5, cut: 0.03}", SPIKES)
    (folder / "passes.yaml").write_text(text)
    done = deltamerge(folder, "run", "passes.yaml", "--out", "out-passes", "--quiet")
    assert done.returncode == 0, done.stderr
    base, math, code, merged = (load_tensors(folder / name) for name in ("base", "math", "code", "out-passes"))
    for name, shape in SHAPES.items():
        b, m, c = (tensors[name].double().numpy() for tensors in (base, math, code))
        drawn = bits.keep(bits.mask_key(0, "./math", name), 0, int(np.prod(shape)), 0.5).reshape(shape)
        times = np.abs(m - b) / np.sqrt(np.mean((m - b) ** 2))
        kept = np.where((times >= 1.5) | (drawn & (times >= 0.2)), m - b, 0) / 0.5
        wanted = b + 1.5 * (0.7 * np.clip(kept, -0.06, 0.06) + 0.4 * np.clip(c - b, -0.06, 0.06))
        np.testing.assert_allclose(merged[name].double().numpy(), wanted, rtol=0, atol=1e-6)


def test_what_a_pruning_method_declares_is_asked_for(folder):
    shutil.copytree(folder / "site", folder / "declared", dirs_exist_ok=True)
    (folder / "declared" / "spikes.py").write_text(block("python", 1).replace("random=True)", DECLARED))
    text = block("yaml").replace("prune: {method: spare, density: 0.5, cut: 0.03}", SPIKES)
    (folder / "bad.yaml").write_text(text)
    done = deltamerge(folder, "check", "bad.yaml", site="declared")
    assert "models[0].prune.method: spikes needs calibration" in done.stderr
    assert "models[0].prune.density: must be floor · spread = 0.3, got 0.5" in done.stderr
    found = json.loads(deltamerge(folder, "methods", "spikes", "--json", site="declared").stdout)
    assert found["prune"][0]["parameters"]["density"]["default"] == "floor · spread"


TALLEST = """
from deltamerge.methods.prune.select import above
from deltamerge.methods.registry import Param, PruneMethod


def nodes(masking):
    return above(masking.make, masking.delta, masking.cut)


spikes = PruneMethod(
    "tallest", "deltamerge.methods.prune.select:keep_largest", "the largest of all tensors",
    parameters={"density": Param("fraction kept", low=0, high=1)},
    groups=("model",), nodes="spikes:nodes",
)
"""


@pytest.mark.slow
def test_functions_may_be_named_and_a_threshold_of_the_model_is_given_to_who_asks(folder):
    shutil.copytree(folder / "site", folder / "named", dirs_exist_ok=True)
    (folder / "named" / "spikes.py").write_text(TALLEST)
    for name, prune in (("tallest", "method: tallest"), ("magnitude", "method: magnitude, group: model")):
        text = block("yaml").replace("method: spare, density: 0.5, cut: 0.03", f"{prune}, density: 0.1")
        (folder / f"{name}.yaml").write_text(text)
        done = deltamerge(folder, "run", f"{name}.yaml", "--out", f"out-{name}", "--quiet", site="named")
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_tensors(folder / f"out-{name}") for name in ("tallest", "magnitude"))
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_a_method_with_a_loop_runs_in_it_and_gives_the_same_bytes(folder):
    """One file has both, and either makes the file's bytes."""
    if not kernels.available():
        pytest.skip("no compiled kernels here")
    text = block("yaml").replace("limited", "plain_sum").replace("limit: 0.06, lambda: 1.5", "")
    (folder / "fast.yaml").write_text(text.replace("    prune: {method: spare, density: 0.5, cut: 0.03}\n", ""))
    planned = json.loads(deltamerge(folder, "plan", "fast.yaml", "--json").stdout)
    assert {tensor["backend"] for tensor in planned["tensors"]} == {"fused"}
    made = {}
    for name, switch in (("on", {}), ("off", {kernels.SWITCH: kernels.OFF})):
        done = deltamerge(folder, "run", "fast.yaml", "--out", f"out-{name}", "--quiet", **switch)
        assert done.returncode == 0, done.stderr
        made[name] = load_tensors(folder / f"out-{name}")
    base, math, code = (load_tensors(folder / name) for name in ("base", "math", "code"))
    for name in SHAPES:
        assert torch.equal(made["on"][name], made["off"][name])
        b, m, c = (tensors[name].double() for tensors in (base, math, code))
        torch.testing.assert_close(made["on"][name].double(), b + 0.7 * (m - b) + 0.4 * (c - b), rtol=0, atol=1e-6)


OLD = """
from deltamerge.methods.registry import MergeMethod, Param, PruneMethod


def limited(base, *deltas, tile, weights, limit, lambda_):
    import torch

    from deltamerge.methods.ops import densify

    total = torch.zeros(tile.size, dtype=torch.float32, device=base.device)
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + densify(delta, tile.size).clamp(-limit, limit) * weight
    return base.to(torch.float32) + total * lambda_


def spare(delta, *, tile, key, density, cut):
    from deltamerge.methods.ops import densify
    from deltamerge.methods.prune.bits import keep_torch

    delta = densify(delta, tile.size)
    kept = keep_torch(key, tile.start, tile.stop, density, delta.device) | (delta.abs() >= cut)
    return delta.where(kept, delta.new_zeros(()))


METHODS = (
    MergeMethod(
        "limited", limited, "task arithmetic of deltas clipped to ± limit",
        parameters={
            "weight": Param("factor of the model's delta", per_model=True, alone=1.0),
            "limit": Param("largest abs(Δ) that stays", low=0),
            "lambda": Param("factor of the merged delta", 1.0),
        },
        needs_base=True, deltas=True, adds=True,
    ),
    PruneMethod(
        "spare", spare, "keep entries of abs(Δ) ≥ cut, others with probability density",
        parameters={
            "density": Param("fraction kept below the cut", low=0, high=1, low_open=True),
            "q": Param("kept entries are divided by q", low=0, high=1, low_open=True),
            "cut": Param("abs(Δ) from which entries always stay", 0.05, low=0),
        },
        random=True,
    ),
)
"""


def test_packages_of_the_old_form_merge_as_before(folder):
    """Entries made by hand, several at one entry point."""
    shutil.copytree(folder / "site", folder / "old", dirs_exist_ok=True)
    (folder / "old" / "limits.py").write_text(OLD)
    (points,) = (folder / "old").glob("*/entry_points.txt")
    points.write_text("[deltamerge.methods]\nlimits = limits:METHODS\n")
    for site in ("site", "old"):
        done = deltamerge(folder, "run", "recipe.yaml", "--out", f"out-of-{site}", "--quiet", site=site)
        assert (done.returncode, done.stderr) == (0, "")
    old, new = (load_tensors(folder / f"out-of-{site}") for site in ("old", "site"))
    assert all(torch.equal(old[name], new[name]) for name in SHAPES)
