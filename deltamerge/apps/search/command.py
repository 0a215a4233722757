"""What a program says of a merged folder: it is run without a shell, has a time, and prints JSON."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltamerge.errors import InputError
from deltamerge.errors.shown import shown
from deltamerge.recipe.schema import Command

LONGEST = 1 << 24
SAID = 200


def words_of(command: Command) -> list[str]:
    """Return the program and its arguments. InputError: none has {folder}, or quotes are open."""
    try:
        words = shlex.split(command.run) if isinstance(command.run, str) else list(command.run)
    except ValueError as error:
        raise InputError(f"study.objective.command.run: {error}", hint="close the quote, or give a list") from None
    if not any("{folder}" in word for word in words):
        raise InputError("study.objective.command.run: has no {folder}", hint="lm_eval … pretrained={folder}")
    return words


def value_of(command: Command, folder: Path, here: Path) -> float:
    """Return the number that a command prints about `folder`. It runs in `here`.

    InputError, in one line: it cannot be started, fails, takes too long, or prints no such number.
    """
    words = [word.replace("{folder}", str(folder)) for word in words_of(command)]
    name = shown(words[0])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=here, start_new_session=True
            )
        except OSError as error:
            raise InputError(f"{name}: cannot be started: {error.strerror}") from None
        try:
            code = process.wait(command.timeout)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{name}: ended after {command.timeout} s", hint="study.objective.command.timeout"
            ) from None
        finally:
            _end(process)
        said, complained = _text(out), _text(err)
    if code:
        last = next((line for line in reversed(complained.splitlines()) if line.strip()), "it says nothing")
        raise InputError(f"{name}: exit code {code}: {shown(last.strip(), SAID)}")
    return _number(said, command.value.split("."), name)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(file: Any) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - LONGEST))
    return str(file.read().decode("utf-8", "replace"))


def _number(said: str, keys: Sequence[str], name: str) -> float:
    found = _last_json(said)
    if found is None:
        raise InputError(f"{name}: prints no JSON object: {shown(said.strip()[-80:] or 'nothing', SAID)}")
    value: Any = found
    at: list[str] = []
    rest = list(keys)
    while rest:
        if not isinstance(value, dict):
            break
        # a key may hold dots itself, or commas: lm-eval's "acc,none"
        here = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in value), 0)
        if not here:
            known = ", ".join(map(shown, list(value)[:8]))
            raise InputError(f"{name}: its JSON has no {'.'.join([*at, rest[0]])}", hint=f"there: {known}")
        at.append(".".join(rest[:here]))
        value, rest = value[at[-1]], rest[here:]
    if rest or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}: {'.'.join(keys)} is no finite number: {shown(json.dumps(value), 80)}")
    return float(value)


def _last_json(said: str) -> dict[str, Any] | None:
    """Return the last JSON object that begins a line."""
    decoder = json.JSONDecoder()
    at = len(said)
    while (at := said.rfind("{", 0, at)) >= 0:
        if at and said[at - 1] != "\n":
            continue
        with suppress(ValueError, RecursionError):
            value, _ = decoder.raw_decode(said, at)
            if isinstance(value, dict):
                return value
    return None
