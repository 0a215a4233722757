"""What commands print on stdout and stderr: progress, results, errors."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import progress, streams
from deltamerge.cli.tables import human
from deltamerge.errors import DeltamergeError, Problem, RecipeError
from deltamerge.errors.shown import LINE, printed, shown
from deltamerge.tensors.names import block_name, natural

if TYPE_CHECKING:
    from pydantic import BaseModel

    from deltamerge.formats.delta.writer import Summary
    from deltamerge.outputs.lora_file import LayerRank, LowRankSummary
    from deltamerge.plan.planner import Plan
    from deltamerge.run.runner import Result


def say(text: str) -> None:
    """Print a command's result on stdout."""
    click.echo(printed(text))


def say_json(value: Any) -> None:
    """Print a result as one JSON object on stdout, in ASCII, so that nothing in it acts on a terminal or a CI log."""
    _say_ascii(json.dumps(value, sort_keys=True))


def say_model(model: BaseModel) -> None:
    """Print the fields of a report as one JSON object on stdout, in order; NaN becomes null."""
    _say_ascii(json.dumps(_finite(model.model_dump(mode="json")), separators=(",", ":")))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_table(rows: Iterable[BaseModel]) -> None:
    """Print records as CSV on stdout: a column for each field, and for each key of a field that is a mapping."""
    say_csv([dict(_columns(row.model_dump(mode="json"))) for row in rows])


def say_csv(flat: Sequence[Mapping[str, Any]]) -> None:
    """Print mappings as CSV on stdout: a column for each key of any."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    say(text.getvalue().removesuffix("\n"))


def _columns(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from ((f"{name}.{key}", one) for key, one in _columns(inner))
        else:
            yield name, "x".join(map(str, inner)) if isinstance(inner, list) else inner


def error_as_json(error: DeltamergeError, where: str) -> dict[str, Any]:
    """What `--json` prints for an error: its line, hint and exit code, and each problem of a recipe with its place."""
    problems = error.problems if isinstance(error, RecipeError) else ()
    return {
        "message": str(error) if isinstance(error, RecipeError) else f"{where}: {error}" if where else str(error),
        "hint": error.hint,
        "exit_code": error.exit_code,
        "problems": [_problem(problem) | {"path": getattr(error, "path", where)} for problem in problems],
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {key: value for key, value in asdict(problem).items() if key != "text"}


def annotate(level: str, message: str, path: str, line: int | None = None, column: int | None = None) -> None:
    """Print a line that GitHub shows beside a line of a file: an error, a warning or a notice."""

    def escaped(text: str, also: str = "") -> str:
        return "".join(f"%{ord(c):02X}" if c in "%\r\n" + also else c for c in shown(text))

    place = f"file={escaped(path, ',:')}" + (f",line={line},col={column}" if line else "")
    click.echo(f"::{level} {place},title=deltamerge::{escaped(message)}")


def _say_ascii(text: str) -> None:
    click.echo(text.replace("##[", "#\\u0023["))


def tell(line: str) -> None:
    """Print a line on stderr."""
    _to_stderr(printed(shown(line, LINE)))


def _to_stderr(text: str) -> None:
    progress.aside(lambda: streams.to_stderr(f"{text}\n"))


class Warnings:
    """Prints each warning of a run once: a plan's before the work, or after it if there was no plan before.

    `first` is a line to print before them, once there is a plan.
    """

    def __init__(self, first: str = "") -> None:
        self.said: set[str] = set()
        self.first = first

    def watch(self, plan: Plan) -> Callable[[int], None]:
        """Print those of `plan` that have not been printed yet; as `Options.watch`."""
        if self.first:
            tell(self.first)
            self.first = ""
        for warning in plan.warnings:
            if warning not in self.said:
                self.said.add(warning)
                tell(f"warning: {warning}")
        return lambda _: None

    def end(self, result: Result) -> None:
        """Print those that have not been printed yet, and of what in the result is not finite."""
        from deltamerge.run.weights import describe_nonfinite

        self.watch(result.plan)
        if result.nonfinite:
            tell(f"warning: {describe_nonfinite(result.nonfinite)}")


def _of_delta(delta: Summary) -> dict[str, Any]:
    return {"entries": delta.entries, "relative_error": delta.error, "encodings": dict(delta.stored)}


def summary_of(result: Result, begun: float, **more: Any) -> dict[str, Any]:
    """What `--json` prints of a run that had `begun` then, by `time.monotonic`, and `more`."""
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
        **({} if delta is None else _of_delta(delta)),
        **({} if result.lora is None else {"lora": result.lora.describe()}),
        **more,
    }


def report_run(result: Result, begun: float, *, as_json: bool, quiet: bool, **more: Any) -> None:
    """Print what a run made that had `begun` then, by `time.monotonic`; `more` is added to the JSON object."""
    seconds = time.monotonic() - begun
    delta, quantised = result.delta, result.lock.get("quantization")
    if as_json:
        say_json(summary_of(result, begun, **more))
    elif not quiet:
        lost = ""
        for folder, made in result.intermediate.items():
            tell(f"{folder}: {'made' if made else 'as it would be made, kept'}")
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
        if quantised is not None:
            lost += f", {len(quantised['tensors'])} quantised: relative error {quantised['relative_error']:.3g}"
        tell(f"{result.folder}: {result.name}, {human(result.size)} in {seconds:.1f} s{lost}")
        for line in result.next_steps:
            tell(line)
        for line in of_layers(result.lora) if result.lora is not None else ():
            tell(line)
        for note in result.remarks:
            tell(f"note: {note}")


def of_layers(lora: LowRankSummary) -> Iterator[str]:
    """What a LoRA keeps, layer by layer, and in all."""
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
    also = "" if lora.output is None else f", {lora.output:.3g} of the outputs' change"
    missed = max((layer.missed for layer in lora.layers.values()), default=0.0)
    bound = f"; the best of these ranks would keep at most {missed:.2g} more of any" if missed else ""
    yield f"all: keeps {lora.energy:.3g} of the deltas' squares{also}{bound}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} … {high}"


def complain(error: DeltamergeError, where: str) -> None:
    """Print one error on stderr with its hint; problems of a recipe carry their own places.

    On a terminal this is in colour, with the recipe's lines.
    """
    if streams.is_terminal():
        progress.aside(partial(_show, error, where))
        return
    _to_stderr(printed(str(error) if isinstance(error, RecipeError) else f"{shown(where)}: {error}"))
    if error.hint:
        tell(f"hint: {shown(error.hint)}")


def _show(error: DeltamergeError, where: str) -> None:
    from deltamerge.cli import excerpt

    with suppress(OSError):
        excerpt.show(error, where, streams.console())
