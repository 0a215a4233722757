"""Plug-ins of trainers, driven as those drive them: a round's weights reach the rollouts, and what changed alone.

The recorded classes have the names and signatures of verl at 1dda039 (verl/checkpoint_engine/base.py), NeMo-RL at
7ea279a (nemo_rl/utils/checkpoint_engines/base.py), SkyRL at a956457 (weight_sync/) and prime-rl at 559b447
(transports/weights/, inference/vllm/).
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from test_chain import Tensors, same, states
from test_dialects import pull_skyrl, raw
from test_vllm import REAL, Model, record, vllm

import deltamerge as dm
from deltamerge.apps.serve.rounds import ChainReceiver, ChainSender
from deltamerge.errors import InputError, OutputError

__all__ = ["vllm"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "base", states(3)[0])
    return tmp_path


@pytest.fixture
def fresh() -> Iterator[None]:
    """Plug-ins are imported anew, over the recorded classes."""
    yield
    for name in ("verl", "nemo_rl", "skyrl", "prime_rl", "prime_rl_worker"):
        sys.modules.pop(f"deltamerge.apps.serve.{name}", None)


class Registry:
    known: ClassVar[dict[str, type]] = {}

    @staticmethod
    def register(backend: str) -> Callable[[type], type]:
        return lambda cls: Registry.known.setdefault(backend, cls)


class VerlEngine(ABC):
    wire_format = "named_tensors"

    @abstractmethod
    def prepare(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]) -> Any: ...

    @abstractmethod
    def init_process_group(self, **kwargs: Any) -> None: ...

    @abstractmethod
    def finalize(self) -> None: ...

    @abstractmethod
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> Any: ...

    @abstractmethod
    async def receive_weights(self, global_steps: int | None = None) -> Any: ...


async def taken(weights: AsyncIterator[Any], model: Model) -> list[str]:
    """Load what a rollout is given, one by one or in batches; return the names."""
    found = []
    async for one in weights:
        batch = one if isinstance(one, list) else [one]
        model.load_weights(batch)
        found += [name for name, _ in batch]
    return sorted(found)


def changed(old: Tensors, new: Tensors) -> list[str]:
    return sorted(name for name in new if not same({name: old[name]}, {name: new[name]}))


def test_verl(made: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    content = {"CheckpointEngine": VerlEngine, "CheckpointEngineRegistry": Registry}
    record(monkeypatch, {"verl": {}, "verl.checkpoint_engine": {}, "verl.checkpoint_engine.base": content})
    importlib.import_module("deltamerge.apps.serve.verl")  # by custom_backend_module
    own = {"chain": str(made / "run"), "base": str(made / "base")}
    engine_of = Registry.known["deltamerge"]
    actors = [engine_of(is_master=rank == 0, bucket_size=1 << 20, **own) for rank in range(2)]
    rollouts = [engine_of(bucket_size=1 << 20, **own) for _ in range(2)]
    found, models = states(3), [Model(load_tensors(made / "base")) for _ in rollouts]

    async def update(state: Tensors, step: int) -> list[Any]:
        metadata = [one.prepare() for one in (*actors, *rollouts)]
        for workers, kwargs in zip((actors, rollouts), engine_of.build_topology(2, 2, metadata), strict=True):  # type: ignore[attr-defined]
            for number, one in enumerate(workers):
                one.init_process_group(**{key: values[number] for key, values in kwargs.items()})
        sending = [one.send_weights(iter(state.items()), global_steps=step) for one in actors]
        receiving = [
            taken(one.receive_weights(global_steps=step), model) for one, model in zip(rollouts, models, strict=True)
        ]
        done = await asyncio.gather(*receiving, *sending)
        for one in (*actors, *rollouts):
            one.finalize()
        return done

    for step in range(1, 4):
        *names, figures, none = asyncio.run(update(found[step], step))
        assert all(same(model.state, found[step]) for model in models)
        assert names == [changed(found[step - 1], found[step])] * 2
        assert figures["checkpoint_engine/changed_ratio"] > 0
        assert none == {}
    assert [one.step for one in dm.follow(made / "run", timeout=0)] == [1, 2, 3]


class NemoEngine(ABC):
    shard_expert_weights = False

    @abstractmethod
    def prepare(self) -> Any: ...

    @abstractmethod
    def init_policy_process_group(
        self, *, worker_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None: ...

    @abstractmethod
    def init_rollout_process_group(
        self, *, rollout_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None: ...

    @abstractmethod
    async def send_weights(self, weights: Any) -> None: ...

    @abstractmethod
    def receive_weight_batches(self) -> AsyncIterator[Any]: ...


def test_nemo_rl(made: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    record(monkeypatch, {"nemo_rl.utils.checkpoint_engines.base": {"CheckpointEngine": NemoEngine}})
    module, _, name = "deltamerge.apps.serve.nemo_rl:ChainRefitEngine".partition(":")
    own = {"chain": str(made / "run"), "base": str(made / "base"), "release_after_refit": False}
    engines = [getattr(importlib.import_module(module), name)(bucket_size=5000, **own) for _ in range(3)]
    *policy, rollout = engines
    metadata = [one.prepare() for one in engines]
    sizes = {"train_world_size": 2, "rollout_world_size": 1, "metadata": metadata}
    for rank, one in enumerate(policy):
        one.init_policy_process_group(worker_rank=rank, **sizes)
    rollout.init_rollout_process_group(rollout_rank=0, **sizes)
    found, model = states(3), Model(load_tensors(made / "base"))

    async def refit(state: Tensors) -> Any:
        sending = [one.send_weights(iter(state.items())) for one in policy]
        return (await asyncio.gather(taken(rollout.receive_weight_batches(), model), *sending))[0]

    for step in range(1, 4):
        assert asyncio.run(refit(found[step])) == changed(found[step - 1], found[step])
        assert same(model.state, found[step])


class SkyrlStrategy:
    @staticmethod
    def create_init_info(ie_cfg: Any, inference_world_size: Any = None, base_model_path: Any = None) -> Any: ...


class SkyrlSender:
    def __init__(self, init_info: Any, inference_client: Any) -> None:
        self._init_info, self._inference_client = init_info, inference_client

    async def _apply_receiver_update(self, update_info: dict[str, Any], rank: int, reset_prefix_cache: bool) -> None:
        await self._inference_client.fetch_weights(update_info["target_version"], sync_dir=update_info["sync_dir"])

    def teardown(self) -> None: ...


def test_skyrl(made: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    pytest.importorskip("zstandard")
    package = "skyrl.backends.skyrl_train.weight_sync"
    strategy = {"DeltaTransferStrategy": SkyrlStrategy, "DeltaWeightTransferSender": SkyrlSender}
    record(monkeypatch, {package: {"DeltaTransferStrategy": SkyrlStrategy}, f"{package}.delta_strategy": strategy})
    plugin = importlib.import_module("deltamerge.apps.serve.skyrl")
    plugin.install()
    found, weights, at = states(3), raw(states(3)[0]), 0

    class Client:
        async def fetch_weights(self, target_version: int, sync_dir: str) -> None:
            nonlocal at
            pull_skyrl(weights, Path(sync_dir), target_version, at)
            at = target_version

    given = SimpleNamespace(sync_dir=str(made / "sync"), base_model_path=str(made / "base"))
    sender = sys.modules[package].DeltaTransferStrategy.create_sender(init_info=given, inference_client=Client())
    for step in range(1, 4):
        chunks = [SimpleNamespace(names=[name], tensors=[tensor]) for name, tensor in found[step].items()]
        asyncio.run(sender.send_chunks(chunks, reset_prefix_cache=True))
        assert (at, {n: b.tobytes() for n, b in weights.items()}) == (
            step,
            {n: b.tobytes() for n, b in raw(found[step]).items()},
        )
    sender.teardown()
    state = load_tensors(made / "base")
    assert dm.load_delta(made / "sync-chain").apply_(state) == 3
    assert same(state, found[3])
    given.sync_dir = "s3://bucket/sync"
    with pytest.raises(InputError, match="is no folder"):
        plugin.ChainTransferStrategy.create_sender(given, Client())


def test_prime_rl(made: Path, monkeypatch: pytest.MonkeyPatch, fresh: None, vllm: None) -> None:
    if REAL:
        pytest.skip("vLLM's worker asks for a whole configuration")
    loaded: list[str] = []

    class FileSystemBroadcast:
        def __init__(self, output_dir: Path, config: Any, lora_config: Any = None) -> None:
            self.output_dir, self.lora_config, self.world = output_dir, lora_config, SimpleNamespace(is_master=True)

        def broadcast_weights(self, model: Any, step: int) -> None:
            loaded.append(f"adapter {step}")

        def _notify_orchestrator(self, save_dir: Path) -> None:
            (save_dir / "STABLE").touch()

    class FileSystemWorker:
        def update_weights_from_path(self, weight_path: str) -> None:
            loaded.append(weight_path)

    extensions = {"filesystem": "theirs"}
    record(monkeypatch, {
        "prime_rl.transports.weights": {"FileSystemWeightBroadcast": FileSystemBroadcast},
        "prime_rl.transports.weights.filesystem": {"FileSystemWeightBroadcast": FileSystemBroadcast},
        "prime_rl.utils.utils": {
            "get_broadcast_dir": lambda folder: folder / "broadcasts",
            "get_step_path": lambda folder, step: folder / f"step_{step}",
        },
        "prime_rl.utils.weights": {
            "convert_state_dict_to_hf": lambda model, state: state, "resolve_fqn": lambda model, key: key,
        },
        "prime_rl.inference.vllm.server": {"WORKER_EXTENSION_CLS": extensions},
        "prime_rl.inference.vllm.worker.filesystem": {"FileSystemWeightUpdateWorker": FileSystemWorker},
        "vllm.config": {"set_current_vllm_config": nullcontext},
    })  # fmt: skip
    plugin = importlib.import_module("deltamerge.apps.serve.prime_rl")
    plugin.install_trainer(str(made / "base"))
    plugin.install_server()
    broadcast_of = sys.modules["prime_rl.transports.weights"].FileSystemWeightBroadcast
    master, other = broadcast_of(made, None), broadcast_of(made, None)
    other.world.is_master = False
    module, _, name = extensions["filesystem"].rpartition(".")
    found, model = states(3), Model(load_tensors(made / "base"))
    worker = getattr(importlib.import_module(module), name)()
    worker.model_runner, worker.device = SimpleNamespace(model=model), torch.device("cpu")
    worker.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=str(made / "base"), quantization=None))
    for step in range(1, 4):
        for one in (other, master):
            one.broadcast_weights(SimpleNamespace(state_dict=lambda: found[step]), step)  # noqa: B023
        folder = made / "broadcasts" / f"step_{step}"
        assert (folder / "STABLE").exists()
        assert not list(folder.glob("*.safetensors"))
        worker.update_weights_from_path(str(folder))
        assert same(model.state, found[step])
    (made / "plain").mkdir()
    worker.update_weights_from_path(str(made / "plain"))  # a checkpoint: theirs loads it
    model.state["b"].zero_()
    worker.update_weights_from_path(str(made / "broadcasts" / "step_1"))
    assert same(model.state, found[1])
    broadcast_of(made, None, object()).broadcast_weights(None, 4)
    assert loaded == [str(made / "plain"), "adapter 4"]


def test_a_receiver_waits_no_longer_than_it_should_and_keeps_what_it_holds(made: Path) -> None:
    found = states(3)
    sender, receiver = ChainSender(made / "run", made / "base"), ChainReceiver(made / "run", made / "base")
    receiver.ready()
    with pytest.raises(OutputError, match="no version has come in 0 s"):
        receiver.receive(patience=0.01)
    sender.send(found[1].items(), writes=True)
    assert sorted(name for name, _ in receiver.receive()) == changed(found[0], found[1])
    sender.send(found[2].items(), writes=True)
    file = next((made / "run" / "000002").glob("delta.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes(byte ^ 255 for byte in whole[-3:]))
    with pytest.raises(InputError):
        receiver.receive()
    file.write_bytes(whole)
    names = dict(receiver.receive())
    assert sorted(names) == changed(found[1], found[2])
    assert all(same({name: tensor}, {name: found[2][name]}) for name, tensor in names.items())
    sender.close()
