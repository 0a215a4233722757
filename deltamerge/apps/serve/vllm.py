"""vLLM's weight-transfer engine "deltamerge": a served model becomes a fine-tune of its base, by a delta on a disk.

    init_weight_transfer_engine({"base": "./base"})       the served model's own folder or hub id if it is not given
    start_weight_update(); update_weights({"delta": "deltas/math"}); finish_weight_update()

`delta` is an artifact, a version of a chain, or a chain (its pinned version, or its newest); None: the base. Every
worker reads it, and checks it and the base by hash before anything is written. If a write fails, its layers are loaded
as they were; if that fails too, the next update writes every tensor.

If a model keeps its weights as loaded, only the changed positions are written, if they are few. Other layers are loaded
anew, from the base's file: layers in which most of a tensor changes, and layers whose weights vLLM has packed (on the
CPU, quantised, experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    layerwise_groups,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from deltamerge.apps.serve.fine_tunes import Changes, ServedModel
from deltamerge.errors import InputError


@dataclass
class DeltaInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not read for types
    """Settings of the engine.

    base      the base of the served model and of the deltas; None: the model's folder
    draft     the base of a model that drafts tokens for it; None: the draft's folder, or `base` for layers in it
    in_place  write single positions into the loaded weights; None: if the model keeps them as loaded
    keep      number of deltas that a worker holds decoded; None: all
    """

    base: str | None = None
    draft: str | None = None
    in_place: bool | None = None
    keep: int | None = None


@dataclass
class DeltaUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM is not read for types
    """An update: `delta` is a folder that every worker sees. None: the base."""

    delta: str | None = None


class DeltaEngine(WeightTransferEngine[DeltaInit, DeltaUpdate]):  # type: ignore[misc]  # vLLM is not read for types
    """The engine of one worker, which updates its model or its draft model, as vLLM targets it."""

    init_info_cls = DeltaInit
    update_info_cls = DeltaUpdate
    supports_draft_weight_update = True

    def init_transfer_engine(self, init_info: DeltaInit) -> None:
        """Open the base, which the model has to hold when this is first called. InputError: it is no checkpoint.

        Called again while the model holds a delta, the next update writes every tensor.
        """
        before = getattr(self, "_served", None)
        self._init, self._default, self._fresh = init_info, self.model, before is None
        self._base = init_info.base or self.model_config.model
        self._served = ServedModel(self._base, keep=init_info.keep)
        self._draft: ServedModel | None = None
        self._in_place = keeps_weights(self) if init_info.in_place is None else init_info.in_place
        self._own = self.model_config.model
        if before is not None and before.at != {}:
            self.forget()

    def forget(self) -> None:
        """Let the next update write every tensor, as the model holds something else."""
        self._served.at = None

    def _target(self) -> ServedModel:
        """Return the state of the model that is updated."""
        if self.model is self._default:
            return self._served
        if self._draft is None:
            own = self.model_config.model
            base = self._init.draft or (self._base if own == self._own else own)
            self._draft = ServedModel(base, keep=self._init.keep)
            if not self._fresh:
                self._draft.at = None
        return self._draft

    def start_weight_update(self) -> None:
        """Do nothing: an update is whole in `receive_weights`, which refuses before it begins."""

    def finish_weight_update(self) -> None:
        """Do nothing."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: DeltaUpdate) -> None:
        """Update the model to a delta.

        InputError, with nothing written: the delta is damaged or for another base.
        """
        if not hasattr(self, "_served"):
            raise InputError("init_weight_transfer_engine was not called", hint='init_info {"base": FOLDER}')
        served = self._target()
        changes = served.changes(update_info.delta)
        patches = self._patches(served, changes) if self._in_place and served is self._served else []
        touched, before = {*served.touched(changes)}, served.at
        anew = touched - {patch.name for patch in patches}
        served.at = None
        try:
            if patches:
                load_checkpoint_weight_patches(self.model, patches, validate_unique_indices=False)
            if anew:
                self._load(served, changes, anew)
        except BaseException:
            if before is not None:
                self._load(served, before, touched)
                served.at = before
            raise
        served.at = changes

    def _patches(self, served: ServedModel, changes: Changes) -> list[CheckpointWeightPatch]:
        """Return the changes that vLLM can write in place: single positions, floating, without NaN.

        NaN means to vLLM that an entry does not change.
        """
        return [
            CheckpointWeightPatch(*patch)
            for patch in served.patches(changes)
            if patch.indices is not None and patch.dtype.is_floating_point and not bool(patch.values.isnan().any())
        ]

    def _load(self, served: ServedModel, changes: Changes, names: set[str]) -> None:
        """Load the layers of some tensors anew, as vLLM reloads them."""
        groups = layerwise_groups(list(served.base))
        wanted = [name for group in groups if not names.isdisjoint(group) for name in group]
        with torch.device(self.device):
            initialize_layerwise_reload(self.model)
            try:
                self.model.load_weights(served.weights(changes, wanted))
            finally:
                finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held but memory."""


def keeps_weights(engine: DeltaEngine) -> bool:
    """Return whether a model computes with its weights as they were loaded, so that they can be written in place."""
    plain = engine.device.type != "cpu" and engine.model_config.quantization is None
    return plain and not any("MoE" in type(module).__name__ for module in engine.model.modules())
