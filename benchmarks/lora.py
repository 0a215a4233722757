"""What a LoRA keeps of a real fine-tune, by rank: plain SVD, weighed by inputs, and sparse deltas of the same bytes.

    python benchmarks/lora.py --tasks .demo/tasks --out lora.json      # tasks: shared data's make_tasks.py

Scores are those of plain transformers and PEFT on the first 400 test rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from deltamerge.recipe.file import read_recipe
from deltamerge.run.apply import apply
from deltamerge.run.options import Options
from deltamerge.run.runner import Result, run

RANKS = (4, 8, 16, 32, 64)
ROWS = 400


def made(folder: Path, name: str, recipe: dict[str, Any]) -> Result:
    """The result of a recipe."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run(read_recipe(path), folder / name, Options(workers=1))


def score(model: Any, tokenizer: Any, rows: list[dict[str, Any]], task: str) -> float:
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
        return 50 * float(pearsonr(values, labels)[0] + spearmanr(values, labels)[0])
    return 100 * float((logits.argmax(1).numpy() == labels).mean())


def main() -> None:
    """Measure every task at every rank; a line each, and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("/work/shared/data"))
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found: dict[str, Any] = {}
    for task in ("sentiment", "intensity"):
        tune, base = options.models / task, options.models / "base"
        lines = (options.tasks / f"{task}.test.jsonl").read_text().splitlines()[:ROWS]
        rows = [json.loads(line) for line in lines]
        tokenizer = AutoTokenizer.from_pretrained(tune)
        calibration = {"data": str(options.tasks / f"{task}.train.jsonl"), "sequences": 200, "length": 40}

        def loaded(folder: Path, tune: Path = tune) -> Any:
            config = json.loads((tune / "config.json").read_text())
            labels = len(config.get("id2label") or (0, 1))
            settings = {"dtype": torch.float32, "num_labels": labels, "problem_type": config.get("problem_type")}
            return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()

        own = {"fine-tune": {"score": score(loaded(tune), tokenizer, rows, task)}}
        found[task] = own
        print(task, "fine-tune", own["fine-tune"], flush=True)
        for rank in RANKS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                common = {"base_model": str(base), "models": [{"model": str(tune)}]}
                nbytes = 0
                for name, more in (("svd", {}), ("inputs", {"calibration": calibration})):
                    output = {"kind": "peft", "rank": rank, "whole": "heads"}
                    result = made(folder, name, {**common, **more, "output": output})
                    nbytes = result.nbytes
                    model = PeftModel.from_pretrained(loaded(base), folder / name).eval()
                    figures = {"bytes": nbytes, **{k: v for k, v in result.lock["lora"].items() if k != "tensors"}}
                    own[f"{name} {rank}"] = figures | {"score": score(model, tokenizer, rows, task)}
                    print(task, name, rank, own[f"{name} {rank}"], flush=True)
                for name in ("magnitude", "dare"):
                    prune = {"method": name, "budget": nbytes, "q": "output_change"}
                    recipe = {**common, "calibration": calibration, "prune": prune}
                    result = made(folder, name, {**recipe, "output": {"kind": "delta", "values": "bfloat16"}})
                    apply(str(folder / name), str(base), folder / f"{name}-applied", workers=1)
                    size = result.delta.nbytes if result.delta else 0
                    merged = loaded(folder / f"{name}-applied")
                    own[f"{name} {rank}"] = {"bytes": size, "score": score(merged, tokenizer, rows, task)}
                    print(task, name, rank, own[f"{name} {rank}"], flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
