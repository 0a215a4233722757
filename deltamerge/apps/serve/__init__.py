"""Servers that are switched between deltas.

`register` is the entry point of vLLM's group `vllm.general_plugins`. It imports nothing of a vLLM that is too old.
"""

from __future__ import annotations

ENGINE = "deltamerge"


def register() -> None:
    """Name the engine "deltamerge" to vLLM, whose processes all call this. Leave a vLLM without such engines alone."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError:
        return
    if ENGINE not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(ENGINE, "deltamerge.apps.serve.vllm", "DeltaEngine")
