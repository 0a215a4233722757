"""Errors of other people's code during a calibration, turned into InputErrors: this model or its files are unusable."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltamerge.engine.devices import is_out_of_memory
from deltamerge.errors import DeltamergeError, InputError

OWN = Path(__file__).resolve().parents[1]
LONGEST = 200


@contextmanager
def running(what: str, hint: str | None = None) -> Iterator[None]:
    """Turn an error of code that is not deltamerge's into an InputError that begins with `what`."""
    try:
        yield
    except (DeltamergeError, MemoryError):
        raise
    except Exception as error:
        if is_own(error) or is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {reason(error)}", hint=hint) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' advice on lengths and padding."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_own(error: Exception) -> bool:
    """Whether an error was raised by deltamerge itself, not by code that it called.

    Torch's own functions are called through the modes that watch them.
    """
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[-1].name == "__torch_function__":
        frames.pop()
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(OWN)


def reason(error: Exception) -> str:
    """An error on one line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    shown = first if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {first}"
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
