"""Runs in mergekit's environment, not ours: `python mergekit_moe_side.py A.yaml …` makes each with mergekit-moe's own
`build` into `A.mergekit`; what it refuses leaves `A.refused` with the reason. Works in the folder of the recipes."""

import sys
from pathlib import Path

import torch
import yaml
from mergekit.moe import router
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build

# Its states are bfloat16; compared are formulas.
of_transformers = router.AutoModelForCausalLM.from_pretrained


def in_float32(*arguments, **options):
    return of_transformers(*arguments, **{**options, "torch_dtype": torch.float32, "device_map": None})


router.AutoModelForCausalLM.from_pretrained = in_float32
for recipe in map(Path, sys.argv[1:]):
    try:
        config = MoEMergeConfig.model_validate(yaml.safe_load(recipe.read_text()))
        build(config, str(recipe.with_suffix(".mergekit")), MergeOptions(quiet=True))
    except BaseException as refusal:
        recipe.with_suffix(".refused").write_text(f"{type(refusal).__name__}: {refusal}\n")
