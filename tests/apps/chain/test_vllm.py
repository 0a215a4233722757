"""Both sides of vLLM's weight transfer: against vLLM where it is installed, else its interface as 0.32.0 has it.

The recorded classes have the names, fields and signatures of vllm/distributed/weight_transfer/base.py and factory.py,
model_executor/model_loader/checkpoint_weight_patch.py and reload/.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from test_chain import NAMES, Tensors, same, states

import deltamerge as dm
from deltamerge.apps.serve import register
from deltamerge.errors import InputError

REAL = importlib.util.find_spec("vllm") is not None
T, U = TypeVar("T"), TypeVar("U")


@dataclass
class InitInfo:
    pass


@dataclass
class UpdateInfo:
    pass


@dataclass
class TrainerInitInfo:
    rank: int = field(kw_only=True)

    @property
    def is_sender(self) -> bool:
        return self.rank == 0


class WorkerEngine(Generic[T, U]):
    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        self.config, self.model_config, self.device, self.model = config, vllm_config.model_config, device, model

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return self.update_info_cls(**update_dict)  # type: ignore[attr-defined]

    def set_weight_update_target(self, model: torch.nn.Module, model_config: Any) -> None:
        self._held, self.model, self.model_config = (self.model, self.model_config), model, model_config

    def reset_weight_update_target(self) -> None:
        self.model, self.model_config = self._held


class TrainerEngine(Generic[T]):
    def __init__(self, *, client: Any, source: Any = None, is_sender: bool = True) -> None:
        self.is_sender, self.client, self.source = is_sender, client, source


class Patch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


class Factory:
    _registry: dict[str, Any]

    def __init_subclass__(cls) -> None:
        cls._registry = {}

    @classmethod
    def register_engine(cls, name: str, module: str, class_name: str) -> None:
        cls._registry[name] = lambda: getattr(importlib.import_module(module), class_name)


class Engines(Factory):
    pass


class Trainers(Factory):
    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any:
        return cls._registry[init_info.backend]().trainer_init(init_info=init_info, client=client, source=source)


def load_patches(model: Any, patches: list[Patch], *, validate_unique_indices: bool = True) -> None:
    for patch in patches:
        model.write(patch.name, patch.values, patch.indices)


def record(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Put modules with such contents in the place of packages that are not installed."""
    for name, content in modules.items():
        parent, _, own = name.rpartition(".")
        if parent and parent not in modules and parent not in sys.modules:
            record(monkeypatch, {parent: {}})
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if parent:
            monkeypatch.setattr(sys.modules[parent], own, module, raising=False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM itself, or its interface."""
    if not REAL:
        base = {
            "WeightTransferEngine": WorkerEngine, "WeightTransferInitInfo": InitInfo,
            "WeightTransferUpdateInfo": UpdateInfo,
            "TrainerInitInfo": TrainerInitInfo, "TrainerWeightTransferEngine": TrainerEngine,
            "layerwise_groups": lambda names: [[name] for name in names],
        }  # fmt: skip
        made = {
            "vllm": {}, "vllm.distributed": {}, "vllm.model_executor": {}, "vllm.model_executor.model_loader": {},
            "vllm.distributed.weight_transfer": {
                "WeightTransferEngineFactory": Engines, "WeightTransferTrainerFactory": Trainers,
            },
            "vllm.distributed.weight_transfer.base": base,
            "vllm.model_executor.model_loader.checkpoint_weight_patch": {
                "CheckpointWeightPatch": Patch, "load_checkpoint_weight_patches": load_patches,
            },
            "vllm.model_executor.model_loader.reload": {
                "initialize_layerwise_reload": lambda model: None,
                "finalize_layerwise_reload": lambda model, config: None,
            },
        }  # fmt: skip
        record(monkeypatch, made)
    register()
    register()  # twice is once
    yield
    for name in ("vllm", "vllm_trainer"):
        sys.modules.pop(f"deltamerge.apps.serve.{name}", None)


class Model(torch.nn.Module):
    """A served model: `fails` writes are left before one fails amid."""

    def __init__(self, state: Tensors) -> None:
        super().__init__()
        self.state, self.fails = {name: tensor.clone() for name, tensor in state.items()}, -1

    def write(self, name: str, values: torch.Tensor, indices: torch.Tensor | None = None) -> None:
        line = self.state[name].view(-1)
        where = slice(None) if indices is None else indices.long()
        self.fails -= 1
        if self.fails == 0:
            line[:1] = 0
            raise RuntimeError("no memory")
        line[where] = values.view(-1)

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.write(name, tensor)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    found = states(3)
    make_checkpoint(tmp_path / "base", found[0])
    return tmp_path


def served(made: Path, *, in_place: bool) -> tuple[Any, Model]:
    from deltamerge.apps.serve.vllm import DeltaEngine, DeltaInit

    model = Model(load_tensors(made / "base"))
    config = SimpleNamespace(model=str(made / "base"), quantization=None)
    if not REAL:
        engine = DeltaEngine(None, SimpleNamespace(model_config=config), torch.device("cpu"), model)
    else:  # its constructor asks for a whole configuration
        engine = DeltaEngine.__new__(DeltaEngine)
        engine.model_config, engine.device, engine.model = config, torch.device("cpu"), model
    engine.init_transfer_engine(DeltaInit(base=str(made / "base"), in_place=in_place))
    return engine, model


class Client:
    """A server's routes, as vLLM's clients call them, with a worker's engine behind."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.calls = engine, list[Any]()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(init_info)

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(weight_version)


def test_a_trainer_sends_versions(vllm: None, made: Path) -> None:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    from deltamerge.apps.serve.vllm_trainer import DeltaTrainerInit

    found = states(3)
    engine, model = served(made, in_place=False)
    client, source = Client(engine), dict[str, torch.Tensor]()

    class Source:
        """Fresh at every round, as vLLM's ModuleSource."""

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source.items())

    info = {"chain": str(made / "run"), "base": str(made / "base")}
    sender = WeightTransferTrainerFactory.trainer_init(DeltaTrainerInit(**info, rank=0), client=client, source=Source())
    other = WeightTransferTrainerFactory.trainer_init(DeltaTrainerInit(**info, rank=1), client=None, source=Source())
    for state in found[1:]:
        source |= state
        other.send_weights()  # gathers, and no more
        sender.send_weights()
        assert same(model.state, state)
    assert client.calls == [{"base": str(made / "base")}, *NAMES[:3]]
    sender.shutdown()
    other.shutdown()
    engine.update_weights({"delta": str(made / "run" / NAMES[0])})  # versions stay
    assert same(model.state, found[1])
    with pytest.raises(InputError, match="no weights to send"):
        WeightTransferTrainerFactory.trainer_init(DeltaTrainerInit(**info, rank=0), client=client)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_worker_whose_write_fails_holds_what_it_held(vllm: None, made: Path, in_place: bool) -> None:
    found = states(3)
    with dm.DeltaWriter(made / "run", base=made / "base") as writer:
        for state in found[1:]:
            writer.write(state)
    if in_place and REAL:
        pytest.skip("vLLM writes patches into modules of its own")
    engine, model = served(made, in_place=in_place)
    versions = [made / "run" / name for name in NAMES[:3]]
    for fails, held in ((1, None), (2, None), (1, 2), (2, 1)):
        engine.update_weights({"delta": None if held is None else str(versions[held])})
        model.fails = fails
        with pytest.raises(RuntimeError, match="no memory"):
            engine.update_weights({"delta": str(versions[0])})
        assert same(model.state, found[0 if held is None else held + 1])
    engine.update_weights({"delta": str(made / "run")})
    assert same(model.state, found[3])


def test_a_worker_that_is_begun_again_writes_every_tensor(vllm: None, made: Path) -> None:
    from deltamerge.apps.serve.vllm import DeltaInit

    found = states(3)
    with dm.DeltaWriter(made / "run", base=made / "base") as writer:
        for state in found[1:]:
            writer.write(state)
    engine, model = served(made, in_place=False)
    engine.update_weights({"delta": str(made / "run" / NAMES[0])})
    engine.init_transfer_engine(DeltaInit(base=str(made / "base")))
    engine.update_weights({"delta": None})
    assert same(model.state, found[0])


def test_a_model_that_drafts_is_updated_by_itself(vllm: None, made: Path) -> None:
    """Its layers lie in the served model's folder, or it has one of its own."""
    from deltamerge.apps.serve.vllm import DeltaInit

    found = states(3)
    with dm.DeltaWriter(made / "run", base=made / "base") as writer:
        for state in found[1:]:
            writer.write(state)
    make_checkpoint(made / "drafts", found[1])
    with dm.DeltaWriter(made / "drafts-run", base=made / "drafts") as writer:
        writer.write(found[3])
    engine, model = served(made, in_place=False)
    assert engine.supports_draft_weight_update
    for folder, run, held, wanted in (
        ("base", "run", found[0], found[2]),
        ("drafts", "drafts-run", found[1], found[3]),
    ):
        draft = Model(held)
        engine.init_transfer_engine(DeltaInit(base=str(made / "base"), in_place=False))
        config = SimpleNamespace(model=str(made / folder), quantization=None)
        engine.set_weight_update_target(draft, config)
        engine.update_weights({"delta": str(made / run / NAMES[1 if folder == "base" else 0])})
        engine.reset_weight_update_target()
        assert same(draft.state, wanted)
        assert same(model.state, found[0])
