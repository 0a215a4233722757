"""The extension of vLLM's workers in prime-rl's server that takes versions of a chain."""

from __future__ import annotations

from pathlib import Path

from prime_rl.inference.vllm.worker.filesystem import FileSystemWeightUpdateWorker
from vllm.config import set_current_vllm_config

from deltamerge.apps.serve.prime_rl import POINTER
from deltamerge.apps.serve.vllm import DeltaEngine, DeltaInit, DeltaUpdate


class ChainWeightUpdateWorker(FileSystemWeightUpdateWorker):  # type: ignore[misc]  # prime-rl is not read for types
    """Updates the served model to the version that a step's folder names."""

    def update_weights_from_path(self, weight_path: str) -> None:
        """Load the changes of a version. A folder that names no version is a checkpoint, and is loaded whole."""
        pointer = Path(weight_path) / POINTER
        engine: DeltaEngine | None = getattr(self, "_chain_engine", None)
        if not pointer.is_file():
            super().update_weights_from_path(weight_path)
            if engine is not None:
                engine.forget()
            return
        if engine is None:
            model = getattr(self.model_runner.model, "runnable", self.model_runner.model)
            engine = self._chain_engine = DeltaEngine(None, self.vllm_config, self.device, model)
            engine.init_transfer_engine(DeltaInit())
        with set_current_vllm_config(self.vllm_config):
            engine.receive_weights(DeltaUpdate(delta=pointer.read_text(encoding="utf-8").strip()))
