"""Series of checkpoints: the folders that a pattern names, in the order of their numbers, and their weights.

    constant     1/n each (PMA, arXiv 2505.12082, "SMA")
    minus_sqrt   c_i = (√(i+1) − √i) / √n of checkpoint i = 0 … n − 1, the oldest first
    ema          c_0 = d^(n−1), c_i = (1 − d) d^(n−1−i): d times the average so far, 1 − d times the new checkpoint
                 (PMA, "EMA"); d is `decay`

A constant learning rate and then an average is a decayed learning rate (WSM, arXiv 2507.17634, theorem 3.1): the update
between checkpoints i − 1 and i counts w_i = Σ_{j ≥ i} c_j, so c_i = w_i − w_{i+1}. minus_sqrt has w_i = 1 − √(i/n), the
decay from w_0 = 1 to w_n = 0 of Hägele et al. (arXiv 2405.18392).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.tensors.names import natural

Schedule = Literal["constant", "minus_sqrt", "ema"]

MAGIC = re.compile(r"[*?[]")
UNFINISHED = re.compile(r"(^|[-_.])(tmp|temp|incomplete|partial)([-_.]|$)", re.IGNORECASE)
LARGEST = 2.0**100  # largest weight in the running form of an ema
SHOWN = 24


@dataclass(frozen=True, slots=True)
class Matches:
    """The references that match a pattern, in order, and the names of folders that are passed over."""

    references: tuple[str, ...]
    unfinished: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Series:
    """The checkpoints of one item of a recipe, and the share of each in their average."""

    pattern: str
    names: tuple[str, ...]
    of: int
    schedule: str | None
    decay: float | None
    shares: tuple[float, ...]
    found: Matches

    def describe(self) -> Iterator[str]:
        """Yield the lines of a plan about the series."""
        count = len(self.names)
        what = f"the last {count} of {self.of} models" if count < self.of else f"{count} models"
        how = "" if self.schedule is None else f", {self.schedule}" + (f" {self.decay:g}" if self.decay else "")
        pairs = list(zip(self.names, self.shares, strict=False))
        if not pairs:
            listed = list(self.names)
        elif len(set(self.shares)) == 1:
            how, listed = f"{how} {self.shares[0]:.4g} each", list(self.names)
        else:
            listed = [f"{name} {share:.4g}" for name, share in pairs]
        if count > SHOWN:
            listed = [*listed[: SHOWN // 2], "…", *listed[-SHOWN // 2 :]]
        yield f"{self.pattern}: {what}{how}: {', '.join(listed)}"
        if self.found.unfinished:
            yield f"{self.pattern}: passed over as unfinished, by their names: {some(self.found.unfinished)}"
        if self.found.linked:
            yield f"{self.pattern}: passed over as links to others of them: {some(self.found.linked)}"


def find(reference: str, folder: Path) -> Matches | None:
    """Return the folders of a local path with * ? [] ("run/step-*", "base+run/checkpoint-*"), by their numbers.

    None: it is no pattern. InputError: nothing matches, or the order is unknown.
    """
    before, plus, pattern = (
        reference.rpartition("+") if MAGIC.search(reference.rpartition("+")[2]) else ("", "", reference)
    )
    if not MAGIC.search(pattern) or (folder / os.path.expanduser(reference)).exists():
        return None
    if "**" in pattern:
        raise InputError(f"{reference}: ** is not read", hint="* stands for one name; write run/*/step-*")
    places, start = [""], folder
    parts = os.path.expanduser(pattern).split("/")
    if parts[0] == "":
        places, parts, start = ["/"], parts[1:], Path("/")
    for part in parts:
        places = [os.path.join(place, name) for place in places for name in _matching(start / place, part)]
    kept, unfinished, linked = _sorted_out(places, start)
    if not kept:
        there = _matching((start / pattern).parent, "*") if not MAGIC.search(os.path.dirname(pattern)) else []
        hint = f"there are {some(sorted(there, key=natural))}" if there else "is the path relative to the recipe?"
        raise InputError(f"{reference} matches no folder", hint=hint)
    numbered = [place for place in kept if re.search(r"\d", _varying(place, pattern))]
    if numbered and len(numbered) < len(kept):
        odd = next(place for place in kept if place not in numbered)
        hint = f"narrow the pattern: {reference.replace('*', '[0-9]*')}, or name it alone"
        raise InputError(f"{reference}: {odd} has no number, its place among the others is not known", hint=hint)
    return Matches(tuple(f"{before}{plus}{place}" for place in kept), unfinished, linked)


def _matching(folder: Path, pattern: str) -> list[str]:
    """Return the names of folders in a folder that match one part of a pattern."""
    if not MAGIC.search(pattern):
        return [pattern] if (folder / pattern).is_dir() else []
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    return [name for name in names if fnmatchcase(name, pattern) and name.startswith(".") == pattern.startswith(".")]


def _sorted_out(places: Sequence[str], start: Path) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Sort folders into the complete, in order and each once; the unfinished; and links to others."""
    ordered = sorted(places, key=lambda place: (natural(place), place))
    unfinished = [place for place in ordered if UNFINISHED.search(place.rpartition("/")[2])]
    kept = [place for place in ordered if place not in unfinished]
    own = {os.path.realpath(start / place) for place in kept if not (start / place).is_symlink()}
    linked = [place for place in kept if (start / place).is_symlink() and os.path.realpath(start / place) in own]
    return [place for place in kept if place not in linked], tuple(unfinished), tuple(linked)


def _varying(place: str, pattern: str) -> str:
    """Return the names that a place has where the pattern has * ? []."""
    names, parts = place.split("/"), os.path.expanduser(pattern).split("/")
    return "/".join(name for name, part in zip(names, parts, strict=True) if MAGIC.search(part))


def shares(schedule: str, count: int, decay: float | None = None) -> tuple[float, ...]:
    """Return the weights of `count` checkpoints, the oldest first; they add up to 1 (formulas above)."""
    if schedule == "minus_sqrt":
        return tuple((math.sqrt(i + 1) - math.sqrt(i)) / math.sqrt(count) for i in range(count))
    if schedule == "ema":
        assert decay is not None
        return tuple((1.0 if i == 0 else 1 - decay) * decay ** (count - 1 - i) for i in range(count))
    return (1 / count,) * count


def running(schedule: str, start: int, count: int, decay: float | None = None) -> tuple[float, ...] | None:
    """Return weights in proportion to `shares` that no later checkpoint changes, numbers `start` to `start + count`.

    For constant they are 1; for ema 1, then (1 − d) d^(−i). None: no such weights exist, or they leave float32's range.
    """
    if schedule == "minus_sqrt":
        return None
    if schedule == "constant":
        return (1.0,) * count
    assert decay is not None
    last = start + count - 1
    if math.log(1 - decay) - last * math.log(decay) > math.log(LARGEST):
        return None
    return tuple(1.0 if i == 0 else (1 - decay) * decay**-i for i in range(start, start + count))
