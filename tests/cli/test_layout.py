"""What people read at 80 and at 120 columns: tables, methods, and a recipe's errors with a caret."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import call
from rich.cells import cell_len
from rich.console import Console
from terminals import terminal

from deltamerge.apps.inspect.statistics import (
    Activations,
    Influence,
    LayerInfluence,
    Massive,
    Report,
    Statistics,
    TensorStatistics,
)
from deltamerge.apps.recommend.prune import Evidence, Paper, PruneCandidate, Recommendation
from deltamerge.cli import main, output
from deltamerge.cli.inspect import render_inspect
from deltamerge.cli.layout import Column, cut, cut_at_word, table
from deltamerge.cli.methods import catalogue, gist, render_method, render_methods
from deltamerge.cli.recommend import render_recommend
from deltamerge.errors import InputError, RecipeError
from deltamerge.methods.registry import MERGE, PRUNE
from deltamerge.recipe.load import load_all
from deltamerge.recipe.yaml_source import loads_all

LONG = "model.layers.{}.self_attn.query_key_value_projection.weight"


def statistics(count: int, scale: float, **more: Any) -> dict[str, Any]:
    return {
        "count": count, "mean_abs": scale, "variance": scale, "kurtosis": None, "max_abs": 10 * scale,
        "unchanged": 0.25, "norm": 1.0, "base_norm": 2.0, "relative_norm": 0.5 * scale, "energy_share": 0.5,
        "quantiles": {}, "kept_energy": {"0.1": 0.9, "0.01": 0.105}, **more,
    }  # fmt: skip


def report(*, activations: bool = False) -> Report:
    blocks = [f"model.layers.{i}" for i in range(2)]
    tensors = [
        TensorStatistics(
            name=LONG.format(i), kind="linear", layer=block, shape=[2, 2], **statistics(16_777_216, 0.0031)
        )
        for i, block in enumerate(blocks)
    ]
    numbers = dict.fromkeys(Influence.model_fields, 0.1234)
    layers = [
        LayerInfluence(**numbers, name=t.name, tokens=7, massive=[Massive(feature=63, mean_abs=1, ratio=8)])
        for t in tensors
    ]
    seen = Activations(density=0.1, gamma=0.05, sequences=4, total=Influence(**numbers), layers=layers)
    return Report(
        model="math",
        base="./base",
        total=Statistics(**statistics(33_554_432, 0.003)),
        kinds={"linear": Statistics(**statistics(33_554_432, 0.003))},
        layers={block: Statistics(**statistics(16_777_216, 0.0031)) for block in blocks},
        tensors=tensors,
        without_delta=[f"head.{i}" for i in range(20)],
        activations=seen if activations else None,
        warnings=["math may have another base"],
    )


def recommendation(*, measured: bool) -> Recommendation:
    def one(name: str, delta: float | None, lost: float | None) -> PruneCandidate:
        on = measured or None
        return PruneCandidate(
            name=name, prune={"method": "dare", "density": 0.1}, needs_calibration=False, delta_error=delta,
            layer_error=on and 0.5, lost=on and lost, metric=None, q=on and 0.1,
        )  # fmt: skip

    evidence = dict.fromkeys(Evidence.model_fields) | {
        "mean_abs_delta": 0.003, "relative_norm": 0.08, "noise": 0.35, "large": False, "kept_energy": 0.319,
    }  # fmt: skip
    return Recommendation(
        model="math",
        base="./base",
        density=0.1,
        method="dare",
        why=[
            "‖Δ‖/‖W‖ · sqrt((1 − d)/d) is 0.35, not above 0.5: the delta is small, and plain DARE keeps the fine-tune"
        ],
        paper=Paper(method="darex_q", prune={}, why="no fine-tuning, small deltas, no labels: DAREx-q, output_change"),
        evidence=Evidence(**evidence),
        candidates=[one("dare", 9.0, 0.04), one("magnitude_q", 0.68, 0.1), one("wanda", None, 0.2)],
        recipe="# dare\nbase_model: ./base\n",
    )


BAD = """\
base_model: ./base
merge_method: linear
models:
  - {model: ./a, prune: {method: dare, density: 20}}
  - {model: "日本語", weigth: 3}
  - model: ./b
    parameters: {weight: [1, two], a_parameter_that_there_is_not_and_that_has_a_long_name: 1, another: 2}
"""


def complaints(width: int) -> str:
    """What a terminal shows of a bad recipe, of YAML that is none, and of another error."""
    shown = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    for text in (BAD, "models:\n\t- a\n"):
        try:
            load_all(loads_all(text, "r.yaml"))
        except RecipeError as error:
            output.show(error, "error", shown)
    output.show(InputError("m: is missing", hint="name a folder", also=["a: one", "b: two"]), "error", shown)
    return shown.file.getvalue()  # type: ignore[attr-defined]


GOLDEN = Path(__file__).parent / "golden"


def outputs(width: int) -> dict[str, str]:
    """What people read, by the name of a file that keeps it."""
    return {
        f"inspect-{width}.txt": render_inspect(report(), width=width),
        f"inspect-rows-{width}.txt": render_inspect(report(activations=True), tensors=True, width=width),
        f"recommend-{width}.txt": render_recommend(recommendation(measured=False), width=width),
        f"recommend-rows-{width}.txt": render_recommend(recommendation(measured=True), width=width),
        f"method-ties-{width}.txt": render_method(catalogue("ties"), width),
        f"errors-{width}.txt": complaints(width),
    }


@pytest.mark.parametrize("width", [80, 120])
def test_what_people_read_is_as_it_was(width):
    for name, text in outputs(width).items():
        assert text.rstrip("\n") == (GOLDEN / name).read_text().rstrip("\n"), f"python {__file__} writes {name} anew"


def test_reports_are_a_line_in_python_and_a_table_in_a_notebook():
    found, advice = report(), recommendation(measured=False)
    norm = f"{found.total.relative_norm:.3g}"
    assert repr(found) == f"<Report math on ./base: {len(found.tensors)} tensors, ‖Δ‖/‖W‖ {norm}>" == str(found)
    assert repr(advice) == str(advice) == "<Recommendation math on ./base, density 0.1: dare>"
    assert f"<caption>{found.model} on {found.base}</caption>" in found._repr_html_()
    assert f"<td>{found.total.count:,}</td>" in found._repr_html_()
    hostile = advice.model_copy(update={"why": ["<script>"]})
    assert "&lt;script&gt;" in hostile._repr_html_()
    assert "<script" not in hostile._repr_html_()


def test_tables_fit_any_width():
    for width in range(64, 200, 17):
        listed = render_methods(catalogue(), width).splitlines()
        assert [line.split()[0] for line in listed if line.startswith("  ")] == [*MERGE, *PRUNE]
        texts = [text for name, text in outputs(width).items() if not name.startswith("errors")]
        assert max(map(len, [*listed, *(line for text in texts for line in text.splitlines())])) <= width


def test_a_table_leaves_out_what_is_empty_first_and_then_by_rank():
    columns = [Column("a", 1), Column("empty"), Column("two-\nlines", 2), Column("kept")]
    rows = [("x" * 40, ["1" * 9, "–", "2" * 9, "3" * 9]), ("y\x1b", ["1", "", "2", "3"])]
    whole = table(columns, [rows], 80)
    assert [line.split() for line in whole] == [
        ["two-"], ["a", "lines", "kept"], ["x" * 40, "1" * 9, "2" * 9, "3" * 9], ["y\\x1b", "1", "2", "3"],
    ]  # fmt: skip
    assert max(map(len, whole)) == 40 + 3 * 11
    narrow = table(columns, [rows], 60)
    assert narrow[-1] == "no room in 60 columns for: twolines; --json has them"
    assert "…" in narrow[1]
    assert max(map(len, narrow)) <= 60
    assert (cut("abcdefghij", 5), cut_at_word("one, two three", 9), cut_at_word("onetwothree", 6)) == (
        "ab…ij",
        "one …",
        "onet …",
    )


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize(
    ("line", "column"),
    [("a: b", 1), ("a: b", 4), ("日本: x", 5), ("\ta: b", 2), ("k" * 300 + ": v", 303), ("é\x1b[31m: v", 5), ("", 1)],
)
def test_the_caret_stands_under_its_column(line, column, width):
    text, before = output.excerpt(line, column, width)
    assert cell_len(text) <= width
    assert "\x1b" not in text
    at = next((i for i in range(len(text) + 1) if cell_len(text[:i]) == before), None)
    assert at is not None
    wanted = line[column - 1 : column]
    assert text[at : at + 1] == wanted or wanted in ("", "\x1b")


def test_a_terminal_shows_the_line_and_a_pipe_does_not(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BAD)
    code, _, plain = call(capsys, "check", "r.yaml", "--offline")
    assert (code, "^" in plain) == (1, False)
    assert "rich" in sys.modules  # by these tests; test_cli sees to it that no command without a terminal imports it
    for more, colour in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with terminal(monkeypatch, 80, **more) as seen:
            with pytest.raises(SystemExit):
                main(["check", "r.yaml", "--offline"])
            text = seen.read()
        assert ("\x1b[" in text) is colour
        shown = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "   4 |   - {model: ./a, prune: {method: dare, density: 20}}\n" in shown
        assert f"     | {' ' * 48}^\n" in shown
        kept = [line for line in shown.splitlines() if not re.match(r" {0,4}\d* +\|", line)]
        assert kept == plain.splitlines()


def test_a_set_value_is_shown_as_it_was_set_and_a_terminal_without_columns_has_some(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BAD)
    with terminal(monkeypatch, 80, NO_COLOR="1") as seen:
        with pytest.raises(SystemExit):
            main(["check", "r.yaml", "--offline", "--set", "models.0.prune.density=300"])
        assert "density: 300}}" in seen.read()
    with terminal(monkeypatch, 0, NO_COLOR="1") as seen:
        with pytest.raises(SystemExit):
            main(["check", "r.yaml", "--offline"])
        assert "     |              ^\nhint: 20 % is 0.2\n" in seen.read()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for columns in (80, 120):
        for name, text in outputs(columns).items():
            (GOLDEN / name).write_text(f"{text.rstrip()}\n")


def test_methods_say_what_they_need_and_are_cut_at_a_clause() -> None:
    lines = {line.split()[0]: line.split() for line in render_methods(catalogue(), 80).splitlines() if line[:2] == "  "}
    needs = {name: words[1:3] for name, words in lines.items()}
    assert (needs["linear"][0], needs["ties"][0], needs["regmean"]) == ("–", "base", ["base,", "rows"])
    assert needs["wanda"][0] == "rows"
    assert gist("first clause, and so on", 14) == "first clause"
    assert gist("a (b, c) and so on", 9) == "a (b …"
    assert gist("ram, with more words", 12) == "ram, with …"
    assert gist("short", 5) == "short"
