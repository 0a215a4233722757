"""A callback of transformers' Trainer that writes a version of a chain as training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from deltamerge.apps.train.trainer import DeltaWriter
from deltamerge.errors import UsageError


class DeltaCallback(TrainerCallback):
    """Writes a version every so many optimizer steps, or every epoch, and at the end if something is left.

        chain, base   as for `DeltaWriter`; the default base is the checkpoint that the model was loaded from
        every         steps, or "epoch"
        log           gets each version's figures, like `wandb.log` and `trackio.log`

    In a run of several processes only the first writes. An error in the background stops the training at the next
    version.
    """

    def __init__(
        self,
        chain: str | Path,
        *,
        base: str | Path | None = None,
        every: int | Literal["epoch"] = 1,
        log: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise UsageError(f"every={every!r}: steps, or 'epoch'")
        self.chain, self.base, self.every = Path(chain), base, every
        self.log = log
        self.writer: DeltaWriter | None = None
        self._written = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            self.writer = DeltaWriter(self.chain, model, base=self.base, log=self.log)
            self._written = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every != "epoch" and state.global_step % self.every == 0:
            self._write(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every == "epoch":
            self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.writer is not None:
            self._write(state)
            self.writer.close()
            self.writer = None

    def _write(self, state: Any) -> None:
        if self.writer is not None and state.global_step > self._written:
            self._written = state.global_step
            self.writer.write(step=state.global_step)
