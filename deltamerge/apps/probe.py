"""Probe a merged language model beside its parents: a few answers, perplexity on plain text, and its faults.

It is no benchmark. It finds a merge that is broken: empty answers, repetition, a perplexity far above the parents'.
Each model runs as it would in calibration, one after another. Greedy answers; nothing is random.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamerge.apps.search.evaluate import LOSS, ScoredTask, measured, open_model
from deltamerge.calibrate.rows.chats import Chat
from deltamerge.calibrate.rows.files import DataRow, read
from deltamerge.calibrate.rows.heads import POSITIONS, has_head
from deltamerge.calibrate.stage import calibrating
from deltamerge.errors import InputError
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.tokenizer_files import tokenizer_config
from deltamerge.recipe.schema import Calibration
from deltamerge.run.options import choose_device
from deltamerge.tensors.reader import Reader

PROMPTS = (
    "The capital of France is",
    "Question: What is 2 + 3?\nAnswer:",
    "To make a cup of tea, first",
    "Once upon a time there was a",
    "def add(a, b):",
)
TEXTS = (
    "The river rises in the hills to the north, passes three small towns, and reaches the sea near the old harbour.",
    "Water boils at a lower temperature in the mountains, because the air presses on it less than at the coast.",
    "She closed the shop at six, counted the money twice, and walked home through the park as she did every evening.",
    "A library lends books for four weeks. Whoever brings one back late pays a small fee for every day.",
    "The committee met on Tuesday to discuss the budget for the coming year, but it did not reach a decision.",
    "Bees find flowers by colour and scent, and tell the others in the hive where they are by a dance.",
    "If the engine does not start, check first whether the battery is charged and the fuel tap is open.",
    "He had read the letter so often that he knew it by heart, and still he took it out again on the train.",
)
NEW_TOKENS, LENGTH = 40, 256
HIGH = 1.5  # times the largest perplexity of a parent
LOOP, LEAST = 3, 8  # a phrase that often in a row, at the end of an answer of so many words
LONGEST = 12  # words of such a phrase
EXTREME = 700.0  # of a larger loss the exponential is infinite


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """The answers of one model. `perplexity` is per token of the plain texts."""

    model: str
    perplexity: float
    answers: tuple[str, ...]

    @property
    def empty(self) -> int:
        """Return how many answers are empty."""
        return sum(not answer.strip() for answer in self.answers)

    @property
    def loops(self) -> int:
        """Return how many answers end in a phrase again and again."""
        return sum(map(repeats, self.answers))


@dataclass(frozen=True, slots=True)
class Probe:
    """A merge and its parents on the same prompts and texts. `remarks` name the faults of the merge."""

    prompts: tuple[str, ...]
    texts: int
    merge: ProbedModel
    parents: tuple[ProbedModel, ...]

    @property
    def remarks(self) -> list[str]:
        """Return a line for each fault of the merge that its parents do not have."""
        found = []
        worst = max((one.perplexity for one in self.parents), default=math.inf)
        if not math.isfinite(self.merge.perplexity):
            found.append("its perplexity is not finite")
        elif self.merge.perplexity > HIGH * worst:
            found.append(f"perplexity {self.merge.perplexity:.3g}, of its parents at most {worst:.3g}")
        for count, fault in (("empty", "nothing"), ("loops", "a phrase again and again")):
            own, most = getattr(self.merge, count), max((getattr(one, count) for one in self.parents), default=0)
            if own > most:
                asked = len(self.prompts)
                found.append(f"it answers {own} of {asked} prompts with {fault}, its parents at most {most}")
        return found

    def describe(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "prompts": list(self.prompts),
            "texts": self.texts,
            "models": [
                {
                    "model": one.model,
                    "perplexity": one.perplexity if math.isfinite(one.perplexity) else None,
                    "answers": list(one.answers),
                    "empty": one.empty,
                    "loops": one.loops,
                }
                for one in (self.merge, *self.parents)
            ],
            "remarks": self.remarks,
        }


def repeats(answer: str) -> bool:
    """Tell whether an answer ends in one phrase of at most `LONGEST` words, `LOOP` times or more."""
    words = re.findall(r"\w+|[^\w\s]", answer)
    if len(words) < LEAST:
        return False
    for size in range(1, min(LONGEST, len(words) // LOOP) + 1):
        times = max(LOOP, math.ceil(LEAST / 2 / size))
        last = words[-size:]
        if len(words) >= size * times and words[-size * times :] == last * times:
            return True
    return False


def probe(
    merge: str,
    parents: Sequence[str],
    *,
    rows: Path | str | None = None,
    base: str | None = None,
    device: str = "auto",
    pickles: bool = False,
) -> Probe:
    """Return the answers of a merge and its parents, and their perplexities.

        merge, parents   folders or hub ids, base+adapter, adapters and delta artifacts over `base`
        rows             texts, and prompts if rows have them; default: a few texts of this module

    InputError: a model is no language model, or cannot be run.
    """
    references = dict.fromkeys((merge, *parents))
    return probe_models({one: open_model(one, base, pickles=pickles) for one in references}, rows=rows, device=device)


def probe_models(models: Mapping[str, Checkpoint], *, rows: Path | str | None = None, device: str = "auto") -> Probe:
    """Return the same of opened models by name, the merge first."""
    for name, checkpoint in models.items():
        if not has_head(checkpoint.config, "causal-lm"):
            raise InputError(f"{name}: is no language model, which a probe asks", hint="deltamerge eval scores it")
    prompts, texts = _rows(rows)
    chosen = choose_device(device)
    found = []
    with Reader() as reader:
        for name, checkpoint in models.items():
            settings = Calibration.model_validate({"data": "probe", "task": "causal-lm", "length": _room(checkpoint)})
            task = ScoredTask(name, checkpoint, settings, Path(), reader, chosen)
            with calibrating(name, 1, "probing", device=chosen):
                ((score,),) = measured([(task, task.sheet(texts, [LOSS]))], [[task.own]])
                answers = _answers(task, prompts)
            perplexity = math.exp(min(score[LOSS], EXTREME)) if math.isfinite(score[LOSS]) else math.nan
            found.append(ProbedModel(name, perplexity, answers))
    return Probe(tuple(str(row.content) for row in prompts), len(texts), found[0], tuple(found[1:]))


def _room(checkpoint: Checkpoint) -> int:
    """Return the tokens of a text or prompt: `LENGTH`, or fewer where model or tokenizer bear few."""
    rooms = [places - NEW_TOKENS for places in map(checkpoint.config.get, POSITIONS) if isinstance(places, int)]
    if isinstance(longest := tokenizer_config(checkpoint.path).get("model_max_length"), int):
        rooms.append(longest)
    return max(1, min([LENGTH, *rooms]))


def _rows(data: Path | str | None) -> tuple[list[DataRow], list[DataRow]]:
    """Return prompts and texts from `data`, or this module's if it has none."""
    own = [DataRow(text, None, i) for i, text in enumerate(PROMPTS, 1)]
    plain = [DataRow(text, None, i) for i, text in enumerate(TEXTS, 1)]
    if data is None:
        return own, plain
    rows = read(str(data), folder=Path(), limit=100)[:100]
    asked = [row for row in rows if row.completion is not None or isinstance(row.content, Chat)]
    texts = [row for row in rows if row not in asked]
    return [DataRow(row.content, None, row.number) for row in asked[: len(PROMPTS)]] or own, texts or plain


def _answers(task: ScoredTask, prompts: Sequence[DataRow]) -> tuple[str, ...]:
    """Return the model's greedy answers, in the order of the prompts. Prompts of about one length go together."""
    asked = task.reads.prompts([replace(row, label=place) for place, row in enumerate(prompts)])
    assert asked.texts is not None
    made: dict[str, str] = {}
    tokens = task.model.generate(asked.inputs, task.own, new_tokens=NEW_TOKENS)
    for some, places in zip(tokens, asked.texts, strict=True):
        made |= zip(places, task.reads.decode(some), strict=True)
    return tuple(made[str(place)] for place in range(len(prompts)))
