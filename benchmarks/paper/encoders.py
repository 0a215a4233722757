"""The small encoder of the text experiments: its fine-tunes, and what one scores once it is pruned."""

from __future__ import annotations

import json
import random
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BertConfig, BertModel

from benchmarks import encoder, tasks
from benchmarks.paper.frame import NotKept, Setting
from benchmarks.pruning import quality
from benchmarks.pruning.quality import Method
from benchmarks.tasks import TASKS, Part, Row
from benchmarks.training import adamr, adamw

# AdamW, and AdamR with the λ that docs/howto/adamr.md found on one of the tasks.
TRAINERS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "AdamR-L2": {"regularizer": "l2", "decay": 0.01},
    "AdamR-L1": {"regularizer": "l1", "decay": 3e-5},
}


def fine_tune(setting: Setting, task: str, trainer: str = "AdamW", **options: Any) -> Path:
    """A checkpoint of the base fine-tuned on a task; `options` are `lr`, and AdamR's in place of the trainer's."""
    lr = options.pop("lr", TASKS[task].lr)
    decay = {**(TRAINERS[trainer] or {}), **options}
    steps = setting.pick(160, 3)
    train = partial(
        encoder.fine_tune,
        base(setting),
        TASKS[task],
        lr=lr,
        steps=steps,
        seed=setting.seed,
        rows=rows_folder(setting),
        factory=adamr(base(setting), **decay) if decay else adamw,
    )
    return setting.folder(f"{task}-{trainer}", {"steps": steps, "lr": lr, "adamr": decay}, train)


METHODS = {method.name: method for method in quality.METHODS}
METHODS["random drop"] = Method("random drop", {"method": "dare", "q": 1.0}, True)


def cell(
    setting: Setting, task: str, trainer: str, method: Method, density: float, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """What `quality.cell` finds of one pruned fine-tune: its score in %, q, passes, seconds; kept."""
    tuned = fine_tune(setting, task, trainer, **options)
    made_of = {"tuned": tuned.name, "prune": method.prune, "density": density, "mask": seed}

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=setting.work) as work:
            where = quality_setting(setting, task, tuned, Path(work))
            return quality.cell(where, task, method, density, setting.seed + seed)

    return setting.once(f"{task}-{trainer}", made_of, measure)


def prune(setting: Setting, task: str, tuned: Path, method: Method, density: float, work: Path) -> Path:
    """The checkpoint, in `work`, that the first mask of a method leaves of a fine-tune, in float32."""
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.runner import run

    spec = quality.recipe(quality_setting(setting, task, tuned, work), task, method, density, setting.seed)
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(spec | {"dtype": "float32"}), encoding="utf-8")
    return run(read_recipe(path), work / "pruned", Options(workers=1, device="cpu")).folder


def quality_setting(setting: Setting, task: str, tuned: Path, work: Path) -> quality.Setting:
    """How much of the rows calibration and scoring use."""
    return quality.Setting(
        {"base": base(setting), task: tuned},
        rows_folder(setting),
        work,
        test_rows=len(rows(setting, task, "test")),
        sequences=setting.pick(100, 8),
        length=32,
        mask_seeds=setting.pick(2, 1),
    )


def cells(
    setting: Setting, task: str, trainer: str, method: Method, density: float, **options: Any
) -> list[dict[str, Any]]:
    """A cell for every mask that is drawn: two of a random method that is not calibrated, else one; none not kept."""
    masks = 2 if method.random and isinstance(method.prune.get("q", 1.0), float) and not setting.toy else 1
    found = []
    with suppress(NotKept):
        found += [cell(setting, task, trainer, method, density, seed, **options) for seed in range(masks)]
    return found


def scores_of(found: list[dict[str, Any]]) -> list[float]:
    return [each["score"] for each in found]


def unpruned(setting: Setting, task: str, trainer: str = "AdamW", **options: Any) -> float:
    """The score of a fine-tune as it is."""
    tuned = fine_tune(setting, task, trainer, **options)
    test = rows(setting, task, "test")
    made_of = {"tuned": tuned.name}
    return setting.once(f"{task}-{trainer}-whole", made_of, lambda: round(encoder.score(tuned, TASKS[task], test), 2))


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
    """Rows that are scored: the first 400 of the test part, 300 of another."""
    count = setting.pick(400 if part == "test" else 300, 12)
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
