"""`diff` of checkpoints that hold NaN and infinities: figures, and nothing else on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from raw_tensors import Stored, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# A NaN that traps when it is converted (signalling), one that does not, and infinity, by dtype.
BITS: dict[str, dict[str, int]] = {
    "F32": {"signalling": 0x7F800001, "quiet": 0x7FC00000, "infinity": 0x7F800000},
    "BF16": {"signalling": 0x7F81, "quiet": 0x7FC0, "infinity": 0x7F80},
    "F16": {"signalling": 0x7C01, "quiet": 0x7E00, "infinity": 0x7C00},
}


def diff(folder: Path, *options: str) -> tuple[dict[str, Any] | str, str]:
    """What `diff a b` prints, in a process of its own, where no test turns warnings into errors."""
    command = [sys.executable, "-m", "deltamerge", "diff", str(folder / "a"), str(folder / "b"), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return (json.loads(done.stdout) if "--json" in options else done.stdout), done.stderr


def ones(dtype: str, count: int = 64, **changed: int) -> Stored:
    """A vector of ones, but for the bits at some places."""
    one = {"F32": 0x3F800000, "BF16": 0x3F80, "F16": 0x3C00}[dtype]
    bits = np.full(count, one, np.uint32 if dtype == "F32" else np.uint16)
    for place, value in changed.items():
        bits[int(place.removeprefix("at"))] = value
    return dtype, bits


def test_what_is_not_finite_brings_no_warning_of_numpy(tmp_path: Path) -> None:
    """Of every dtype: a value that becomes one, one that was one, and one that stays."""
    first, second = dict[str, Stored](), dict[str, Stored]()
    for dtype, kinds in BITS.items():
        for kind, bits in kinds.items():
            name = f"{dtype}.{kind}"
            first |= {f"{name}.new": ones(dtype), f"{name}.old": ones(dtype, at3=bits)}
            second |= {f"{name}.new": ones(dtype, at3=bits), f"{name}.old": ones(dtype)}
            first[f"{name}.same"] = second[f"{name}.same"] = ones(dtype, at3=bits)
    write_checkpoint(tmp_path / "a", first)
    write_checkpoint(tmp_path / "b", second)
    found, err = diff(tmp_path, "--json")
    assert err == ""
    assert isinstance(found, dict)
    assert {one["name"]: one["changed"] for one in found["tensors"]} == {n: 1 for n in first if "same" not in n}


def test_infinities_that_meet_are_no_warning_either(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {"w": ones("F32", at1=0x7F800000, at2=0x7F7FFFFF)})
    write_checkpoint(tmp_path / "b", {"w": ones("F32", at1=0xFF800000, at2=0xFF7FFFFF, at5=0x40000000)})
    _, err = diff(tmp_path)
    assert err == ""


def test_the_largest_change_is_that_of_numbers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {"w": ones("F32")})
    write_checkpoint(tmp_path / "b", {"w": ones("F32", at3=0x7FC00000, at9=0x40800000)})  # NaN, and 4 for 1
    printed, _ = diff(tmp_path)
    assert isinstance(printed, str)
    assert printed.splitlines()[1].split() == ["w", "2", "64", "3", "nan", "nan"]
