"""A LoRA's file and config: choose ranks, cut factors and store them as PEFT does.

Every update has the scale 1: lora_alpha and alpha_pattern repeat r and rank_pattern for each weight. So readers without
patterns compute the same.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.errors.shown import human, some
from deltamerge.formats.peft.adapter import CONFIG, PREFIX
from deltamerge.formats.peft.shira import count_changed
from deltamerge.formats.safetensors import Layout, Writer, plan_layout
from deltamerge.methods.low_rank import Array, Floats, Wanted
from deltamerge.outputs.adapter import ADAPTER, ChangedTensor, ModelModules
from deltamerge.outputs.output import LayerRank, LowRankSummary
from deltamerge.plan.outputs import OutputTensor
from deltamerge.plan.planner import Plan
from deltamerge.tensors.dtypes import ITEMSIZE, PLAIN, narrow
from deltamerge.tensors.names import EMBEDDING, TOKEN_HEAD
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

REST = "rest.safetensors"
CODES = {"float32": "F32", "bfloat16": "BF16"}
TRIES = 8


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, columns) of a weight's matrix: a convolution's (out, in, …) is (out, in · …)."""
    return shape[0], math.prod(shape[1:])


def is_matrix(output: OutputTensor) -> bool:
    """Return whether a tensor may have factors, by name and shape."""
    known = output.pieces[0].built.delta is not None and len(output.pieces) == 1
    return known and len(output.shape) > 1 and EMBEDDING.search(output.name) is None


@dataclass(frozen=True, slots=True)
class FactorTarget:
    """A weight that gets factors: its module, whether it is stored (in, out), and where its factors lie."""

    output: OutputTensor
    module: str
    turned: bool
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of Δ as it is stored."""
        return sides(self.output.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in). A convolution's A also has the sides of its kernel."""
        return self.shape[::-1] if self.turned else self.shape


@dataclass(frozen=True, slots=True)
class FactorFile:
    """A weight whose factors lie in the file `path`: Bᵀ (k, out), A (k, in) and perhaps the rows' lengths, float32.

    `state` is its entry in the journal.
    """

    target: FactorTarget
    path: Path
    state: Mapping[str, Any]

    @property
    def module(self) -> str:
        return self.target.module

    @property
    def gains(self) -> Floats:
        return np.array(self.state["gains"], np.float64)

    @property
    def energies(self) -> Floats:
        return np.array(self.state["energies"], np.float64)

    @property
    def rank(self) -> int:
        """The number of available ranks."""
        return len(self.state["gains"])

    def shapes(self, rank: int, *, dora: bool) -> dict[str, tuple[int, ...]]:
        """Return the stored tensors by the ends of their names."""
        (out, columns), shape = self.target.sides, self.target.output.shape
        kernel = shape[2:]
        a = (rank, *shape[1:]) if kernel else (rank, columns)
        b = (out, rank, *(1 for _ in kernel))
        length = (1, out, *(1 for _ in kernel)) if kernel else (out,)
        return {"lora_A.weight": a, "lora_B.weight": b} | ({"lora_magnitude_vector": length} if dora else {})

    def read(self, rank: int) -> dict[str, Array]:
        """Read the first `rank` ranks, and the lengths."""
        out, columns = self.target.sides
        held = np.fromfile(self.path, np.float32)
        b, a = held[: self.rank * out], held[self.rank * out : self.rank * (out + columns)]
        return {
            "lora_A.weight": a[: rank * columns],
            "lora_B.weight": np.ascontiguousarray(b.reshape(self.rank, out)[:rank].T).reshape(-1),
            "lora_magnitude_vector": held[self.rank * (out + columns) :],
        }


def stored_dtype(planned: Plan) -> str:
    """Return the dtype in which factors are stored: `values`, or the dtype of most of the output."""
    if planned.recipe.output.values is not None:
        return CODES[planned.recipe.output.values]
    sizes: dict[str, int] = {}
    for out in planned.outputs:
        sizes[out.dtype] = sizes.get(out.dtype, 0) + out.elements
    usual = max((dtype for dtype in sizes if dtype in PLAIN), key=lambda dtype: sizes[dtype], default="F32")
    return usual if usual != "F64" else "F32"


def finish(
    planned: Plan,
    folder: Path,
    modules: ModelModules,
    made: Mapping[str, FactorFile],
    results: Mapping[str, TensorInfo],
) -> LowRankSummary:
    """Write the adapter from the factors in `made` and from `results`, the merged tensors without factors."""
    made = {out.name: made[out.name] for out in planned.outputs if out.name in made}
    dtype = stored_dtype(planned)
    with errors.context("output.kind: peft"), Reader() as reader:
        saved, loose, notes = _whole(planned, reader, modules, made, results)
        whole = {**saved, **loose}
        ranks, layout = _ranks(planned, made, whole, dtype)
        written = [name for name, rank in ranks.items() if rank]
        if not written and not whole:
            raise InputError("nothing differs from the base", hint="are these the fine-tune and its base?")
        (folder / layout.files[0].name).unlink(missing_ok=True)
        with Writer(folder, layout) as writer:
            for name in written:
                _write(writer, made[name], ranks[name], dtype, dora=planned.recipe.output.dora)
            for key, info in whole.items():
                writer.copy(key, info, reader)
            found = writer.finish()
    targets = {made[name].module: ranks[name] for name in written}
    config = _config(planned, modules, targets, made, saved)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    file = layout.files[0]
    layers = {name: _layer(made[name], ranks[name]) for name in made}
    total = sum(one.state["energy"] for one in made.values())
    kept = sum(float(made[name].energies[: ranks[name]].sum()) for name in made)
    weighed = [name for name in made if layers[name].output is not None]
    gained = sum(float(made[name].gains[: ranks[name]].sum()) for name in weighed)
    most = sum(made[name].state["gain"] for name in weighed)
    return LowRankSummary(
        file.size,
        {file.name: {"hash": found.hashes[file.name], "size": file.size}},
        layers,
        kept / total if total else 1.0,
        tuple(notes),
        gained / most if most else None,
        sum(info.nbytes for info in whole.values()),
    )


def _layer(made: FactorFile, rank: int) -> LayerRank:
    state = made.state
    energy = float(made.energies[:rank].sum()) / state["energy"] if state["energy"] else 1.0
    output = None
    if state["weighed"]:
        output = float(made.gains[:rank].sum()) / state["gain"] if state["gain"] else 1.0
    return LayerRank(rank, energy, output, state["missed"])


def _whole(
    planned: Plan,
    reader: Reader,
    modules: ModelModules,
    made: Mapping[str, FactorFile],
    results: Mapping[str, TensorInfo],
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo], list[str]]:
    """Return the changed tensors without factors: tensors of whole modules, tensors loaded into the base, and notes.

    InputError: such tensors must be refused, or a tensor is not a parameter of a module as it is.
    """
    wanted = planned.recipe.output.whole or "keep"
    base, canonical = planned.inputs.base, planned.inputs.canonical
    assert base is not None
    by_stored = {stored: name for name, stored in modules.stored.items()}
    changed: list[ChangedTensor] = []
    unknown: list[str] = []
    for stored, result in results.items():
        old = base.get(canonical.get(stored, stored))
        count = 0 if old is None else count_changed(reader, old, result)
        if old is not None and not count:
            continue
        if stored in by_stored:
            changed.append(ChangedTensor(by_stored[stored], result, old, count))
        else:
            unknown.append(stored)
    if unknown and wanted in ("keep", "refuse"):
        raise InputError(
            f"{modules.architecture} holds {some(unknown)} in other tensors, which cannot be stored whole",
            hint="whole: drop leaves it out; or write kind: delta",
        )
    names = unknown + [one.result.name for one in changed]
    if not names:
        return {}, {}, []
    if wanted == "refuse":
        raise InputError(f"changed, and without factors: {some(names)}", hint="whole: keep, or drop")
    notes = []
    if wanted in ("drop", "heads", "task_heads"):
        heads = {
            one.module
            for one in changed
            if one.module in modules.heads and (wanted == "heads" or TOKEN_HEAD.search(one.result.name) is None)
        }
        kept = [one for one in changed if wanted != "drop" and (one.base is None or one.module in heads)]
        if dropped := [name for name in names if name not in {one.result.name for one in kept}]:
            notes.append(f"left out, though it differs from the base (`whole: keep` stores it): {some(dropped)}")
        changed = kept
    targets = [one.module for one in made.values() if one.rank]
    known = {stored: info for stored, name in canonical.items() if (info := base.get(name)) is not None}
    # a module is stored with all of its tensors, even unchanged ones
    saved, loose = modules.share_out(changed, targets, {**known, **results})
    for how, stored_so in (("as modules_to_save", saved), ("loaded into the base (as bias: all)", loose)):
        if stored_so:
            count = sum(info.nbytes for info in stored_so.values())
            shown = some(key.removeprefix(PREFIX) for key in stored_so)
            notes.append(f"stored whole, {how}, {human(count)}: {shown}")
    return saved, loose, notes


def _ranks(
    planned: Plan, made: Mapping[str, FactorFile], whole: Mapping[str, TensorInfo], dtype: str
) -> tuple[dict[str, int], Layout]:
    """Return the rank of every weight, and the file. InputError: not one rank fits the budget."""
    output = planned.recipe.output
    if output.budget is None:
        wanted = Wanted(output.rank, output.energy)
        ranks = {name: wanted.count(one.gains, one.state["gain"]) for name, one in made.items()}
        return ranks, _layout(made, ranks, whole, dtype, dora=output.dora)
    spectra = {name: RankSpectrum(one.gains, ITEMSIZE[dtype] * sum(one.target.sides)) for name, one in made.items()}
    taken = sum(info.nbytes for info in whole.values())
    room = output.budget - taken
    for _ in range(TRIES):
        ranks = greedy(spectra, room) if room > 0 else {}
        if not any(ranks.values()):
            break
        layout = _layout(made, ranks, whole, dtype, dora=output.dora)
        over = layout.files[0].size - output.budget
        if over <= 0:
            return ranks, layout
        room -= over
    stored = f", {taken} are of what is stored whole" if taken else ""
    hint = "give a larger budget" + (", or whole: drop" if taken else "")
    raise InputError(f"a budget of {output.budget} bytes holds no rank{stored}", hint=hint)


def _layout(
    made: Mapping[str, FactorFile], ranks: Mapping[str, int], whole: Mapping[str, TensorInfo], dtype: str, *, dora: bool
) -> Layout:
    metas = [(key, info.dtype, info.shape) for key, info in whole.items()]
    for name, rank in ranks.items():
        if rank:
            shapes = made[name].shapes(rank, dora=dora)
            metas += [(f"{PREFIX}{made[name].module}.{end}", dtype, shape) for end, shape in shapes.items()]
    return plan_layout(metas, None, (ADAPTER,))


def _write(writer: Writer, made: FactorFile, rank: int, dtype: str, *, dora: bool) -> None:
    values = made.read(rank)
    for end in made.shapes(rank, dora=dora):
        rounded = narrow(values[end], dtype)
        writer.write(f"{PREFIX}{made.module}.{end}", 0, rounded)


def _config(
    planned: Plan,
    modules: ModelModules,
    targets: Mapping[str, int],
    made: Mapping[str, FactorFile],
    saved: Iterable[str],
) -> dict[str, Any]:
    """Return PEFT's adapter_config.json."""
    base = planned.inputs.base
    r = max(targets.values(), default=1)
    patterns = {_pattern(module, modules): rank for module, rank in targets.items() if rank != r}
    causal = modules.architecture.endswith("ForCausalLM") or modules.architecture.endswith("LMHeadModel")
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base.name if base else None,
        "revision": base.checkpoint.revision if base else None,
        "task_type": "CAUSAL_LM" if causal else None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": _shortest(targets, modules),
        "fan_in_fan_out": any(one.target.turned for one in made.values()),
        "bias": "none",
        "modules_to_save": sorted({key.rpartition(".")[0].removeprefix(PREFIX) for key in saved}) or None,
        "init_lora_weights": True,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "use_dora": planned.recipe.output.dora,
    }


def _shortest(targets: Mapping[str, int], modules: ModelModules) -> list[str] | str:
    """Return `target_modules`: the ends of the targets' names if they match nothing else, otherwise full names."""
    ends = sorted({module.rpartition(".")[2] for module in targets})
    if {name for name in modules.names if name.rpartition(".")[2] in ends} == set(targets):
        return ends
    full = sorted(targets)
    if {name for name in modules.names if any(name.endswith(f".{one}") for one in full)}:
        return "|".join(map(re.escape, full))  # a pattern is matched from the start of a name
    return full


def _pattern(module: str, modules: ModelModules) -> str:
    """Return a key of rank_pattern as a pattern that matches the end of names."""
    ambiguous = any(name != module and name.endswith(f".{module}") for name in modules.names)
    return f"^{re.escape(module)}" if ambiguous else module


# -- ranks


@dataclass(frozen=True, slots=True)
class RankSpectrum:
    """The gain of each rank of a weight, in descending order, and the bytes of one rank."""

    gains: Floats
    price: int


def greedy(spectra: Mapping[str, RankSpectrum], room: int) -> dict[str, int]:
    """Return the ranks that keep most in `room` bytes: the next rank goes where it keeps most a byte.

    Gains fall with the rank, and a weight's ranks all cost the same. So no other choice of as many bytes keeps more,
    except for bytes left over by the last rank that does not fit.
    """
    ranks = dict.fromkeys(spectra, 0)
    queue = [(-float(s.gains[0]) / s.price, i, name) for i, (name, s) in enumerate(spectra.items()) if s.gains.size]
    heapq.heapify(queue)
    while queue:
        _, i, name = heapq.heappop(queue)
        spectrum = spectra[name]
        if spectrum.price > room:
            continue
        room -= spectrum.price
        ranks[name] += 1
        if ranks[name] < spectrum.gains.size:
            heapq.heappush(queue, (-float(spectrum.gains[ranks[name]]) / spectrum.price, i, name))
    return ranks


def affordable(prices: Mapping[str, int], budget: int) -> int:
    """Return the single rank for all weights that about fits."""
    return budget // max(1, sum(prices.values()))
