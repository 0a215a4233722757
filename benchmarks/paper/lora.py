"""Tables 4 and 16, LoRA: the adapter's own A and B pruned, with a calibrated q, and trained with AdamR."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from benchmarks import encoder
from benchmarks.paper import encoders, pruned
from benchmarks.paper.frame import Experiment, Record, Setting
from benchmarks.paper.pruned import Subject
from benchmarks.tasks import TASKS
from benchmarks.training import OptimizerFactory, adamw, trained
from deltamerge import AdamR

TASK = "sentiment"
RANK, ALPHA, LR = 8, 16, 2e-3
DENSITIES = (0.7, 0.5, 0.3, 0.1)
# Trainer -> by what its fine-tune is pruned.
NAMES = {
    "AdamW": ("DARE", "DAREx-q, q_v", "DAREx-q, q_e", "importance sampling", "magnitude", "magnitude, q_e"),
    "AdamR-L2": ("DARE", "DAREx-q, q_e", "magnitude, q_e"),
}
DECAY = 0.01


def with_head(base: Path, out: Path, seed: int) -> None:
    """The base with a head: a q is calibrated on a model whose config the adapter does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=TASKS[TASK].labels)
    model.float().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def fine_tune(setting: Setting, base: Path, factory: OptimizerFactory, out: Path) -> None:
    """A LoRA adapter of every linear layer of the encoder, and the head."""
    from peft import LoraConfig, get_peft_model

    steps, size = setting.pick(300, 3), 16
    rows = encoders.tasks.rows(TASK, "train", encoders.rows_folder(setting))
    rng = torch.Generator().manual_seed(setting.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    batches = []
    for _ in range(steps):
        some = [rows[i] for i in torch.randint(0, len(rows), (size,), generator=rng).tolist()]
        batches.append(encoder.encode(tokenizer, some) | {"labels": torch.tensor([int(row.label) for row in some])})
    config = LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=["query", "key", "value", "dense"],
        exclude_modules=["bert.pooler.dense"], modules_to_save=["classifier"],
    )  # fmt: skip

    def adapted() -> Any:
        with _quiet():
            return get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)

    trained(adapted, batches, steps=steps, lr=LR, seed=setting.seed, factory=factory).save_pretrained(out)


def adamr(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
    """AdamR that pulls A and B to zero: they are what is pruned. The head is fresh."""
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if "lora_" in name}
    return AdamR.for_model(model, zeros, lr=lr, decay=DECAY, fresh=["classifier"])


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT 0.21 reads a property that transformers 5 renames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def subject(setting: Setting, trainer: str) -> Subject:
    """A fine-tune, trained if it is not kept."""
    start = encoders.base(setting)
    base = setting.folder("lora-base", {"base": start.name}, partial(with_head, start, seed=setting.seed))
    made_of = {"base": base.name, "steps": setting.pick(300, 3), "lr": LR, "rank": RANK}
    made_of |= {"decay": DECAY} if trainer == "AdamR-L2" else {}
    factory = adamw if trainer == "AdamW" else adamr
    adapter = setting.folder(f"lora-{trainer}", made_of, partial(fine_tune, setting, base, factory))
    test = encoders.rows(setting, TASK, "test")
    data = encoders.rows_folder(setting) / f"{TASK}.validation.jsonl"
    calibration = {
        "data": str(data), "sequences": setting.pick(50, 4), "length": setting.pick(40, 12), "seeds": 2,
    }  # fmt: skip

    def score(folder: Path) -> float:
        from peft import PeftModel

        adapter = str(folder).rpartition("+")[2]
        with _quiet():
            model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter)
        return encoder.score(model, TASKS[TASK], test, tokenizer=AutoTokenizer.from_pretrained(base))

    return Subject(base, f"{base}+{adapter}", calibration, score, {"rows": len(test)}, {"kind": "peft"})


def table_4(setting: Setting) -> Record:
    names = setting.pick(NAMES, {trainer: some[::2][:2] for trainer, some in NAMES.items()})
    densities, seeds = setting.pick((DENSITIES, 3), ((0.1,), 1))
    found = pruned.fine_tunes(setting, subject, names, densities, seeds)
    return {"task": TASK, "test_rows": len(encoders.rows(setting, TASK, "test")), "rank": RANK, "fine-tunes": found}


def show_table_4(record: Record) -> str:
    return (
        f"Accuracy in % on {record['test_rows']} rows of {record['task']}: LoRA of rank {record['rank']} on every "
        "linear layer of the small encoder. The entries of A and B are pruned at this rate each "
        "(`output: {kind: peft}`, loaded by plain PEFT), so that of the products that B A is a sum of the square of "
        "the density is left. AdamR-L2 pulls A and B to zero. The paper's figures are not at hand.\n\n"
    ) + pruned.by_trainer(record["fine-tunes"])


EXPERIMENTS = (Experiment("table-4", "Tables 4 and 16: LoRA", table_4, show_table_4, 8),)
