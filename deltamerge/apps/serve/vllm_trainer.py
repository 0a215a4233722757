"""The trainer's side of vLLM's weight transfer "deltamerge": each round is a version of a chain.

    deltamerge.apps.serve.register()
    engine = WeightTransferTrainerFactory.trainer_init(
        DeltaTrainerInit(chain="run", base="./base", rank=0), client=client, source=ModuleSource(model)
    )
    engine.send_weights()

The server's workers read the chain from a disk that they see, by the engine of `deltamerge.apps.serve.vllm`. Only
the changes of a round are written. Versions stay, and servers can go back to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from deltamerge.apps.serve.rounds import ChainSender
from deltamerge.errors import InputError


@dataclass
class DeltaTrainerInit(TrainerInitInfo):  # type: ignore[misc]  # vLLM is not read for types
    """Settings of the trainer's side.

    chain   the folder of versions, which trainer and workers see under this name
    base    the base of the served model, also under this name for all
    rank    this process's rank; 0 writes and drives the server, the others only gather
    """

    backend: ClassVar[str] = "deltamerge"

    chain: str
    base: str


class DeltaTrainerEngine(TrainerWeightTransferEngine[DeltaTrainerInit]):  # type: ignore[misc]  # likewise
    """The trainer's engine, one in each of its processes."""

    init_info_cls = DeltaTrainerInit

    @classmethod
    def trainer_init(cls, init_info: DeltaTrainerInit, *, client: Any, source: Any = None) -> DeltaTrainerEngine:
        """Open the chain, and tell the server its base. InputError: no source, or the base cannot be read."""
        if source is None:
            raise InputError("there are no weights to send", hint="source=ModuleSource(model)")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._sender = ChainSender(init_info.chain, init_info.base)
        if engine.is_sender:
            client.init_weight_transfer_engine({"base": str(Path(init_info.base).resolve())})
        return engine

    def send_weights(self) -> None:
        """Write the changes as the next version, and switch the server to it. Call this in all processes.

        A refusal by the server is raised. The version stays, and the next round continues from it.
        """
        made = self._sender.send(self.source, writes=self.is_sender)
        if made is None:
            return
        version = made.path
        self.client.start_weight_update()
        self.client.update_weights({"delta": str(version.resolve())})
        self.client.finish_weight_update(version.name)

    def shutdown(self) -> None:
        """Let the chain go."""
        self._sender.close()
