"""Plans side by side and as a picture, on real plans of tiny checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from calls import call
from conftest import tiny_llama
from running import make_plan

from deltamerge.plan.review import difference, markdown, mermaid

OLD = """\
base_model: ./base
merge_method: ties
models:
  - {model: ./a, parameters: {weight: 0.5}}
  - {model: ./b, parameters: {weight: 0.5}}
parameters: {density: 0.5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("review")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "a", seed=1, base=base)
    tiny_llama(folder / "b", seed=2, base=base)
    (folder / "old.yaml").write_text(OLD)
    return folder


def described(folder: Path, text: str) -> dict:
    (folder / "new.yaml").write_text(text)
    return make_plan(folder / "new.yaml").describe()


def test_a_plan_does_nothing_otherwise_than_itself(folder):
    plan = described(folder, OLD)
    found = difference(plan, plan)
    assert not any(found.values())
    assert "Nothing changes." in markdown(found, "a", "b")


@pytest.mark.parametrize(
    ("old", "new", "key", "values"),
    [
        ("merge_method: ties", "merge_method: dare_ties", "method", ["ties", "dare_ties"]),
        ("density: 0.5", "density: 0.25", "sources", None),
        ("parameters: {density", "dtype: float16\nparameters: {density", "dtype", ["BF16", "F16"]),
    ],
)
def test_what_changes_is_named_once_for_all_tensors_alike(folder, old, new, key, values):
    before, after = described(folder, OLD), described(folder, OLD.replace(old, new))
    found = difference(before, after)
    assert found["added"] == found["removed"] == []
    named = [name for group in found["changed"] for name in group["tensors"]]
    differing = [a["name"] for a, b in zip(before["tensors"], after["tensors"], strict=True) if a[key] != b[key]]
    assert set(named) >= set(differing)
    assert differing
    assert len(named) == len(set(named))
    if values is not None:
        assert {str(group[key]) for group in found["changed"] if key in group} == {str(values)}
    assert key in markdown(found, "old", "new")


def test_a_filtered_parameter_changes_only_its_tensors(folder):
    text = OLD.replace(
        "weight: 0.5}}\n  - {model: ./b", "weight: [{filter: mlp, value: 1}, {value: 0.5}]}}\n  - {model: ./b"
    )
    found = difference(described(folder, OLD), described(folder, text))
    names = [name for group in found["changed"] for name in group["tensors"]]
    assert names
    assert all("mlp" in name for name in names)
    shown = markdown(found, "old", "new")
    assert re.search(r"layers\.\{0–\d\}\.mlp", shown)


def test_tensors_that_come_and_go_are_named(folder):
    plan = described(folder, OLD)
    fewer = {**plan, "tensors": plan["tensors"][1:]}
    name = plan["tensors"][0]["name"]
    assert difference(plan, fewer)["removed"] == [name]
    assert difference(fewer, plan)["added"] == [name]
    assert f"**added**: `{name}`" in markdown(difference(fewer, plan), "old", "new")


def test_the_graph_joins_every_model_to_the_output(folder):
    plan = described(folder, OLD)
    lines = mermaid(plan).splitlines()
    assert lines[0] == "flowchart LR"
    edges = [re.findall(r"\w+", line) for line in lines if "-->" in line]
    reached = {"out"}
    while more := {edge[0] for edge in edges if edge[-1] in reached} - reached:
        reached |= more
    drawn = {re.match(r"\s+(\w+)[\[(]", line)[1] for line in lines[1:] if re.match(r"\s+\w+[\[(]", line)}
    assert drawn == reached
    assert sum("[(" in line and "./" in line for line in lines) == 3


def test_the_command(folder, capsys):
    (folder / "new.yaml").write_text(OLD.replace("ties", "dare_ties"))
    code, out, _ = call(capsys, "plan", "--diff", folder / "old.yaml", folder / "new.yaml")
    assert code == 0
    assert "| merge_method | ties | dare_ties |" in out
    code, out, _ = call(capsys, "plan", "--diff", folder / "old.yaml", folder / "new.yaml", "--json")
    assert json.loads(out)["plan"]["merge_method"] == ["ties", "dare_ties"]
    code, out, _ = call(capsys, "plan", "--graph", folder / "new.yaml")
    assert out.startswith("flowchart LR\n")
    assert call(capsys, "plan", "--graph", "--json", folder / "new.yaml")[0] == 2
    code, _, err = call(capsys, "plan", "--diff", folder / "nowhere.yaml", folder / "new.yaml")
    assert code == 1
    assert "nowhere.yaml" in err
