"""Table G.1, a vision transformer: what each way of pruning keeps of a small ViT's digits."""

from __future__ import annotations

from functools import partial

from training import adamr, adamw

from paper import digits, pruned
from paper.frame import Experiment, Record, Setting
from paper.pruned import Subject

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
}
DECAY = 0.1


def subject(setting: Setting, trainer: str) -> Subject:
    """A fine-tune, trained if it is not kept."""
    data = digits.parts(setting.toy)
    pretrain = {"steps": setting.pick(1000, 3), "seed": setting.seed}
    base = setting.folder("vit-base", pretrain, partial(digits.build_base, data["train"].images_NHW, **pretrain))
    tuning = {"steps": setting.pick(400, 3), "seed": setting.seed}
    factory = adamw if trainer == "AdamW" else adamr(base, DECAY)
    tuned = setting.folder(
        f"vit-{trainer}",
        {"base": base.name, **tuning} | ({"decay": DECAY} if trainer == "AdamR-L2" else {}),
        partial(digits.fine_tune, base, data["train"], factory=factory, **tuning),
    )
    pictures = setting.folder("digits", {}, partial(digits.write, data["validation"]))
    calibration = {"data": str(pictures), "sequences": setting.pick(100, 8), "seeds": setting.pick(3, 2)}
    score = partial(digits.accuracy, data=data["test"])
    return Subject(base, str(tuned), calibration, score, {"rows": len(data["test"].labels_N)})


def table_g1(setting: Setting) -> Record:
    names = setting.pick(NAMES, {trainer: some[:2] for trainer, some in NAMES.items()})
    densities, seeds = setting.pick((DENSITIES, 3), ((0.1,), 1))
    found = pruned.fine_tunes(setting, subject, names, densities, seeds)
    return {"test_rows": len(digits.parts(setting.toy)["test"].labels_N), "fine-tunes": found}


def show_table_g1(record: Record) -> str:
    return (
        f"Accuracy in % on {record['test_rows']} images: a ViT of 0.2 M parameters (4 layers of width 64, patches of "
        "2 × 2), trained from scratch on scikit-learn's 8 × 8 digits to tell by which of the square's symmetries they "
        "were turned, then fine-tuned to the ten digits. q is calibrated on a folder of pictures. The paper has a ViT "
        "fine-tuned to CIFAR-100; its figures are not at hand.\n\n"
    ) + pruned.by_trainer(record["fine-tunes"])


EXPERIMENTS = (Experiment("table-g1", "Table G.1: a vision transformer", table_g1, show_table_g1, 3),)
