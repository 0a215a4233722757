"""Rows of text with labels, for tiny models that know the words w4 to w95."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def rows(path: Path, count: int = 20) -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    lines = []
    for i in range(count):
        words = " ".join(f"w{n}" for n in generator.integers(4, 96, 4 + i % 6))
        lines.append(json.dumps({"text": words, "label": int(generator.integers(2))}))
    path.write_text("\n".join(lines) + "\n")
