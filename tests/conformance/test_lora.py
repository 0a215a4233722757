"""mergekit-extract-lora 0.1.5 and ours: the same products, and the same singular subspaces to 1e-4."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import load
from running import run
from safetensors.torch import load_file
from tiny_models import make

pytestmark = [pytest.mark.conformance, pytest.mark.skipif("MERGEKIT_PYTHON" not in os.environ, reason="no mergekit")]
PREFIX = "base_model.model."


def factors(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B and A of every linear layer, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_B.weight", ".lora_A.weight"
    names = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    return {n.removeprefix(PREFIX): tuple(tensors[n + end].double().numpy() for end in ends) for n in names}


def test_the_subspaces_of_mergekit(tmp_path: Path) -> None:
    architecture = "LlamaForCausalLM"
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "tie_word_embeddings": False}
    make(architecture, tmp_path / "base", **settings)
    model, generator = load(architecture, tmp_path / "base"), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if noise.dim() == 2:  # singular values that are apart, so that subspaces are told
                u, s, vt = torch.linalg.svd(noise, full_matrices=False)
                noise = (u * (s / (1 + torch.arange(len(s))))) @ vt
            parameter.add_(0.05 * noise)
    model.save_pretrained(tmp_path / "tuned")
    script = Path(os.environ["MERGEKIT_PYTHON"]).parent / "mergekit-extract-lora"
    models = ["--model", str(tmp_path / "tuned"), "--base-model", str(tmp_path / "base")]
    command = [str(script), *models, "--out-path", "theirs", "--max-rank", "6"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    recipe = "base_model: base\nmodels: [{model: tuned}]\noutput: {kind: peft, rank: 6}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    run(tmp_path / "r.yaml", tmp_path / "ours")
    theirs, ours = factors(tmp_path / "theirs"), factors(tmp_path / "ours")
    assert ours.keys() <= theirs.keys()
    assert len(ours) == 21
    for name, (b, a) in ours.items():
        other_b, other_a = theirs[name]
        np.testing.assert_allclose(b @ a, other_b @ other_a, atol=1e-5 * np.abs(b @ a).max())
        for one, two in ((b, other_b), (a.T, other_a.T)):
            q, other = np.linalg.qr(one)[0], np.linalg.qr(two)[0]
            assert np.linalg.svd(q.T @ other, compute_uv=False).min() > 1 - 1e-4, name
            sines = np.linalg.norm(other - q @ (q.T @ other), 2)
            assert sines < 1e-4, name
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    mine = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (mine["r"], mine["lora_alpha"]) == (6, 6)
