"""The small encoder of the text experiments: its fine-tunes, and what one scores once it is pruned."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import encoder
import quality
import tasks
import torch
from quality import Method
from tasks import TASKS, Part, Row
from transformers import BertConfig, BertModel, PreTrainedModel

from deltamerge.optim import AdamR
from paper.frame import Setting

# AdamW, and AdamR with the λ that docs/adamr.md found on one of the tasks.
TRAINERS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "AdamR-L2": {"regularizer": "l2", "decay": 0.01},
    "AdamR-L1": {"regularizer": "l1", "decay": 3e-5},
}


def fine_tune(setting: Setting, task: str, trainer: str = "AdamW", **options: Any) -> Path:
    """A checkpoint of the base fine-tuned on a task; `options` are AdamR's, in place of the trainer's."""
    base_folder = base(setting)
    decay = {**(TRAINERS[trainer] or {}), **options}
    steps = setting.pick(300, 3)

    def factory(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
        return AdamR.for_model(model, base_folder, lr=lr, **decay)

    train = partial(
        encoder.fine_tune,
        base_folder,
        TASKS[task],
        steps=steps,
        seed=setting.seed,
        rows=rows_folder(setting),
        optimizer_factory=factory if decay else None,
    )
    return setting.folder(f"{task}-{trainer}", {"steps": steps, "lr": TASKS[task].lr, "adamr": decay}, train)


def base(setting: Setting) -> Path:
    """The pretrained model: three layers of MiniLM; at toy scale random weights."""
    if setting.toy:
        return setting.folder("base", {}, _toy_base)
    folder = tasks.WORK / "base"
    if not folder.exists():
        encoder.build_base(folder)
    return folder


def rows_folder(setting: Setting) -> Path:
    if setting.toy:
        return setting.folder("rows", {}, _toy_rows)
    tasks.rows("sentiment", "test")  # makes them if they are not there
    return tasks.ROWS


def rows(setting: Setting, task: str, part: Part) -> list[Row]:
    """Rows that are scored: the first 500 of the test part, 300 of another."""
    count = setting.pick(500 if part == "test" else 300, 12)
    return tasks.rows(task, part, rows_folder(setting))[:count]


_TOY_WORDS = [f"word{i}" for i in range(40)]


def _toy_base(out: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_TOY_WORDS]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(pieces),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=48,
        )
        BertModel(config).bfloat16().save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(out)


def _toy_rows(out: Path) -> None:
    out.mkdir(parents=True)
    generator = random.Random(0)
    for task in TASKS.values():
        for part in ("train", "validation", "test"):
            lines = []
            for _ in range(64):
                text = " ".join(generator.choices(_TOY_WORDS, k=generator.randint(3, 9)))
                label = len(text) % 17 / 8 if task.labels == 1 else len(text) % task.labels
                lines.append(json.dumps({"text": text, "label": label}) + "\n")
            (out / f"{task.name}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")
