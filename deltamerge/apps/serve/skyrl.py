"""SkyRL's delta weight sync from a chain: its servers read the layout that they know, mirrored from the chain.

    from deltamerge.apps.serve.skyrl import install
    install()  # in the trainer's workers, before they make their senders; weight_sync_backend: delta

`sync_dir` gets SkyRL's versions, and `sync_dir`-chain the chain: small, kept, to be rolled back and served elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skyrl.backends.skyrl_train import weight_sync
from skyrl.backends.skyrl_train.weight_sync.delta_strategy import DeltaTransferStrategy, DeltaWeightTransferSender

from deltamerge.apps.serve.rounds import ChainSender
from deltamerge.errors import InputError
from deltamerge.models.chain.skyrl import SKYRL


class ChainTransferStrategy(DeltaTransferStrategy):  # type: ignore[misc]  # SkyRL is not read for types
    """SkyRL's delta strategy with another sender."""

    @staticmethod
    def create_sender(init_info: Any, inference_client: Any) -> ChainTransferSender:
        """Return the sender of one process."""
        return ChainTransferSender(init_info, inference_client)


class ChainTransferSender(DeltaWeightTransferSender):  # type: ignore[misc]  # likewise
    """Writes rounds as versions of a chain and its mirror, and has SkyRL's servers fetch and load them."""

    def __init__(self, init_info: Any, inference_client: Any) -> None:
        super().__init__(init_info, inference_client)
        if "://" in init_info.sync_dir:
            raise InputError(f"{init_info.sync_dir}: is no folder", hint="sync_dir: a folder that all machines see")
        self._folder = Path(init_info.sync_dir)
        chain = self._folder.with_name(f"{self._folder.name}-chain")
        self._sender = ChainSender(chain, init_info.base_model_path, mirrors={self._folder: SKYRL.name})

    async def send_chunks(
        self, chunks: Iterable[Any], weight_metadata: Any = None, reset_prefix_cache: bool = False
    ) -> None:
        """Publish a round's weights, and have the servers load them; every process takes part in gathering them."""
        import torch

        is_many = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if is_many else 0
        weights = ((name, tensor) for one in chunks for name, tensor in zip(one.names, one.tensors, strict=True))
        await asyncio.to_thread(self._sender.send, weights, writes=not rank)
        if not rank:
            number = max(SKYRL.numbers(self._folder))
            where = {"sync_dir": str(self._folder), "uri": str(self._folder / SKYRL.title(number))}
            update = {"target_version": number, "version": number, **where}
            await self._apply_receiver_update(update, rank, reset_prefix_cache)

    def teardown(self) -> None:
        """Let the chain go."""
        self._sender.close()
        super().teardown()


def install() -> None:
    """Put the strategy in the place of SkyRL's own for `weight_sync_backend: delta`, in this process."""
    weight_sync.DeltaTransferStrategy = ChainTransferStrategy
