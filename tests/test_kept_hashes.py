"""The bytes of a fixed table of recipes, which never change: hashes of what the first compiled loops (numba) made.

`kept_recipes.py` has the table and how its inputs are made; `kept_hashes.json` was written by it at commit e38ab56.
Every layer of the inputs is another pair of dtypes, so a line has the hashes of a recipe in each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_choice import COMPILED, TORCH, available, computed_by
from kept_recipes import DTYPES, RECIPES, kept, make_inputs, output_hashes

# One of so many recipes every day, all with -m slow.
EVERYDAY = {"merges": 1, "pruned": 8, "large": 3}


def compare(folder: Path, kind: str, names: list[str]) -> None:
    make_inputs(folder, kind)
    wanted, recipes = kept()[kind], RECIPES[kind]()
    different = {}
    for name in names:
        pairs = zip(DTYPES, output_hashes(folder, kind, recipes[name]).split(), wanted[name].split(), strict=True)
        if wrong := [dtypes for dtypes, got, hash_ in pairs if got != hash_]:
            different[name] = wrong
    assert not different


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_has_kept_hashes(kind: str) -> None:
    assert list(kept()[kind]) == list(RECIPES[kind]())


@pytest.mark.parametrize("kind", RECIPES)
def test_bytes_are_those_kept(tmp_path: Path, kind: str) -> None:
    compare(tmp_path, kind, list(RECIPES[kind]())[:: EVERYDAY[kind]])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [COMPILED, TORCH])
@pytest.mark.parametrize("kind", RECIPES)
def test_bytes_are_those_kept_by_either_backend(tmp_path: Path, kind: str, backend: str) -> None:
    if backend not in available():
        pytest.skip("no compiled loops here")
    with computed_by(backend):
        compare(tmp_path, kind, list(RECIPES[kind]()))
