"""Loads the compiled kernels (`_native`, C++ in src/), and tells whether they exist and for which processor.

DELTAMERGE_KERNELS chooses: `off` leaves everything to torch and numpy; `baseline`, `avx2` or `avx512` asks for the
loops of such a processor. The bytes are the same.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from deltamerge.errors import InputError

SWITCH = "DELTAMERGE_KERNELS"
OFF = "off"
WITHOUT = "deltamerge runs without its compiled kernels (none are installed for this system): torch computes, slower"
STALE = (
    "deltamerge runs without its compiled kernels (they were compiled of other sources than are here): "
    "torch computes, slower; pip install -e . compiles them again"
)
SOURCES = Path(__file__).parent / "src"


@cache
def native() -> Any | None:
    """Return the extension module, its loops chosen; None where it is switched off or was not compiled of the sources
    here.

    InputError: DELTAMERGE_KERNELS asks for loops that do not exist here.
    """
    asked = os.environ.get(SWITCH, "")
    if asked == OFF:
        return None
    module = _compiled()
    if module is None or not _is_current(module):
        return None
    if asked and not module.choose(asked):
        known = ", ".join((OFF, *module.levels()))
        raise InputError(f"{SWITCH}={asked}: no such kernels on this processor", hint=f"one of {known}")
    return module


def _compiled() -> Any | None:
    try:
        return importlib.import_module("deltamerge.engine.kernels._native")
    except ImportError:
        return None


def _is_current(module: Any) -> bool:
    """Tell whether the module was compiled of the sources in this development tree; a wheel has no sources."""
    if not (SOURCES / "module.cpp").exists():
        return True
    digest = hashlib.sha256((SOURCES.parents[1] / "fused" / "codes.py").read_bytes())
    for path in [*sorted(SOURCES.glob("**/*.cpp")), *sorted(SOURCES.glob("**/*.h"))]:
        if path.name != "codes.h":
            digest.update(path.read_bytes())
    return hasattr(module, "sources") and bool(module.sources() == digest.hexdigest()[:16])


def available() -> bool:
    """Tell whether compiled kernels compute."""
    return native() is not None


def missing() -> str | None:
    """Return a line for users whose installation lacks kernels although they are not switched off."""
    if native() is not None or os.environ.get(SWITCH) == OFF:
        return None
    return WITHOUT if _compiled() is None else STALE


def described() -> str:
    """Return the kernels in a word or two, for people: the processor's level, or the reason that there are none."""
    module = native()
    if module is not None:
        return str(module.level())
    if os.environ.get(SWITCH) == OFF:
        return f"off ({SWITCH})"
    return "not compiled, torch computes" if _compiled() is None else "compiled of other sources, torch computes"
