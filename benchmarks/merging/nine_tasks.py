"""The nine tasks of experts.py on one encoder, and their experts.

The sentences of vaderSentiment (see tasks.py) come from four sources. Each source has a sentiment task (two classes,
ratings near 0 left out) and an intensity task (the rating, from -2 to 2); domain tells the sources apart. A sentence
is in one part only, of whatever tasks have it: what one expert was trained on is no other task's test row.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import encoder, tasks
from benchmarks.tasks import WORK, Row, Task

HOME = WORK / "merging"
SOURCES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
NEUTRAL = 0.3  # a rating at most so far from 0 is neither positive nor negative
VALIDATION, TEST = 300, 700  # sentences of each source
RATE, STEPS = 3e-4, 250
PARTS: tuple[tasks.Part, ...] = ("validation", "test", "train")  # in the order in which they take sentences

TASKS = {
    task.name: task
    for source in SOURCES
    for task in (
        Task(f"sentiment-{source}", 2, "accuracy", RATE),
        Task(f"intensity-{source}", 1, "pearson_spearman", RATE),
    )
} | {"domain": Task("domain", len(SOURCES), "accuracy", RATE)}

# Test rows that nobody looks at before `--final`: named before anything was measured.
KEPT_BACK = ("sentiment-tweets", "intensity-products", "domain")


def rows(task: str, part: tasks.Part, home: Path = HOME) -> list[Row]:
    """One part of a task; all are made on first use."""
    folder = home / "tasks"
    if not folder.exists():
        with tasks.building(folder) as out:
            _write(out)
    return tasks.rows(task, part, folder)


def split(by_source: dict[str, list[tuple[str, float]]]) -> dict[str, dict[tasks.Part, list[Row]]]:
    """Task -> part -> rows, from source -> (sentence, rating); a sentence of two sources stays in the first."""
    made: dict[str, dict[tasks.Part, list[Row]]] = {name: {part: [] for part in PARTS} for name in TASKS}
    seen: set[str] = set()
    for label, (source, rated) in enumerate(by_source.items()):
        unique = [(text, rating) for text, rating in dict(rated).items() if text.lower() not in seen]
        seen |= {text.lower() for text, _ in unique}
        random.Random(label).shuffle(unique)
        ends = (VALIDATION, VALIDATION + TEST, len(unique))
        for part, start, end in zip(PARTS, (0, *ends), ends, strict=False):
            for text, rating in unique[start:end]:
                if abs(rating) >= NEUTRAL:
                    made[f"sentiment-{source}"][part].append(Row(text, int(rating > 0)))
                made[f"intensity-{source}"][part].append(Row(text, rating / 2))
                made["domain"][part].append(Row(text.lower(), label))
    for parts in made.values():
        for some in parts.values():
            random.Random(0).shuffle(some)
    return made


def _write(out: Path) -> None:
    published = tasks.rated_sentences()
    for task, parts in split({name: published[file] for name, file in SOURCES.items()}).items():
        for part, some in parts.items():
            text = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in some)
            (out / f"{task}.{part}.jsonl").write_text(text, encoding="utf-8")


def headless(base: Path, out: Path) -> Path:
    """A copy of the base without its pooler, which is not trained (it means its tokens): each expert makes it its own.

    A merge with this base takes an expert's pooler for its head's, as it is scored: coefficients are fitted with it.
    """
    if not out.exists():
        with tasks.building(out) as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True)
            tensors = load_file(base / "model.safetensors")
            kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return out


def expert(task: str, home: Path = HOME, *, base: Path = WORK / "base", rate: float = RATE, steps: int = STEPS) -> Path:
    """The folder of the task's fine-tune with its head, trained on first use: a minute or two of one core."""
    out = home / "experts" / f"{task}-{rate:g}-{steps}"
    if not out.exists():
        rows(task, "train", home)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # half the time; weights are float32
            encoder.fine_tune(base, TASKS[task], out, lr=rate, steps=steps, rows=home / "tasks")
    return out
