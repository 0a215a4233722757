"""Generated arithmetic for a decoder: a corpus to pretrain on, and word problems with worked-out answers.

    corpus     9+7=16;16-5=11                      chains of sums, and stories without a question
    problem    Ann has 9 pears . She buys 7 . She sells 5 . How many pears ?      answer: 9+7=16;16-5=11

The number after the last = is what counts. Everything is a function of the seed. Nothing here uses deltamerge.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ANSWER = r"=(\d+)$"  # of a worked-out answer, as `calibration.answer`
LARGEST, STEP = 20, 9  # of a number, of what is added or taken away
PEOPLE = (("Ann", "She"), ("Ben", "He"), ("Eva", "She"), ("Tom", "He"), ("Zoe", "She"), ("Max", "He"))
THINGS = ("apples", "pears", "books", "coins", "cards", "stones", "shells", "stamps")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("sells", "loses", "gives away", "breaks")
SHAPES = ("{who} has {n} {thing} .", "There are {n} {thing} . {who} takes them .", "{who} starts with {n} {thing} .")
QUESTIONS = ("How many {thing} ?", "How many are left ?", "What does {who} have now ?")
EOS, PAD = "</s>", "<pad>"


class Problem(NamedTuple):
    text: str
    label: str


class _Story(NamedTuple):
    text: str
    chain: str
    who: str
    thing: str


def problems(count: int, seed: int) -> list[Problem]:
    """Word problems of one, two or three steps."""
    rng = random.Random(f"problems {seed}")
    made = []
    for _ in range(count):
        story = _story(rng)
        question = rng.choice(QUESTIONS).format(who=story.who, thing=story.thing)
        made.append(Problem(f"{story.text} {question}", story.chain))
    return made


def corpus(seed: int) -> Iterator[str]:
    """Endless documents: three chains for every story, which has neither a question nor a chain."""
    rng = random.Random(f"corpus {seed}")
    while True:
        for _ in range(3):
            yield _story(rng).chain
        yield _story(rng).text


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A token for each word, sign and number, written to `folder`."""
    templates = " ".join((*SHAPES, *QUESTIONS, *GAINS, *LOSSES, *THINGS)).split()
    words = {word for word in templates if "{" not in word} | {name for pair in PEOPLE for name in pair} | {"."}
    pieces = [PAD, EOS, "▁", *"+-=;", *map(str, range(LARGEST + 1)), *sorted(f"▁{word}" for word in words)]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"\d+|[+\-=;]"), "isolated")]
    )
    made.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, pad_token=PAD, model_max_length=128)
    fast.save_pretrained(folder)
    return fast


def _story(rng: random.Random) -> _Story:
    (who, pronoun), thing = rng.choice(PEOPLE), rng.choice(THINGS)
    value = rng.randint(2, LARGEST)
    sentences, steps = [rng.choice(SHAPES).format(who=who, n=value, thing=thing)], []
    for _ in range(rng.randint(1, 3)):
        gain = rng.random() < 0.5 if 2 < value < LARGEST - 2 else value <= 2
        step = rng.randint(1, min(LARGEST - value if gain else value, STEP))
        result = value + step if gain else value - step
        sentences.append(f"{pronoun} {rng.choice(GAINS if gain else LOSSES)} {step} .")
        steps.append(f"{value}{'+' if gain else '-'}{step}={result}")
        value = result
    return _Story(" ".join(sentences), ";".join(steps), who, thing)
