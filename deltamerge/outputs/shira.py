"""A SHiRA adapter as output: exact for linear layers; other tensors that changed are stored whole.

The run writes the merged model. Its differences from the base then become the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.formats.peft.adapter import CONFIG, PREFIX
from deltamerge.formats.peft.shira import Candidate, choose_rank, count_changed, entries
from deltamerge.formats.safetensors import Writer, plan_layout, read_header
from deltamerge.outputs.adapter import ADAPTER, AdapterOutput, ChangedTensor, ModelModules
from deltamerge.outputs.assets import Files
from deltamerge.outputs.assets import config as output_config
from deltamerge.outputs.output import Weights
from deltamerge.plan.planner import Plan
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo


class ShiraOutput(AdapterOutput):
    """A folder with the entries of linear layers that differ from the base."""

    def notes(self, wanted: Output, *, weighed: bool) -> Iterator[str]:
        """Yield a line on how it is made."""
        yield "merged, then what differs from the base is written as a SHiRA adapter"

    def finish(self, plan: Plan, folder: Path, weights: Weights, files: Files) -> tuple[Weights, tuple[str, ...]]:
        """Turn the merged model in `folder` into an adapter."""
        return replace(weights, hashed={}), _write_shira(plan, folder)


OUTPUT = ShiraOutput()


def _write_shira(planned: Plan, folder: Path) -> tuple[str, ...]:
    with errors.context("output.kind: peft"), Reader() as reader:
        results = {n: i for file in planned.layout.files for n, i in read_header(folder / file.name).tensors.items()}
        modules = ModelModules.of(output_config(planned), results)
        changed = list(_changed(planned, reader, modules, results))
        candidates = {
            e.name: Candidate((e.result.shape[0], e.result.shape[1]), e.changed, e.result.nbytes)
            for e in changed
            if e.base is not None and e.name.endswith(".weight") and e.module in modules.linear
        }
        if not candidates:
            raise InputError(
                f"{modules.architecture} has no linear layer that changed, and SHiRA adapts torch.nn.Linear only",
                hint="write kind: delta or model",
            )
        rank, sparse = choose_rank(candidates)
        if not sparse:
            raise InputError(
                "no linear layer has changes few enough for a SHiRA adapter",
                hint="prune more (density 0.05 or less), or write kind: delta or model",
            )
        targets = [name.rpartition(".")[0] for name in sparse]
        rest = [e for e in changed if e.name not in sparse]
        saved, loose = modules.share_out(rest, targets, results)
        _write(reader, folder, changed, sparse, rank, {**saved, **loose})
    settings = {
        "peft_type": "SHIRA",
        "auto_mapping": None,
        "base_model_name_or_path": planned.inputs.base.name if planned.inputs.base else None,
        "revision": planned.inputs.base.checkpoint.revision if planned.inputs.base else None,
        "task_type": "CAUSAL_LM" if modules.architecture.endswith("ForCausalLM") else None,
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",
        "random_seed": 0,
        "target_modules": sorted(targets),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": sorted({key.rpartition(".")[0].removeprefix(PREFIX) for key in saved}) or None,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in planned.layout.files:
        (folder / file.name).unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    dtype = output_config(planned).get("dtype", "its own dtype")
    notes = [
        f"SHiRA adapter of r {rank}: {len(sparse)} linear layers, {rank} · (in + out) entries in each",
        f"made for {modules.architecture} of the base, loaded in {dtype}: PeftModel.from_pretrained(model, folder)",
    ]
    base = "loaded into the base model itself (as LoRA's bias: all)"
    for how, stored in (("as modules_to_save", saved), (base, loose)):
        if stored:
            size = sum(info.nbytes for info in stored.values())
            names = some(name.removeprefix(PREFIX) for name in stored)
            notes.append(f"stored whole, {how}, {size} bytes: {names}")
    return tuple(notes)


def _changed(
    planned: Plan, reader: Reader, modules: ModelModules, results: dict[str, TensorInfo]
) -> Iterable[ChangedTensor]:
    base, canonical = planned.inputs.base, planned.inputs.canonical
    assert base is not None
    for name, stored in modules.stored.items():
        result = results[stored]
        old = base.get(canonical[stored])
        if old is None:
            yield ChangedTensor(name, result, None, 0)
        elif count := count_changed(reader, old, result):
            yield ChangedTensor(name, result, old, count)


def _write(
    reader: Reader,
    folder: Path,
    changed: Iterable[ChangedTensor],
    sparse: Iterable[str],
    rank: int,
    whole: dict[str, TensorInfo],
) -> None:
    by_name = {e.name: e for e in changed}
    sizes = {name: rank * sum(by_name[name].result.shape) for name in sparse}
    metas = [(key, info.dtype, info.shape) for key, info in whole.items()]
    for name, size in sizes.items():
        stem = PREFIX + by_name[name].module
        metas += [(f"{stem}.shira_weight", "F32", (size,)), (f"{stem}.shira_indices", "I32", (2, size))]
    with Writer(folder, plan_layout(metas, None, (ADAPTER,))) as writer:
        for name, size in sizes.items():
            entry = by_name[name]
            assert entry.base is not None
            indices, values = entries(reader, entry.base, entry.result, size)
            writer.write(f"{PREFIX}{entry.module}.shira_weight", 0, values)
            writer.write(f"{PREFIX}{entry.module}.shira_indices", 0, indices)
        for key, info in whole.items():
            writer.copy(key, info, reader)
        writer.finish()
