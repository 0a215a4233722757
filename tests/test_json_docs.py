"""docs/inspect.md has the schema of what inspect and recommend print as JSON."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from deltamerge.chosen import Choice, Run
from deltamerge.influence import Activations, Influence, LayerInfluence, Massive
from deltamerge.inspect import Report, Statistics, TensorStatistics
from deltamerge.recommend import Candidate, Evidence, Paper, Recommendation

PAGE = Path(__file__).parent.parent / "docs" / "inspect.md"
MODELS: tuple[type[BaseModel], ...] = (
    Report,
    Statistics,
    TensorStatistics,
    Activations,
    Influence,
    LayerInfluence,
    Massive,
    Run,
    Choice,
    Recommendation,
    Evidence,
    Candidate,
    Paper,
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
        besides = f"What {parent.__name__} has, and:\n\n" if inherited else ""
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
    for module in ("deltamerge.inspect.", "deltamerge.influence.", "deltamerge.chosen.", "typing."):
        text = text.replace(module, "")
    return text.replace(" | None", " or null").replace("|", "or")


def test_the_page_has_the_schema() -> None:
    assert PAGE.read_text().endswith(tables()), "write it again from tests/test_json_docs.py: tables()"
