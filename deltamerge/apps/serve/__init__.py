"""Servers that are switched between deltas.

`register` is the entry point of vLLM's group `vllm.general_plugins`. It imports nothing of a vLLM that is too old.
"""

from __future__ import annotations

ENGINE = "deltamerge"


def register() -> None:
    """Register the engine "deltamerge" in vLLM. All processes of vLLM call this; a trainer must call it.

    Do nothing in a vLLM without such engines.
    """
    try:
        from vllm.distributed import weight_transfer
    except ImportError:
        return
    for factory, module, name in (
        ("WeightTransferEngineFactory", "vllm", "DeltaEngine"),
        ("WeightTransferTrainerFactory", "vllm_trainer", "DeltaTrainerEngine"),
    ):
        found = getattr(weight_transfer, factory, None)
        if found is not None and ENGINE not in found._registry:
            found.register_engine(ENGINE, f"deltamerge.apps.serve.{module}", name)
