"""mergekit-tokensurgeon 0.1.5 and `tokenizer: {transplant: …}` on the same models: the same rows for every token, to
1e-4 of the largest (its least squares are of float32, ours of float64).

Off by default, as `test_tokenizers.py`. Named differences that the models here do not have: a token beyond the donor's
embedding, or an id without a token, is zeros there and the mean row here; spellings are matched by bytes here.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import load_tensors, tiny_llama
from running import run
from transplants import two_models
from vocabularies import vocab_of

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("default")]

CASES = {
    "omp": ("omp", 5, "omp"),
    "omp-all": ("omp", 24, "omp"),
    "common": ("common", 6, "common_interpolation"),
    "mean": ("mean", 64, "mean"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_rows(case, tied, tmp_path):
    python = Path(os.environ.get("MERGEKIT_PYTHON", "/nowhere"))
    if not python.exists():
        pytest.skip("MERGEKIT_PYTHON names no interpreter")
    method, k, theirs = CASES[case]
    two_models(tmp_path, tied=tied)
    tiny_llama(tmp_path / "donor", seed=5, dtype=torch.float32, vocab_size=36, tied=tied)
    arguments = ["base", "donor", "theirs", "-k", str(k), "-a", theirs]
    done = subprocess.run(
        [python, "-m", "mergekit.scripts.tokensurgeon", *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    more = "" if method == "mean" else f", k: {k}"
    (tmp_path / "r.yaml").write_text(
        "merge_method: passthrough\nmodels: [{model: ./base}]\n"
        f"tokenizer: {{transplant: ./donor, method: {method}{more}}}\n"
    )
    out = run(tmp_path / "r.yaml", tmp_path / "ours").folder
    ours, wanted = load_tensors(out), load_tensors(tmp_path / "theirs")
    assert vocab_of(out) == vocab_of(tmp_path / "theirs")
    stated = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert len({(c["vocab_size"], c["bos_token_id"], c["eos_token_id"], c["pad_token_id"]) for c in stated}) == 1
    assert ours.keys() - wanted.keys() == set()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-4 * float(wanted[name].abs().max()))
