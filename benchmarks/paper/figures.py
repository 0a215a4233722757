"""Figures 1 to 3 on the small encoder: over the rescaling factor, over the density, and over AdamR's λ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import deltamerge
from benchmarks import encoder
from benchmarks.drawing import draw_lines
from benchmarks.paper import encoders
from benchmarks.paper.encoders import METHODS, scores_of
from benchmarks.paper.frame import Experiment, Record, Setting, spread, table
from benchmarks.tasks import TASKS

DENSITY = 0.01
FACTORS = (1.0, 3.0, 6.0, 10.0, 17.0, 30.0, 55.0, 100.0)  # 1/q; DARE's is the last


def fig_1(setting: Setting) -> Record:
    tasks, factors = setting.pick((list(TASKS), FACTORS), (["sentiment"], FACTORS[::7]))
    return {
        task: {
            "unpruned": encoders.unpruned(setting, task),
            "points": setting.once(
                f"{task}-over-q",
                {"tuned": encoders.fine_tune(setting, task).name, "factors": factors, "density": DENSITY},
                lambda task=task: over_factors(setting, task, factors),
            ),
        }
        for task in tasks
    }


def over_factors(setting: Setting, task: str, factors: Sequence[float]) -> list[dict[str, float]]:
    """Of one random mask, at every 1/q: the mean absolute change of the last hidden state, and the score."""
    tuned = encoders.fine_tune(setting, task)
    fine, base = (load_file(folder / "model.safetensors") for folder in (tuned, encoders.base(setting)))
    model, tokenizer = encoder.load(tuned), AutoTokenizer.from_pretrained(tuned)
    batch = encoder.encode(tokenizer, encoders.rows(setting, task, "validation")[:50])
    before_NTC = hidden(model, batch)
    points = []
    for factor in factors:
        pruned = deltamerge.prune(
            fine, base, name=task, seed=setting.seed, workers=1, method="dare", density=DENSITY, q=1 / factor
        )
        model.load_state_dict(pruned)
        change_NTC = (hidden(model, batch) - before_NTC).abs()
        score = encoder.score(model, TASKS[task], encoders.rows(setting, task, "test"), tokenizer=tokenizer)
        change = change_NTC[batch["attention_mask"].bool()].mean().item()
        points.append({"factor": factor, "change": change, "score": round(score, 2)})
    return points


def hidden(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    model.train(False)
    with torch.inference_mode():
        state_NTC: Tensor = model.base_model(**batch).last_hidden_state
    return state_NTC


def show_fig_1(record: Record) -> str:
    rows = []
    for task, found in record.items():
        points = found["points"]
        least = min(points, key=lambda point: point["change"])
        best = max(points, key=lambda point: point["score"])
        gap = best["score"] - points[-1]["score"]
        rows.append(
            [
                task,
                found["unpruned"],
                points[-1]["score"],
                f"{best['score']:.1f} at {best['factor']:g}",
                f"{least['score']:.1f} at {least['factor']:g}",
                gap,
            ]
        )
    head = ["task", "unpruned", "DARE, 1/q = 100", "best score", "score at least output change", "gained"]
    return table(head, rows) + (
        "\nOne random mask at p = 0.99, eight values of 1/q. The paper's Fig. 1 (BERT-base, four tasks): the best 1/q "
        "differs from 1/(1 − p) on all four, with up to tenfold gains; that of least output change is a good proxy.\n"
    )


def draw_fig_1(record: Record, path: Path) -> None:
    def curves(key: str) -> dict[str, list[tuple[float, float]]]:
        return {task: [(p["factor"], p[key]) for p in found["points"]] for task, found in record.items()}

    whole = {task: found["unpruned"] for task, found in record.items()}
    panels = {"output change": curves("change"), "score (dashed: unpruned)": curves("score")}
    gains = {
        task: max(p["score"] for p in found["points"]) - found["points"][-1]["score"] for task, found in record.items()
    }
    most = max(gains, key=lambda task: gains[task])
    title = f"The best 1/q is not 1/(1 − p): another one gains up to {gains[most]:.0f} points, on {most}"
    y = ["mean abs(change) of the last state", "%"]
    draw_lines(path, title, panels, "1/q", y, levels={"score (dashed: unpruned)": whole})


OVER = ("DARE", "DAREx-q, q_e", "importance sampling", "magnitude", "magnitude, q_e", "WANDA")


def fig_2(setting: Setting) -> Record:
    methods = setting.pick(OVER, ("DARE", "magnitude"))
    densities = setting.pick((0.1, 0.03, 0.01, 0.003), (0.1, 0.01))
    return {
        "unpruned": encoders.unpruned(setting, "sentiment"),
        "densities": densities,
        "methods": {
            name: [scores_of(encoders.cells(setting, "sentiment", "AdamW", METHODS[name], d)) for d in densities]
            for name in methods
        },
    }


def show_fig_2(record: Record) -> str:
    rows = [[name, *(spread(s) if s else None for s in scores)] for name, scores in record["methods"].items()]
    head = [f"sentiment, unpruned {record['unpruned']:.1f}", *(f"p = {1 - d:g}" for d in record["densities"])]
    return table(head, rows) + "\nIn the paper DARE falls first, DAREx-q later, as p goes to 1.\n"


def draw_fig_2(record: Record, path: Path) -> None:
    whole = {"unpruned": record["unpruned"]}
    curves = {
        name: [(d, fmean(s)) for d, s in zip(record["densities"], scores, strict=True) if s]
        for name, scores in record["methods"].items()
    }
    least = min(record["densities"])
    there = {name: dict(points)[least] for name, points in curves.items() if least in dict(points)}
    best = max(there, key=lambda name: there[name])
    title = f"At density {least:g} {best} keeps {there[best]:.0f} % accuracy, DARE {there['DARE']:.0f} %"
    draw_lines(path, title, {"sentiment": curves}, "density", ["accuracy, %"], levels={"sentiment": whole})


DECAYS = {"AdamR-L2": (1e-3, 1e-2, 1e-1), "AdamR-L1": (3e-6, 3e-5, 3e-4)}
AFTER = {"AdamR-L2": ("DARE", "magnitude, q_e"), "AdamR-L1": ("magnitude", "magnitude, q_e")}


def fig_3(setting: Setting) -> Record:
    found: Record = {}
    for trainer, decays in DECAYS.items():
        for decay in setting.pick(decays, decays[:1]):
            usual = encoders.TRAINERS[trainer]
            assert usual is not None
            options: dict[str, Any] = {} if decay == usual["decay"] else {"decay": decay}
            pruned = {
                name: encoders.cell(setting, "sentiment", trainer, METHODS[name], DENSITY, **options)["score"]
                for name in AFTER[trainer]
            }
            whole = encoders.unpruned(setting, "sentiment", trainer, **options)
            found.setdefault(trainer, []).append({"decay": decay, "unpruned": whole, **pruned})
    return found


def show_fig_3(record: Record) -> str:
    parts = []
    for trainer, points in record.items():
        head = [f"sentiment, {trainer}", *(f"λ = {point['decay']:g}" for point in points)]
        keys = [key for key in points[0] if key != "decay"]
        parts.append(table(head, [[key, *(point[key] for point in points)] for key in keys]))
    return "\n".join(parts) + (
        "\nPruned at p = 0.99, one mask, one training run a column. A λ too small leaves deltas that pruning breaks, "
        "one too large a model that learned less.\n"
    )


def draw_fig_3(record: Record, path: Path) -> None:
    panels = {
        trainer: {key: [(p["decay"], p[key]) for p in points] for key in points[0] if key != "decay"}
        for trainer, points in record.items()
    }
    trainer, best = max(
        ((name, point) for name, points in record.items() for point in points if "DARE" in point),
        key=lambda pair: pair[1]["DARE"],
        default=(next(iter(record)), {"decay": 0.0, "DARE": 0.0}),
    )
    title = (
        f"Pruned at p = 0.99, DARE keeps most after {trainer} with λ = {best['decay']:g}: {best['DARE']:.0f} % accuracy"
    )
    draw_lines(path, title, panels, "λ", ["accuracy, %"] * len(panels))


EXPERIMENTS = (
    Experiment("fig-1", "Figure 1: output change and score over 1/q", fig_1, show_fig_1, 4, draw_fig_1),
    Experiment("fig-2", "Figure 2: score over density", fig_2, show_fig_2, 4, draw_fig_2),
    Experiment("fig-3", "Figure 3: score over AdamR's λ", fig_3, show_fig_3, 8, draw_fig_3),
)
