"""Where the experts and rows of experts.py are, what a run costs, and what a merged encoder scores."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks import encoder, process, tasks
from benchmarks.merging import nine_tasks
from benchmarks.merging.nine_tasks import TASKS
from benchmarks.tasks import Part, Row
from deltamerge.api import load_recipe

CHOICE_ROWS, TEST_ROWS = 150, 300  # of each source
HEAD = ("bert.pooler.dense", "classifier")  # of an expert; its own where merges are fitted and where they are scored


Weights = dict[str, Tensor]
Outputs = dict[str, list[float]]  # task -> what is predicted, by row
Runner = Callable[[Path, Path], process.Run]  # a recipe, and the folder of its result


def here(recipe: Path, out: Path) -> process.Run:
    """A run on one thread of this process, which is cheaper than one that has torch to import: what it adds to both."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else what was let go of before would be used again, and not seen
    before, ended, peaks = process.memory(os.getpid()), threading.Event(), [0, 0]

    def sample() -> None:
        while not ended.wait(0.01):
            peaks[:] = map(max, peaks, process.memory(os.getpid()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        load_recipe(recipe, workers=1).run(out)
    finally:
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        ended.set()
        sampler.join()
    added = [max(0, peak - at) * 1024 / 1e6 for peak, at in zip(peaks, before, strict=True)]
    return process.Run(wall, cpu, *added)


@dataclass(frozen=True)
class Setting:
    """Where base, experts and rows are, how many rows of a source are used, and how a recipe is run."""

    base: Path
    experts: Mapping[str, Path]
    home: Path
    choice_rows: int = CHOICE_ROWS
    test_rows: int = TEST_ROWS
    run: Runner = here

    def rows(self, task: str, part: Part) -> list[Row]:
        """Of validation those that choose; those after them calibrate."""
        most = self.choice_rows if part == "validation" else self.test_rows
        return nine_tasks.rows(task, part, self.home)[: most * (len(nine_tasks.SOURCES) if task == "domain" else 1)]

    def calibration(self) -> Path:
        """A folder of TASK.jsonl, texts alone, and of all.jsonl, a row of each task in turn."""
        folder = self.home / f"calibration-{self.choice_rows}"
        if not folder.exists():
            texts = {}
            for task in self.experts:
                first = len(self.rows(task, "validation"))
                texts[task] = [
                    json.dumps({"text": r.text}) for r in nine_tasks.rows(task, "validation", self.home)[first:]
                ]
            texts["all"] = [text for some in zip_longest(*texts.values()) for text in some if text]
            with tasks.building(folder) as out:
                for name, lines in texts.items():
                    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def key(self, *of: Any) -> str:
        """A name for what is kept: of what is measured, of the experts and of the rows."""
        made = [of, [path.name for path in self.experts.values()], self.choice_rows, self.test_rows]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


class Judge:
    """What an encoder with the experts' heads predicts; a sentence that several tasks share is read once."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.model = setting, AutoModel.from_pretrained(setting.base, add_pooling_layer=False)
        self.model.float().train(False)
        self.tokenizer = AutoTokenizer.from_pretrained(setting.base)
        self.heads = {}
        for task, path in setting.experts.items():
            expert = load_file(path / "model.safetensors")
            self.heads[task] = [expert[f"{of}.{name}"].float() for of in HEAD for name in ("weight", "bias")]
        self.own = {part: self._own(part) for part in ("validation", "test")}

    def _own(self, part: Part) -> Outputs:
        """What each expert predicts on its own task's rows; of the tasks kept back too, which nothing is chosen by."""
        path = self.setting.home / "cells" / f"own-{part}-{self.setting.key()}.json"
        if not path.exists():
            found = {}
            for task, folder in self.setting.experts.items():
                found |= self.outputs(encoder_of(folder), part, [task])
            write(path, found)
        kept: Outputs = json.loads(path.read_text(encoding="utf-8"))
        return kept

    def outputs(self, weights: Weights, part: Part, tasks: Iterable[str]) -> Outputs:
        rows = {task: self.setting.rows(task, part) for task in tasks}
        ids = {task: self._ids(of) for task, of in rows.items()}
        unique = sorted({one for some in ids.values() for one in some}, key=lambda one: (len(one), one))
        number = {one: i for i, one in enumerate(unique)}
        self.model.load_state_dict(weights)
        first_ND = torch.cat([self._first(unique[i : i + 64]) for i in range(0, len(unique), 64)])
        found = {}
        for task, some in ids.items():
            pool_DD, pool_D, weight_LD, bias_L = self.heads[task]
            pooled_ND = torch.tanh(first_ND[[number[one] for one in some]] @ pool_DD.T + pool_D)
            logits_NL = pooled_ND @ weight_LD.T + bias_L
            picked = logits_NL[:, 0] if TASKS[task].labels == 1 else logits_NL.argmax(dim=1)
            found[task] = [round(x, 5) for x in picked.tolist()]
        return found

    def _ids(self, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        texts = [row.text for row in rows]
        return [tuple(some) for some in self.tokenizer(texts, truncation=True, max_length=encoder.TOKENS)["input_ids"]]

    def _first(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        padded = self.tokenizer.pad({"input_ids": [list(one) for one in batch]}, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            first: Tensor = self.model(**padded).last_hidden_state[:, 0]
        return first.float()

    def shares(self, outputs: Outputs, part: Part, draw: np.random.Generator | None = None) -> dict[str, float]:
        """Scores in % of the expert's own, on the same rows: all, or as many drawn with replacement."""
        found = {}
        for task, predicted in outputs.items():
            label_N = np.array([row.label for row in self.setting.rows(task, part)])
            n = len(label_N)
            chosen = np.arange(n) if draw is None else draw.integers(0, n, n)
            metric = encoder.METRICS[TASKS[task].metric]
            ours, own = (metric(np.array(x)[chosen], label_N[chosen]) for x in (predicted, self.own[part][task]))
            found[task] = 100 * ours / own
        return found

    def spread(self, outputs: Outputs, times: int = 100) -> NDArray[np.float64]:
        """Standard deviations over draws of the test rows: of the mean share, and of the least."""
        draw = np.random.default_rng(0)
        drawn = [list(self.shares(outputs, "test", draw).values()) for _ in range(times)]
        return np.array([(np.mean(some), min(some)) for some in drawn]).std(axis=0)


def encoder_of(folder: Path) -> Weights:
    """The encoder's tensors under its own names, in float32, without the head."""
    tensors = load_file(folder / "model.safetensors")
    heads = (*HEAD, "pooler.dense")
    return {name.removeprefix("bert."): t.float() for name, t in tensors.items() if not name.startswith(heads)}


def write(path: Path, made: Any) -> None:
    """JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
