"""Calibration rows as batches for a model: tokenised and padded texts, or processed pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamerge.calibrate.model.passes import COMPARED
from deltamerge.calibrate.model.transformers_code import has_decoder_inputs, reason, running
from deltamerge.calibrate.rows.chats import Chat, as_texts
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.calibrate.rows.heads import POSITIONS, check_length, class_labels
from deltamerge.errors import InputError

RESERVED = re.compile(r"\[.*\]|<.*>")  # a token that no text has, whether the tokenizer calls it special or not


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of rows.

    inputs   of batch b: arguments of the model's forward
    labels   of batch b: class indices, floats or token ids (−100: not scored)
    texts    of batch b: the reference answers of text generation
    """

    inputs: list[dict[str, Tensor]]
    labels: list[Tensor] | None
    texts: list[list[str]] | None = None

    def with_more(self, other: Batches) -> Batches:
        """Return these batches followed by the batches of `other`."""
        labels = None if self.labels is None or other.labels is None else self.labels + other.labels
        return Batches(self.inputs + other.inputs, labels)


class RowReader:
    """Turns rows into batches with the tokenizer or image processor in `folder` (never remote code).

    Sequences have `length` tokens at most, and are padded to the longest of their batch.

    InputError: no tokenizer, no pad token (decoders use their end-of-sequence token), or a `length` that is too large.
    """

    def __init__(self, folder: Path, config: Any, *, task: str, length: int) -> None:
        self.config, self.task, self.length = config, task, length
        self.decoder = has_decoder_inputs(config.to_dict())
        self.tokenizer: Any = None
        self.processor: Any = None
        if task == "image-classification":
            self.processor = _processor(folder)
        else:
            self.tokenizer = tokenizer_of(folder)
            check_length(length, min([self.tokenizer.model_max_length, *_positions(config)]))

    @property
    def pad_token_id(self) -> int | None:
        """Return the id that pads sequences; None for pictures."""
        return None if self.tokenizer is None else self.tokenizer.pad_token_id

    @cached_property
    def special(self) -> Tensor:
        """Return the ids of special and added tokens (int64); none for pictures."""
        tokenizer = self.tokenizer
        ids = set() if tokenizer is None else {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        return torch.tensor(sorted(ids), dtype=torch.int64)

    @cached_property
    def words(self) -> Tensor:
        """Return the ids of tokens that texts have (int64), so none that is special, added or reserved; none for
        pictures."""
        if self.tokenizer is None:
            return self.special
        known = self.config.get_text_config().vocab_size
        found = {i for token, i in self.tokenizer.get_vocab().items() if i < known and not RESERVED.fullmatch(token)}
        return torch.tensor(sorted(found - {*self.special.tolist()}), dtype=torch.int64)

    def batches(self, rows: Sequence[DataRow], *, size: int = 32, labelled: bool = False) -> Batches:
        """Return batches of `size` rows; with `labelled`, labels in the form of the head. InputError: they do not fit
        it.

        Texts are batched by length, so that there is little padding. text-generation: a row's label is the answer that
        follows its text, and part of the sequence.
        """
        if self.processor is not None:
            groups = _groups(rows, size)
            inputs = [self._pictures([_picture(row) for row in group]) for group in groups]
        else:
            groups = _groups(self._by_length([self._written(row) for row in rows]), size)
            inputs = [self._inputs(group) for group in groups]
        return Batches(inputs, self._labels(groups, inputs) if labelled else None)

    def check(self, rows: Sequence[DataRow]) -> None:
        """Raise InputError for texts that make no batch; pictures are not opened."""
        if self.tokenizer is not None:
            self.batches(rows)

    def steps(self, rows: Sequence[DataRow], *, step: int = 64, size: int = 16) -> tuple[Batches, list[list[int]]]:
        """Return batches to learn on, and the batch indices of each step: of `step` rows at most, all of about as
        many."""
        even = math.ceil(len(rows) / max(1, math.ceil(len(rows) / step))) or step
        parts = [self.batches(group, size=size).inputs for group in _groups(rows, even)]
        starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
        indices = [list(range(start, start + len(part))) for start, part in zip(starts, parts, strict=True)]
        return Batches([batch for part in parts for batch in part], None), indices

    def prompts(self, rows: Sequence[DataRow], *, size: int = 32) -> Batches:
        """Return left-padded prompts for generation, with the labels as reference answers."""
        groups = _groups(self._by_length([self._written(row, asks=True) for row in rows]), size)
        inputs = [self._encode([row.content for row in group], side="left") for group in groups]
        return Batches(inputs, None, [[str(row.label) for row in group] for group in groups])

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of generated tokens (B, T)."""
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def _written(self, row: DataRow, *, asks: bool = False) -> DataRow:
        """Return the row with its chat as a text. With `asks` the text ends where an answer begins."""
        if not isinstance(row.content, Chat):
            return row
        prompt, answer = as_texts(row.number, row.content, row.completion, self.tokenizer, asks=asks)
        return replace(row, content=prompt, completion=answer)

    def _content(self, row: DataRow) -> Any:
        if not isinstance(row.content, str | tuple):
            kind = "a picture" if isinstance(row.content, Path) else type(row.content).__name__
            hint = "see calibration.text and task"
            raise InputError(f"row {row.number}: {kind}, but texts are needed", hint=hint)
        if not isinstance(row.content, str):
            return row.content
        if row.completion is not None:
            return (row.content, row.completion) if self.decoder else row.content + row.completion
        answered = self.task == "text-generation" and row.label is not None
        if self.decoder:
            return row.content, str(row.label) if answered else row.content
        return f"{row.content} {row.label}" if answered else row.content

    def _pictures(self, images: Sequence[Any]) -> dict[str, Tensor]:
        with running("its image processor cannot take the pictures"):
            return dict(self.processor(images=images, return_tensors="pt"))

    def _by_length(self, rows: Sequence[DataRow]) -> list[DataRow]:
        contents = [self._content(row) for row in rows]
        first = [content[0] for content in contents] if self.decoder else contents
        tokens = self._tokenise(first)["input_ids"]
        return [rows[i] for i in sorted(range(len(rows)), key=lambda i: len(tokens[i]))]

    def _inputs(self, rows: Sequence[DataRow]) -> dict[str, Tensor]:
        """Return the inputs of a forward, and which logits are compared where a row is a prompt and its completion."""
        encoded = self._encode([self._content(row) for row in rows])
        if self.decoder or all(row.completion is None for row in rows):
            return encoded
        compared = encoded["attention_mask"].bool()
        for i, row in enumerate(rows):
            if row.completion is not None:
                end = int(compared[i].sum())
                start = self._said_from(row, encoded["input_ids"][i, :end].tolist())
                compared[i, : start - 1] = compared[i, end - 1] = False
        return encoded | {COMPARED: compared}

    def _said_from(self, row: DataRow, ids: list[int]) -> int:
        """Return where the completion begins among a row's ids: at the first id that the prompt alone does not have."""
        alone = self._tokenise([row.content])["input_ids"][0] if row.content else []
        start = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
        if max(1, start) >= len(ids):
            hint = "raise calibration.length, or take the row out"
            raise InputError(f"row {row.number}: its {len(ids)} tokens hold nothing of its completion", hint=hint)
        return max(1, start)

    def _encode(self, contents: Sequence[Any], side: str = "right") -> dict[str, Tensor]:
        """Return the inputs of a forward. For an encoder-decoder they include `decoder_input_ids`, the target text."""
        if self.decoder and isinstance(contents[0], tuple):
            sources, targets = ([content[i] for content in contents] for i in (0, 1))
            encoded, said = self._padded(sources, side), self._padded(targets, side)
            return encoded | {"decoder_input_ids": said["input_ids"], "decoder_attention_mask": said["attention_mask"]}
        return self._padded(contents, side)

    def _padded(self, contents: Sequence[Any], side: str) -> dict[str, Tensor]:
        encoded = dict(self._tokenise(contents, padding=True, padding_side=side, return_tensors="pt"))
        if not encoded["input_ids"].numel():
            raise InputError(f"{len(contents)} rows make no token", hint="take empty texts out of the calibration data")
        return encoded

    def _tokenise(self, contents: Sequence[Any], **options: Any) -> Any:
        pairs = isinstance(contents[0], tuple)
        columns = [list(column) for column in zip(*contents, strict=True)] if pairs else [list(contents)]
        with running("its tokenizer cannot take the texts"):
            return self.tokenizer(*columns, truncation=True, max_length=self.length, **options)

    def _labels(self, groups: Sequence[Sequence[DataRow]], inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        if self.task in ("causal-lm", "text-generation"):
            return [said(b) for b in inputs]
        settings = self.config.to_dict() | {"num_labels": self.config.num_labels}
        return [torch.tensor(class_labels(group, settings)) for group in groups]


def said(batch: dict[str, Tensor]) -> Tensor:
    """Return (B, T) a language model's target tokens: place t + 1 scores the logits of place t; −100 scores none."""
    if "decoder_input_ids" not in batch:
        scored = batch["attention_mask"].bool()
        if COMPARED in batch:  # by the place before it
            scored = scored & torch.nn.functional.pad(batch[COMPARED][:, :-1], (1, 0))
        return batch["input_ids"].masked_fill(~scored, -100)
    said = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, -100)
    return torch.nn.functional.pad(said[:, :-1], (1, 0), value=-100)  # the decoder's inputs are shifted


def _groups(rows: Sequence[DataRow], size: int) -> list[Sequence[DataRow]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def config_of(folder: Path) -> Any:
    """Return a model's configuration. InputError: transformers cannot read it."""
    from transformers import AutoConfig

    with running("transformers cannot read its config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer in a folder, with a pad token. InputError: there is no usable tokenizer."""
    from transformers import AutoTokenizer

    with running(f"{folder}: no usable tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if (
        not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    ):  # transformers would make a tokenizer from nothing
        raise InputError(f"{folder}: no usable tokenizer: its vocabulary is empty", hint="put tokenizer.json there")
    if tokenizer.pad_token is None:
        encoder = tokenizer.mask_token is not None or tokenizer.cls_token is not None
        if tokenizer.eos_token is None or encoder:
            raise InputError(f"{folder}: the tokenizer has no pad token", hint="set pad_token in tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained
    with running(f"{folder}: no usable image processor"):
        try:
            return load(folder, local_files_only=True, trust_remote_code=False)
        except ImportError as error:  # transformers before 5.18 requires torchvision
            hint = "pip install torchvision pillow"
            raise InputError(f"{folder}: no usable image processor: {reason(error)}", hint=hint) from None


def _picture(row: DataRow) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError  # type: ignore[import-not-found,unused-ignore]  # optional
    except ImportError:
        raise InputError("reading pictures needs Pillow", hint="pip install pillow") from None
    if isinstance(row.content, str | tuple):
        raise InputError(f"row {row.number}: a text, but pictures are needed", hint="see calibration.text and task")
    if not isinstance(row.content, Path):
        return row.content.convert("RGB")
    try:
        with Image.open(row.content) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise InputError(f"row {row.number}: {row.content} is no readable picture") from None


def check_new_tokens(length: int, new_tokens: int, config: Any) -> None:
    """Raise InputError unless prompt and answer together fit the model's positions."""
    limit = min(_positions(config), default=length + new_tokens)
    if length + new_tokens > limit:
        raise InputError(
            f"{length} tokens and {new_tokens} new tokens, but the model has {limit} positions",
            hint="lower calibration.length or calibration.new_tokens",
        )


def _positions(config: Any) -> list[int]:
    found = [getattr(config, key, None) for key in POSITIONS]
    return [p for p in found if isinstance(p, int) and p > 0]
