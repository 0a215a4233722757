"""Adapters drawn at random, read by deltamerge as PEFT merges them.

`make fuzz` runs it for a night: FUZZ / 50 adapters, drawn anew every time, instead of the few of every day; `-m slow`
400. A failure names its seed: `drawn(seed)` is the case.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tensors
from test_adapter import expanded

from deltamerge.errors import InputError
from deltamerge.models import hub

peft = pytest.importorskip("peft")

from random_adapters import BY_PEFT, Case, drawn, quiet  # noqa: E402

# What deltamerge refuses by name and PEFT may merge.
REFUSALS = (
    "begins with a part of a convolution", "of a convolution", "only plain LoRA of experts can be read",
    "changes an embedding that is tied to the head", "changes an embedding that is tied to a head",
    "lora_bias needs a bias in the base's layer", "are of two adapters",
    "changes rows of tokens and a head that shares them",
)  # fmt: skip
TOLERANCES = {"float32": 2e-5, "bfloat16": 2**-6}


def difference(case: Case, folder: Path) -> str | None:
    """What is wrong with what deltamerge reads; "skipped" where PEFT cannot make, load or merge the adapter."""
    if not case.write(folder) or (adapted := case.adapted(folder)) is None:
        return "skipped"
    ids = torch.arange(60).reshape(3, 20)
    try:  # the adapted model's own answers, before its weights are merged
        logits = quiet(adapted, ids).logits.detach() if "tied" in case.family or case.family == "gpt2" else None
        merged = quiet(adapted.merge_and_unload)
    except BY_PEFT:
        return "skipped"
    try:
        checkpoint = hub.open_model("base+adapter", folder, weights=False)
    except InputError as error:
        return "refused" if any(reason in str(error) for reason in REFUSALS) else f"refused: {error}"
    if any("modules_to_save" in name for name in merged.state_dict()):
        return "skipped"  # PEFT leaves its own wrappers in the model
    got, stored = expanded("base+adapter", folder), load_tensors(folder / "base")
    if got.keys() != stored.keys() and logits is not None:
        return _by_logits(case, merged, checkpoint.config, got, logits)
    quiet(merged.save_pretrained, folder / "merged")
    return _apart(got, load_tensors(folder / "merged"), TOLERANCES[case.dtype])


def _by_logits(
    case: Case, model: Any, config: dict[str, Any], got: dict[str, torch.Tensor], logits: torch.Tensor
) -> str | None:
    """Where the head is untied, which PEFT's merge does not do, the adapted model's own answer is the judge."""
    if config.get("tie_word_embeddings") is not False or "lm_head.weight" not in got:
        return f"names differ: {sorted(got)[:4]}"
    made = type(model)(type(model.config).from_dict(config)).to(getattr(torch, case.dtype)).eval()
    made.load_state_dict(got)
    ids = torch.arange(60).reshape(3, 20)
    with torch.inference_mode():
        return _apart({"logits": made(ids).logits}, {"logits": logits}, 2e-4 if case.dtype == "float32" else 0.1)


def _apart(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> str | None:
    if got.keys() != want.keys():
        return f"names differ: {sorted(got.keys() ^ want.keys())[:4]}"
    for name, tensor in got.items():
        if tensor.dtype != want[name].dtype or tensor.shape != want[name].shape:
            return f"{name}: {tensor.dtype} {list(tensor.shape)}, PEFT's {want[name].dtype} {list(want[name].shape)}"
        if not torch.allclose(tensor.float(), want[name].float(), rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"{name}: {(tensor.float() - want[name].float()).abs().max():.3g} away from PEFT's"
    return None


def walked(seeds: Any, folder: Path) -> dict[str, int]:
    """How many cases were compared, refused and skipped; fails with all that differ."""
    counts = {"compared": 0, "refused": 0, "skipped": 0}
    wrong = []
    for seed in seeds:
        case = drawn(seed)
        said = difference(case, folder / str(seed))
        shutil.rmtree(folder / str(seed))
        if said in counts:
            counts[said] += 1
        elif said is None:
            counts["compared"] += 1
        else:
            wrong.append(f"drawn({seed}) {case}: {said}")
    assert not wrong, "\n".join(wrong)
    return counts


# The first few, and those that found: a square Conv1D beside a head (258, 318), a head's residual that is stored
# (32, 126), one that the embedding shares (125), stored rows of a tied model (19), more rank than rows (73), OLoRA of a
# Conv1D (91).
EVERYDAY = (*range(6), 19, 32, 73, 91, 125, 126, 258, 318)


def test_adapters_drawn_at_random(tmp_path: Path) -> None:
    long = "FUZZ" in os.environ
    seeds = [secrets.randbits(40) for _ in range(max(20, int(os.environ["FUZZ"]) // 50))] if long else EVERYDAY
    counts = walked(seeds, tmp_path)
    assert counts["compared"] > len(seeds) // 2, counts


@pytest.mark.slow
def test_many_adapters(tmp_path: Path) -> None:
    counts = walked(range(400), tmp_path)
    assert counts["compared"] > 300, counts
