"""Runs in mergekit's environment, not ours: `python mergekit_side.py A.yaml B.yaml …` merges each into `A.mergekit`.

A recipe that mergekit refuses leaves `A.refused` with the reason; `methods.txt` has the names of its methods. Works in
the folder of the recipes.
"""

import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions

Path("methods.txt").write_text("\n".join(method.spec.name for method in registered_methods()))
for recipe in map(Path, sys.argv[1:]):
    try:
        configuration = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
        run_merge(configuration, str(recipe.with_suffix(".mergekit")), MergeOptions(random_seed=0, quiet=True))
    except Exception as refusal:
        recipe.with_suffix(".refused").write_text(f"{type(refusal).__name__}: {refusal}\n")
