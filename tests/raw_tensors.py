"""safetensors checkpoints written and read by numpy alone; a stored tensor is (safetensors code, array)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
OTHERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.uint8,
          "C64": np.complex64}  # fmt: skip
# of each dtype: bits after the point of a number from 1 to 2, exponent of the smallest normal number, largest number
DIGITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
LEAST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}
LARGEST = {
    "F64": 2.0**1023 * (2 - 2**-52),
    "F32": 2.0**127 * (2 - 2**-23),
    "F16": 65504.0,
    "BF16": 2.0**127 * 255 / 128,
}

Stored = tuple[str, np.ndarray[Any, Any]]


def stored(values: Any, code: str) -> Stored:
    """float64 values rounded to a dtype (to nearest, ties to even; bfloat16 from what float32 makes of them)."""
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if code != "BF16":
            return code, values.astype(ARRAYS[code])
        bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return code, np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def widened(tensor: Stored) -> np.ndarray[Any, Any]:
    """The numbers that a tensor stores, in float64."""
    code, array = tensor
    if code != "BF16":
        return array.astype(np.float64)
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    write_weights(folder / "model.safetensors", tensors)
    return folder


def write_weights(path: Path, tensors: Mapping[str, Stored]) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, at = [b""], 0
    for name, (code, array) in tensors.items():
        parts.append(array.tobytes())
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of every safetensors file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            array = np.frombuffer(data[begin + first : begin + end], (ARRAYS | OTHERS)[entry["dtype"]])
            found[name] = entry["dtype"], array.reshape(entry["shape"])
    return found
