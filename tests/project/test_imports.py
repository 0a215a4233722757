"""How much of the package a plain run imports: each module costs time at every start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from raw_tensors import stored, write_checkpoint

RECIPE = """\
merge_method: ties
base_model: ./base
models: [{model: ./a}, {model: ./b}]
parameters: {weight: 0.5, density: 0.5}
"""
LOADED = (
    "import sys\nfrom deltamerge.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as left:\n"
    "    assert not left.code\nprint(*(m for m in sys.modules if m.startswith('deltamerge') or m == 'numpy'))"
)
# A command -> the modules that it imports at most. A lower number may be written here, a higher one never.
MOST = {"check": 106, "run": 113}
# What a merge of plain checkpoints never needs, whole packages and single modules.
NEVER = (
    "apps", "calibrate", "formats.dcp", "formats.delta", "formats.gguf", "formats.peft", "formats.torch_bin",
    "formats.quantised.awq", "formats.quantised.codes", "formats.quantised.scheme", "formats.quantised.writer",
    "methods.low_rank", "models.adapter", "models.chain",
    "models.delta_file", "models.delta_over_base", "models.gguf_tokenizer", "models.hub", "models.hub_client",
    "outputs.delta", "outputs.gguf", "outputs.lora", "plan.calibration_graph", "plan.transplant",
    "run.ray",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain recipe of three tiny checkpoints."""
    folder = tmp_path_factory.mktemp("imports")
    (folder / "r.yaml").write_text(RECIPE)
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        values = np.random.default_rng(seed).standard_normal((8, 16)).astype(ml_dtypes.bfloat16)
        write_checkpoint(folder / name, {"w": stored(values, "BF16")}, {"model_type": "llama"})
    return folder


@pytest.mark.parametrize("command", MOST)
def test_a_plain_recipe_imports_few_modules(folder: Path, command: str) -> None:
    arguments = [command, "r.yaml", *(["--out", "out"] if command == "run" else [])]
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [name.removeprefix("deltamerge.") for name in done.stdout.splitlines()[-1].split()]
    assert ("numpy" in names) == (command == "run")
    loaded = [name for name in names if name not in ("engine.kernels._native", "numpy")]
    needless = [name for name in loaded if any(name == never or name.startswith(f"{never}.") for never in NEVER)]
    assert not needless
    assert len(loaded) <= MOST[command], loaded
