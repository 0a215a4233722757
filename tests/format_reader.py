"""A reader of the encoding `steps`, and of chains of final values, written from docs/reference/delta-format.md alone:
numpy, bit by bit, without deltamerge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

Array = np.ndarray[Any, Any]
TILE = 1 << 20
FORM = {"BF16": (7, 255), "F16": (10, 31)}  # where the exponent begins, and its mask


def documented(word: str) -> str:
    """The Python of docs/reference/delta-format.md that has `word` in it."""
    text = (Path(__file__).parents[1] / "docs" / "reference" / "delta-format.md").read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return next(block for block in blocks if word in block)


class Bits:
    """Bits from the lowest of each byte."""

    def __init__(self, stored: bytes) -> None:
        self.number, self.at, self.size = int.from_bytes(stored, "little"), 0, 8 * len(stored)

    def take(self, width: int) -> int:
        value = self.number >> self.at & ((1 << width) - 1)
        self.at += width
        assert self.at <= self.size
        return value

    def zeros(self) -> int:
        count = 0
        while not self.take(1):
            count += 1
        return count

    def rice(self, n: int, k: int) -> list[int]:
        return [(q << k) + self.take(k) for q in [self.zeros() for _ in range(n)]]

    def wide_rice(self, n: int, k: int) -> list[int]:
        return [(1 << k + q) + self.take(k + q) - (1 << k) for q in [self.zeros() for _ in range(n)]]


class Header:
    def __init__(self, code: bytes) -> None:
        self.code, self.at = code, 0

    def byte(self) -> int:
        self.at += 1
        return self.code[self.at - 1]

    def choice(self) -> tuple[int, int, bool]:
        """n, k, inverted"""
        n, shift, byte = 0, 0, 128
        while byte & 128:
            byte = self.byte()
            n |= (byte & 127) << shift
            shift += 7
        how = self.byte()
        return n, how & 63, bool(how & 64)


def chosen(bits: Bits, choice: tuple[int, int, bool], size: int) -> list[int]:
    """Which of `size` are chosen."""
    n, k, inverted = choice
    listed, last = set(), -1
    for gap in bits.rice(n, k):
        last += gap + 1
        listed.add(last)
    assert last < size
    return [i for i in range(size) if (i in listed) != inverted]


def place(pattern: int) -> int:
    return pattern + 0x8000 if pattern < 0x8000 else 0xFFFF - pattern


def pattern(place: int) -> int:
    return place - 0x8000 if place >= 0x8000 else 0xFFFF - place


def read_code(code: bytes, base: Array, dtype: str) -> Array:
    """What a tile's code makes of the base's 16-bit patterns."""
    result = base.copy()
    if not code:
        return result
    shift, mask = FORM[dtype]
    exponents = base >> shift & mask
    header, groups, last = Header(code), [], -1
    for _ in range(header.byte()):
        first, last = last + 1, header.byte()
        changed = header.choice()
        large = header.choice() if changed[0] or changed[2] else (0, 0, False)
        groups.append((first, last, changed, large, header.byte() if large[0] or large[2] else 0))
    bits = Bits(code[header.at :])
    for first, last, changed, large, k in groups:
        members = np.flatnonzero((exponents >= first) & (exponents <= last))
        changing = members[chosen(bits, changed, members.size)]
        signs = [-1 if bits.take(1) else 1 for _ in changing]
        sizes = [1] * changing.size
        which = chosen(bits, large, changing.size)
        for i, excess in zip(which, bits.wide_rice(len(which), k), strict=True):
            sizes[i] = excess + 2
        for i, sign, size in zip(changing, signs, sizes, strict=True):
            result[i] = pattern((place(int(base[i])) + sign * size) % 65536)
    assert bits.size - bits.at < 8
    assert bits.take(bits.size - bits.at) == 0
    return result


def read_steps(record: dict[str, Any], stored: Array, base: Array) -> Array:
    """The result's patterns of a tensor; `base`: those of the base, in the result's dtype and shape."""
    size, raw = math.prod(record["shape"]), stored.tobytes()
    tiles = -(-size // TILE)
    at, parts = 4 * tiles, []
    for number, length in enumerate(np.frombuffer(raw, "<u4", tiles).tolist()):
        start = number * TILE
        parts.append(read_code(raw[at : at + length], base[start : start + TILE], record["dtype"]))
        at += length
    assert at == len(raw)
    return np.concatenate(parts)


State = dict[str, tuple[str, tuple[int, ...], Array]]  # dtype, shape, elements as integers
Positions = Callable[[dict[str, Any], str, dict[str, Array]], Array]


def short_hash(array: Array) -> str:
    return blake3(array.tobytes()).hexdigest(length=16)


def state_of(tensors: State) -> str:
    """The hash that names all tensors' contents."""
    rows = ((n, d, ",".join(map(str, shape)), short_hash(bits)) for n, (d, shape, bits) in sorted(tensors.items()))
    return blake3("".join("\t".join(row) + "\n" for row in rows).encode()).hexdigest(length=16)


def read_delta(folder: Path, base: State, positions: Positions, load: Callable[[Path], dict[str, Array]]) -> State:
    """What an artifact of final values makes; `positions` is the page's own function, of the other encodings."""
    manifest = json.loads((folder / "delta.json").read_text())
    arrays = load(folder / "delta.safetensors")
    found, used = State(), {*manifest.get("removed", [])}
    for name, record in manifest["tensors"].items():
        used.add(record.get("base_name", name))
        kind = record["dtype"], tuple(record["shape"])
        if "base" in record:
            assert base[name][:2] == kind
            bits = base[name][2].copy()
            assert short_hash(bits) == record["base"]
        else:
            bits = np.empty(math.prod(kind[1]), arrays[f"{name}.values"].dtype.str.replace("f", "u"))
        if record["count"] and record["encoding"] == "steps":
            bits = read_steps(record, arrays[f"{name}.steps"], bits)
        elif record["count"]:
            bits[positions(record, name, arrays)] = arrays[f"{name}.values"].view(bits.dtype)
        assert short_hash(bits) == record["result"]
        found[name] = *kind, bits
    return found | {name: base[name] for name in base.keys() - used}


def read_chain(
    chain: Path, base: State, positions: Positions, load: Callable[[Path], dict[str, Array]]
) -> dict[str, State]:
    """What every version of a chain makes, each named by its folder and hashed as its note says."""
    notes = {path.parent.name: path.parent / "version.json" for path in chain.glob("[!.]*/delta.json")}
    said = {name: json.loads(path.read_text()) if path.exists() else None for name, path in notes.items()}
    found: dict[str, State] = {}
    after, now = None, base
    while said.keys() - found.keys():
        name = next(n for n, note in said.items() if n not in found and (note or {}).get("after") == after)
        now = read_delta(chain / name, now, positions, load)
        state = state_of(now)
        if (note := said[name]) is not None:  # a first version may be without
            assert (note["format"], note["name"]) == ("deltamerge-version", name)
            assert (note["base"], note["state"]) == (state_of(base), state)
            for file, wanted in note["files"].items():
                raw = (chain / name / file).read_bytes()
                assert (wanted["size"], wanted["hash"]) == (len(raw), "blake3:" + blake3(raw).hexdigest())
        found[name], after = now, {"name": name, "state": state}
    return found
