"""Table G.1, a vision transformer: what each way of pruning keeps of a small ViT's digits."""

from __future__ import annotations

from functools import partial

from paper import digits, pruned
from paper.frame import Experiment, Record, Setting
from paper.pruned import Subject
from paper.training import adamr

DENSITIES = (0.3, 0.1, 0.05, 0.01)
NAMES = (
    "DARE",
    "DAREx-q, q_v",
    "DAREx-q per layer, q_v",
    "DAREx-q, q_e",
    "DAREx-q per layer, q_e",
    "importance sampling, q_e",
    "magnitude",
    "magnitude, q_e",
    "WANDA, q_e",
)
WITH_ADAMR = ("DARE", "DAREx-q, q_e", "magnitude, q_e")
DECAY = 0.1


def table_g1(setting: Setting) -> Record:
    data = digits.parts(setting.toy)
    pretrain = {"steps": setting.pick(1000, 3), "seed": setting.seed}
    base = setting.folder("vit-base", pretrain, partial(digits.build_base, data["train"].images_NHW, **pretrain))
    pictures = setting.folder("digits", {}, partial(digits.write, data["validation"]))
    calibration = {"data": str(pictures), "sequences": setting.pick(100, 8), "seeds": setting.pick(3, 2)}
    record: Record = {"test_rows": len(data["test"].labels_N), "fine-tunes": {}}
    for trainer, names in (("AdamW", NAMES), ("AdamR-L2", WITH_ADAMR)):
        tuning = {"base": base.name, "steps": setting.pick(400, 3), "seed": setting.seed}
        decay = {} if trainer == "AdamW" else {"factory": adamr(base, DECAY)}
        made_of = tuning | ({"decay": DECAY} if decay else {})
        tuned = setting.folder(
            f"vit-{trainer}",
            made_of,
            partial(digits.fine_tune, base, data["train"], steps=tuning["steps"], seed=setting.seed, **decay),
        )
        subject = Subject(
            base, str(tuned), calibration, partial(digits.accuracy, data=data["test"]), {"rows": record["test_rows"]}
        )
        chosen = setting.pick(names, names[:4:3])
        record["fine-tunes"][trainer] = pruned.whole(setting, subject) | {
            "rows": pruned.scores(setting, subject, chosen, setting.pick(DENSITIES, (0.1,)), setting.pick(3, 1))
        }
    return record


def show_table_g1(record: Record) -> str:
    return (
        f"Accuracy in % on {record['test_rows']} images: a ViT of 0.2 M parameters (4 layers of width 64, patches of "
        "2 × 2), trained from scratch on scikit-learn's 8 × 8 digits to tell by which of the square's symmetries they "
        "were turned, then fine-tuned to the ten digits. q is calibrated on a folder of pictures. The paper has a ViT "
        "fine-tuned to CIFAR-100; its figures are not at hand.\n\n"
    ) + pruned.by_trainer(record["fine-tunes"])


EXPERIMENTS = (Experiment("table-g1", "Table G.1: a vision transformer", table_g1, show_table_g1, 5),)
