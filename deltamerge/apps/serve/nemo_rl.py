"""NeMo-RL's checkpoint engine for chains: each refit is a version on a disk that policy and generation workers see.

    policy.generation:
      refit_transport: "deltamerge.apps.serve.nemo_rl:ChainRefitEngine"
      refit_cfg: {"deltamerge.apps.serve.nemo_rl:ChainRefitEngine": {chain: /shared/run, base: /shared/base}}

NeMo-RL's `SparseRefitTransport` carries payloads of its own codec, to receivers that know S3 and ZeroMQ alone: a chain
does not fit there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from nemo_rl.utils.checkpoint_engines.base import CheckpointEngine

from deltamerge.apps.serve.rounds import ChainReceiver, ChainSender, Weights


class ChainRefitEngine(CheckpointEngine):  # type: ignore[misc]  # NeMo-RL is not read for types
    """The engine of one worker. The policy's first worker writes.

    chain, base   a folder of versions, and the model that generation was started from, under the same names in all
                  workers
    """

    def __init__(self, *, bucket_size: int, chain: str, base: str, **more: Any) -> None:
        self._bucket, self._writes = bucket_size, False
        self._sender, self._receiver = ChainSender(chain, base), ChainReceiver(chain, base)

    def prepare(self) -> dict[str, Any]:
        """Take note of the newest version, after which the refit's comes."""
        self._receiver.ready()
        return {}

    def init_policy_process_group(
        self, *, worker_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        """Take note of who writes."""
        self._writes = not worker_rank

    def init_rollout_process_group(
        self, *, rollout_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        """Do nothing: all that is shared is a folder."""

    async def send_weights(self, weights: Weights) -> None:
        """Publish the policy's weights; every worker takes part in gathering them."""
        self._sender.send(weights, writes=self._writes)

    async def receive_weight_batches(self) -> AsyncGenerator[list[tuple[str, Any]], None]:
        """Yield the tensors that the refit changes, some of a bucket's bytes at once."""
        batch: list[tuple[str, Any]] = []
        for name, tensor in await asyncio.to_thread(self._receiver.receive):
            if batch and sum(one.nbytes for _, one in batch) + tensor.nbytes > self._bucket:
                yield batch
                batch = []
            batch.append((name, tensor))
        if batch:
            yield batch
