"""What a forward pass of a calibration takes on one thread: CPU seconds of a candidate's in the search and in the
comparison, beside what `plan` says; page faults and peak memory of the process; and the q that one mask gives.

    python -m benchmarks.speed.passes RECIPE [--precision bfloat16]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deltamerge.calibrate.q.choices import Searches
from deltamerge.calibrate.q.subject import Subject
from deltamerge.calibrate.stage import calibrating
from deltamerge.cli.plan import calibration_seconds
from deltamerge.recipe.file import read_recipe
from deltamerge.run.options import Options
from deltamerge.run.plans import make_plans
from deltamerge.tensors.reader import Reader

CANDIDATES = (0.05, 0.1, 0.2)


def measured(path: Path, precision: str) -> dict[str, Any]:
    """The figures of the recipe's only stage."""
    torch.set_num_threads(1)
    ((stage, spec),) = make_plans(read_recipe(path), None, Options())[-1].specs.items()
    calibration = spec.source.calibration.model_copy(update={"precision": precision})
    spec = replace(spec, source=replace(spec.source, calibration=calibration))
    found: dict[str, Any] = {"precision": spec.source.precision, "sequences": calibration.sequences}
    with calibrating(spec.name, spec.passes, device="cpu"), Reader() as reader:
        (tensors,) = spec.models(stage.inputs)
        subject = Subject(spec.source, replace(tensors, masks=tensors.masks[:1]), reader)
        searches = Searches(spec, subject)
        found["q"] = searches.run()[0].numbers["q"]
        some = [dict.fromkeys(searches.layers, q) for q in CANDIDATES]
        inputs = subject.batches["search"].inputs
        judge = subject.agreement(inputs).objective
        found["search"] = _of(lambda: subject.of_masks(searches.objective, some, range(1)), len(some))
        found["comparison"] = _of(lambda: subject.parts(judge, some), len(some))
    described = spec.describe()
    counts = {"search": (1, 0), "comparison": (1, 1)}
    for name, (passes, whole) in counts.items():
        found[name]["planned"] = calibration_seconds({**described, "forward_passes": passes, "head_passes": whole})
    used = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"peak_mb": used.ru_maxrss / 1e3, "faults": used.ru_minflt, "planned_bytes": described["memory"]}


def _of(work: Callable[[], Any], passes: int) -> dict[str, float]:
    begun, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"cpu": (time.process_time() - begun) / passes, "faults": faults / passes}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    options = parser.parse_args()
    print(json.dumps(measured(options.recipe, options.precision), indent=1))
