"""Loads the compiled kernels (`_native`, C++ in src/), and tells whether they exist and for which processor.

DELTAMERGE_KERNELS chooses: `off` leaves everything to torch and numpy; `baseline`, `avx2` or `avx512` asks for the
loops of such a processor. The bytes are the same.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

from deltamerge.errors import InputError

SWITCH = "DELTAMERGE_KERNELS"
OFF = "off"
WITHOUT = "deltamerge runs without its compiled kernels (none are installed for this system): torch computes, slower"


@cache
def native() -> Any | None:
    """The extension module, its loops chosen; None where it is switched off or was not compiled.

    InputError: DELTAMERGE_KERNELS asks for loops that do not exist here.
    """
    asked = os.environ.get(SWITCH, "")
    if asked == OFF:
        return None
    try:
        module = importlib.import_module("deltamerge.engine.kernels._native")
    except ImportError:
        return None
    if asked and not module.choose(asked):
        known = ", ".join((OFF, *module.levels()))
        raise InputError(f"{SWITCH}={asked}: no such kernels on this processor", hint=f"one of {known}")
    return module


def available() -> bool:
    """Whether compiled kernels compute."""
    return native() is not None


def missing() -> str | None:
    """A line for users whose installation lacks kernels although they are not switched off."""
    return WITHOUT if native() is None and os.environ.get(SWITCH) != OFF else None


def described() -> str:
    """The kernels in a word or two, for people: the processor's level, or the reason that there are none."""
    module = native()
    if module is not None:
        return str(module.level())
    return f"off ({SWITCH})" if os.environ.get(SWITCH) == OFF else "not compiled, torch computes"
