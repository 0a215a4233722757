"""docs/reference/json.md has the schema of what inspect, recommend, plan and diff print as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from calls import call
from conftest import tiny_llama
from pydantic import BaseModel

from deltamerge.apps.inspect.statistics import (
    Activations,
    Influence,
    LayerInfluence,
    Massive,
    Report,
    Statistics,
    TensorStatistics,
)
from deltamerge.apps.recommend.forecast import SkillForecast
from deltamerge.apps.recommend.meeting import Conflict
from deltamerge.apps.recommend.merge import MergeAdvice, MergeCandidate, MergeTrial
from deltamerge.apps.recommend.prune import Evidence, Paper, PruneCandidate, Recommendation
from deltamerge.plan.review import TENSOR_KEYS
from deltamerge.run.calibration_record import ChosenQ, Run

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
MODELS: tuple[type[BaseModel], ...] = (
    Report,
    Statistics,
    TensorStatistics,
    Activations,
    Influence,
    LayerInfluence,
    Massive,
    Run,
    ChosenQ,
    Recommendation,
    Evidence,
    PruneCandidate,
    Paper,
    MergeAdvice,
    Conflict,
    SkillForecast,
    MergeCandidate,
    MergeTrial,
)


def tables() -> str:
    """A table of each model's own fields: key, type, meaning."""
    parts = []
    for model in MODELS:
        parent = model.__mro__[1]
        inherited = parent.model_fields if issubclass(parent, BaseModel) else {}
        rows = [
            f"| {name} | {_type(field.annotation)} | {_cell(field.description)} |"
            for name, field in model.model_fields.items()
            if name not in inherited
        ]
        besides = f"The fields of {parent.__name__}, and:\n\n" if inherited else ""
        first = str(model.__doc__).splitlines()[0]
        head = f"### {model.__name__}\n\n{first}\n\n{besides}| key | type | meaning |\n|---|---|---|\n"
        parts.append(head + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _type(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) and "[" not in str(annotation) else str(annotation)
    text = re.sub(r"Annotated\[float, FieldInfo\(.*?\)\]\)\]", "float", text)
    text = re.sub(r"^typing.Union\[(\w+), (.*)\]$", r"\1 | \2", text)
    for module in (
        "deltamerge.apps.inspect.statistics.",
        "deltamerge.apps.recommend.merge.",
        "deltamerge.apps.recommend.forecast.",
        "deltamerge.run.calibration_record.",
        "typing.",
    ):
        text = text.replace(module, "")
    return text.replace(" | None", " or null").replace("|", "or")


def test_the_page_has_the_schema() -> None:
    assert PAGE.read_text().endswith(tables()), "write it again from tests/project/test_json_docs.py: tables()"


KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "object": (dict,), "list of str": (list,),
    "list of int": (list,), "list of object": (list,), "null": (type(None),),
}  # fmt: skip


def described(title: str) -> dict[str, tuple[set[type], bool]]:
    """The keys of a section's first table: their types, and whether they are always there."""
    text = PAGE.read_text()
    found = {}
    for row in re.findall(
        r"^\| (`.*?) \| (.*?) \|", text.partition(f"{title}\n")[2].partition("\n| key")[2].partition("\n\n")[0], re.M
    ):
        keys, types = re.findall(r"`(.*?)`", row[0]), row[1].partition(", only")[0].split(", ")
        for i, key in enumerate(keys):
            kinds = types[i if len(types) > 1 else 0].split(" or ")
            found[key] = {kind for name in kinds for kind in KINDS[name]}, ", only" not in row[1]
    return found


def flat(value: dict[str, Any]) -> dict[str, list[Any]]:
    """Values by the key that the page gives them: those in lists of objects as key[].inner."""
    found: dict[str, list[Any]] = {}
    for key, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            for name in inner[0]:
                found[f"{key}[].{name}"] = [one[name] for one in inner]
        else:
            found[key] = [inner]
    return found


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_plan_and_diff_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    base = tiny_llama(tmp_path / "base", seed=0, tokenizer=True)
    tiny_llama(tmp_path / "tuned", seed=1, base=base, tokenizer=True)
    tiny_llama(tmp_path / "other", seed=2, base=base, tokenizer=True)
    (tmp_path / "rows.txt").write_text("\n".join(f"w{i} w7" for i in range(9, 49)))
    monkeypatch.chdir(tmp_path)
    recipe = "base_model: ./base\nmodels: [{{model: ./tuned, prune: {{method: dare, density: 0.5{}}}}}]\n"
    calibrated = (
        "calibration: {data: rows.txt, length: 8, sequences: 8}\ntokenizer_source: base\nchat_template: chatml\n"
    )
    Path("a.yaml").write_text(recipe.format(""))
    Path("b.yaml").write_text(recipe.format(", q: output_change") + calibrated)
    Path("c.yaml").write_text(recipe.format("") + "output: {kind: delta}\n")
    Path("d.yaml").write_text("base_model: ./base\ngate_mode: random\nexperts: [{model: ./tuned}, {model: ./base}]\n")
    for name in ("a.yaml", "c.yaml"):
        assert call(capsys, "run", name, "-q")[0] == 0
    cases = [("## plan", ("plan", name)) for name in ("a.yaml", "b.yaml", "c.yaml", "d.yaml")]
    cases += [
        ("## plan --diff", ("plan", "--diff", "a.yaml", "c.yaml")),
        ("## plan --diff", ("plan", "--diff", "a.yaml", "b.yaml")),
        ("## diff", ("diff", "base", "tuned")),
        ("## diff", ("diff", "base", "base")),
        ("Two locks:", ("diff", "a-merged/recipe.lock", "c-merged/recipe.lock")),
        ("## run, extract and apply", ("run", "a.yaml", "--out", "a")),
        ("## A probe", ("eval", "base", "tuned", "--probe", "--device", "cpu")),
        ("## merge", ("merge", "tuned", "other", "--base", "base", "--out", "both", "--dry-run")),
        ("## bisect", ("bisect", "both.yaml", "--rows", "rows.txt", "--sequences", "8", "--length", "8")),
        ("## run, extract and apply", ("extract", "tuned", "--base", "base", "--values", "int8")),
        ("## run, extract and apply", ("extract", "tuned", "--base", "base", "--density", "0.5", "--out", "half")),
        ("## run, extract and apply", ("extract", "tuned", "--base", "base", "--lora", "2", "--whole", "drop")),
        ("## run, extract and apply", ("apply", "tuned-delta", "--base", "base", "--out", "again")),
    ]
    for title, words in cases:
        said, got = described(title), flat(printed(capsys, *words))
        pairs = {f"changed[].{key}" for key in TENSOR_KEYS} if title == "## plan --diff" else set()
        lists = {key.partition("[")[0] for key in said} - said.keys()
        assert got.keys() - pairs - lists <= said.keys(), words
        assert title != "## plan" or sum(got["memory"][0].values()) == got["peak_bytes"][0], words
        empty = {key for key in lists if got.get(key) == [[]]}
        missing = {key for key, (_, always) in said.items() if always} - got.keys()
        assert all(key.partition("[")[0] in empty for key in missing), (words, missing)
        for key in got.keys() & said.keys():
            assert {type(value) for value in got[key]} <= said[key][0], key


def test_every_table_of_the_page_was_read():
    assert len(described("## plan")) == 48
    assert len(described("## diff")) == 19
    assert len(described("## run, extract and apply")) == 18
    assert len(described("## A probe")) == 8
    assert len(described("## bisect")) == 16
    assert set(described("## merge")) == {"advice", "recipe", "run"}
    assert set(described("Two locks:")) == {"kind", "a", "b", "changes"}
