"""Table G.1, a vision transformer: what each way of pruning keeps of a small ViT's clothes."""

from __future__ import annotations

from functools import partial

from benchmarks.paper import fashion, pictures, pruned
from benchmarks.paper.frame import Experiment, Record, Setting
from benchmarks.paper.pruned import Subject
from benchmarks.training import adamr, adamw

DENSITIES = (0.3, 0.1, 0.05, 0.01)
# Trainer -> by what its fine-tune is pruned.
NAMES = {
    "AdamW": (
        "DARE",
        "DAREx-q, q_e",
        "DAREx-q, q_v",
        "DAREx-q per layer, q_e",
        "DAREx-q per layer, q_v",
        "importance sampling, q_e",
        "magnitude",
        "magnitude, q_e",
        "WANDA, q_e",
    ),
    "AdamR-L2": ("DARE", "DAREx-q, q_e", "magnitude, q_e"),
    "AdamW, small lr": ("DARE", "DAREx-q, q_e", "importance sampling, q_e", "magnitude, q_e", "WANDA, q_e"),
}
DECAY = 0.1
SMALL = 2e-4  # learning rate; the others have fine_tune's own


PATCH = 4


def subject(setting: Setting, trainer: str) -> Subject:
    """A fine-tune, trained if it is not kept."""
    data = fashion.parts(setting.work, setting.toy)
    first = {"steps": setting.pick(1500, 3), "seed": setting.seed, "patch": PATCH}
    base = setting.folder("vit-base", first, partial(pictures.pretrain, data["pretrain"], **first))
    tuning = {"steps": setting.pick(400, 3), "seed": setting.seed}
    tuning |= {"lr": SMALL} if trainer == "AdamW, small lr" else {}
    factory = adamr(base, DECAY) if trainer == "AdamR-L2" else adamw
    tuned = setting.folder(
        f"vit-{trainer.replace(', ', '-').replace(' ', '-')}",
        {"base": base.name, **tuning} | ({"decay": DECAY} if trainer == "AdamR-L2" else {}),
        partial(pictures.fine_tune, base, data["train"], factory=factory, **tuning),
    )
    rows = setting.folder("clothes", {}, partial(pictures.write, data["validation"]))
    calibration = {"data": str(rows), "sequences": setting.pick(60, 8), "seeds": 2}
    score = partial(pictures.accuracy, data=data["test"])
    return Subject(base, str(tuned), calibration, score, {"rows": len(data["test"].labels_N)})


def table_g1(setting: Setting) -> Record:
    names = setting.pick(NAMES, {trainer: NAMES[trainer][:2] for trainer in ("AdamW", "AdamR-L2")})
    densities, seeds = setting.pick((DENSITIES, 3), ((0.1,), 1))
    return {
        "test_rows": setting.pick(fashion.TEST, 40),
        "fine-tunes": pruned.fine_tunes(setting, subject, names, densities, seeds),
    }


def show_table_g1(record: Record) -> str:
    return (
        f"Accuracy in % on {record['test_rows']} images of Fashion-MNIST: a ViT of 0.2 M parameters (4 layers of width "
        "64, patches of 4 × 4), trained from scratch on five of its classes (shoes, shirts and bags), then fine-tuned "
        "to the other five (tops, trousers, pullovers, dresses and coats) with a fresh head. q is calibrated on a "
        "folder of pictures. The paper has a ViT fine-tuned to CIFAR-100; its figures are not at hand.\n\n"
    ) + pruned.by_trainer(record["fine-tunes"])


EXPERIMENTS = (Experiment("table-g1", "Table G.1: a vision transformer", table_g1, show_table_g1, 8),)
