"""`make torture`, small: kills, faults, a full disk, two runs at once and parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "torture.py"


@pytest.mark.slow
def test_a_tortured_merge_comes_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--kills", "4", "--folder", str(tmp_path / "torture")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "one wrote, one was refused" in done.stdout
