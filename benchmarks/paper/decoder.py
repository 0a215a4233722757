"""Table 3, decoders: a Llama of a million parameters, trained on arithmetic, fine-tuned to word problems."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from training import Batch, OptimizerFactory, adamr, adamw, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paper import arithmetic, pruned
from paper.arithmetic import Problem
from paper.frame import Experiment, Record, Setting
from paper.pruned import Subject

WIDTH, INNER, HEADS = 128, 512, 4
ROW = 48  # tokens of a row of the corpus


def build_base(out: Path, *, steps: int, seed: int, layers: int = 4, lr: float = 3e-3, batch_size: int = 16) -> None:
    """Train a Llama from scratch on `arithmetic.corpus`, documents packed into rows."""
    tokenizer = arithmetic.tokenizer(out)
    ids: list[int] = []
    documents = arithmetic.corpus(seed)
    rows = steps * batch_size
    while len(ids) < rows * ROW:
        some = [document + arithmetic.EOS for document in islice(documents, 1000)]
        ids += [i for document in tokenizer(some)["input_ids"] for i in document]
    tokens = torch.tensor(ids[: rows * ROW]).view(steps, batch_size, ROW)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    batches = [{"input_ids": batch, "labels": batch} for batch in tokens]
    trained(lambda: LlamaForCausalLM(config), batches, steps=steps, lr=lr, seed=seed).save_pretrained(out)


def fine_tune(
    base: Path,
    out: Path,
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    batch_size: int = 16,
    factory: OptimizerFactory = adamw,
) -> None:
    """Teach `base` to answer word problems; only the answer and the end of the sequence are scored."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = arithmetic.problems(steps * batch_size, seed + 1)
    batches = [_batch(tokenizer, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    load = partial(AutoModelForCausalLM.from_pretrained, base, dtype=torch.float32)
    trained(load, batches, steps=steps, lr=lr, seed=seed, factory=factory).save_pretrained(out)
    tokenizer.save_pretrained(out)


def exact_match(folder: Path, rows: Sequence[Problem], new_tokens: int, batch_size: int = 128) -> float:
    """Share of problems, in %, whose generated answer ends in the right number."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    by_length = sorted(rows, key=lambda row: len(row.text.split()))
    for start in range(0, len(rows), batch_size):
        some = by_length[start : start + batch_size]
        inputs = tokenizer([row.text for row in some], padding=True, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(_number(text) == _number(row.label) is not None for text, row in zip(texts, some, strict=True))
    return 100 * right / len(rows)


def write(rows: Sequence[Problem], folder: Path) -> None:
    """Rows as calibration data."""
    folder.mkdir()
    (folder / "problems.jsonl").write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")


def _number(text: str) -> str | None:
    found = re.search(arithmetic.ANSWER, text.strip())
    return found[1] if found else None


def _batch(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Problem]) -> Batch:
    """Problems with their answers and an end, padded on the right; the problem's tokens are not scored."""
    batch = dict(
        tokenizer([f"{row.text} {row.label}{arithmetic.EOS}" for row in rows], padding=True, return_tensors="pt")
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for i, row in enumerate(rows):
        labels[i, : len(tokenizer(row.text)["input_ids"])] = -100
    return batch | {"labels": labels}


DENSITIES = (0.5, 0.3, 0.1, 0.05, 0.01)
# Trainer -> by what its fine-tune is pruned.
NAMES = {
    "AdamW": (
        "DARE",
        "DAREx-q, q_e",
        "DAREx-q, q_v",
        "magnitude",
        "magnitude, q_e",
        "DAREx-q per layer, q_e",
        "DAREx-q per layer, q_v",
        "importance sampling",
    ),
    "AdamR-L2": ("DARE", "DAREx-q, q_e"),
}
DECAY = 0.003
TEST = (200, 8)  # problems that are scored, and at toy scale


def subject(setting: Setting, trainer: str) -> Subject:
    """A fine-tune, trained if it is not kept."""
    pretrain = {"steps": setting.pick(400, 2), "layers": setting.pick(4, 1), "batch_size": setting.pick(16, 4)}
    pretrain |= {"seed": setting.seed}
    base = setting.folder("decoder-base", pretrain, partial(build_base, **pretrain))
    tuning = {"steps": setting.pick(400, 2), "batch_size": setting.pick(32, 4), "seed": setting.seed}
    tuned = setting.folder(
        f"decoder-{trainer}",
        {"base": base.name, **tuning, "decay": 0 if trainer == "AdamW" else DECAY},
        partial(fine_tune, base, factory=adamw if trainer == "AdamW" else adamr(base, DECAY), **tuning),
    )
    rows = arithmetic.problems(setting.pick(400, 20), seed=20_000 + setting.seed)
    data = setting.folder("problems", {"first": rows[0].text, "count": len(rows)}, partial(write, rows))
    new_tokens = setting.pick(20, 2)
    calibration = {
        "data": str(data / "problems.jsonl"), "sequences": setting.pick(32, 4), "length": 64, "seeds": 2,
        "task": "text-generation", "metric": "exact_match", "answer": arithmetic.ANSWER, "new_tokens": new_tokens,
    }  # fmt: skip
    test = arithmetic.problems(setting.pick(*TEST), seed=10_000 + setting.seed)
    score = partial(exact_match, rows=test, new_tokens=new_tokens)
    return Subject(base, str(tuned), calibration, score, {"rows": len(test)})


def table_3(setting: Setting) -> Record:
    names = setting.pick(NAMES, {trainer: some[:2] for trainer, some in NAMES.items()})
    densities, seeds = setting.pick((DENSITIES, 2), ((0.1,), 1))
    return {
        "test_rows": setting.pick(*TEST),
        "fine-tunes": pruned.fine_tunes(setting, subject, names, densities, seeds),
    }


# Exact match on GSM8K at p = 0.99.
PAPER = {
    "": ("MetaMath-Qwen2-0.5B, p = 0.99", "MetaMath-7B, p = 0.99"),
    "unpruned": (42.00, 65.50),
    "DARE": (0.00, 0.00),
    "DAREx-q, q_v": (19.17, 34.87),
    "DAREx-q per layer, q_v": (18.65, 32.06),
    "DAREx-q, q_e": (18.95, 32.60),
    "DAREx-q per layer, q_e": (17.66, 28.05),
}


def show_table_3(record: Record) -> str:
    return (
        f"Exact match in % on {record['test_rows']} generated word problems: the last number of what the model writes. "
        "q_v is searched on exact match itself (`metric: exact_match`). A Llama of 1.06 M parameters, trained for "
        "minutes, has little that is redundant: it loses at densities where the paper's models of 0.5 B and more lose "
        "nothing, so the columns where methods differ are those of larger densities. The last two are the paper's, "
        "on GSM8K.\n\n"
    ) + pruned.by_trainer(record["fine-tunes"], PAPER)


EXPERIMENTS = (Experiment("table-3", "Table 3: decoders", table_3, show_table_3, 9),)
