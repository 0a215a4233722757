"""What a LoRA keeps of a real fine-tune, by rank: plain SVD, weighed by inputs, and sparse deltas of the same bytes.

    python -m benchmarks.pruning.lora --tasks .encoder/tasks --out lora.json      # tasks: shared data's make_tasks.py
    python -m benchmarks.pruning.lora --decoders reversal sorting --out lora-decoders.json    # of benchmarks/smollm2.py

Encoders: accuracy or correlation in plain transformers and PEFT on the first 400 test rows. Decoders: exact match and
mean cross-entropy of the answers on 200 test rows; calibration rows are 100 other prompts with the fine-tune's own
answers. What the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import process, smollm2
from benchmarks.tasks import models_folder
from deltamerge.recipe.file import read_recipe
from deltamerge.run.apply import apply
from deltamerge.run.options import Options
from deltamerge.run.runner import Result, run

RANKS = (4, 8, 16, 32, 64)
METHODS = ("svd", "inputs", "magnitude", "dare")
ROWS = 400
ANSWERED = 100


class Subject(NamedTuple):
    """A fine-tune of a base; `whole` is what its LoRAs store beside factors."""

    name: str
    base: Path
    tune: Path
    calibration: dict[str, Any]
    whole: str
    load: Callable[[Path], Any]
    score: Callable[[Any], dict[str, float]]


def encoder(task: str, models: Path, tasks: Path) -> Subject:
    """A fine-tune of the shared data."""
    tune = models / task
    config = json.loads((tune / "config.json").read_text())
    lines = (tasks / f"{task}.test.jsonl").read_text().splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(tune)
    labels = len(config.get("id2label") or (0, 1))
    settings = {"dtype": torch.float32, "num_labels": labels, "problem_type": config.get("problem_type")}

    def load(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()

    calibration = {"data": str(tasks / f"{task}.train.jsonl"), "sequences": 200, "length": 40}
    return Subject(
        task, models / "base", tune, calibration, "heads", load, lambda model: classified(model, tokenizer, rows, task)
    )


def classified(model: Any, tokenizer: Any, rows: list[dict[str, Any]], task: str) -> dict[str, float]:
    """Accuracy, or of a regression the mean of Pearson's and Spearman's correlation, in percent."""
    from scipy.stats import pearsonr, spearmanr

    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), 50):
            texts = [row["text"] for row in rows[start : start + 50]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
            found.append(model(**batch).logits.float())
    logits, labels = torch.cat(found), np.array([row["label"] for row in rows])
    if task == "intensity":
        values = logits[:, 0].numpy()
        return {"score": 50 * float(pearsonr(values, labels)[0] + spearmanr(values, labels)[0])}
    return {"score": 100 * float((logits.argmax(1).numpy() == labels).mean())}


def decoder(name: str, *, answers: bool = True) -> Subject:
    """A fine-tune of SmolLM2; without `answers` they are not written out, and have no exact match."""
    tune, task = smollm2.FOLDER / name, smollm2.EXPERTS[name].task
    rows = smollm2.rows(task, "test")[: smollm2.TEST_ROWS]
    tokenizer = AutoTokenizer.from_pretrained(tune)
    calibration = {"data": str(smollm2.answered(name, ANSWERED)), "sequences": ANSWERED, "length": 128}

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def score(model: Any) -> dict[str, float]:
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        some = smollm2.examples(tokenizer, rows)
        with torch.inference_mode():
            parts = [float(smollm2.loss_of(model, some[i : i + 20])) for i in range(0, len(some), 20)]
        found = {"loss": sum(parts) / len(parts)}
        if answers:
            made = smollm2.answers(model, tokenizer, [row.text for row in rows], smollm2.NEW_TOKENS[task])
            right = sum(text.strip() == row.label for text, row in zip(made, rows, strict=True))
            found["score"] = 100 * right / len(rows)
        return found

    return Subject(name, smollm2.base(), tune, calibration, "drop", load, score)


def made(folder: Path, name: str, recipe: dict[str, Any]) -> Result:
    """The result of a recipe."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run(read_recipe(path), folder / name, Options(workers=1))


def adapter(subject: Subject, rank: int, folder: Path, *, weighed: bool) -> dict[str, Any]:
    """A LoRA in bfloat16: bytes, kept shares, and its score."""
    output = {"kind": "peft", "rank": rank, "whole": subject.whole, "values": "bfloat16"}
    recipe = {"base_model": str(subject.base), "models": [{"model": str(subject.tune)}], "output": output}
    result = made(folder, "lora", recipe | ({"calibration": subject.calibration} if weighed else {}))
    model = PeftModel.from_pretrained(subject.load(subject.base), folder / "lora").eval()
    figures = {key: value for key, value in result.lock["lora"].items() if key != "tensors"}
    return {"bytes": result.nbytes, **figures, **subject.score(model)}


def sparse(subject: Subject, method: str, nbytes: int, folder: Path) -> dict[str, Any]:
    """A sparse delta in bfloat16 of at most `nbytes`: its bytes and its score."""
    recipe = {
        "base_model": str(subject.base),
        "models": [{"model": str(subject.tune)}],
        "calibration": subject.calibration,
        "prune": {"method": method, "budget": nbytes, "q": "output_change"},
        "output": {"kind": "delta", "values": "bfloat16"},
    }
    result = made(folder, method, recipe)
    apply(str(folder / method), str(subject.base), folder / "applied", workers=1)
    assert result.delta is not None
    return {"bytes": result.delta.nbytes, **subject.score(subject.load(folder / "applied"))}


def measures(
    subject: Subject, ranks: list[int], methods: list[str], known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every figure of a subject that is not known."""
    for name, folder in (("fine-tune", subject.tune), ("base", subject.base)):
        if name not in known:
            yield name, subject.score(subject.load(folder))
    for rank in ranks:
        for name in methods:
            if (key := f"{name} {rank}") in known:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                if name in ("svd", "inputs"):
                    yield key, adapter(subject, rank, Path(scratch), weighed=name == "inputs")
                else:
                    yield key, sparse(subject, name, known[f"svd {rank}"]["bytes"], Path(scratch))


def main() -> None:
    """Measure every fine-tune at every rank; a line each, and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=models_folder())
    parser.add_argument("--tasks", type=Path, help="of the encoders' test rows")
    parser.add_argument("--decoders", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--loss", action="store_true", help="decoders: cross-entropy alone, a third of the time")
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="sparse ones have the bytes of svd")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    subjects = [decoder(name, answers=not options.loss) for name in options.decoders]
    if options.tasks:
        subjects += [encoder(task, options.models, options.tasks) for task in ("sentiment", "intensity")]
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for subject in subjects:
        own = found.setdefault(subject.name, {})
        for key, figures in measures(subject, options.ranks, options.methods, own):
            own[key] = figures
            print(subject.name, key, figures, flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    process.keep_pages()
    main()
