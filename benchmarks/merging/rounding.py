"""What a quantised merge loses: nearest codes beside codes chosen by the layers' inputs, in KL and exact match.

    python -m benchmarks.merging.rounding BASE TUNED [TUNED ...] --rows TRAIN.jsonl --held TEST.jsonl
    python -m benchmarks.merging.rounding BASE TUNED --rows TRAIN.jsonl --held TEST.jsonl --schemes int4 --count 100

The merge is the base and the deltas with `--weight` each. Rows have `text` and `label`, as those of `smollm2.py`. Each
output is loaded by transformers. KL(unquantised merge ‖ output) is a mean over the tokens of the held rows' answers.
Results go to benchmarks/results/rounding.json, one after the other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, FineGrainedFP8Config

from benchmarks import RESULTS, smollm2
from benchmarks.merging import scores
from benchmarks.process import surroundings

FILE = RESULTS / "rounding.json"
SCHEMES = ("int4", "nvfp4", "mxfp4", "int8", "fp8")
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path, nargs="+")
    parser.add_argument("--rows", type=Path, required=True, help="rows by which codes are chosen")
    parser.add_argument("--held", type=Path, required=True, help="rows that are scored")
    parser.add_argument("--other", type=Path, help="rows of another task, on which KL is measured too")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--sequences", type=int, default=256, help="calibration rows")
    parser.add_argument("--count", type=int, default=200, help="held rows")
    parser.add_argument("--new-tokens", type=int, default=26)
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args()
    import sys

    found: dict[str, Any] = {**surroundings({"deltamerge": sys.executable}), "sequences": asked.sequences}
    found |= {"tuned": [path.name for path in asked.tuned], "weight": asked.weight, "cells": []}
    with tempfile.TemporaryDirectory() as work:
        measure(asked, Path(work), found)
    print(table(found))


def measure(asked: argparse.Namespace, work: Path, found: dict[str, Any]) -> None:
    """Score the plain merge, then every scheme with either rounding."""
    rows = whole_rows(asked.rows, work / "rows.jsonl")
    held = read_rows(asked.held)
    held = held[: asked.count]
    other = [] if asked.other is None else read_rows(asked.other)[: asked.count]
    plain: list[list[Tensor]] = []
    for scheme, rounding in [("none", None), *((s, r) for s in asked.schemes for r in ("nearest", "inputs"))]:
        recipe = work / f"{scheme}-{rounding}.yaml"
        recipe.write_text(yaml.safe_dump(keys(asked, rows, scheme, rounding)), encoding="utf-8")
        out = work / recipe.stem
        run = scores.here(recipe, out)
        model, tokenizer = loaded(out), AutoTokenizer.from_pretrained(out)
        logits = [answer_logits(model, tokenizer, some) for some in (held, other)]
        plain = plain or logits
        lock = yaml.safe_load((out / "recipe.lock").read_text(encoding="utf-8"))
        cell = {
            "scheme": scheme,
            "rounding": rounding,
            "kl": divergence(plain[0], logits[0]),
            "kl_other": divergence(plain[1], logits[1]) if other else None,
            "exact_match": exact_match(model.bfloat16(), tokenizer, held, asked.new_tokens),
            "held_rows": len(held),
            "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
            "cpu_s": round(run.cpu, 1),
            "peak_mb": round(run.anonymous),
            **{key: value for key, value in lock.get("quantization", {}).items() if key != "tensors"},
        }
        found["cells"].append(cell)
        scores.write(asked.out, found)
        print(json.dumps(cell), flush=True)


def read_rows(path: Path) -> list[smollm2.Row]:
    """Return the rows of a file."""
    return [smollm2.Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def whole_rows(path: Path, out: Path) -> Path:
    """Write rows as one text each, prompt and answer."""
    texts = (json.dumps({"text": f"{row.text} {row.label}"}) for row in read_rows(path))
    out.write_text("".join(f"{line}\n" for line in texts), encoding="utf-8")
    return out


def keys(asked: argparse.Namespace, rows: Path, scheme: str, rounding: str | None) -> dict[str, Any]:
    """Return a recipe."""
    models = [{"model": str(path.absolute()), "parameters": {"weight": asked.weight}} for path in asked.tuned]
    found: dict[str, Any] = {
        "base_model": str(asked.base.absolute()),
        "merge_method": "task_arithmetic",
        "models": models,
        "dtype": "bfloat16",
    }
    if rounding is not None:
        found["output"] = {"quantization": scheme, "rounding": rounding}
        found["calibration"] = {"data": str(rows), "text": "text", "sequences": asked.sequences, "length": 96}
    return found


def loaded(folder: Path) -> Any:
    """Return a model with the values of its stored codes, in float32."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if said is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kind = FineGrainedFP8Config if said["quant_method"] == "fp8" else CompressedTensorsConfig
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=kind(dequantize=True))


def exact_match(model: Any, tokenizer: Any, held: list[smollm2.Row], new_tokens: int) -> float:
    """Return the share of rows, in %, that are answered with the label and nothing else."""
    made = smollm2.answers(model, tokenizer, [row.text for row in held], new_tokens)
    return 100 * sum(text.strip() == row.label for text, row in zip(made, held, strict=True)) / len(held)


@torch.inference_mode()
def answer_logits(model: Any, tokenizer: Any, held: list[smollm2.Row]) -> list[Tensor]:
    """Return the log-probabilities (tokens of answers, vocabulary) of each batch."""
    some = smollm2.examples(tokenizer, held)
    found = []
    for start in range(0, len(some), BATCH):
        ids, places, _ = smollm2.padded(some[start : start + BATCH])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        found.append(model.lm_head(hidden[places]).log_softmax(-1))
    return found


def divergence(plain: list[Tensor], other: list[Tensor]) -> float:
    """Return the mean KL(plain ‖ other) of a token in nats."""
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(plain, other, strict=True)]
    return float(f"{float(torch.cat(each).double().mean()):.4g}")


def table(found: dict[str, Any]) -> str:
    """Return the results as a table."""
    head = (
        "| quantization | rounding | KL | … of other rows | exact match | outputs' error | delta | its effect | CPU s |"
    )
    lines = [head, "|---" * head.count(" | ") + "|---|"]
    for cell in found["cells"]:
        outputs = cell.get("outputs", {})
        shares = [part.get("delta", {}).get("share") for part in (cell, outputs)]
        shown = [outputs.get("relative_error"), *shares]
        numbers = " | ".join("–" if value is None else f"{value:.3g}" for value in shown)
        other = "–" if cell["kl_other"] is None else f"{cell['kl_other']:.3g}"
        kl, match = f"{cell['kl']:.3g} | {other}", f"{cell['exact_match']:.1f}"
        lines.append(
            f"| {cell['scheme']} | {cell['rounding'] or '–'} | {kl} | {match} | {numbers} | {cell['cpu_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
