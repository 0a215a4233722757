"""Chains that a training run writes: float32 masters, restarts, failures in the background, transformers' Trainer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_llama
from test_chain import same

import deltamerge as dm
from deltamerge.errors import InputError, OutputError
from deltamerge.models.chain.folder import line
from deltamerge.models.delta_file import bits_of
from deltamerge.models.delta_over_base import folded
from deltamerge.models.references import open_model
from deltamerge.tensors.reader import Reader


class Small(torch.nn.Module):
    """Weights, a tied head, a counter and a buffer that is not saved."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed = torch.nn.Parameter(torch.randn(40, 16, generator=generator).to(dtype))
        self.head = self.embed
        self.norm = torch.nn.Parameter(torch.randn(16, generator=generator).to(dtype))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)


def saved(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds, by torch's own cast."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "head"}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def step(model: Small, seed: int, size: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed += size * torch.randn(model.embed.shape, generator=generator)
        model.norm[::3] *= 1 + size
        model.norm[seed] = float("nan") if seed % 2 else -0.0
        model.count += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masters_are_written_as_the_base_and_runs_go_on(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Small(torch.float32)
    make_checkpoint(tmp_path / "base", saved(model, dtype))
    chain, states = tmp_path / "chain", []
    with dm.DeltaWriter(chain, model, base=tmp_path / "base") as writer:
        for number in range(1, 4):
            step(model, number)
            writer.write(step=10 * number)
            states.append(saved(model, dtype))
        with pytest.raises(OutputError, match="another process is adding versions"):
            dm.DeltaWriter(chain, model, base=tmp_path / "base")
    model = Small(torch.float32)  # the run begins again, from an earlier step
    step(model, 1)
    with dm.DeltaWriter(chain, model) as writer:  # the chain knows its base
        assert writer.last == "000030"
        done = writer.write(step=11).result()
        assert done.path.name == "000031"
        assert 0 < done.changed <= done.elements
        states.append(saved(model, dtype))
        assert writer.write().result().changed == 0  # nothing changed, and yet a version
        states.append(states[-1])
    found = list(dm.follow(chain, timeout=0))
    assert [(one.name, one.step) for one in found] == [
        ("000010", 10), ("000020", 20), ("000030", 30), ("000031", 11), ("000032", None),
    ]  # fmt: skip
    state = load_tensors(tmp_path / "base")
    for one, wanted in zip(found, states, strict=True):
        one.apply_(state)
        assert same(state, wanted)


def test_tensors_of_several_tiles(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    now = {"w": torch.randn(1051, 1009, generator=generator).bfloat16(), "f": torch.randn(1 << 20, generator=generator)}
    make_checkpoint(tmp_path / "base", now)
    with dm.DeltaWriter(tmp_path / "chain", base=tmp_path / "base") as writer:
        for number in range(1, 4):
            now = {name: tensor.clone() for name, tensor in now.items()}
            now["w"].view(-1)[number :: 97 * number] *= 1.01
            if number != 2:
                now["f"][number::333] += 1
            writer.write(now)
    make_checkpoint(tmp_path / "tuned", now)
    state = load_tensors(tmp_path / "base")
    assert dm.load_delta(tmp_path / "chain").apply_(state) == 3
    assert same(state, now)
    base = str(tmp_path / "base")
    bits = bits_of(load_tensors(tmp_path / "base")["w"])
    for tile in (1 << 20, 1000, (1 << 20) + 1):  # as --memory has it
        delta = folded(line(tmp_path / "chain" / "000003"), every=tile == 1000)
        made = np.concatenate(list(delta.entries["w"].tiles(lambda a, b: bits[a:b], tile=tile)))
        assert np.array_equal(made, bits_of(now["w"]))
    with Reader() as reader:  # any range, from any thread
        info = open_model(f"{base}+{tmp_path}/chain", tmp_path, weights=True).tensors["w"]
        for start, stop in ((0, 5), ((1 << 20) - 3, (1 << 20) + 9), (1000, 1051 * 1009)):
            out = np.empty(stop - start, np.uint16)
            reader.read_into(info, start, out)
            assert np.array_equal(out, bits_of(now["w"])[start:stop])


def test_what_cannot_be_written_is_said_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(torch.bfloat16)
    make_checkpoint(tmp_path / "base", saved(model, torch.bfloat16))
    chain = tmp_path / "chain"
    with pytest.raises(InputError, match="no version yet, and no base"):
        dm.DeltaWriter(chain, model)
    writer = dm.DeltaWriter(chain, model, base=tmp_path / "base")
    state = dict(model.state_dict())
    for change, said in {
        "missing": ({"norm": None}, "the model has no norm"),
        "shape": ({"norm": torch.ones(3)}, r"norm is \[3\], in the base \[16\]"),
        "kind": ({"norm": torch.ones(16, dtype=torch.int64)}, "norm is I64, in the base BF16"),
        "more": ({"new": torch.ones(3)}, "the base has no new"),
    }.values():
        with pytest.raises(InputError, match=said):
            writer.write({name: tensor for name, tensor in (state | change).items() if tensor is not None})
    from deltamerge.apps.train import trainer

    real, begun, go = trainer.ArtifactWriter, threading.Event(), threading.Event()

    class Full(real):  # type: ignore[misc, valid-type]
        def finish(self) -> Any:
            begun.set()
            go.wait(5)
            raise OutputError("no space left on the device")

    monkeypatch.setattr(trainer, "ArtifactWriter", Full)
    step(model, 1)
    first = writer.write()
    begun.wait(5)
    assert not first.done()  # in the background
    go.set()
    monkeypatch.setattr(trainer, "ArtifactWriter", real)
    with pytest.raises(OutputError, match="no space"):
        writer.write()
    step(model, 2)
    writer.write()
    writer.close()
    state = load_tensors(tmp_path / "base")
    dm.load_delta(chain).apply_(state)
    assert same(state, saved(model, torch.bfloat16))
    assert [path.name for path in chain.iterdir() if path.is_dir()] == ["000001"]


@pytest.mark.slow
def test_a_trainer_writes_versions(tmp_path: Path) -> None:
    import transformers
    from conftest import LLAMA

    config = transformers.LlamaConfig(
        **{k: v for k, v in LLAMA.items() if k != "architectures"}, vocab_size=64, num_hidden_layers=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-4,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        callback = dm.DeltaCallback(tmp_path / "chain", every=2)
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    found = list(dm.follow(tmp_path / "chain", timeout=0))
    assert [(one.name, one.step) for one in found] == [("000002", 2), ("000003", 3)]
    served = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert dm.load_delta(tmp_path / "chain").apply_(served.state_dict()) == 2
    trained = model.bfloat16().state_dict()
    assert same({**served.state_dict()}, {**trained})
    with pytest.raises(dm.DeltamergeError, match="every=0"):
        dm.DeltaCallback(tmp_path / "chain", every=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what they use
@pytest.mark.parametrize("how", ["sft", "grpo"])
def test_trls_own_trainers_write_versions(tmp_path: Path, how: str) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tiny_llama(tmp_path / "base", seed=0, tokenizer=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    words = [" ".join(f"w{4 + (7 * row + at) % 90}" for at in range(6)) for row in range(8)]
    rows = datasets.Dataset.from_dict({"text" if how == "sft" else "prompt": words})
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    more: dict[str, Any] = {
        "train_dataset": rows,
        "processing_class": transformers.AutoTokenizer.from_pretrained(tmp_path / "base"),
        "callbacks": [dm.DeltaCallback(tmp_path / "run", base=tmp_path / "base")],
    }
    if how == "sft":
        trainer = trl.SFTTrainer(model=model, args=trl.SFTConfig(max_length=16, **given), **more)
    else:
        config = trl.GRPOConfig(num_generations=4, max_completion_length=6, **given)
        rewards = lambda completions, **_: [float(len({*one})) for one in completions]  # noqa: E731
        trainer = trl.GRPOTrainer(model=model, args=config, reward_funcs=rewards, **more)
    trainer.train()
    assert [(one.name, one.step) for one in dm.follow(tmp_path / "run", timeout=0)] == [("000001", 1), ("000002", 2)]
    state = load_tensors(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in state.items()}
    dm.load_delta(tmp_path / "run").apply_(state)
    trained = {name: tensor.detach().bfloat16() for name, tensor in trainer.model.state_dict().items() if name in state}
    assert same(state, trained)
    assert not same(state, before)
