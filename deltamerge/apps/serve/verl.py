"""verl's checkpoint engine "deltamerge": each update of the rollouts is a version of a chain on a disk that all see.

    actor_rollout_ref.rollout.checkpoint_engine:
      backend: deltamerge
      custom_backend_module: deltamerge.apps.serve.verl
      engine_kwargs: {deltamerge: {chain: /shared/run, base: /shared/base}}

It takes the place of verl's own `delta_sharded`, for every rollout that loads named tensors. Only changed tensors are
handed to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from deltamerge.apps.serve.rounds import ChainReceiver, ChainSender, Weights


@CheckpointEngineRegistry.register("deltamerge")
class ChainCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # verl is not read for types
    """The engine of one process. The actor's master process writes.

    chain, base   a folder of versions, and the model that the rollouts were started from, under the same names in all
                  processes
    """

    def __init__(self, bucket_size: int = 0, is_master: bool = False, *, chain: str, base: str) -> None:
        self._is_master = is_master
        self._sender, self._receiver = ChainSender(chain, base), ChainReceiver(chain, base)

    def prepare(self) -> dict[str, Any]:
        """Take note of the newest version, after which the update's comes."""
        self._receiver.ready()
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return arguments of `init_process_group`: none, as all that is shared is a folder."""
        return {}, {}

    def init_process_group(self, **kwargs: Any) -> None:
        """Do nothing."""

    def finalize(self) -> None:
        """Keep everything for the next update."""

    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> dict[str, float]:
        """Publish the actor's weights; every process takes part in gathering them."""
        made = self._sender.send(weights, writes=self._is_master, step=global_steps)
        if made is None:
            return {}
        figures = {"changed_ratio": made.changed / max(1, made.elements), "payload_mbytes": made.nbytes / (1 << 20)}
        return {f"checkpoint_engine/{name}": value for name, value in figures.items()}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Any]]:
        """Yield the tensors that the update changes."""
        for name, tensor in await asyncio.to_thread(self._receiver.receive):
            yield name, tensor
