"""What commands say on stdout and stderr while they work, when they are done and when they cannot go on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from deltamerge.errors import DeltamergeError, RecipeError
from deltamerge.show import human

if TYPE_CHECKING:
    from deltamerge.runner import Result


class Progress:
    """A line on stderr: bytes done, rate and time left; silent where nobody looks."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self.begun = self.started = time.monotonic()
        self.total = self.done = 0
        self.last = 0.0
        self.lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def start(self, total: int) -> Callable[[int], None]:
        self.total, self.done = total, 0
        self.started = time.monotonic()
        return self.add

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            if not self.shown or time.monotonic() - self.last < 0.1:
                return
            self.last = time.monotonic()
            rate = self.done / max(time.monotonic() - self.started, 1e-3)
            left = (self.total - self.done) / max(rate, 1)
            share = self.done / max(self.total, 1)
            bar = "█" * int(share * 24)
            text = f"{bar:<24} {share:4.0%} {human(self.done)} of {human(self.total)} {human(rate)}/s {left:.0f} s left"
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    def stop(self) -> None:
        if self.shown:
            click.echo("\r\x1b[K", nl=False, err=True)


def report_run(result: Result, progress: Progress, *, as_json: bool, quiet: bool, **more: Any) -> None:
    """What a finished run made; `more` is for the JSON object."""
    progress.stop()
    tensors, delta = len(result.plan.outputs), result.delta
    kind = result.plan.recipe.output.kind
    adapter = kind == "peft"
    size = delta.nbytes if delta else result.plan.nbytes if kind == "model" else result.nbytes
    if as_json:
        summary = {
            "out": str(result.folder),
            "bytes": size,
            "tensors": tensors,
            "seconds": round(progress.seconds, 3),
            "lock": result.lock,
            "nonfinite": {name: count._asdict() for name, count in result.nonfinite.items()},
            **({} if delta is None else {"entries": delta.entries, "relative_error": delta.error}),
            **more,
        }
        click.echo(json.dumps(summary, sort_keys=True))
    elif not quiet:
        lost = ""
        for folder, made in result.intermediate.items():
            click.echo(f"{folder}: {'made' if made else 'as it would be made, kept'}", err=True)
        if delta is not None:
            values = result.plan.delta_values
            how = "final values, exact" if values is None else f"{values} values, relative error {delta.error:.3g}"
            lost = f", {delta.entries:,} entries: {how}"
        what = "an adapter" if adapter else f"{tensors} tensors"
        click.echo(f"{result.folder}: {what}, {human(size)} in {progress.seconds:.1f} s{lost}", err=True)
        for note in result.plan.notes if adapter else ():
            click.echo(f"note: {note}", err=True)


def complain(error: DeltamergeError, where: str) -> None:
    """One error on stderr, with its hint; a recipe's problems say where they are themselves."""
    click.echo(str(error) if isinstance(error, RecipeError) else f"{where}: {error}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
