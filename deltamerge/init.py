"""A first recipe for the models someone has: commented, checked against their headers before it is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from deltamerge.errors import OutputError, context
from deltamerge.io import hub

HEAD = """\
# deltamerge check {name}    the headers of every model, no weights read
# deltamerge plan {name}     every output tensor, its sources, method and bytes
# deltamerge run {name}      the checkpoint, with card, recipe and lock
base_model: {base}
"""
ONE = """\
merge_method: task_arithmetic    # base + weight · delta
models:
  - model: {model}
    parameters: {{weight: 1.0}}
"""
SEVERAL = """\
merge_method: ties               # the largest entries of each delta, elected sign; or task_arithmetic, dare_ties, …
models:
"""
OF_SEVERAL = """\
  - model: {model}
    parameters: {{weight: 1.0, density: 0.2}}    # the fraction of the delta that is kept
"""
CALIBRATED = """\
prune: {{method: magnitude, density: 0.05, q: output_change}}    # the largest twentieth, rescaled by a calibrated q
calibration: {{data: {data}}}    # unlabelled text; 50 sequences are enough
"""
UNCALIBRATED = """\
# prune: {method: magnitude, density: 0.05, q: output_change}    # the largest twentieth, rescaled by a calibrated q
# calibration: {data: sentences.jsonl}    # unlabelled text; 50 sequences are enough
"""
TAIL = """\
dtype: {dtype}    # of the output; arithmetic is float32
seed: 0    # the same recipe gives the same bytes
output: {{path: merged}}
"""
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def first_recipe(base: str, models: Sequence[str], path: Path, data: Path | None = None) -> str:
    """The text of a recipe at `path` that merges `models` on `base`, each a folder or a hub id.

    With one fine-tune and calibration `data` it is pruned, with several they are merged by ties. Folders are named as
    seen from the recipe. InputError: a model that cannot be opened; only headers are read.
    """
    checkpoints = [hub.resolve(reference, Path(), weights=False) for reference in (base, *models)]
    dtypes = [tensor.dtype for tensor in checkpoints[0].tensors.values()]
    dtype = max(DTYPES, key=dtypes.count)
    named = [_seen_from(path, reference) for reference in (base, *models)]
    text = HEAD.format(name=path.name, base=_scalar(named[0]))
    if len(models) == 1:
        text += ONE.format(model=_scalar(named[1]))
        text += CALIBRATED.format(data=_scalar(_seen_from(path, str(data)))) if data else UNCALIBRATED
    else:
        text += SEVERAL + "".join(OF_SEVERAL.format(model=_scalar(model)) for model in named[1:])
    return text + TAIL.format(dtype=DTYPES[dtype])


def _seen_from(path: Path, reference: str) -> str:
    """A local path relative to the recipe's folder; a hub id as it is."""
    expanded = Path(reference).expanduser()
    if not expanded.exists() or expanded.is_absolute():
        return reference
    relative = os.path.relpath(expanded, path.parent)
    return relative if relative.startswith("..") else f"./{relative}"


def _scalar(text: str) -> str:
    """`text` as a YAML scalar, quoted where it must be."""
    return yaml.safe_dump(text, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()


def write_new(path: Path, text: str) -> None:
    """Write `text` to a file that must not exist. OutputError: it does, or it cannot be made."""
    with context(str(path)):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise OutputError("is there already", hint="another name with --out, or - for stdout") from None
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}") from error
