"""Runs in fusion-bench's environment, not ours: `python fusion_side.py FOLDER` merges the models a, b, c of FOLDER.

Leaves NAME.safetensors of every method that fusion-bench has, the deltas added to the base in float64.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import wudi_merging
from fusion_bench.utils.state_dict_arithmetic import state_dict_mul, state_dict_sub, state_dict_sum
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
base, *tunes = (load_file(folder / name / "model.safetensors") for name in ("base", "a", "b", "c"))
excluded = ["embed_tokens.weight", "lm_head.weight"]


def deltas() -> list[dict[str, torch.Tensor]]:
    return [state_dict_sub(tune, base) for tune in tunes]


def save(name: str, delta: dict[str, torch.Tensor]) -> None:
    merged = {key: (base[key].double() + value.detach().double()).contiguous() for key, value in delta.items()}
    save_file(merged, folder / f"{name}.safetensors")


def trimmed(density: float) -> dict[str, torch.Tensor]:
    """TIES of one tensor at a time, as fusion-bench trims whole models; it keeps one entry more than it is told to."""
    found = {}
    for key, value in base.items():
        flat = torch.stack([delta[key].flatten() for delta in deltas()])
        share = (int(density * value.numel()) - 0.5) / value.numel()
        found[key] = ties_merging(flat, reset_thresh=share, merge_func="mean").view(value.shape)
    return found


def masked() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Consensus of TALL masks, and the second task's model."""
    agreed, second = {}, {}
    for key, value in base.items():
        flat = torch.stack([delta[key].flatten() for delta in deltas()])
        tuned = torch.stack([tune[key].flatten() for tune in tunes])
        masks = generate_task_masks(flat, tuned, value.flatten(), tall_mask_lambda=0.4)
        agreed[key] = (flat.sum(0) * (masks.sum(0) >= 2)).view(value.shape)
        second[key] = (flat.sum(0) * masks[1]).view(value.shape)
    return agreed, second


def elected() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The second task's EMR model, rescaled by the paper's quotient of sums over the model and by theirs, of means."""
    unified, masks, rescalers = emr_merge(deltas())
    kept = {key: value * masks[key][1] for key, value in unified.items()}
    own = sum(value.abs().sum() for value in deltas()[1].values())
    ours = state_dict_mul(kept, float(own / sum(value.abs().sum() for value in kept.values())))
    return ours, state_dict_mul(kept, float(rescalers[1]))


with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    save("task_arithmetic", state_dict_mul(state_dict_sum(deltas()), 0.4))
    save("ties", trimmed(0.3))
    save("iso_c", state_dict_mul(iso_c(deltas(), "cpu", excluded), 1.3))
    save("iso_cts", iso_cts(deltas(), 0.8, "cpu", excluded))
    save("tsv_m", TSVM_utils.compute_and_sum_svd_mem_reduction(deltas(), excluded, torch.device("cpu")))
    save("wudi", wudi_merging(deltas(), "cpu", 300, excluded))
    for names, made in ((("consensus", "tall_masks"), masked()), (("emr", "emr_means"), elected())):
        for name, delta in zip(names, made, strict=True):
            save(name, delta)
