"""The result of a run on stdout and stderr: warnings, summary, JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltamerge.cli.output import say_json, tell
from deltamerge.errors.shown import human
from deltamerge.tensors.names import block_name, natural

if TYPE_CHECKING:
    from deltamerge.formats.delta.writer import Summary
    from deltamerge.outputs.output import LayerRank, LowRankSummary
    from deltamerge.plan.planner import Plan
    from deltamerge.run.runner import Result


class Warnings:
    """Prints each warning of a run once: before the work if a plan is known by then, otherwise after it.

    `first` is a line to print before the warnings, once there is a plan.
    """

    def __init__(self, first: str = "") -> None:
        self.said: set[str] = set()
        self.first = first

    def watch(self, plan: Plan) -> Callable[[int], None]:
        """Print the warnings of `plan` that are not printed yet; serves as `Options.watch`."""
        if self.first:
            tell(self.first)
            self.first = ""
        for warning in plan.warnings:
            if warning not in self.said:
                self.said.add(warning)
                tell(f"warning: {warning}")
        return lambda _: None

    def end(self, result: Result) -> None:
        """Print the remaining warnings, and a warning about values of the result that are not finite."""
        from deltamerge.run.runner import describe_nonfinite

        self.watch(result.plan)
        if result.nonfinite:
            tell(f"warning: {describe_nonfinite(result.nonfinite)}")


def _of_delta(delta: Summary) -> dict[str, Any]:
    return {"entries": delta.entries, "relative_error": delta.error, "encodings": dict(delta.stored)}


def summary_of(result: Result, begun: float, **more: Any) -> dict[str, Any]:
    """Return the summary of a run for `--json`. `begun` is its start by `time.monotonic`; `more` is added."""
    delta, quantised = result.delta, result.lock.get("quantization")
    return {
        "out": str(result.folder),
        "bytes": result.size,
        "tensors": len(result.plan.outputs),
        "seconds": round(time.monotonic() - begun, 3),
        "lock": result.lock,
        "up_to_date": not result.made,
        "nonfinite": {name: count._asdict() for name, count in result.nonfinite.items()},
        "warnings": list(result.plan.warnings),
        **({} if quantised is None else {"quantization_error": quantised["relative_error"]}),
        **({} if not (measured := _of_rounding(quantised)) else {"rounding": measured}),
        **({} if delta is None else _of_delta(delta)),
        **({} if result.lora is None else {"lora": result.lora.describe()}),
        **more,
    }


def report_run(result: Result, begun: float, *, as_json: bool, quiet: bool, verbose: bool = False, **more: Any) -> None:
    """Print the result of a run. `begun` is its start by `time.monotonic`; `more` is added to the JSON object.

    With `verbose`, a LoRA also gets a line for each layer.
    """
    seconds = time.monotonic() - begun
    delta, quantised = result.delta, result.lock.get("quantization")
    if as_json:
        say_json(summary_of(result, begun, **more))
    elif not quiet:
        lost = ""
        for folder, made in result.intermediate.items():
            tell(f"{folder}: {'made' if made else 'up to date'}")
        if not result.made:
            tell(f"{result.folder}: up to date")
            return
        if delta is not None:
            values = result.plan.delta_values
            rounded = any(tune.checkpoint.quantised is not None for tune in result.plan.inputs.tunes)
            how = f"{values} values, relative error {delta.error:.3g}"
            if values is None:
                how = f"final values, {'rounded once' if rounded else 'exact'}"
            lost = f", {delta.entries:,} entries: {how}"
            if (budget := result.lock.get("budget")) is not None:
                spent = ", ".join(f"{name} {human(size)}" for name, size in budget["spent"].items())
                lost = f": {spent}; {budget['lost']:.3g} of the delta's squares are lost"
                if "learned" in budget:
                    said = budget["learned"]["divergence"]
                    lost += f"; learned codes: loss from {said['before']:.3g} to {said['after']:.3g}"
        if quantised is not None:
            lost += f", {len(quantised['tensors'])} quantised: relative error {quantised['relative_error']:.3g}"
            lost += of_rounding(quantised)
        tell(f"{result.folder}: {result.name}, {human(result.size)} in {seconds:.1f} s{lost}")
        if result.lora is not None:
            tell(of_lora(result.lora))
            for line in of_layers(result.lora) if verbose else ():
                tell(line)
        for line in result.next_steps:
            tell(line)
        for note in result.remarks:
            tell(f"note: {note}")


def _of_rounding(quantised: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (quantised or {}).items() if key in ("delta", "outputs", "unseen")}


def of_rounding(quantised: Mapping[str, Any]) -> str:
    """Return the measures of a rounding as text: the loss of the layers' outputs, and the delta's share. "": none."""
    outputs, found = quantised.get("outputs"), ""
    if outputs is not None:
        found = f", of outputs {outputs['relative_error']:.3g} (nearest codes {outputs['nearest']:.3g})"
    shares = {"of the delta": quantised, "of its effect": outputs or {}}
    kept = [f"{part['delta']['share']:.3g} {what}" for what, part in shares.items() if "delta" in part]
    return found + (f"; {' and '.join(kept)} survives" if kept else "")


def of_lora(lora: LowRankSummary) -> str:
    """Return the contents of a LoRA as text: factors, their kept share, and parts that are stored whole."""
    ranks = [layer.rank for layer in lora.layers.values() if layer.rank]
    also = "" if lora.output is None else f", {lora.output:.3g} of the outputs' change"
    missed = max((layer.missed for layer in lora.layers.values()), default=0.0)
    bound = f" (the best of these ranks would keep at most {missed:.2g} more of any)" if missed else ""
    kept = f"keep {lora.energy:.3g} of the deltas' squares{also}{bound}" if ranks else "none"
    size = f"{human(lora.nbytes - lora.whole)}, {len(ranks)} weights, rank {_range(ranks)}: " if ranks else ""
    return f"factors {size}{kept}; whole parts {human(lora.whole) if lora.whole else 'none'}"


def of_layers(lora: LowRankSummary) -> Iterator[str]:
    """Yield a line for each layer of a LoRA with the energy that it keeps."""
    blocks: dict[str, list[LayerRank]] = {}
    for name, layer in lora.layers.items():
        blocks.setdefault(block_name(name) or name, []).append(layer)
    for name, layers in sorted(blocks.items(), key=lambda block: natural(block[0])):
        count = f"{len(layers)} weights, " if len(layers) > 1 else ""
        ranks = _range([layer.rank for layer in layers])
        kept = _range([layer.energy for layer in layers])
        outputs = [layer.output for layer in layers if layer.output is not None]
        also = f", {_range(outputs)} of the outputs" if outputs else ""
        yield f"{name}: {count}rank {ranks}, keeps {kept} of the delta{also}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} … {high}"
