"""Tables 1, 2, 5 to 9 on the small encoder: what each way of pruning keeps of three fine-tunes."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from benchmarks.paper import encoders, published
from benchmarks.paper.encoders import METHODS, scores_of
from benchmarks.paper.frame import Experiment, Record, Setting, spread, table
from benchmarks.tasks import TASKS

# (trainer, method): the paper's, then ours. The first of each trainer is the fine-tune itself.
PAPER = (
    ("AdamW", "DARE"),
    ("AdamW", "DAREx-q, q_v"),
    ("AdamW", "DAREx-q per layer, q_v"),
    ("AdamW", "DAREx-q, q_e"),
    ("AdamW", "DAREx-q per layer, q_e"),
    ("AdamR-L2", "DARE"),
    ("AdamR-L1", "magnitude"),
)
BEYOND = (
    ("AdamW", "magnitude"),
    ("AdamW", "WANDA"),
    ("AdamW", "importance sampling"),
    ("AdamW", "importance sampling, q_e"),
    ("AdamW", "magnitude, q_e"),
    ("AdamW", "magnitude of the model, q_e"),
    ("AdamW", "WANDA, q_e"),
    ("AdamW", "magnitude, least squares per layer"),
    ("AdamW", "WANDA, least squares per layer"),
    ("AdamW", "magnitude, learned per row"),
    ("AdamR-L2", "DAREx-q, q_e"),
    ("AdamR-L2", "magnitude, q_e"),
    ("AdamR-L1", "magnitude, q_e"),
)
CHEAP = (("AdamW", "DARE"), ("AdamW", "magnitude"), ("AdamW", "WANDA"), ("AdamR-L2", "DARE"), ("AdamR-L1", "magnitude"))


def rows_of(setting: Setting, pairs: Any, density: float, tasks: list[str]) -> list[dict[str, Any]]:
    """Of each (trainer, method) what was found per task, for every mask: score, q, forward passes, CPU seconds."""
    return [
        {
            "trainer": trainer,
            "method": method,
            "cells": {t: encoders.cells(setting, t, trainer, METHODS[method], density) for t in tasks},
        }
        for trainer, method in pairs
    ]


def whole_of(
    setting: Setting, tasks: list[str], trainers: Any = tuple(encoders.TRAINERS)
) -> dict[str, dict[str, float]]:
    return {trainer: {t: encoders.unpruned(setting, t, trainer) for t in tasks} for trainer in trainers}


def table_1(setting: Setting) -> Record:
    tasks = setting.pick(list(TASKS), ["sentiment"])
    few = (("AdamW", "DARE"), ("AdamW", "DAREx-q, q_e"), ("AdamR-L1", "magnitude"))
    return {
        "unpruned": whole_of(setting, tasks),
        "0.99": rows_of(setting, setting.pick((*PAPER, *BEYOND), few), 0.01, tasks),
        "0.9": rows_of(setting, setting.pick(CHEAP, CHEAP[:1]), 0.1, tasks),
    }


def show_table_1(record: Record) -> str:
    whole, tasks = record["unpruned"], list(record["unpruned"]["AdamW"])
    head = ["trained with", "pruned by", *(f"{t}, %" for t in tasks), "kept, %", *published.ENCODERS]
    parts = []
    for p in ("0.99", "0.9"):
        rows = [_whole_row(trainer, whole[trainer], whole["AdamW"], p == "0.99") for trainer in whole]
        rows += [_row(row, whole["AdamW"], p == "0.99") for row in record[p]]
        parts.append(f"p = {p}:\n\n{table(head if p == '0.99' else head[:-4], rows)}")
    return "\n".join(parts) + (
        "\nThe last four columns of p = 0.99 are the paper's, empty where it has no such row. *Kept* is the mean over "
        "tasks of the score's share of the unpruned AdamW model's. Everything but the head is pruned.\n"
    )


def _whole_row(trainer: str, scores: dict[str, float], own: dict[str, float], paper: bool) -> list[Any]:
    shares = [100 * scores[t] / own[t] for t in own]
    return [
        trainer,
        "unpruned",
        *scores.values(),
        f"{fmean(shares):.0f}",
        *(_published("unpruned" if trainer == "AdamW" else "") if paper else []),
    ]


def _row(row: dict[str, Any], own: dict[str, float], paper: bool) -> list[Any]:
    name = row["method"] if row["trainer"] == "AdamW" else f"{row['trainer']}, {row['method']}"
    scores = {task: scores_of(found) for task, found in row["cells"].items()}
    return [
        row["trainer"],
        row["method"],
        *(spread(values) if values else None for values in scores.values()),
        f"{fmean(100 * fmean(values) / own[t] for t, values in scores.items()):.0f}" if all(scores.values()) else None,
        *(_published(name) if paper else []),
    ]


def _published(name: str) -> list[str | None]:
    return [f"{score:.2f}" for score in published.HEADLINE.get(name, ())] or [None] * len(published.ENCODERS)


DENSITIES = (0.1, 0.03, 0.01)
FOUR = ("magnitude", "WANDA", "DARE", "random drop")


def table_6(setting: Setting) -> Record:
    tasks = setting.pick(["sentiment", "intensity"], ["sentiment"])
    trainers = setting.pick(list(encoders.TRAINERS), ["AdamW", "AdamR-L2"])
    densities = setting.pick(DENSITIES, (0.1,))
    return {
        "unpruned": whole_of(setting, tasks, trainers),
        "rows": [
            {"density": d} | row
            for d in densities
            for row in rows_of(setting, [(t, m) for t in trainers for m in FOUR], d, tasks)
        ],
    }


def show_table_6(record: Record) -> str:
    """A column for each drop rate; a row for each task, trainer and method."""
    densities = list(dict.fromkeys(row["density"] for row in record["rows"]))
    lines = []
    for trainer, by_task in record["unpruned"].items():
        for task, own in by_task.items():
            for method in FOUR:
                found = {
                    row["density"]: spread(scores) if (scores := scores_of(row["cells"][task])) else None
                    for row in record["rows"]
                    if (row["trainer"], row["method"]) == (trainer, method)
                }
                lines.append([task, trainer, method, own, *(found[d] for d in densities)])
    head = ["task", "trained with", "pruned by", "unpruned", *(f"p = {1 - d:g}" for d in densities)]
    return table(head, lines) + "\nNothing is calibrated here: q = 1, but for DARE, whose q is the density.\n"


def table_9(setting: Setting) -> Record:
    tasks = setting.pick(list(TASKS), ["sentiment"])
    methods = setting.pick(("DARE", "DAREx-q, q_e", "structured", "structured, q_e"), ("structured",))
    trainers = setting.pick(("AdamW", "AdamR-L2"), ("AdamW",))
    pairs = [(t, m) for t in trainers for m in methods if t == "AdamW" or m in ("DARE", "structured")]
    return {"unpruned": whole_of(setting, tasks, trainers), "rows": rows_of(setting, pairs, 0.01, tasks)}


def show_table_9(record: Record) -> str:
    whole = record["unpruned"]
    rows = [_whole_row(trainer, whole[trainer], whole["AdamW"], False) for trainer in whole]
    rows += [_row(row, whole["AdamW"], False) for row in record["rows"]]
    return table(["trained with", "pruned by", *(f"{t}, %" for t in whole["AdamW"]), "kept, %"], rows) + (
        "\nStructured: a tenth of a layer's input columns, a tenth of the entries of those; density 0.01 as in the "
        "paper.\n"
    )


def table_8(setting: Setting) -> Record:
    """What `deltamerge inspect --calibration` says of every fine-tune."""
    from deltamerge.apps.inspect.study import inspect

    found = {}
    for trainer in encoders.TRAINERS:
        for task in setting.pick(list(TASKS), ["sentiment"]):
            tuned = encoders.fine_tune(setting, task, trainer)
            data = encoders.rows_folder(setting) / f"{task}.validation.jsonl"
            calibration = {"data": str(data), "sequences": setting.pick(50, 4), "length": 32}

            def measure(tuned: Any = tuned, calibration: Any = calibration) -> dict[str, float]:
                seen = inspect(
                    str(tuned), str(encoders.base(setting)), calibration=calibration, device="cpu", workers=1
                )
                assert seen.activations is not None
                total = seen.activations.total
                names = ("mean_abs_influence", "influence", "influence_variance", "coherence", "dare_error")
                return {
                    "mean_abs": seen.total.mean_abs,
                    "relative_norm": seen.total.relative_norm or 0.0,
                    "mean_abs_delta": total.mean_abs_delta,
                    **{name: getattr(total, name) for name in names},
                }

            statistics = setting.once(f"{task}-{trainer}-statistics", {"tuned": tuned.name, **calibration}, measure)
            kept = scores_of(encoders.cells(setting, task, trainer, METHODS["DARE"], 0.01))
            own = encoders.unpruned(setting, task, trainer)
            found[f"{task}, {trainer}"] = statistics | {"kept": 100 * fmean(kept) / own}
    return found


def show_table_8(record: Record) -> str:
    head = ["model", "mean abs(Δ)", "‖Δ‖/‖W‖", "mean abs(c)", "c̄", "σ²", "D/A", "DARE keeps at p = 0.99, %"]
    rows = [
        [
            name,
            *(
                f"{one[key]:.1e}"
                for key in ("mean_abs_delta", "relative_norm", "mean_abs_influence", "influence", "influence_variance")
            ),
            f"{one['coherence']:.2f}",
            f"{one['kept']:.0f}",
        ]
        for name, one in record.items()
    ]
    rows += [
        [f"*{name} (paper)*", f"{size:.1e}", None, f"{influence:.1e}", None, None, None, says]
        for name, (size, influence, says) in published.STATISTICS.items()
    ]
    return table(head, rows) + (
        "\nOf the linear weights, c_ij = Δ_ij x_j over 50 validation rows (`deltamerge inspect --calibration`).\n"
    )


SMALL = 2e-4  # learning rate, a quarter of the task's own
SMALL_DENSITIES = (0.1, 0.01)
ENOUGH = ("DARE", "DAREx-q, q_v", "DAREx-q, q_e", "importance sampling", "magnitude", "magnitude, q_e")


def small(setting: Setting) -> Record:
    """Of two learning rates: mean abs(Δ), the unpruned score, the cells of each method and density."""
    from deltamerge.apps.inspect.study import inspect

    found = {}
    methods, densities = setting.pick((ENOUGH, SMALL_DENSITIES), (ENOUGH[:2], SMALL_DENSITIES[:1]))
    for lr in (TASKS["sentiment"].lr, SMALL):
        tuned = encoders.fine_tune(setting, "sentiment", lr=lr)
        delta = inspect(str(tuned), str(encoders.base(setting)), device="cpu", workers=1).total
        cells = {
            name: [encoders.cells(setting, "sentiment", "AdamW", METHODS[name], d, lr=lr) for d in densities]
            for name in methods
        }
        whole = encoders.unpruned(setting, "sentiment", lr=lr)
        found[f"{lr:g}"] = {"mean_abs": delta.mean_abs, "unpruned": whole, "methods": cells}
    return {"densities": densities, "fine-tunes": found}


def show_small(record: Record) -> str:
    lines: list[list[Any]] = []
    for lr, one in record["fine-tunes"].items():
        about = f"{lr}, {one['mean_abs']:.1e}"
        lines.append([about, "unpruned", *[one["unpruned"]] * len(record["densities"])])
        lines += [[about, name, *map(_left, cells)] for name, cells in one["methods"].items()]
    head = ["learning rate, mean abs(Δ)", "pruned by", *(f"p = {1 - d:g}" for d in record["densities"])]
    return table(head, lines) + (
        "\nAccuracy in % on sentiment, AdamW. † held-out rows found nothing better than the method without "
        "calibration, which stays.\n"
    )


def _left(cells: list[dict[str, Any]]) -> str | None:
    plain = any(cell.get("chosen") == "plain" for cell in cells)
    return spread(scores_of(cells)) + " †" * plain if cells else None


EXPERIMENTS = (
    Experiment("table-1", "Tables 1, 2 and 5: encoders at p = 0.99", table_1, show_table_1, 22),
    Experiment(
        "table-6", "Tables 6 and 7: importance against chance, with and without AdamR", table_6, show_table_6, 11
    ),
    Experiment("table-8", "Table 8: the size of deltas and of their influence", table_8, show_table_8, 10),
    Experiment("table-9", "Table 9: structured drop", table_9, show_table_9, 8),
    Experiment("small", "Small deltas: where plain DARE is enough", small, show_small, 5),
)
