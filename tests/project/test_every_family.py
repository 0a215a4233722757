"""The families of transformers: a few every day, all of them in a slow test, and the page about them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import family_walk
import pytest
import transformers
from running import make_plan, run
from small_families import families

from deltamerge.errors import InputError

RESULTS = json.loads(family_walk.RESULTS.read_text())
# experts and towers; a head apart from the embedding that its config ties it to; a tensor with a part for each layer
EVERYDAY = {
    "qwen3_vl_moe": ["merge", "stack", "delta"],
    "bigbird_pegasus": ["merge", "delta"],
    "esm": ["stack"],
}
GOOD = {"merge": ("ok",), "delta": ("ok",), "stack": ("ok", "refused: "), "calibrate": ("ok", "refused: ", "late: ")}


def faults(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row that are neither right nor refused where a refusal is right."""
    return {cell: row[cell] for cell, good in GOOD.items() if cell in row and not row[cell].startswith(good)}


@pytest.mark.parametrize("family", EVERYDAY)
def test_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = family_walk.examine(family, tmp_path / "models", {c: family_walk.CELLS[c] for c in EVERYDAY[family]})
    if "unbuilt" in row:
        pytest.skip(f"transformers {transformers.__version__}: {row['unbuilt']}")
    assert faults(row) == {}
    if transformers.__version__ == RESULTS["transformers"]:
        kept = RESULTS["families"][family]
        assert {c: row[c].split(":")[0] for c in EVERYDAY[family]} == {
            c: kept[c].split(":")[0] for c in EVERYDAY[family]
        }


def test_a_layer_that_the_class_builds_otherwise_is_refused(tmp_path: Path) -> None:
    """The last layer of some models is of one kind whatever their config says, so that no other can be the last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = family_walk.Made("diffusion_gemma_text", tmp_path)
    path = made.recipe("stack", family_walk.layers([(0, 2), (0, 2)], None))
    make_plan(path)
    with pytest.raises(
        InputError, match=r"layer 1 of ./a would be layer 3 of layers, which transformers builds otherwise"
    ):
        run(path, tmp_path / "out")


def test_the_results_have_no_fault_and_are_the_page() -> None:
    rows = RESULTS["families"]
    assert {family: wrong for family, row in rows.items() if (wrong := faults(row))} == {}
    assert family_walk.PAGE.read_text() == family_walk.page(RESULTS)


@pytest.mark.slow
def test_every_family() -> None:
    """Half an hour. What was right is right, and nothing is wrong."""
    wrong = {}
    for family, row in family_walk.each(families()):
        kept = {cell for cell, said in RESULTS["families"].get(family, {}).items() if said == "ok"}
        worse = {c: row.get(c, row) for c in GOOD if c in kept and not row.get(c, "").startswith("ok")}
        if found := faults(row) | worse:
            wrong[family] = found
    assert wrong == {}
