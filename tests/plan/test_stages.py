"""Stages before the first tile: what they read are their inputs, where whoever walks the graph sees it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from running import make_plan

from deltamerge.run.partition import Part
from deltamerge.run.reading import _files_read
from deltamerge.tensors.tensor import Tensor, TensorInfo

ROWS = "calibration: {data: ../rows.jsonl, sequences: 6, length: 12}\n"
WEIGHT = "parameters: {weight: 1.0}"
TWO = f"base_model: ../base\nmodels: [{{model: ../a, {WEIGHT}}}, {{model: ../b, {WEIGHT}}}]\n"
MERGED = TWO + "merge_method: task_arithmetic\n"
RECIPES = {
    "q of a mask": MERGED + ROWS + "prune: {method: dare, density: 0.5, q: output_change}\n",
    "q of a mask by norms": MERGED + ROWS + "prune: {method: wanda, density: 0.5, q: layer_mse}\n",
    "protected columns": MERGED + ROWS + "prune: {method: dare, density: 0.5, q: output_change, "
    "protect: {massive_activations: 2}}\n",
    "one threshold": MERGED + "prune: {method: magnitude, density: 0.5, group: model}\n",
    "lambda": MERGED + "prune: {method: dare, density: 0.5}\n" + ROWS.replace("}", ", per: merge}"),
    "coefficients": MERGED + ROWS.replace("}", ", per: merge, coefficients: layer}"),
    "moments": TWO + ROWS + "merge_method: regmean\n",
    "moments of the merge": TWO + ROWS + "merge_method: regmean_plus\n",
    "gradients": TWO + ROWS + "merge_method: fisher\n",
    "totals": TWO.replace(f", {WEIGHT}", "") + "merge_method: emr\nparameters: {task: 1}\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"w{4 + i} w{5 + i}"}) + "\n" for i in range(20)))
    return folder


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside a parameter."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TensorInfo):
        yield value.tensor
    elif isinstance(value, Mapping):
        yield from (found for one in value.values() for found in tensors_in(one))
    elif isinstance(value, tuple | list):
        yield from (found for one in value for found in tensors_in(one))
    elif dataclasses.is_dataclass(value):
        fields = (getattr(value, one.name) for one in dataclasses.fields(value))
        yield from (found for one in fields for found in tensors_in(one))


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_hold_no_graph(models: Path, tmp_path: Path, name: str) -> None:
    """A parameter is plain data: every tensor that a stage reads is an input of its node."""
    folder = models / name.replace(" ", "-")
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPES[name])
    planned = make_plan(folder / "r.yaml", tmp_path / "out", data=False)
    seen: dict[int, Tensor] = {}
    for task in planned.tasks:
        seen |= {id(node): node for node in task.root.graph()}
    stages = [node for node in seen.values() if node.kind == "stage"]
    assert stages
    assert not [node.function for node in seen.values() if any(tensors_in([value for _, value in node.parameters]))]
    for model in planned.sources:
        own = {tensor.name for tensor in model.tensors}
        reads = [{leaf.name for leaf in stage.leaves() if leaf.path.parent == model.checkpoint} for stage in stages]
        assert own in reads


def test_a_part_reads_what_a_threshold_of_the_model_reads(tmp_path: Path) -> None:
    """One threshold over all tensors: each part of a run depends on all shards of its models."""
    base = tiny_llama(tmp_path / "base", seed=0, shards=2)
    tiny_llama(tmp_path / "a", seed=1, base=base, shards=2)
    text = (
        "base_model: ./base\nmodels: [{model: ./a}]\noutput: {shard_size: 40KB}\n"
        "prune: {method: magnitude, density: 0.5%s}\n"
    )
    found = {}
    for group in ("", ", group: model"):
        (tmp_path / "r.yaml").write_text(text % group)
        planned = make_plan(tmp_path / "r.yaml", tmp_path / "out")
        count = len(planned.layout.files)
        read = [_files_read(planned, Part(i + 1, count), ()) for i in range(count)]
        found[group] = [len({path for path in paths if path.suffix == ".safetensors"}) for paths in read]
    assert min(found[""]) < 4
    assert set(found[", group: model"]) == {4}
