"""Bytes against skill: what a delta of so many bytes keeps of a fine-tune, by ours and by the field's methods.

    python -m benchmarks.pruning.bytes sentiment intensity            the two encoders (DELTAMERGE_SHARED, tasks)
    python -m benchmarks.pruning.bytes smollm2:sorting --ratios 128   a fine-tune of SMOLLM2 (benchmarks.smollm2)
    python -m benchmarks.pruning.bytes --page                         table and picture of what is kept

Each cell makes a delta of at most checkpoint / ratio bytes, applies it, and measures the KL divergence of its outputs
from the fine-tune's on test rows (mean squared difference where the task is regression), and the score. Decoders: KL of
the answers' tokens, and the share of answers whose every token is the most likely one.

    ours, ours with rows   `extract --ratio`, without and with 50 validation rows, labels unread: those of a decoder
                           have the fine-tune's own greedy answers; real files, headers and all
    LoRA by SVD            `extract --lora --budget`: bfloat16, ranks shared out
    DARE, magnitude        `prune: {method: …, budget: …}`, values of one bit: real files; DARE divides by its density
    DAREx-q, magnitude q_e the same, q by output change on the 50 rows (encoders)
    Delta-CoMe             arXiv 2406.08903: of each linear weight 2 components in 8 bits, 32 in 3, the rest in 2, to
                           nearest, scales of 16 bits; one share of the full rank everywhere; headers not counted
    BitDelta               arXiv 2402.10193: a bit for each entry of linear weights, a scale each; 1/16 alone

Of Delta-CoMe and BitDelta embeddings, norms and biases are the base's, as `nothing` is what is cheapest there. Results
are added to benchmarks/results/bytes.json, and a cell that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import RESULTS, ROOT, process, tasks
from benchmarks.drawing import draw_lines
from benchmarks.pruning import quality
from benchmarks.tasks import TASKS, models_folder

FILE = RESULTS / "bytes.json"
PAGE = ROOT / "docs" / "measurements" / "bytes.md"
RATIOS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROWS = 50
State = dict[str, Tensor]


class Cell(NamedTuple):
    """A method at a ratio on a model."""

    model: str
    ratio: int
    method: str
    bytes: int
    kl: float
    score: float


class Subject(Protocol):
    """A fine-tune, its base, and what its outputs are compared by."""

    name: str
    base: Path
    tuned: Path
    score: float

    @property
    def rows(self) -> list[dict[str, str]]:
        """The first validation rows, without labels; of a decoder with the fine-tune's own answers."""

    def measure(self, state: State) -> tuple[float, float]:
        """KL and score of weights, by their names in the fine-tune's file."""


class Encoder:
    """A fine-tune of the small encoder; `count` test rows."""

    def __init__(self, name: str, count: int) -> None:
        from transformers import AutoTokenizer

        from benchmarks import encoder

        self.name, self.base, self.tuned = name, models_folder() / "base", models_folder() / name
        self.rows = [{"text": row.text} for row in tasks.rows(name, "validation")[:ROWS]]
        self.task, self.encoder = TASKS[name], encoder
        self.test = sorted(tasks.rows(name, "test")[:count], key=lambda row: len(row.text))
        self.tokenizer = AutoTokenizer.from_pretrained(self.tuned)
        self.model = encoder.load(self.tuned)
        self.target = self._outputs()
        self.score = self._score()

    def measure(self, state: State) -> tuple[float, float]:
        self.model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
        found = self._outputs()
        if self.task.labels == 1:
            return float((found - self.target).square().mean()), self._score()
        left, right = self.target.log_softmax(1), found.log_softmax(1)
        return float((left.exp() * (left - right)).sum(1).mean()), self._score()

    def _outputs(self) -> Tensor:
        with torch.inference_mode():
            parts = [
                self.model(**self.encoder.encode(self.tokenizer, self.test[at : at + 64])).logits
                for at in range(0, len(self.test), 64)
            ]
        return torch.cat(parts)

    def _score(self) -> float:
        return self.encoder.score(self.model, self.task, self.test, tokenizer=self.tokenizer)


class Decoder:
    """A fine-tune of SmolLM2; `count` test rows, in bfloat16."""

    def __init__(self, name: str, count: int) -> None:
        from transformers import AutoTokenizer

        from benchmarks import smollm2

        own = name.partition(":")[2]
        self.name, self.base, self.tuned = name, smollm2.FOLDER / "base", smollm2.FOLDER / own
        self.asked = [row.text for row in smollm2.rows(smollm2.EXPERTS[own].task, "validation")[:ROWS]]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.tuned)
        tokenizer = self.tokenizer
        some = smollm2.examples(tokenizer, smollm2.rows(smollm2.EXPERTS[own].task, "test")[:count])
        some = sorted(some, key=lambda one: len(one.ids))
        self.batches = [some[at : at + 25] for at in range(0, len(some), 25)]
        self.padded = smollm2.padded
        self.model = self._loaded()
        self.target = [*self._outputs()]
        self.score = self._score(self.target)

    def _loaded(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.tuned, dtype=torch.bfloat16).eval()

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """The rows that were asked, answered up to the end of the sequence."""
        found, model = [], self._loaded()
        for text in self.asked:
            ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
            made = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
            found.append({"prompt": text, "completion": self.tokenizer.decode(made[0, ids.shape[1] :])})
        return found

    def measure(self, state: State) -> tuple[float, float]:
        self.model.load_state_dict(state, strict=False)
        found = [*self._outputs()]
        total = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(self.target, found, strict=True))
        return total / sum(len(one) for one in found), self._score(found)

    def _outputs(self) -> Iterator[Tensor]:
        for batch in self.batches:
            ids, places, _ = self.padded(batch)
            with torch.inference_mode():
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                yield self.model.lm_head(hidden[places]).float().log_softmax(-1)

    def _score(self, outputs: Sequence[Tensor]) -> float:
        right = 0
        for batch, found in zip(self.batches, outputs, strict=True):
            is_right = found.argmax(-1) == self.padded(batch)[2]
            right += sum(bool(one.all()) for one in is_right.split([example.scored for example in batch]))
        return 100 * right / sum(len(batch) for batch in self.batches)


def subject(name: str, count: int) -> Subject:
    return Decoder(name, min(count, 100)) if name.startswith("smollm2:") else Encoder(name, count)


# ---- methods: the bytes that a delta takes, and the weights that it makes


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "deltamerge", *arguments], check=True, stdout=subprocess.DEVNULL)


def weights(one: Subject, folder: Path, out: Path) -> State:
    """The checkpoint that an artifact makes."""
    command("apply", str(folder), "--base", str(one.base), "--out", str(out), "-q")
    return load_file(out / "model.safetensors")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("delta*"))


def ours(one: Subject, budget: int, work: Path, *, rows: bool) -> tuple[int, State]:
    more = ["--calibration", str(calibration(one, work))] if rows else []
    command("extract", str(one.tuned), "--base", str(one.base), "--budget", str(budget), "--out", str(work / "d"), "-q",
            *more)  # fmt: skip
    return size(work / "d"), weights(one, work / "d", work / "m")


def calibration(one: Subject, work: Path) -> Path:
    out = work / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in one.rows), encoding="utf-8")
    return out


def entries(one: Subject, budget: int, work: Path, prune: Mapping[str, Any]) -> tuple[int, State]:
    """An artifact of single entries, of one bit each."""
    recipe: dict[str, Any] = {
        "base_model": str(one.base.resolve()),
        "models": [{"model": str(one.tuned.resolve()), "prune": {"budget": budget, **prune}}],
        "output": {"kind": "delta", "semantics": "add", "values": "sign"},
    }
    if "q" in prune:
        recipe["calibration"] = {"data": str(calibration(one, work)), "text": "text"}
    (work / "r.yaml").write_text(yaml.safe_dump(recipe))
    command("run", str(work / "r.yaml"), "--out", str(work / "d"), "-q")
    return size(work / "d"), weights(one, work / "d", work / "m")


def lora(one: Subject, budget: int, work: Path) -> tuple[int, State]:
    sides = ["--lora", "", "--budget", str(budget), "--whole", "heads"]
    command("extract", str(one.tuned), "--base", str(one.base), *sides, "--out", str(work / "d"), "-q")
    (work / "r.yaml").write_text(
        yaml.safe_dump({"merge_method": "passthrough", "models": [f"{one.base.resolve()}+{work / 'd'}"]})
    )
    command("run", str(work / "r.yaml"), "--out", str(work / "m"), "-q")
    made = load_file(work / "m" / "model.safetensors")
    made |= {name: tensor for name, tensor in load_file(one.tuned / "model.safetensors").items() if is_head(name)}
    return (work / "d" / "adapter_model.safetensors").stat().st_size, made


def is_head(name: str) -> bool:
    return name.startswith(("classifier", "score"))


def linear(one: Subject) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Name, the base's name, base and delta of the weights of linear layers."""
    base, tuned = load_file(one.base / "model.safetensors"), load_file(one.tuned / "model.safetensors")
    for name, tensor in tuned.items():
        stored = name if name in base else name.removeprefix("bert.")
        if tensor.ndim == 2 and stored in base and "embed" not in name:
            yield name, stored, base[stored], tensor.float() - base[stored].float()


def added(one: Subject, deltas: Mapping[str, Tensor]) -> State:
    """The base's weights with deltas of some, and the fine-tune's head, in the fine-tune's names."""
    base, tuned = load_file(one.base / "model.safetensors"), load_file(one.tuned / "model.safetensors")
    made: State = {}
    for name, tensor in tuned.items():
        stored = base.get(name if name in base else name.removeprefix("bert."))
        old = tensor if stored is None or is_head(name) else stored
        made[name] = (old.float() + deltas[name]).to(old.dtype) if name in deltas else old
    return made


def bitdelta(one: Subject, budget: int, work: Path) -> tuple[int, State]:
    deltas, nbytes = {}, 0
    for name, _, _, delta in linear(one):
        deltas[name] = delta.sign() * delta.abs().mean()
        nbytes += -(-delta.numel() // 8) + 4
    return nbytes, added(one, deltas)


def delta_come(one: Subject, budget: int, work: Path) -> tuple[int, State]:
    found = {name: delta for name, _, _, delta in linear(one)}

    def bits_of(rank: int) -> list[int]:
        return [8 if i < 2 else 3 if i < 34 else 2 for i in range(rank)]

    def nbytes(share: float) -> int:
        total = 0
        for delta in found.values():
            m, n = delta.shape
            total += sum((m + n) * b // 8 + 4 for b in bits_of(int(share * min(m, n))))
        return total

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if nbytes(middle) <= budget else (low, middle)
    deltas = {}
    for name, delta in found.items():
        rank = int(low * min(delta.shape))
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * root, v[:rank].T * root
        bits = bits_of(rank)
        deltas[name] = (nearest(left, bits) @ nearest(right, bits).T).float()
    return nbytes(low), added(one, deltas)


def nearest(columns: Tensor, bits: Sequence[int]) -> Tensor:
    """Each column on a symmetric grid of so many bits, with the scale of least squared error of 40."""
    made = torch.zeros_like(columns)
    for i, width in enumerate(bits):
        column, best = columns[:, i], math.inf
        levels = 2 ** (width - 1)
        for part in np.linspace(0.2, 1, 40):
            scale = float(column.abs().max()) * part / (levels - 0.5)
            if scale <= 0:
                continue
            coded = ((column / scale - 0.5).round().clamp(-levels, levels - 1) + 0.5) * scale
            if (lost := float((coded - column).square().sum())) < best:
                made[:, i], best = coded, lost
    return made


Make = Callable[[Subject, int, Path], tuple[int, State]]
METHODS: dict[str, Make] = {
    "ours": lambda one, budget, work: ours(one, budget, work, rows=False),
    "ours with rows": lambda one, budget, work: ours(one, budget, work, rows=True),
    "LoRA by SVD": lora,
    "Delta-CoMe": delta_come,
    "BitDelta": bitdelta,
    "DARE": lambda one, budget, work: entries(one, budget, work, {"method": "dare"}),
    "DAREx-q": lambda one, budget, work: entries(one, budget, work, {"method": "dare", "q": "output_change"}),
    "magnitude": lambda one, budget, work: entries(one, budget, work, {"method": "magnitude"}),
    "magnitude q_e": lambda one, budget, work: entries(
        one, budget, work, {"method": "magnitude", "q": "output_change"}
    ),
}
CALIBRATED = ("DAREx-q", "magnitude q_e")


def known(file: Path) -> list[Cell]:
    if not file.exists():
        return []
    return [Cell(**one) for one in json.loads(file.read_text(encoding="utf-8"))["cells"]]


def keep(file: Path, cell: Cell, whole: float) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"fine-tunes": {}, "cells": []}
    found["fine-tunes"][cell.model] = round(whole, 2)
    found["cells"].append(cell._asdict())
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def measure(file: Path, names: Iterable[str], ratios: Iterable[int], methods: Sequence[str], count: int) -> None:
    for name in names:
        one = subject(name, count)
        whole = (one.tuned / "model.safetensors").stat().st_size
        for ratio in ratios:
            for method in methods:
                done = {(cell.model, cell.ratio, cell.method) for cell in known(file)}
                if (name, ratio, method) in done or (method == "BitDelta" and ratio != 16):
                    continue
                if method in CALIBRATED and isinstance(one, Decoder):
                    continue
                begun = time.perf_counter()
                with tempfile.TemporaryDirectory() as work:
                    try:
                        nbytes, state = METHODS[method](one, whole // ratio, Path(work))
                    except subprocess.CalledProcessError:
                        print(f"{name} 1/{ratio} {method}: does not fit", flush=True)
                        continue
                    kl, score = one.measure(state)
                keep(file, Cell(name, ratio, method, nbytes, float(f"{kl:.4g}"), round(score, 2)), one.score)
                print(f"{name} 1/{ratio} {method}: {nbytes:,} bytes, KL {kl:.4g}, {score:.1f} of {one.score:.1f}, "
                      f"{time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip


# ---- the page


def tables(cells: Sequence[Cell], whole: Mapping[str, float]) -> str:
    lines: list[str] = []
    for model in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if cell.model == model]
        ratios = sorted({cell.ratio for cell in own})
        lines += [f"**{model}** (fine-tune {whole[model]:.1f}): KL / score", ""]
        lines += ["| method | " + " | ".join(f"1/{ratio}" for ratio in ratios) + " |", "|---" * (1 + len(ratios)) + "|"]
        for method in METHODS:
            row = {cell.ratio: f"{cell.kl:.3g} / {cell.score:.1f}" for cell in own if cell.method == method}
            if row:
                lines.append(f"| {method} | " + " | ".join(row.get(ratio, "–") for ratio in ratios) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """KL by ratio, a panel for each model; both as logarithms."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.ratio):
        own = panels.setdefault(cell.model, {}).setdefault(cell.method, [])
        own.append((math.log2(cell.ratio), math.log10(max(cell.kl, 1e-9))))
    title = "What a delta of so many bytes loses of a fine-tune"
    draw_lines(path, title, panels, "log2 of the ratio", ["log10 of the KL"] * len(panels))


def documented(text: str, file: Path = FILE) -> str:
    """The page with the tables of the results between its marks."""
    before, _, rest = text.partition("<!-- tables -->\n")
    found = json.loads(file.read_text(encoding="utf-8"))["fine-tunes"]
    return f"{before}<!-- tables -->\n\n{tables(known(file), found)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def page() -> None:
    """Write the page's tables, and the picture beside it."""
    PAGE.write_text(documented(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(known(FILE), PAGE.parent / "pictures" / "bytes.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="sentiment, intensity, or smollm2:NAME")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rows", type=int, default=1500, help="test rows of encoders; decoders take 100 at most")
    parser.add_argument("--out", type=Path, default=FILE, help="results that cells are added to")
    parser.add_argument("--page", action="store_true", help="write docs/measurements/bytes.md and its picture")
    asked = parser.parse_args()
    quality.quiet()
    measure(asked.out, asked.models, asked.ratios, asked.methods, asked.rows)
    if asked.page:
        page()


if __name__ == "__main__":
    process.keep_pages()
    main()
