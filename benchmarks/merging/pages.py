"""The table and the picture of docs/measurements/merging.md, from benchmarks/results/merging.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.drawing import MOST, draw_bars
from deltamerge.apps.report.svg import Point

DOCS = ROOT / "docs" / "measurements"
ADVISED = {
    "words": "merging_words.json",
    "pictures": "merging_pictures.json",
    "decoder": "merging_skills.json",
}
PAGE, PICTURE = DOCS / "merging.md", DOCS / "pictures" / "merging.svg"


def write(found: dict[str, Any]) -> None:
    PAGE.write_text(documented(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(found, PICTURE)


def documented(found: dict[str, Any], page: str) -> str:
    """The page with what stands between `<!-- merging: NAME -->` and `<!-- end -->` made anew."""
    tables = {"methods": methods, "tasks": tasks}

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]](found)}{match[3]}"

    return re.sub(r"(<!-- merging: (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)


def write_words(found: dict[str, Any]) -> None:
    """Write the tables of words.py: of both families, of the reported experts of every seed, and of their LoRAs."""
    _put("words", {"words": words, "seeds": seeds_of_reported, "loras": loras_of_words}, found)
    write_advised()


def write_pictures(found: dict[str, Any]) -> None:
    """Write the tables of pictures.py: of the experts that choose, and of those that are reported, by seed too."""
    _put("pictures", {"choose": choice_of_pictures, "report": report_of_pictures, "seeds": seeds_of_reported}, found)
    write_advised()


def write_cases(found: list[dict[str, Any]]) -> None:
    """Write the tables of cases.py: how near the advice is to the best merge, and what merges of so many keep."""
    _put("cases", {"advice": advice, "methods": methods_of_cases, "signs": signs_of_cases}, found)


def write_decoder(found: dict[str, Any]) -> None:
    """Write the tables of decoder.py: experts alone, merges of four, and of pairs and triples."""
    _put("decoder", {"models": models_of_decoder, "fours": fours_of_decoder, "sets": sets_of_decoder}, found)
    write_advised()


def write_advised() -> None:
    """Write the table of what `recommend` chooses of the reported experts of all benchmarks, with few rows."""
    _put("advised", {"report": advised}, None)


def advised(_: None) -> str:
    """What `recommend` chose with so many rows, what it expected of it on average, and what was kept on test rows."""
    lines = [["experts", "rows, searched on + deciding", "chosen", "λ", "expected", "kept", "by task", "CPU s"]]
    lines.append(["---"] * len(lines[0]))
    for kind, file in ADVISED.items():
        found = json.loads((RESULTS / file).read_text(encoding="utf-8")).get("advised", {})
        some = {"report": found} if isinstance(found, list) else {k: v.values() for k, v in found.items()}
        for family, cells in some.items():
            seed = family.partition("seed ")[2] or "0"
            for c in (cell for cell in cells if family.startswith("report")):
                rows = c["merge"].removeprefix("recommend, ").removesuffix(" rows")
                known = [share for share in c["expected"] if share is not None]
                shares = ", ".join(f"{share:.0f}" for share in c["shares"].values())
                ends = [f"{fmean(known):.1f}" if known else "–", f"{c['mean']} / {c['worst']}", shares]
                lines.append(
                    [f"{kind}, seed {seed}", rows, c["chosen"], f"{c['lambda']:.3g}", *ends, f"{c['cpu_s']:.0f}"]
                )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def models_of_decoder(found: dict[str, Any]) -> str:
    """The base and every expert: exact match, perplexity on plain text, KL to the base on its answers."""
    lines = [["family", "model", "exact match, %", "perplexity", "KL to the base"], ["---"] * 5]
    for family, models in found["models"].items():
        for name, one in models.items():
            kl = f"{one['kl']:.3f}"
            lines.append([family, name, f"{one['exact_match']:.0f}", f"{one['perplexity']:.2f}", kl])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fours_of_decoder(found: dict[str, Any]) -> str:
    """Merges of each family's four experts, by the mean share of the family that is reported."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in found["cells"]:
        if len(cell["tasks"]) == 4:
            cells.setdefault(cell["merge"], {})[cell["family"]] = cell
    heads = ["merge", "λ", "rows", "reported", "by task", "text, %", "KL", "chosen on", "by task", "CPU s"]
    lines = [heads, ["---"] * len(heads)]
    for name, of in sorted(cells.items(), key=lambda item: -item[1].get("report", {"mean": -1.0})["mean"]):
        one = of.get("report") or of["choose"]
        line = [name, "–" if one["lambda"] is None else f"{one['lambda']:.3g}", str(one["rows"] or "–")]
        for family in ("report", "choose"):
            cell = of.get(family)
            if cell is None:
                line += ["–"] * (4 if family == "report" else 2)
                continue
            shares = ", ".join(f"{share:.0f}" for share in cell["shares"].values())
            line += [f"{cell['mean']} / {cell['worst']}", shares]
            line += [f"{cell['text']:+.1f}", f"{cell['instructions']:.2f}"] if family == "report" else []
        lines.append([*line, f"{one['cpu_s']:.0f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sets_of_decoder(found: dict[str, Any]) -> str:
    """Mean / worst share of each merge by family and number of experts, means over these sets."""
    columns: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in sorted(found["cells"], key=lambda cell: (cell["family"], len(cell["tasks"]))):
        of = columns.setdefault(f"{cell['family']}, {len(cell['tasks'])}", {})
        of.setdefault(cell["merge"], []).append(cell)
    few = [merge for of in columns.values() if of for merge in of]
    some = [merge for merge in dict.fromkeys(few) if all(merge in of for of in columns.values())]
    lines = [["merge", *columns], ["---"] * (1 + len(columns))]
    for merge in some:
        shown = [f"{fmean(c['mean'] for c in of[merge]):.1f} / {fmean(c['worst'] for c in of[merge]):.1f}"
                 for of in columns.values()]  # fmt: skip
        lines.append([merge, *shown])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _put(kind: str, tables: Mapping[str, Callable[[Any], str]], found: Any) -> None:
    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]](found)}{match[3]}"

    pattern = rf"(<!-- {kind}: (\w+) -->)\n.*?(<!-- end -->)"
    page = re.sub(pattern, table, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


def advice(found: list[dict[str, Any]]) -> str:
    """By family and seed: cases within a point of the best merge, points behind it, and how far forecasts are off."""
    lines = [
        ["experts", "advice", "within 1 point", "… of any λ", "behind, mean (most)", "expected, off", "of a skill"]
    ]
    lines.append(["---"] * len(lines[0]))
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in found:
        groups.setdefault(f"{case['family']}, seed {case['seed']}", []).append(case)
    for name, some in [*groups.items(), ("all", found)]:
        for kind in ("without rows", "with rows", "with rows, fits"):
            told = [case for case in some if kind in case]
            if not told:
                continue
            behind = [case["best"] - case[kind]["mean"] for case in told]
            further = [case["best at any λ"] - case[kind]["mean"] for case in told]
            off = [abs(case[kind]["expected"] - case[kind]["mean"]) for case in told]
            skills = [abs(error) for case in told for error in case[kind]["errors"]]
            near, nearer = (f"{sum(one <= 1.0 for one in of)} of {len(told)}" for of in (behind, further))
            spread = f"{fmean(behind):.1f} ({max(behind):.1f})"
            lines.append([name, kind, near, nearer, spread, f"{fmean(off):.1f}", f"{fmean(skills):.1f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def methods_of_cases(found: list[dict[str, Any]]) -> str:
    """Mean / worst share of each merge at its rule's λ by family and number of experts, means over cases and seeds."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for case in found:
        columns.setdefault(f"{case['family']}, {len(case['tasks'])}", []).append(case)
    lines = [["merge", *columns], ["---"] * (1 + len(columns))]
    for merge in found[0]["mean"]:
        cells = [
            f"{fmean(c['mean'][merge] for c in some):.1f} / {fmean(c['worst'][merge] for c in some):.1f}"
            for some in columns.values()
        ]
        lines.append([merge, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def signs_of_cases(found: list[dict[str, Any]]) -> str:
    """By sign: the cases in which what it names is within a point of the best method, and points behind."""
    lines = [["decided by", "within 1 point", "behind, mean (most)"], ["---"] * 3]
    for sign in found[0]["behind by sign"]:
        behind = [case["behind by sign"][sign] for case in found]
        near = f"{sum(one <= 1.0 for one in behind)} of {len(behind)}"
        lines.append([sign, near, f"{fmean(behind):.1f} ({max(behind):.1f})"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def words(found: dict[str, Any]) -> str:
    """Mean / worst share at the rule's λ, and the best mean of the λ tried, of the families of four."""
    cells = {
        family: {cell["merge"]: cell for cell in some.values() if len(cell["tasks"]) == 4}
        for family, some in found["cells"].items()
    }
    chosen, reported = cells.get("choose", {}), cells.get("report", {})
    lines = [["method", "λ of the rule", "reported", "by task", "at its best λ", "chosen on", "at its best λ"]]
    lines.append(["---"] * len(lines[0]))
    for name, cell in sorted(reported.items(), key=lambda item: -item[1]["mean"]):
        shares = ", ".join(f"{share:.0f}" for share in cell["shares"].values())
        other = chosen.get(name)
        before = ["–", "–"] if other is None else [f"{other['mean']} / {other['worst']}", f"{other['best']}"]
        ends = f"{cell['mean']} / {cell['worst']}"
        lines.append([name, f"{cell['lambda']:.3g}", ends, shares, f"{cell['best']}", *before])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def seeds_of_reported(found: dict[str, Any]) -> str:
    """Mean / worst share at the rule's λ, of the reported experts of every seed and on average, the best mean first.

    The best means of the λ tried stand at the end. Merges that lack a seed stand below.
    """
    seeds = {"0": found["cells"].get("report", {})}
    seeds |= {name.split()[-1]: cells for name, cells in found["cells"].items() if name.startswith("report, seed")}
    every = [name for name in seeds["0"] if sum(name in cells for cells in seeds.values()) > 1]
    lines = [["method", "mean of seeds", *(f"seed {seed}" for seed in seeds), "at its best λ"]]
    lines.append(["---"] * len(lines[0]))
    some = {name: [cells.get(name) for cells in seeds.values()] for name in every}
    whole = {name: [cell for cell in of if cell is not None] for name, of in some.items()}
    for name in sorted(every, key=lambda name: (None in some[name], -fmean(c["mean"] for c in whole[name]))):
        own = whole[name]
        mean = f"{fmean(c['mean'] for c in own):.1f} / {fmean(c['worst'] for c in own):.1f}"
        if len(own) < len(seeds):
            mean += f", of {len(own)}"
        of_seeds = ["–" if c is None else f"{c['mean']} / {c['worst']}" for c in some[name]]
        lines.append([own[0]["merge"], mean, *of_seeds, ", ".join(f"{c['best']}" for c in own)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def loras_of_words(found: dict[str, Any]) -> str:
    """Mean / worst share of the reported tasks' LoRAs at the rule's λ, beside those of the full fine-tunes."""
    whole = {cell["merge"]: cell for cell in found["cells"].get("report", {}).values()}
    lines = [["method", "λ of the rule", "LoRAs", "by task", "at its best λ", "full fine-tunes"], ["---"] * 6]
    for c in sorted(found["cells"].get("loras", {}).values(), key=lambda cell: -cell["mean"]):
        shares = ", ".join(f"{share:.0f}" for share in c["shares"].values())
        ends = [f"{one['mean']} / {one['worst']}" for one in (c, whole[c["merge"]])]
        lines.append([c["merge"], f"{c['lambda']:.3g}", ends[0], shares, f"{c['best']}", ends[1]])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def chosen_of_pictures(found: dict[str, Any]) -> dict[str, tuple[str, list[float]]]:
    """Merge -> the λ of the best mean on the family that chooses, as text, and mean and worst share there."""
    return {
        cell["merge"]: max(cell["tried"].items(), key=lambda tried: tried[1][0])
        for cell in found["cells"].get("choose", {}).values()
    }


def choice_of_pictures(found: dict[str, Any]) -> str:
    """Mean / worst share at the rule's λ, each task's, and mean / worst at the best λ that was tried."""
    chosen = chosen_of_pictures(found)
    lines = [["method", "λ of the rule", "mean / worst", "by task", "best λ", "mean / worst"], ["---"] * 6]
    for c in sorted(found["cells"].get("choose", {}).values(), key=lambda cell: -cell["mean"]):
        best, ends = chosen[c["merge"]]
        lines.append([*_at_rule(c), *([best, "{} / {}".format(*ends)] if not _alone(c["merge"]) else "––")])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report_of_pictures(found: dict[str, Any]) -> str:
    """Mean / worst share at the rule's λ, each task's, and mean / worst at the λ that the other family chooses."""
    chosen = chosen_of_pictures(found)
    lines = [["method", "λ of the rule", "mean / worst", "by task", "λ chosen", "mean / worst"], ["---"] * 6]
    for c in sorted(found["cells"].get("report", {}).values(), key=lambda cell: -cell["mean"]):
        factor = "" if _alone(c["merge"]) else chosen[c["merge"]][0]
        lines.append([*_at_rule(c), *([factor, "{} / {}".format(*c["tried"][factor])] if factor else "––")])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _alone(merge: str) -> bool:
    """Whether no λ but the rule's was tried."""
    return merge in ("emr", "tall_masks") or "coefficients" in merge


def _at_rule(cell: dict[str, Any]) -> list[str]:
    shares = ", ".join(f"{share:.0f}" for share in cell["shares"].values())
    return [cell["merge"], f"{cell['lambda']:.3g}", f"{cell['mean']} / {cell['worst']}", shares]


def ordered(found: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Delta -> cell for each method, the best unpruned mean first."""
    by_merge: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in found["cells"]:
        by_merge.setdefault(cell["merge"], {})[cell["delta"]] = cell
    return sorted(by_merge.values(), key=lambda cells: -cells["unpruned"]["mean"] if "unpruned" in cells else 0.0)


def methods(found: dict[str, Any]) -> str:
    """Mean / worst share of each method, by kind of delta, and the cost of a merge of the unpruned."""
    deltas = list(dict.fromkeys(cell["delta"] for cell in found["cells"]))
    lines = [["method", "λ", *deltas, "CPU s", "peak MB"], ["---"] * (len(deltas) + 4)]
    for cells in ordered(found):
        one = cells.get("unpruned") or next(iter(cells.values()))
        shown = [_ends(cells[delta], spread=delta == "unpruned") if delta in cells else "–" for delta in deltas]
        factor = "–" if one["factor"] is None else f"{one['factor']:.3g}"
        name = one["merge"] + ", a model per task" * one["task"]
        lines.append([name, factor, *shown, f"{one['cpu_s']:.0f}", f"{one['peak_mb']}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ends(cell: dict[str, Any], spread: bool) -> str:
    mean, worst = (f" ± {s}" if spread else "" for s in cell["spread"])
    return f"{cell['mean']}{mean} / {cell['worst']}{worst}"


def tasks(found: dict[str, Any]) -> str:
    """Shares by task of the unpruned merges; the experts' own scores above."""
    names = list(found["own"])
    lines = [
        ["", *names],
        ["---"] * (len(names) + 1),
        ["*expert's score*", *(f"{v:.1f}" for v in found["own"].values())],
    ]
    for cells in ordered(found):
        if "unpruned" in cells:
            shares = cells["unpruned"]["shares"]
            lines.append([cells["unpruned"]["merge"], *(f"{shares[n]:.0f}" if n in shares else "–" for n in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


BASELINES = ("task_arithmetic", "ties", "dare_ties, 0.1", "mean")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the mean of each unpruned merge as a bar and its worst task as a tick: the best, then the usual."""
    cells = [one["unpruned"] for one in ordered(found) if "unpruned" in one and not one["unpruned"]["task"]]
    cells.sort(key=lambda cell: -cell["worst"])
    some = [cell for cell in cells if cell["merge"] not in BASELINES][: MOST - len(BASELINES)]
    some += [cell for cell in cells if cell["merge"] in BASELINES]
    best = some[0]
    title = f"Of nine tasks {best['merge']} keeps {best['mean']:.0f} % on average, {best['worst']:.0f} % at worst"
    points = [Point(cell["merge"], cell["mean"], max(cell["worst"], 0.0)) for cell in some]
    words = "% of each expert's own score: mean (bar), worst task (tick)"
    draw_bars(path, title, {"merge method, unpruned deltas": points}, words)
