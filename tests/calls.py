"""Calls of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltamerge.cli import main


def call(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err
