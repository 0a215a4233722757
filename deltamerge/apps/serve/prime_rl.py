"""prime-rl's weight broadcast by a chain: orchestrator and servers find a version in place of weights.

    from deltamerge.apps.serve import prime_rl
    prime_rl.install_trainer("/shared/base")    # before prime_rl.trainer.rl.train.main()
    prime_rl.install_server()                   # before the server's main()

With `weight_broadcast.type: filesystem`. The chain is `deltamerge` beside the steps' folders; each of them has a line
that names its version, in place of a checkpoint. LoRAs are broadcast as before. The server's vLLM loads the changes by
the engine of `deltamerge.apps.serve.vllm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltamerge.apps.serve.rounds import ChainSender

POINTER, CHAIN = "deltamerge.version", "deltamerge"


def install_trainer(base: str) -> None:
    """Broadcast versions over `base`, the model that the servers were started from, in this process."""
    from prime_rl.transports import weights
    from prime_rl.transports.weights.filesystem import FileSystemWeightBroadcast
    from prime_rl.utils.utils import get_broadcast_dir, get_step_path
    from prime_rl.utils.weights import convert_state_dict_to_hf, resolve_fqn

    class ChainWeightBroadcast(FileSystemWeightBroadcast):  # type: ignore[misc]  # prime-rl is not read for types
        """Writes a step's weights as a version, and tells the orchestrator."""

        def __init__(self, output_dir: Path, config: Any, lora_config: Any = None) -> None:
            super().__init__(output_dir, config, lora_config)
            self._sender = ChainSender(get_broadcast_dir(output_dir) / CHAIN, base)

        def broadcast_weights(self, model: Any, step: int) -> None:
            """Publish the model's weights; every process takes part in gathering them."""
            if self.lora_config is not None:
                super().broadcast_weights(model, step)
                return
            state = {}
            for key, tensor in model.state_dict().items():
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                if self.world.is_master:
                    state[resolve_fqn(model, key)] = whole.detach().cpu()
            if not self.world.is_master:
                return
            made = self._sender.send(convert_state_dict_to_hf(model, state).items(), writes=True, step=step)
            assert made is not None
            folder = get_step_path(get_broadcast_dir(self.output_dir), step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / POINTER).write_text(f"{made.path.resolve()}\n", encoding="utf-8")
            self._notify_orchestrator(folder)

    weights.FileSystemWeightBroadcast = ChainWeightBroadcast


def install_server() -> None:
    """Have the workers of this server take versions."""
    from prime_rl.inference.vllm import server

    server.WORKER_EXTENSION_CLS["filesystem"] = "deltamerge.apps.serve.prime_rl_worker.ChainWeightUpdateWorker"
