"""A plugin of pytest in mergekit's environment: its `run_merge` becomes `deltamerge run`.

`python -m pytest -p mergekit_shim tests`, in a source tree of mergekit, then tests deltamerge. DELTAMERGE is the
command. A merge that is refused raises ValueError with what deltamerge says.
"""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import mergekit.merge


def run_merge(merge_config, out_path, options, config_source=None):
    """Write the recipe as mergekit writes it, and run it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(config_source or merge_config.to_yaml(), encoding="utf-8")
        command = [*shlex.split(os.environ["DELTAMERGE"]), "run", str(recipe), "--out", str(out_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr)
    if done.returncode != 0:
        raise ValueError(done.stderr)


mergekit.merge.run_merge = run_merge  # before its tests import it
