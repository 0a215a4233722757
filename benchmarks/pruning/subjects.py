"""What deltas are measured on: fine-tunes of the small encoder and of SmolLM2, with their rows and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import encoder, smollm2, tasks
from benchmarks.pruning.field import State
from benchmarks.tasks import TASKS, models_folder
from benchmarks.training import adamr
from deltamerge.calibrate.spec import fast_bfloat16

ROWS, MOST_ROWS = 50, 300
# Encoders beside those of the shared data: a small learning rate, and AdamR-L2.
OTHERS: dict[str, dict[str, Any]] = {"sentiment-slow": {"lr": 1e-4}, "sentiment-adamr": {"decay": 0.01}}


class Subject(Protocol):
    """A fine-tune, its base, and what its outputs are compared by."""

    name: str
    base: Path
    tuned: Path
    score: float
    model: Any

    @property
    def rows(self) -> list[dict[str, str]]:
        """MOST_ROWS validation rows, without labels; of a decoder with the fine-tune's own answers."""

    def measure(self, state: State) -> tuple[float, float]:
        """KL and score of weights, by their names in the fine-tune's file."""

    def distance(self, state: State) -> float:
        """KL on half of the rows."""

    def run(self) -> None:
        """The model's outputs on the rows."""


class Encoder:
    """A fine-tune of the small encoder; `count` test rows, computed in bfloat16 where that is fast."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.base, self.tuned = name, models_folder() / "base", folder_of(name)
        self.task = TASKS[name.partition("-")[0]]
        unseen = tasks.rows(self.task.name, "validation")
        self.rows, some = [{"text": row.text} for row in unseen[:MOST_ROWS]], unseen[:ROWS]
        self.tokenizer = AutoTokenizer.from_pretrained(self.tuned)
        self.test, self.some = (self._batches(one) for one in (tasks.rows(self.task.name, "test")[:count], some))
        self.model = encoder.load(self.tuned)
        self.target, self.own = self._outputs(self.test), self._outputs(self.some[:1])
        self.label = np.array([row.label for batch in self.test for row in batch[1]], np.float64)
        self.score = self._score(self.target)

    def measure(self, state: State) -> tuple[float, float]:
        self._load(state)
        found = self._outputs(self.test)
        return self._kl(self.target, found), self._score(found)

    def distance(self, state: State) -> float:
        self._load(state)
        return self._kl(self.own, self._outputs(self.some[:1]))

    def run(self) -> None:
        self._outputs(self.some)

    def _load(self, state: State) -> None:
        self.model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)

    def _batches(self, rows: Sequence[tasks.Row], size: int = 64) -> list[tuple[Any, Sequence[tasks.Row]]]:
        by_length = sorted(rows, key=lambda row: len(row.text))
        parts = [by_length[at : at + size] for at in range(0, len(rows), size)]
        return [(encoder.encode(self.tokenizer, part), part) for part in parts]

    def _kl(self, target: Tensor, found: Tensor) -> float:
        if self.task.labels == 1:
            return float((found - target).square().mean())
        left, right = target.log_softmax(1), found.log_softmax(1)
        return float((left.exp() * (left - right)).sum(1).mean())

    def _outputs(self, batches: Sequence[tuple[Any, Any]]) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16("cpu")):
            return torch.cat([self.model(**batch).logits.float() for batch, _ in batches])

    def _score(self, found: Tensor) -> float:
        best = found[:, 0] if self.task.labels == 1 else found.argmax(1)
        return 100 * encoder.METRICS[self.task.metric](best.double().numpy(), self.label)


def folder_of(name: str) -> Path:
    """The folder of an encoder's fine-tune; those of OTHERS are made on first use."""
    if name not in OTHERS:
        return models_folder() / name
    out, base = tasks.WORK / name, models_folder() / "base"
    if not out.exists():
        options = OTHERS[name]
        if "decay" in options:
            options = {"factory": adamr(base, options["decay"])}
        encoder.fine_tune(base, TASKS[name.partition("-")[0]], out, **options)
    return out


class Decoder:
    """A fine-tune of SmolLM2; `count` test rows, in bfloat16."""

    def __init__(self, name: str, count: int) -> None:
        own = name.partition(":")[2]
        self.name, self.base, self.tuned = name, smollm2.FOLDER / "base", smollm2.FOLDER / own
        self.task = smollm2.EXPERTS[own].task
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.tuned)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.tuned, dtype=torch.bfloat16)
        prompts = [row.text for row in smollm2.rows(self.task, "validation")[:MOST_ROWS]]
        answers = smollm2.answers(self.model, self.tokenizer, prompts, smollm2.NEW_TOKENS[self.task])
        some = [smollm2.Row(text, answer.strip()) for text, answer in zip(prompts, answers, strict=True)]
        end = self.tokenizer.eos_token
        self.rows = [{"prompt": row.text, "completion": f" {row.label}{end}"} for row in some]
        self.some = self._batches(some[:ROWS])
        self.own = [*self._outputs(self.some[:1])]
        self.see(smollm2.rows(self.task, "test")[:count])

    def see(self, rows: Sequence[smollm2.Row]) -> None:
        """Measure on these rows from now on; the model has the fine-tune's weights."""
        self.test = self._batches(rows)
        self.target = [*self._outputs(self.test)]
        self.score = self._score(self.target)

    def measure(self, state: State) -> tuple[float, float]:
        self.model.load_state_dict(state, strict=False)
        found = [*self._outputs(self.test)]
        return self._kl(self.target, found), self._score(found)

    def distance(self, state: State) -> float:
        self.model.load_state_dict(state, strict=False)
        return self._kl(self.own, [*self._outputs(self.some[:1])])

    def run(self) -> None:
        for _ in self._outputs(self.some):
            pass

    def _batches(self, rows: Sequence[smollm2.Row], size: int = 25) -> list[list[smollm2.Example]]:
        some = sorted(smollm2.examples(self.tokenizer, rows), key=lambda one: len(one.ids))
        return [some[at : at + size] for at in range(0, len(some), size)]

    def _kl(self, target: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        total = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(target, found, strict=True))
        return total / sum(len(one) for one in found)

    def _outputs(self, batches: Sequence[Sequence[smollm2.Example]]) -> Iterator[Tensor]:
        for batch in batches:
            ids, places, _ = smollm2.padded(batch)
            with torch.inference_mode():
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                yield self.model.lm_head(hidden[places]).float().log_softmax(-1)

    def _score(self, outputs: Sequence[Tensor]) -> float:
        right = 0
        for batch, found in zip(self.test, outputs, strict=True):
            is_right = found.argmax(-1) == smollm2.padded(batch)[2]
            parts = torch.split(is_right, [example.scored for example in batch])
            right += sum(bool(part.all()) for part in parts)
        return 100 * right / sum(len(batch) for batch in self.test)


def subject(name: str, count: int) -> Subject:
    return Decoder(name, min(count, 100)) if name.startswith("smollm2:") else Encoder(name, count)


def moments(one: Subject) -> dict[str, Tensor]:
    """E[x xᵀ] of the inputs of linear layers on the rows, by the names of weights; the model is the fine-tune."""
    one.model.load_state_dict(load_file(one.tuned / "model.safetensors"), strict=False)
    found: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def hook(name: str) -> Callable[[Any, tuple[Tensor], Any], None]:
        def see(_: Any, inputs: tuple[Tensor], __: Any) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            with torch.autocast("cpu", enabled=False):
                found[name] = found.get(name, 0) + x.T @ x
            counts[name] += len(x)

        return see

    linear = {f"{name}.weight": part for name, part in one.model.named_modules() if isinstance(part, torch.nn.Linear)}
    handles = [part.register_forward_hook(hook(name)) for name, part in linear.items()]
    one.run()
    for handle in handles:
        handle.remove()
    return {name: square / counts[name] for name, square in found.items()}
