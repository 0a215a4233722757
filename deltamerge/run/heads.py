"""What transformers' names of heads say: the hub's task, and the class that loads the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Head(NamedTuple):
    """A head: the task as the hub calls it, and the class of transformers that loads it; None: the model's own."""

    task: str
    loader: str | None


# By the end of an architecture's name.
HEADS = {
    "ForCausalLM": Head("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": Head("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": Head("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": Head("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": Head("question-answering", "AutoModelForQuestionAnswering"),
    "ForMaskedLM": Head("fill-mask", "AutoModelForMaskedLM"),
    "ForImageClassification": Head("image-classification", "AutoModelForImageClassification"),
    "ForImageTextToText": Head("image-text-to-text", None),
    "ForSpeechSeq2Seq": Head("automatic-speech-recognition", None),
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that config.json names; "" if it names none."""
    return str((config.get("architectures") or [""])[0])


def head_of(config: Mapping[str, Any]) -> Head | None:
    """The head of a model, told by its class; None where the class does not say."""
    architecture = architecture_of(config)
    return next((head for ending, head in HEADS.items() if architecture.endswith(ending)), None)
