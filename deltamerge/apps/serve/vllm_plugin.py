"""What vLLM finds by the entry point of its group `vllm.general_plugins`: the weight-transfer engine "deltamerge"."""

from __future__ import annotations

ENGINE = "deltamerge"


def register() -> None:
    """Name the engine to vLLM, whose processes all call this; a vLLM that has no such engines is left alone."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError:
        return
    if ENGINE not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(ENGINE, "deltamerge.apps.serve.vllm", "DeltaEngine")
