"""A SGLang engine switched between the fine-tunes of its base, by deltas on a disk that this process sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltamerge.apps.chain.live import Delta
from deltamerge.apps.serve.fine_tunes import ServedModel
from deltamerge.errors import InputError, OutputError


class EngineSwitch:
    """A `sglang.Engine` switched between deltas, as `dm.Switch` does with a module.

    engine  serves the base, in the base's dtypes. It must not be quantised, because parts of packed weights cannot be
            written. It needs disable_radix_cache, because SGLang may refuse to drop cached states of old weights
    base    the base of the engine's model and of the deltas: a folder or hub id
    keep    number of deltas that stay decoded in memory, the last used; None: all

    The tensors that change go to the engine's processes whole, in one update: requests in flight end first, later ones
    wait. Nobody else may update the engine's weights.
    """

    def __init__(self, engine: Any, base: str | Path, *, keep: int | None = None) -> None:
        if (packed := engine.server_args.quantization) is not None:
            raise InputError(
                f"the engine's weights are packed, {packed}",
                hint="deltamerge apply, and update_weights_from_disk with its folder",
            )
        if not engine.server_args.disable_radix_cache:
            raise InputError(
                "the engine keeps cached prompts of other weights",
                hint="sglang.Engine(..., disable_radix_cache=True)",
            )
        self._engine, self._served = engine, ServedModel(base, keep=keep)

    def to(self, delta: str | Path | Delta | None) -> None:
        """Switch the engine's model to `delta`: an artifact, a version of a chain, or a chain (its newest).

        A chain with a pinned version stands for that version. None: the base. InputError, with nothing sent: the delta
        is damaged or for another base, or its result has other names, dtypes or shapes. OutputError: SGLang refused the
        tensors. The old tensors are then sent again; if they are refused too, the next `to` sends all tensors.
        """
        changes = self._served.changes(delta)
        if names := self._served.touched(changes):
            weights, before = list(self._served.weights(changes, names)), self._served.at
            self._served.at = None
            _check(self._engine.begin_weight_update())
            try:
                self._send(weights)
            except BaseException:
                if before is not None:
                    self._send(list(self._served.weights(before, names)))
                    self._served.at = before
                raise
            finally:
                _check(self._engine.end_weight_update())
        self._served.at = changes

    def _send(self, weights: list[tuple[str, Any]]) -> None:
        _check(self._engine.update_weights_from_tensor(weights, flush_cache=False))


def _check(answer: tuple[bool, str]) -> None:
    if not answer[0]:
        raise OutputError(f"SGLang: {answer[1]}")
