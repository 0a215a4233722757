"""What merges keep of SmolLM2's experts, at the λ of a rule: two families of four tasks of reasoning-gym.

    python -m benchmarks.merging.decoder choose             every merge of MERGES, on validation rows
    python -m benchmarks.merging.decoder report wudi iso_c  those whose names begin so, on test rows
    python -m benchmarks.merging.decoder report --size 2 3  of every pair and triple instead of all four
    python -m benchmarks.merging.decoder report recommend   what `recommend` chooses with a few rows of each task
    python -m benchmarks.merging.decoder report "recommend, 67 + 33 rows, with text"    and with text for the base
    python -m benchmarks.merging.decoder choose --around    and at 0.7 and 1.4 times the rule's λ
    python -m benchmarks.merging.decoder --docs             only the tables of docs/measurements/merging.md

Experts are those of `smollm2.py`. A row counts if every token of its answer, and the end, is the model's first choice.
What was measured is not measured again without --again.

benchmarks/results/merging_skills.json: `models` has of the base and of each expert its exact match in %, perplexity
on plain text and KL to the base on answers to instructions. `cells` is a list: `family`, `tasks`
that were merged, `merge`, `lambda` (null: fitted, or none), `rows` a model that it saw, `shares` in % of each
expert's own, their `mean` and `worst`, `text` (% of perplexity above the experts' mean), `instructions` (KL),
`cpu_s`, `tried` (factor of λ -> shares). `advised` has such cells of what `recommend` chose, with its advice.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import RESULTS, process, smollm2
from benchmarks.merging.scores import Weights, write
from benchmarks.merging.words import FIFTY, HUNDRED, said, summary
from benchmarks.process import surroundings
from benchmarks.pruning import quality
from deltamerge.api import load_recipe
from deltamerge.apps.recommend.advised import advised_merge
from deltamerge.methods.registry import MERGE
from deltamerge.run.options import Options

FILE = RESULTS / "merging_skills.json"
FAMILIES = {
    "choose": ("arithmetic", "sorting", "reversal", "family"),
    "report": ("needle", "filtering", "legs", "friends"),
}
LENGTH, TEXT = 128, ", with text"
ROWS = 50  # of validation, with an expert's own answers, for merges that look at rows
SEEN = {"choose": ("validation", slice(200, 300)), "report": ("test", slice(0, 100))}  # rows that are scored
AROUND = (0.7, 1.4)
ALIKE: dict[str, Any] = {"keys": {"dtype": "float32"}, "options": Options(workers=1)}  # of advised merges
WINDOW, WINDOWS = 256, 16  # tokens of plain text
Known = dict[str, dict[str, float]]  # model -> its exact match, perplexity and KL to the base


@dataclass(frozen=True)
class Merge:
    """A method as a recipe has it; `rule` is its λ by the number of models, None: the package's.

    `each`: a model per task. `rows`: so many of each model's own stand beside it. `kept`: so many paragraphs of plain
    text stand beside the base. Without keys `recommend` chooses it.
    """

    name: str
    keys: Mapping[str, Any]
    rule: Callable[[int], float] | None = None
    rows: int = 0
    each: bool = False
    kept: int = 0

    def factor(self, models: int) -> float | None:
        """λ, where the method has one and it is not fitted."""
        if self.is_advised:
            return None
        declared = MERGE[self.keys["merge_method"]].parameters
        if "lambda" not in declared or self.is_fitted:
            return None
        return self.rule(models) if self.rule else float(declared["lambda"].default_for(models) or 1.0)

    @property
    def is_advised(self) -> bool:
        return not self.keys

    @property
    def is_fitted(self) -> bool:
        return "coefficients" in self.keys.get("calibration", {})

    def text(self, folder: Path) -> dict[str, Any]:
        """Return the base's rows: the same paragraphs for all merges that keep so many."""
        return {"data": str(smollm2.paragraphs(self.kept, folder)), "sequences": self.kept, "length": LENGTH}

    def recipe(self, base: Path, models: Mapping[str, str], rows: Mapping[str, Path], number: int) -> dict[str, Any]:
        """Return the recipe of the merge; `number` is the task of a model per task, from 1."""
        method = MERGE[self.keys["merge_method"]]
        parameters = dict(self.keys.get("parameters", {}))
        if (factor := self.factor(len(models))) is not None:
            parameters["lambda"] = factor
        if self.each:
            parameters["task"] = number
        if "weight" in method.parameters and method.parameters["weight"].default is None:
            parameters["weight"] = 1.0
        beside: list[dict[str, Any]] = [{"model": path, "name": name} for name, path in models.items()]
        for one in beside if self.rows else ():
            one["calibration"] = {"data": str(rows[one["name"]]), "sequences": self.rows, "length": LENGTH}
        if self.kept:
            beside.append({"model": str(base), "calibration": {**self.text(base.parent), "sequences": self.rows}})
        about = {"base_model": str(base), "models": beside, "dtype": "float32", "parameters": parameters}
        return {**self.keys, **about}


def of(method: str, rule: Callable[[int], float] | None = None, *, balance: bool = False, **parameters: Any) -> Merge:
    """Return a merge without rows."""
    keys = {"merge_method": method, "parameters": parameters} | ({"balance": "norm"} if balance else {})
    return Merge(method + ", balanced" * balance, keys, rule)


def falling(factor: float) -> Callable[[int], float]:
    return lambda models: factor / models**0.5


def fitted(start: Merge, scope: str, kept: int = 0) -> Merge:
    """Return a fit of coefficients that starts at another merge, and keeps the base's answers to text."""
    keys = {**start.keys, "calibration": {"per": "merge", "coefficients": scope}}
    return Merge(f"{start.name} + coefficients per {scope}{TEXT * bool(kept)}", keys, rows=ROWS, kept=kept)


def of_rows(name: str, method: str, rows: int = ROWS, **parameters: Any) -> Merge:
    return Merge(name, {"merge_method": method, "parameters": parameters}, rows=rows)


# method, λ if not the package's, parameters
DATA_FREE: tuple[tuple[str, Callable[[int], float] | None, dict[str, Any]], ...] = (
    ("task_arithmetic", falling(0.7), {}),
    ("ties", falling(1.2), {"density": 0.2}),
    ("dare_ties", falling(0.7), {"density": 0.2}),
    ("iso_c", None, {}),
    ("tsv_m", None, {}),
    ("wudi", None, {}),
    ("svc", None, {}),
)
NEAR = of_rows("regmean, off_diagonal 0.99", "regmean", off_diagonal=0.99)
MERGES = (
    *(of(method, rule, balance=even, **given) for method, rule, given in DATA_FREE for even in (False, True)),
    of_rows("regmean", "regmean"),
    NEAR,
    of_rows("regmean of 100 rows, off_diagonal 0.99", "regmean", 100, off_diagonal=0.99),
    of_rows("regmean_plus", "regmean_plus"),
    Merge("emr", {"merge_method": "emr"}, each=True),
    Merge("tall_masks", {"merge_method": "tall_masks"}, each=True),
    *(fitted(of("wudi", balance=True), scope) for scope in ("layer", "row")),
    *(fitted(NEAR, scope) for scope in ("layer", "row")),
    fitted(NEAR, "layer", 2 * ROWS),
    *(Merge(f"recommend, {said(rows)}", {}, rows=sum(rows)) for rows in (FIFTY, HUNDRED)),
    Merge(f"recommend, {said(HUNDRED)}{TEXT}", {}, rows=sum(HUNDRED), kept=sum(HUNDRED)),
)
# Of pairs and triples.
FEW = ("task_arithmetic, balanced", "iso_c, balanced", "tsv_m, balanced", "wudi", "svc, balanced", "regmean, off")


class Family:
    """Experts side by side, on rows of one part of their tasks, beside what the base could do."""

    def __init__(self, name: str, folder: Path = smollm2.FOLDER) -> None:
        self.name, self.folder, self.base = name, folder, folder / "base"
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16).train(False)
        self.weights = tensors_of(self.base)
        part, place = SEEN[name]
        self.examples = {
            task: smollm2.examples(tokenizer, smollm2.rows(task, part, folder)[place]) for task in FAMILIES[name]
        }
        ids = tokenizer(smollm2.plain_text(folder))["input_ids"][: WINDOWS * WINDOW]
        self.text = torch.tensor(ids[: len(ids) // WINDOWS * WINDOWS]).view(WINDOWS, -1)
        self.instructions = smollm2.instructions(folder)
        self.own = log_softmax(self._instructed(), -1)
        self.advice: dict[str, dict[str, Any]] = {}

    def load(self, weights: Weights) -> None:
        self.model.load_state_dict(weights, strict=False)  # the head is the embeddings

    def right(self, task: str) -> float:
        """Exact match in % of the loaded weights."""
        found = smollm2.right(self.model, self.examples[task])
        return 100 * sum(found) / len(found)

    def kept(self) -> tuple[float, float]:
        """Perplexity on plain text, and mean KL to the base on its own answers, of the loaded weights."""
        losses = []
        with torch.inference_mode():
            for ids in self.text.split(4):
                logits = smollm2.logits_of(self.model, ids, torch.arange(ids.numel())).float().view(*ids.shape, -1)
                losses.append(float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))
        apart = kl_div(log_softmax(self._instructed(), -1), self.own, log_target=True, reduction="none").sum(-1).mean()
        return math.exp(fmean(losses)), float(apart)

    def _instructed(self) -> Tensor:
        with torch.inference_mode():
            ids, places, _ = smollm2.padded(self.instructions)
            return smollm2.logits_of(self.model, ids, places).float()

    def merged(self, merge: Merge, names: Sequence[str]) -> Iterator[tuple[Weights, Sequence[str]]]:
        """The models that the merge makes of these experts, in float32, and the tasks of each."""
        models = {name: str(self.folder / name) for name in names}
        rows = {name: smollm2.answered(name, merge.rows, self.folder, apart=True) for name in names if merge.rows}
        for number, some in enumerate([[name] for name in names] if merge.each else [list(names)], 1):
            with tempfile.TemporaryDirectory() as work:
                path, out = Path(work) / "recipe.yaml", Path(work) / "out"
                if merge.is_advised:
                    seen = [{"data": str(rows[name]), "sequences": merge.rows, "length": LENGTH} for name in names]
                    kept = merge.text(self.folder) if merge.kept else None
                    made = advised_merge(list(models.values()), str(self.base), out, rows=seen, keep=kept, **ALIKE)
                    made.run()
                    self.advice[merge.name] = summary(made.advice)
                else:
                    path.write_text(yaml.safe_dump(merge.recipe(self.base, models, rows, number)), encoding="utf-8")
                    load_recipe(path, workers=1).run(out)
                yield tensors_of(out), some


def tensors_of(folder: Path) -> Weights:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def known_of(family: Family, found: dict[str, Any]) -> Known:
    """What the base and the experts alone do; measured if it is not in `found`."""
    known: Known = found.setdefault("models", {}).setdefault(family.name, {})
    for name in ("base", *FAMILIES[family.name]):
        if name in known:
            continue
        family.load(family.weights)
        tasks = FAMILIES[family.name] if name == "base" else (name,)
        if name != "base":
            family.load(tensors_of(family.folder / name))
        text, apart = family.kept()
        scores = {"exact_match": round(fmean(map(family.right, tasks)), 2)}
        known[name] = scores | {"perplexity": round(text, 4), "kl": round(apart, 4)}
        print(f"{name}: {known[name]}", file=sys.stderr, flush=True)
        keep(found)
    return known


def cell(
    family: Family, merge: Merge, names: Sequence[str], known: Known, around: Sequence[float] = ()
) -> dict[str, Any]:
    """What a merge of these experts keeps, at its λ and at `around` times it."""
    rule = merge.factor(len(names))
    factors = (1.0, *(around if rule else ()))
    tried: dict[float, dict[str, float]] = {factor: {} for factor in factors}
    kept: list[tuple[float, float]] = []
    took, start = 0.0, time.process_time()
    for weights, some in family.merged(merge, names):
        took += time.process_time() - start
        for factor in factors:
            family.load({key: base + factor * (weights[key] - base) for key, base in family.weights.items()})
            for task in some:
                tried[factor][task] = round(100 * family.right(task) / known[task]["exact_match"], 1)
            if factor == 1.0:
                kept.append(family.kept())
        start = time.process_time()
    text, apart = (fmean(values) for values in zip(*kept, strict=True))
    shares = tried.pop(1.0)
    return {
        "family": family.name,
        "tasks": list(names),
        "merge": merge.name,
        "lambda": None if rule is None else round(rule, 4),
        "rows": merge.rows,
        "shares": shares,
        "mean": round(fmean(shares.values()), 1),
        "worst": min(shares.values()),
        "text": round(100 * (text / fmean(known[name]["perplexity"] for name in names) - 1), 1),
        "instructions": round(apart, 3),
        "cpu_s": round(took, 1),
        "tried": tried,
    } | family.advice.get(merge.name, {})


def measured(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    """Measure what is asked and not in `found`, and write the results after each cell."""
    family = Family(asked.family)
    known = known_of(family, found)
    usual = MERGES if asked.size == [len(FAMILIES[asked.family])] else [m for m in MERGES if m.name.startswith(FEW)]
    merges = [merge for name in asked.names for merge in named(name)] or usual
    for merge in merges:
        kind = "advised" if merge.is_advised else "cells"
        cells: list[dict[str, Any]] = found.setdefault(kind, [])
        for names in (names for size in asked.size for names in combinations(FAMILIES[asked.family], size)):
            same = [one for one in cells if identity(one) == (family.name, list(names), merge.name)]
            if same and not asked.again:
                continue
            made = cell(family, merge, names, known, AROUND if asked.around else ())
            found[kind] = cells = [one for one in cells if one not in same] + [made]
            keep(found)
            words = f"{merge.name} of {', '.join(names)}: {made['mean']} / {made['worst']}, text {made['text']:+} %"
            print(f"{words}, {made['cpu_s']} s; {made['tried']}", file=sys.stderr, flush=True)


def named(name: str) -> list[Merge]:
    """Return the merge of that name, or those whose names begin so."""
    return [one for one in MERGES if one.name == name] or [one for one in MERGES if one.name.startswith(name)]


def keep(found: Mapping[str, Any]) -> None:
    write(FILE, surroundings({"python": sys.executable}) | dict(found))


def identity(cell: Mapping[str, Any]) -> tuple[str, list[str], str]:
    return cell["family"], cell["tasks"], cell["merge"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES)
    parser.add_argument("names", nargs="*", help="merges, or how they begin; default: all")
    parser.add_argument("--size", nargs="+", type=int, default=[4], help="experts of a merge")
    parser.add_argument("--around", action="store_true", help=f"at {AROUND} times the rule's λ too")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--docs", action="store_true", help="only write docs/ from the results")
    asked = parser.parse_args()
    quality.quiet()
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"models": {}, "cells": []}
    if asked.family and not asked.docs:
        measured(asked, {k: found[k] for k in ("models", "cells", "advised") if k in found})
    from benchmarks.merging import pages

    pages.write_decoder(json.loads(FILE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    process.keep_pages()
    main()
