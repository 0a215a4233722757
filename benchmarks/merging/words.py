"""What merges keep of encoders' experts, at the λ of a rule that was chosen on other experts than are reported.

    python -m benchmarks.merging.words choose        four experts: sentiment and intensity (shared/data), two of words
    python -m benchmarks.merging.words report        four others, of other data: looked at once rules and list stood
    python -m benchmarks.merging.words loras         LoRAs of the reported tasks, merged in their core (needs peft)
    python -m benchmarks.merging.words report wudi   methods whose names begin so
    python -m benchmarks.merging.words report recommend    what `recommend` chooses with a few rows of each task
    python -m benchmarks.merging.words --docs        only the tables of docs/measurements/merging.md

The experts are those of word_tasks.py and of the demo, each scored with its own head. λ is tried in memory around the
rule's: on validation rows for `choose`, on test rows for `report`, where the other λ only say what the rule misses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks import RESULTS, encoder, tasks
from benchmarks.merging import nine_tasks, picture_tasks, tried, word_tasks
from benchmarks.merging.scores import HEAD, Weights, encoder_of, write
from benchmarks.tasks import Part
from deltamerge.api import load_recipe
from deltamerge.apps.recommend.advised import advised_merge
from deltamerge.apps.recommend.merge import MergeAdvice
from deltamerge.methods.registry import MERGE
from deltamerge.plan.delta_graph import matrix_form
from deltamerge.run.options import Options

FILE = RESULTS / "merging_words.json"
FAMILIES = {
    "choose": ("sentiment", "intensity", "name", "part-of-speech"),
    "report": ("continent", "syllables", "language", "frequency"),
    "loras": ("continent", "syllables", "language", "frequency"),
}
SEEN: dict[str, tuple[Part, int]] = {"choose": ("validation", 200), "report": ("test", 500), "loras": ("test", 500)}
AROUND = dict.fromkeys(FAMILIES, (0.5, 0.7, 1.0, 1.4, 2.0))  # times the rule's λ
SPARE: dict[Part, Part] = {"validation": "test", "test": "validation"}  # rows that neither train nor score
CALIBRATED = 50  # rows a task, of methods that look at rows


@dataclass(frozen=True)
class Merge:
    """A method of the package as a recipe has it, or a formula of `tried`.

    `rule` is its λ by the number of models. It searches on `rows` of each task, without labels, and `decide` others
    decide where coefficients are fitted. Without recipe, formula and `after` it is what `recommend` chooses.
    """

    name: str
    rule: Callable[[int], float]
    recipe: dict[str, Any] | None = None
    rows: int = 0
    decide: int = 0
    formula: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None
    after: str | None = None

    @property
    def each(self) -> bool:
        """Whether it makes a model per task."""
        return self.recipe is not None and "task" in MERGE[self.recipe["merge_method"]].parameters

    @property
    def fits(self) -> bool:
        """Whether it fits coefficients, which start at the rule's λ."""
        return self.recipe is not None and "calibration" in self.recipe

    @property
    def advised(self) -> bool:
        """Whether `recommend` chooses it."""
        return self.recipe is None and self.formula is None and self.after is None


def usual(method: str) -> Callable[[int], float]:
    """The λ that a recipe without one has."""
    return lambda models: float(MERGE[method].parameters["lambda"].default_for(models) or 1.0)


def falling(factor: float) -> Callable[[int], float]:
    return lambda models: factor / models**0.5


def of(method: str, rule: Callable[[int], float] | None = None, rows: int = 0, **keys: Any) -> Merge:
    balanced = ", balanced" if "balance" in keys else ""
    return Merge(f"{method}{balanced}", rule or usual(method), {"merge_method": method, **keys}, rows, rows)


TIES = {"density": 0.2}
PACKAGE = (
    of("task_arithmetic", falling(0.7)),
    of("task_arithmetic", falling(0.8), balance="norm"),
    of("ties", falling(1.2), parameters=TIES),
    of("ties", falling(1.2), parameters=TIES, balance="norm"),
    of("iso_c"),
    of("iso_c", balance="norm"),
    of("tsv_m"),
    of("tsv_m", balance="norm"),
    of("wudi"),
    of("wudi", balance="norm"),
    of("svc"),
    of("svc", balance="norm"),
    of("regmean", rows=CALIBRATED),
)


def fitted(start: Merge, scope: str, rows: tuple[int, int] = (CALIBRATED, CALIBRATED)) -> Merge:
    """A fit of coefficients on rows, searched on and deciding, which starts at another merge of the package."""
    keys = {**(start.recipe or {}), "calibration": {"per": "merge", "coefficients": scope}}
    return Merge(f"{start.name} + coefficients by {scope}, {said(rows)}", start.rule, keys, *rows)


def said(rows: tuple[int, int]) -> str:
    return f"{rows[0]} + {rows[1]} rows"


HUNDRED, FIFTY = (67, 33), (34, 16)  # rows in all, searched on and deciding
BALANCED = of("svc", balance="norm")
STARTS = (BALANCED, of("regmean", rows=CALIBRATED))
ADVISED = tuple(Merge(f"recommend, {said(rows)}", lambda models: 1.0, None, *rows) for rows in (HUNDRED, FIFTY))
AFTER = {"task_arithmetic": 0.8, "iso_c": 1.8, "wudi": 1.2}
MERGES = (
    *PACKAGE,
    *(fitted(start, scope) for start in STARTS for scope in ("layer", "row")),
    *(fitted(BALANCED, "row", rows) for rows in ((2 * CALIBRATED, 2 * CALIBRATED), HUNDRED)),
    *ADVISED,
    Merge("ace", falling(0.8), formula=tried.ace),
    Merge("ace, ε relative", falling(1.2), formula=lambda ds, base: tried.ace(ds, base, relative=True)),
    Merge("ortho", falling(4.0), formula=tried.ortho),
    *(Merge(f"{name}, then svc", falling(factor), after=name) for name, factor in AFTER.items()),
    Merge("task_arithmetic, then aim", falling(0.7), after="task_arithmetic"),
    Merge("tsv_m, balanced, then aim", usual("tsv_m"), after="tsv_m, balanced"),
)


class Family:
    """Experts side by side, on rows of one part of their tasks."""

    model: Any
    merges = MERGES

    def __init__(self, names: Sequence[str], part: Part, count: int, seed: int = 0) -> None:
        self.names, self.spare, self.advice = tuple(names), SPARE[part], dict[str, dict[str, Any]]()
        self.base, self.folders = self.models(seed)
        self.weights = self.body(self.base)
        self.deltas = {
            name: {key: tensor - self.weights[key] for key, tensor in self.body(path).items()}
            for name, path in self.folders.items()
        }
        self.rows = {name: rows_of(name, part)[:count] for name in names}
        self.load()
        self.own = {name: self.score(self.body(path), name) for name, path in self.folders.items()}

    def models(self, seed: int) -> tuple[Path, dict[str, Path]]:
        """The folder of the base without its head, and those of the experts."""
        folder = tasks.models_folder()
        return nine_tasks.headless(folder / "base", word_tasks.HOME / "base"), {
            name: folder / name if name in tasks.TASKS else word_tasks.expert(name, folder / "base", seed=seed)
            for name in self.names
        }

    def source(self, name: str) -> str:
        """What a recipe names of the expert."""
        return str(self.folders[name])

    def body(self, folder: Path) -> Weights:
        """A model's tensors without its head."""
        return encoder_of(folder)

    def load(self) -> None:
        """Load what answers rows: the base's model, and the experts' heads."""
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = AutoModel.from_pretrained(self.base, add_pooling_layer=False).float().train(False)
        self.heads = {name: head_of(path) for name, path in self.folders.items()}

    def score(self, weights: Weights, name: str) -> float:
        return score_of(name, self.outputs(weights, name, self.rows[name]), self.rows[name])

    def outputs(self, weights: Weights, name: str, rows: Sequence[Any]) -> Tensor:
        """Logits of the rows, with the task's own head."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].text))
        self.model.load_state_dict(weights)
        pool, pool_bias, last, last_bias = self.heads[name]
        found = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(rows), 64):
                batch = encoder.encode(self.tokenizer, [rows[i] for i in order[start : start + 64]])
                found.append(self.model(**batch).last_hidden_state[:, 0].float())
        logits = torch.tanh(torch.cat(found) @ pool.T + pool_bias) @ last.T + last_bias
        return logits[torch.tensor(order).argsort()]

    def shares(self, weights: Weights, names: Sequence[str]) -> list[float]:
        """Scores in % of the experts' own."""
        return [100 * self.score(weights, name) / self.own[name] for name in names]

    def merged(self, merge: Merge, names: Sequence[str], task: int = 0) -> Weights:
        """What the merge adds to the base at λ = 1; of a model per task, that of number `task`."""
        if merge.recipe is not None:
            return self._run(merge, names, task)
        if merge.advised:
            return self._advised(merge, names)
        if merge.after is not None:
            before = next(one for one in self.merges if one.name == merge.after)
            found, loud = self._run(before, names), self._loudness(names) if merge.name.endswith("aim") else {}
            for key, tensor in found.items():
                if key in loud:
                    found[key] = tried.aim(tensor.double(), loud[key]).float()
                elif not loud and self._is_matrix(key):
                    found[key] = tried.svc(tensor.double(), self._deltas(key, names)).float()
            return found
        assert merge.formula is not None
        made = {}
        for key, tensor in self.weights.items():
            deltas = self._deltas(key, names)
            mean = torch.stack(deltas).mean(0)
            made[key] = (merge.formula(deltas, tensor.double()) if self._is_matrix(key) else mean).float()
        return made

    def factors(self, merge: Merge, around: Sequence[float]) -> Sequence[float]:
        """The factors of the rule's λ that are scored."""
        return (1.0,) if merge.fits or merge.each or merge.advised else around

    def at(self, factor: float, merge: Merge, added: Weights, models: int) -> Weights:
        """The weights at a λ, from what is added at λ = 1; as in the package, methods of matrices add means once."""
        whole = merge.recipe is not None and not merge.rows and MERGE[merge.recipe["merge_method"]].matrices
        return {
            key: tensor
            + (min(1.0, factor) if whole and matrix_form(key, tuple(tensor.shape), models) is None else factor)
            * added[key]
            for key, tensor in self.weights.items()
        }

    def _loudness(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Mean abs(x) of the inputs of every linear layer of the base, added up over batches of all tasks' rows."""
        found: dict[str, Tensor] = {}

        def hook(name: str, module: Any, given: Any) -> None:
            found[name] = found.get(name, torch.zeros(())) + given[0].double().abs().mean((0, 1))

        layers = [(name, one) for name, one in self.model.named_modules() if isinstance(one, torch.nn.Linear)]
        hooks = [one.register_forward_pre_hook(partial(hook, f"{name}.weight")) for name, one in layers]
        self.model.load_state_dict(self.weights)
        with torch.inference_mode():
            for name in names:
                self.model(**encoder.encode(self.tokenizer, rows_of(name, self.spare)[:CALIBRATED]))
        for one in hooks:
            one.remove()
        return found

    def _deltas(self, key: str, names: Sequence[str]) -> list[Tensor]:
        return [self.deltas[name][key].double() for name in names]

    def _is_matrix(self, key: str) -> bool:
        return self.weights[key].dim() == 2 and "embeddings" not in key

    def _run(self, merge: Merge, names: Sequence[str], task: int = 0) -> Weights:
        assert merge.recipe is not None
        method = MERGE[merge.recipe["merge_method"]]
        factor = merge.rule(len(names)) if merge.fits else 1.0
        parameters: dict[str, Any] = {"lambda": factor} if "lambda" in method.parameters else {}
        parameters |= merge.recipe.get("parameters", {}) | ({"task": task} if merge.each else {})
        if "weight" in method.parameters and method.parameters["weight"].default is None:
            parameters["weight"] = 1.0
        with tempfile.TemporaryDirectory(dir=self.base.parent) as work:
            models: list[dict[str, Any]] = []
            for name in names:
                models.append({"model": self.source(name), "name": name})
                if merge.rows:
                    models[-1]["calibration"] = self.calibration(name, Path(work), merge)
            recipe = {**merge.recipe, "base_model": str(self.base), "models": models, "parameters": parameters}
            path = Path(work) / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe | {"dtype": "float32"}), encoding="utf-8")
            load_recipe(path, workers=1).run(Path(work) / "out")
            made = self.body(Path(work) / "out")
        return {key: (tensor - self.weights[key]) / factor for key, tensor in made.items()}

    def _advised(self, merge: Merge, names: Sequence[str]) -> Weights:
        """What the merge that `recommend` chooses adds to the base. Its advice stays in `advice`."""
        with tempfile.TemporaryDirectory(dir=self.base.parent) as work:
            rows = [self.calibration(name, Path(work), merge) for name in names]
            models, options, out = [self.source(name) for name in names], Options(workers=1), Path(work) / "out"
            made = advised_merge(models, str(self.base), out, rows=rows, keys={"dtype": "float32"}, options=options)
            made.run()
            self.advice[merge.name] = summary(made.advice)
            return {key: tensor - self.weights[key] for key, tensor in self.body(out).items()}

    def calibration(self, name: str, work: Path, merge: Merge) -> dict[str, Any]:
        """Write the rows of the task that the merge sees, and return what a recipe says of them."""
        path, count = work / f"{name}.jsonl", merge.rows + merge.decide
        texts = [json.dumps({"text": row.text}) for row in rows_of(name, self.spare)[:count]]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return {"data": str(path), "sequences": searched(merge), "length": 40}


def searched(merge: Merge) -> int:
    """What a recipe calls `sequences`: all rows of a file of which a third decides."""
    return merge.rows + merge.decide if merge.decide < merge.rows else merge.rows


def summary(advice: MergeAdvice) -> dict[str, Any]:
    """What a table shows of an advice: the choice, and what it expects of each task in %."""
    expected = [None if one.share is None else round(100 * one.share, 1) for one in advice.forecast]
    return {"chosen": advice.method, "lambda": advice.factor, "expected": expected}


class Loras(Family):
    """Models of LoRAs, which are merged as adapters: by some methods in their core."""

    merges = tuple(merge for merge in MERGES if merge.recipe is not None and not merge.fits)

    def models(self, seed: int) -> tuple[Path, dict[str, Path]]:
        folder = tasks.models_folder()
        base = nine_tasks.headless(folder / "base", word_tasks.HOME / "base")
        return base, {name: word_tasks.lora(name, folder / "base", seed=seed) for name in self.names}

    def source(self, name: str) -> str:
        return f"{self.base}+{self.folders[name] / 'lora'}"


@cache
def rows_of(name: str, part: Part) -> list[Any]:
    """Texts or pictures, each with its `label`."""
    if name in picture_tasks.TASKS:
        return picture_tasks.rows(name, part)
    return tasks.rows(name, part) if name in tasks.TASKS else word_tasks.rows(name, part)


def task_of(name: str) -> tasks.Task:
    return (tasks.TASKS | word_tasks.TASKS | picture_tasks.TASKS)[name]


def score_of(name: str, logits: Tensor, rows: Sequence[Any]) -> float:
    task = task_of(name)
    predicted = logits[:, 0] if task.labels == 1 else logits.argmax(1)
    label = np.array([row.label for row in rows], np.float64)
    return 100 * encoder.METRICS[task.metric](predicted.double().numpy(), label)


def head_of(folder: Path) -> list[Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return [tensors[f"{layer}.{kind}"].float() for layer in HEAD for kind in ("weight", "bias")]


def cell(family: Family, merge: Merge, names: Sequence[str], around: Sequence[float]) -> dict[str, Any]:
    """Mean and worst share at the rule's λ, and at λ around it where nothing is fitted and all tasks have one model."""
    rule, took = merge.rule(len(names)), 0.0
    found: dict[float, list[float]] = {factor: [] for factor in family.factors(merge, around)}
    for task, some in enumerate([[name] for name in names] if merge.each else [names], 1):
        start = time.process_time()
        added = family.merged(merge, names, task)
        took += time.process_time() - start
        for factor, shares in found.items():
            shares += family.shares(family.at(rule * factor, merge, added, len(names)), some)
    tried_ = {f"{rule * f:.3g}": [round(float(np.mean(s)), 1), round(min(s), 1)] for f, s in found.items()}
    return {
        "merge": merge.name,
        "tasks": list(names),
        "lambda": round(rule, 4),
        "mean": round(float(np.mean(found[1.0])), 1),
        "worst": round(min(found[1.0]), 1),
        "shares": {name: round(share, 1) for name, share in zip(names, found[1.0], strict=True)},
        "tried": tried_,
        "best": max(mean for mean, _ in tried_.values()),
        "cpu_s": round(took, 1),
    } | family.advice.get(merge.name, {})


def main() -> None:
    makes = {"choose": Family, "report": Family, "loras": Loras}
    run(__doc__, FAMILIES, FILE, makes, SEEN, "write_words", AROUND)


def run(
    about: str | None,
    families: Mapping[str, Sequence[str]],
    file: Path,
    makes: Mapping[str, Callable[[Sequence[str], Part, int, int], Family]],
    seen: Mapping[str, tuple[Part, int]],
    page: str,
    around: Mapping[str, Sequence[float]],
) -> None:
    """Measure the merges that the command line asks for, keep them in `file`, and write its tables."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=families)
    parser.add_argument("names", nargs="*", help="methods, or how they begin; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the experts; others' results stand apart")
    parser.add_argument("--docs", action="store_true", help="only write docs/ from the results")
    asked = parser.parse_args()
    if asked.family and not asked.docs:
        from benchmarks.pruning.quality import quiet

        quiet()
        torch.set_num_threads(1)
        family = makes[asked.family](families[asked.family], *seen[asked.family], asked.seed)
        kept = f"{asked.family}, seed {asked.seed}" if asked.seed else asked.family
        merges = [one for name in asked.names or [""] for one in named(family.merges, name)]
        measured(family, merges, kept, file, around[asked.family])
    from benchmarks.merging import pages

    getattr(pages, page)(json.loads(file.read_text(encoding="utf-8")))


def named(merges: Sequence[Merge], name: str) -> list[Merge]:
    """The merge of that name, or those whose names begin so."""
    return [one for one in merges if one.name == name] or [one for one in merges if one.name.startswith(name)]


def measured(family: Family, merges: Sequence[Merge], kept: str, file: Path, around: Sequence[float]) -> None:
    from benchmarks.process import surroundings

    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": {}, "own": {}}
    own = {name: round(score, 1) for name, score in family.own.items()}
    print(own, file=sys.stderr, flush=True)
    for merge in merges:
        made = cell(family, merge, family.names, around)
        kind = "advised" if merge.advised else "cells"
        known.setdefault(kind, {}).setdefault(kept, {})[f"{merge.name} of {', '.join(family.names)}"] = made
        print(f"{merge.name}: {made['mean']} / {made['worst']}", file=sys.stderr, flush=True)
        if kept in ("choose", "report"):
            known["own"] |= own
        some = {key: known[key] for key in ("own", "cells", "advised") if key in known}
        write(file, surroundings({"python": sys.executable}) | some)


if __name__ == "__main__":
    main()
