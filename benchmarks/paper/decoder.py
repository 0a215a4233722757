"""Tables 3, 6 and 12, decoders: fine-tunes of SmolLM2-135M on a task of reasoning-gym, pruned; and their learning rate.

The fine-tunes are those of `benchmarks/smollm2.py`, which `make decoder` makes; what lacks is left out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks import smollm2
from benchmarks.drawing import draw_lines
from benchmarks.paper import pruned
from benchmarks.paper.frame import Experiment, NotKept, Record, Setting, table
from benchmarks.paper.pruned import Subject

DENSITIES = (0.1, 0.05, 0.01, 0.003)
Q_E = (
    "DAREx-q, q_e",
    "DAREx-q per layer, q_e",
    "importance sampling, q_e",
    "magnitude, q_e",
    "WANDA, q_e",
)
Q_V = ("DAREx-q, q_v", "DAREx-q per layer, q_v")
LEARNED = ("magnitude, learned per tensor", "WANDA, learned per row")
PLAIN = ("DARE", "DARE, linear weights", "importance sampling", "magnitude", "WANDA")
# Fine-tune of smollm2.EXPERTS -> by what it is pruned.
NAMES = {
    "reversal": (*PLAIN, *Q_E, *Q_V, *LEARNED),
    "reversal-mid": (*PLAIN, "DAREx-q, q_e", "importance sampling, q_e", "magnitude, q_e"),
    "reversal-fast": (*PLAIN, *Q_E, *Q_V, *LEARNED),
    "reversal-adamr": (*PLAIN, "DAREx-q, q_e", "importance sampling, q_e", "magnitude, q_e"),
}
TEST = (200, 4)  # rows that are scored, and at toy scale
SEQUENCES = 24


def folder(setting: Setting) -> Path:
    """Where the fine-tunes are; at toy scale a folder with a random model of one layer and sums."""
    if not setting.toy:
        return smollm2.FOLDER
    return setting.folder("smollm2", {}, smollm2.toy)


def subject(setting: Setting, name: str) -> Subject:
    """A fine-tune that is kept; NotKept if it is not."""
    where, expert = folder(setting), smollm2.EXPERTS[name]
    if setting.toy:
        smollm2.make(name, where, steps=1)
    tuned, base = where / name, where / "base"
    if not (tuned / "score.json").exists():
        setting.lacking += 1
        raise NotKept(str(tuned))
    log = json.loads((tuned / "log.json").read_text(encoding="utf-8"))
    setting.kept[str(tuned)] = log["cpu_s"]
    new = smollm2.NEW_TOKENS[expert.task]
    test = smollm2.rows(expert.task, "test", where)[: setting.pick(*TEST)]
    common = {"sequences": setting.pick(SEQUENCES, 2), "length": 96, "seeds": 2}
    labelled = {
        "data": str(smollm2.rows_file(expert.task, "validation", where)),
        "task": "text-generation", "metric": "exact_match", "new_tokens": new, **common,
    }  # fmt: skip
    calibration = {"data": str(smollm2.answered(name, setting.pick(48, 4), where)), **common}
    score = partial(smollm2.exact_match, some=test, new_tokens=new)
    made_of = {"rows": len(test), "of": log["expert"], "tokens": log["tokens"]}
    return Subject(base, str(tuned), calibration, score, made_of, labelled=labelled)


def table_3(setting: Setting) -> Record:
    names = setting.pick(NAMES, {"reversal": ("DARE, linear weights", "DAREx-q, q_e")})
    densities, seeds = setting.pick((DENSITIES, 2), ((0.1,), 1))
    found = pruned.fine_tunes(setting, subject, names, densities, seeds)
    if not found:
        raise NotKept(f"a fine-tune in {folder(setting)} (`make decoder`)")
    experts = {name: smollm2.EXPERTS[name]._asdict() for name in found}
    return {"test_rows": setting.pick(*TEST), "experts": experts, "fine-tunes": found}


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
    named = {_title(record["experts"][name]): found for name, found in record["fine-tunes"].items()}
    usual = _title(smollm2.EXPERTS["reversal"]._asdict())
    paper = {f"{usual}, {key}" if key else key: row for key, row in PAPER.items()}
    return (
        f"Exact match in % of generated answers on {record['test_rows']} held-out rows: SmolLM2-135M-Instruct (30 "
        "layers of 576), all of it fine-tuned to reverse a list of 3 to 6 words, a task of reasoning-gym of which the "
        "base answers none. Learning rates differ as the deltas of MetaMath-7B and MetaMath-llema-7B do. q_e sees "
        "prompts with the fine-tune's own answers, no labels; q_v is searched on exact match itself. DARE "
        'divides every tensor by q; "linear weights" leaves embeddings (the head, which is tied to them) and norms as '
        "they are, as a calibrated q does. A cell of q_v or of learned scales takes four to ten CPU minutes, so that "
        "they are measured at the large rate first, at p = 0.99 and 0.997. The last two columns are the paper's, "
        "on GSM8K.\n\n"
    ) + pruned.by_trainer(named, paper)


def _title(expert: Record) -> str:
    trainer = f"AdamR-L2, λ = {expert['decay']:g}" if expert["decay"] else "AdamW"
    return f"{trainer}, lr {expert['lr']:.0e}"


RATES = ("reversal", "reversal-mid", "reversal-fast")
OVER = (
    "DARE", "DARE, linear weights", "DAREx-q, q_e", "importance sampling", "importance sampling, q_e", "magnitude, q_e",
)  # fmt: skip


def rates(setting: Setting) -> Record:
    """Of each learning rate how large and how coherent the delta is, and what methods keep of it."""
    found = {}
    for name in setting.pick(RATES, RATES[1:2]):
        with suppress(NotKept):
            one = subject(setting, name)
            whole = pruned.whole(setting, one)
            rows = pruned.scores(setting, one, setting.pick(OVER, OVER[:2]), (0.01,), 1)
            found[name] = {"lr": smollm2.EXPERTS[name].lr, **whole, **statistics(setting, one), "rows": rows}
    if not found:
        raise NotKept(f"a fine-tune in {folder(setting)} (`make decoder`)")
    return found


def statistics(setting: Setting, one: Subject) -> Record:
    """What `deltamerge inspect --calibration` says of its linear weights."""

    def measure() -> Record:
        from deltamerge.apps.inspect.study import inspect

        seen = inspect(one.tuned, str(one.base), calibration=dict(one.calibration), device="cpu", workers=1)
        assert seen.activations is not None
        total = seen.activations.total
        return {"coherence": total.coherence, "dare_error": total.dare_error}

    return setting.once(f"{Path(one.tuned).name} statistics", {"tuned": one.tuned, **one.made_of}, measure)


def show_rates(record: Record) -> str:
    densities = sorted({row["density"] for one in record.values() for row in one["rows"]}, reverse=True)
    names = list(dict.fromkeys(row["method"] for one in record.values() for row in one["rows"]))
    lines = []
    for density in densities:
        for one in record.values():
            kept = {row["method"]: _kept(one, row) for row in one["rows"] if row["density"] == density}
            noise = one["relative_norm"] * ((1 - density) / density) ** 0.5
            about = (f"{one['lr']:.0e}", f"{one['relative_norm']:.3f}", f"{noise:.2f}", f"{one['coherence']:.2f}")
            shares = [f"{kept[name]:.0f}" if name in kept else None for name in names]
            lines.append([f"{1 - density:g}", *about, one["score"], *shares])
    head = ["p", "learning rate", "‖Δ‖/‖W‖", "noise", "coherence D/A", "unpruned, %", *(f"{n}: kept, %" for n in names)]
    return table(head, lines) + (
        "\n*Kept* is the share of the unpruned fine-tune's own exact match, *noise* that of DARE beside the weights, "
        "‖Δ‖/‖W‖ · sqrt(p/(1 − p)). While it is small there is nothing to rescue. Where it is large, DARE has two "
        "faults: it divides the embeddings too, which are the head here, and by too small a q; sparing them mends the "
        "first, a calibrated q both, and importance sampling makes less noise to begin with.\n"
    )


def _kept(one: Record, row: Record) -> float:
    return 100 * fmean(cell["score"] for cell in row["cells"]) / one["score"] if one["score"] else 0.0


def draw_rates(record: Record, path: Path) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in record.values():
        for row in one["rows"]:
            curves = panels.setdefault(f"p = {1 - row['density']:g}", {})
            curves.setdefault(row["method"], []).append((one["relative_norm"], _kept(one, row)))
    worst = min((point for curves in panels.values() for point in curves.get("DARE", [])), key=lambda point: point[1])
    title = f"Plain DARE loses where the delta is large: it keeps {worst[1]:.0f} % at ‖Δ‖/‖W‖ = {worst[0]:.2g}"
    draw_lines(path, title, panels, "‖Δ‖/‖W‖ (learning rates)", ["kept, %"] * len(panels))


EXPERIMENTS = (
    Experiment("table-3", "Tables 3, 6 and 12: decoders", table_3, show_table_3, 90),
    Experiment("learning-rates", "Decoders: what plain DARE depends on", rates, show_rates, 20, draw_rates),
)
