"""mergekit's own tests of merges, each run by deltamerge: `make mergekit-suite MERGEKIT_SOURCE=FOLDER`.

FOLDER is an unpacked source of mergekit; nothing of it is in this project. MERGEKIT_SUITE_PYTHON is the interpreter of
an environment with what that source needs, and pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("test_basic_merges.py", "test_tokenizer.py", "test_chat_template.py")  # those that call run_merge
OUTCOME = re.compile(r"^tests/(?:\S+::)?(\S+) (PASSED|FAILED|ERROR)", re.MULTILINE)
PASSES = 33
LOST = "it looks for names that transformers has while a model runs; mergekit's output has them, and lacks the language"
# The tests that do not pass, and why not.
OTHERS = {
    **dict.fromkeys(
        (
            "test_linear_VLM_merge", "test_slerp_VLM_merge", "test_nuslerp_VLM_merges",
            "test_task_arithmetic_VLM_merge", "test_breadcrumbs_VLM_merge", "test_ties_VLM_merge",
            "test_dare_ties_VLM_merge", "test_model_stock_VLM_merge", "test_model_stock_filterwise_VLM_merge",
        ),
        LOST,
    ),
    "test_legacy_mode": "embeddings of different tokenizers are averaged row by row: refused, with tokenizer_source",
}  # fmt: skip

pytestmark = pytest.mark.conformance


def test_mergekits_own_tests_pass():
    source, python = os.environ.get("MERGEKIT_SOURCE"), os.environ.get("MERGEKIT_SUITE_PYTHON")
    if not source or not python:
        pytest.skip("make mergekit-suite MERGEKIT_SOURCE=FOLDER")
    environment = os.environ | {
        "DELTAMERGE": f"{sys.executable} -m deltamerge",
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(ROOT))),
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", "pytest", "-v", "-p", "mergekit_shim", "-p", "no:cacheprovider", "--color=no"]
    done = subprocess.run(
        [*command, *(f"tests/{file}" for file in FILES)], cwd=source, env=environment, capture_output=True, text=True
    )
    outcomes = dict(OUTCOME.findall(done.stdout))
    names = {name.rpartition("::")[2]: outcome for name, outcome in outcomes.items()}
    assert names, done.stdout + done.stderr
    others = {name for name, outcome in names.items() if outcome != "PASSED"}
    assert others == OTHERS.keys(), done.stdout
    assert len(names) - len(others) >= PASSES
