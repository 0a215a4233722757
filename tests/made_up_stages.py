"""A recipe run with what its calibration would find made up: what comes after it is tested without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from running import make_plan

from deltamerge.engine.execute import execute
from deltamerge.formats.audit import NonFinite
from deltamerge.formats.safetensors import Writer
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Node

STAGES = ("deltamerge.calibrate.stage:activations", "deltamerge.calibrate.q.choices:calibrate")


def run_with_stages(path: Path, out: Path, value: Callable[[Node], Any], workers: int = 1) -> dict[str, NonFinite]:
    """Write the weights of a recipe to the new folder `out`; `value` gives what a stage found. What is not finite."""
    planned = make_plan(path, out, data=False, workers=workers)
    nodes = {node for task in planned.tasks for node in depth_first(task.root)}
    known = {node: value(node) for node in nodes if node.function in STAGES}
    out.mkdir()
    with Reader() as reader, Writer(out, planned.layout) as writer:
        execute(
            planned.tasks, reader, writer, workers=planned.workers, tile_elements=planned.tile_elements, known=known
        )
        return dict(writer.finish().nonfinite)
