"""The page of inspect --report: its figures are those of --json, names stay text, nothing is fetched or overwritten."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import make_checkpoint, tiny_bert_pair, tiny_llama
from running import run

from deltamerge.apps.inspect.statistics import Activations, Influence, LayerInfluence, Massive, Report
from deltamerge.apps.inspect.study import inspect
from deltamerge.apps.report import pictures, svg
from deltamerge.apps.report.page import check_target, module_of, page, write
from deltamerge.cli import main
from deltamerge.errors import InputError, OutputError
from deltamerge.run.calibration_record import Run, choices

VOID = {"meta"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&lt;'


@dataclass
class Page(HTMLParser):
    """The elements of a page, each with the heading of the card that it stands in; tags must nest."""

    text: str
    elements: list[tuple[str, dict[str, str], str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.card = ""
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), attrs
        self.elements.append((tag, dict(attrs), self.card))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h3":
            self.card = data
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def shapes(self, card: str, kind: str) -> list[dict[str, str]]:
        return [a for _, a, where in self.elements if where == card and a.get("class") == kind]


def percent(value: str) -> float:
    return float(value.removesuffix("%")) / 100


def influence(value: float) -> dict[str, float]:
    return dict.fromkeys(Influence.model_fields, value)


def with_activations(found: Report, value: float = 0.25) -> Report:
    names = [tensor.name for tensor in found.tensors if tensor.kind == "linear"]
    layers = [
        LayerInfluence(
            **influence(value / (i + 1)) | {"dare_error": 10.0 / (i + 1)},
            name=name,
            tokens=7,
            massive=[Massive(feature=3, mean_abs=2.0, ratio=8.0 + i), Massive(feature=5, mean_abs=1.0, ratio=None)],
        )
        for i, name in enumerate(names)
    ]
    seen = Activations(density=0.1, gamma=0.05, sequences=4, total=Influence(**influence(value)), layers=layers)
    return found.model_copy(update={"activations": seen})


@pytest.fixture
def bert(tmp_path: Path) -> Report:
    base, tune = tiny_bert_pair(tmp_path)
    return inspect(str(tune), str(base))


def test_what_is_drawn_is_what_json_says(tmp_path, capsys, monkeypatch):
    tiny_bert_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["inspect", "tuned", "--base", "base", "--report", "page.html", "--json"])
    out, err = capsys.readouterr()
    assert (leaving.value.code, err) == (0, "page.html: written\n")
    said = json.loads(out)
    text = Path("page.html").read_text(encoding="utf-8")
    assert text == page(Report.model_validate(said))
    drawn = Page(text)
    stack = "bert.encoder.layer"
    for title, key in (("mean |Δ|", "mean_abs"), ("‖Δ‖/‖W‖", "relative_norm"), ("share of energy", "energy_share")):
        columns = drawn.shapes(f"{title} · {stack}", "bar")
        truth = [said["layers"][f"{stack}.{i}"][key] for i in range(2)]
        assert [float(column["data-value"]) for column in columns] == truth
        heights = [float(column["height"]) / max(float(c["height"]) for c in columns) for column in columns]
        assert heights == pytest.approx([value / max(truth) for value in truth])
    for title, key in (("mean |Δ|", "mean_abs"), ("‖Δ‖/‖W‖", "relative_norm")):
        cells = drawn.shapes(f"{title} · {stack}", "cell")
        truth = {t["name"]: t[key] for t in said["tensors"] if t["layer"].startswith(stack) and len(t["shape"]) == 2}
        names = [f"{stack}.{cell['data-layer']}.{cell['data-module']}.weight" for cell in cells]
        assert sorted(names) == sorted(truth)
        for name, cell in zip(names, cells, strict=True):
            assert float(cell["data-value"]) == pytest.approx(truth[name], rel=1e-12)
            low, top = min(truth.values()), max(truth.values())
            part = svg.FAINT + (1 - svg.FAINT) * (truth[name] - low) / (top - low)
            assert float(cell["fill-opacity"]) == pytest.approx(part, abs=1e-4)
    energy = drawn.shapes("share of energy, and of entries (tick)", "bar")
    kinds = [shape for shape in energy if shape["data-name"] in said["kinds"]]
    assert {k["data-name"]: float(k["data-value"]) for k in kinds} == {
        kind: one["energy_share"] for kind, one in said["kinds"].items()
    }
    assert all(percent(k["width"]) == pytest.approx(float(k["data-value"]), rel=1e-4) for k in kinds)
    modules = [shape for shape in energy if shape not in kinds]
    assert math.fsum(float(shape["data-value"]) for shape in modules) == pytest.approx(1)
    kept = drawn.shapes("share of energy kept by magnitude", "bar")
    assert [float(shape["data-value"]) for shape in kept] == list(said["total"]["kept_energy"].values())
    assert "classifier.bias, classifier.weight" in drawn.words


def test_activations_are_drawn(bert):
    found = with_activations(bert)
    assert found.activations is not None
    drawn = Page(page(found))
    by_name = {one.name: one for one in found.activations.layers}
    for title, key in (("coherence D/A", "coherence"), ("q of least squares", "least_squares_q")):
        cells = drawn.shapes(f"{title} · bert.encoder.layer", "cell")
        assert len(cells) == 12
        for cell in cells:
            name = f"bert.encoder.layer.{cell['data-layer']}.{cell['data-module']}.weight"
            assert float(cell["data-value"]) == getattr(by_name[name], key)
    card = "predicted error: DARE → least squares"
    for kind, key in (("first", "dare_error"), ("second", "least_squares_error")):
        dots = drawn.shapes(card, kind)
        dots = [dot for dot in dots if "data-value" in dot]
        values = sorted((getattr(one, key) for one in found.activations.layers), reverse=True)
        assert [float(dot["data-value"]) for dot in dots] == values
        places = [percent(dot["cx"]) for dot in dots]
        slopes = [
            (places[0] - place) / math.log(values[0] / value)
            for place, value in zip(places, values, strict=True)
            if place != places[0]
        ]
        assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-3)
    ratios = [float(bar["data-value"]) for bar in drawn.shapes("massive activations", "bar")]
    assert ratios == sorted((one.massive[0].ratio for one in found.activations.layers), reverse=True)[:12]
    assert "Activations" in drawn.words
    assert "Activations" not in Page(page(bert)).words


def test_experts_and_stacks_are_grouped(tmp_path):
    names = [f"m.layers.{i}.mlp.experts.{j}.up.weight" for i in range(12) for j in range(2)] + ["v.blocks.0.a.weight"]
    make_checkpoint(tmp_path / "base", {name: torch.ones(2, 2) for name in names})
    tuned = {name: torch.ones(2, 2) + i for i, name in enumerate(names)}
    make_checkpoint(tmp_path / "tuned", tuned)
    drawn = Page(page(inspect(str(tmp_path / "tuned"), str(tmp_path / "base"))))
    cells = drawn.shapes("mean |Δ| · m.layers", "cell")
    assert [cell["data-layer"] for cell in cells] == [str(i) for i in range(12)]
    assert {cell["data-module"] for cell in cells} == {"mlp.experts.*.up"}
    assert [float(cell["data-value"]) for cell in cells] == [2 * i + 0.5 for i in range(12)]
    assert float(drawn.shapes("‖Δ‖/‖W‖ · m.layers", "cell")[1]["data-value"]) == pytest.approx(math.sqrt(13 / 2))
    assert len(drawn.shapes("mean |Δ| · v.blocks", "cell")) == 1
    assert module_of("a.1.b.22.c.3", "a.1") == "b.*.c.*"


def test_names_stay_text(tmp_path):
    name = f"layers.0.{EVIL}.weight"
    make_checkpoint(tmp_path / "base", {name: torch.ones(4, 4), f"{EVIL}.b": torch.ones(3)})
    make_checkpoint(
        tmp_path / "tuned", {name: torch.zeros(4, 4), f"{EVIL}.b": torch.ones(3), f"x{EVIL}": torch.ones(1)}
    )
    found = inspect(str(tmp_path / "tuned"), str(tmp_path / "base"))
    hostile = found.model_copy(update={"model": f"{EVIL}\ud800\u202e\x00", "base": f"</title></style>{EVIL}"})
    text = page(with_activations(hostile))
    drawn = Page(text)
    tags = {tag for tag, _, _ in drawn.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "a", "base", "form"}
    assert not any(key.startswith("on") for _, attributes, _ in drawn.elements for key in attributes)
    assert not re.search("[\x00\u202e\ud800]", text)
    assert any("<script>alert(1)</script>" in words for words in drawn.words)
    write(hostile, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(hostile)


def test_nothing_is_fetched(bert):
    text = page(with_activations(bert))
    assert not re.search(r"https?:|//|url\(|@import|@font-face", text.replace(bert.base, ""))
    drawn = Page(text)
    assert not any({"src", "href", "style", "action"} & attributes.keys() for _, attributes, _ in drawn.elements)
    policies = [a["content"] for tag, a, _ in drawn.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in text


def test_a_delta_of_nothing_and_figures_that_are_none(tmp_path):
    base = tiny_llama(tmp_path / "base", seed=0)
    same = tiny_llama(tmp_path / "same", seed=1, base=base, sigma=0.0)
    found = inspect(str(same), str(base))
    assert found.total.norm == 0
    Page(page(with_activations(found, 0.0)))
    drawn = Page(page(with_activations(found, math.nan)))
    assert "–" in drawn.words
    assert drawn.shapes("coherence D/A · model.layers", "cell") == []
    make_checkpoint(tmp_path / "zero", {"e": torch.zeros(0), "w": torch.zeros(2, 2)})
    make_checkpoint(tmp_path / "one", {"e": torch.zeros(0), "w": torch.ones(2, 2)})
    assert "–" in Page(page(inspect(str(tmp_path / "one"), str(tmp_path / "zero")))).words


def test_an_existing_file_stays(tmp_path, capsys, monkeypatch, bert):
    monkeypatch.chdir(tmp_path)
    Path("page.html").write_text("mine")
    arguments = ["inspect", "tuned", "--base", "base", "--report", "page.html"]
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    out, err = capsys.readouterr()
    assert (leaving.value.code, out) == (1, "")
    assert err == "error: page.html: exists\nhint: another name, or --force\n"
    assert Path("page.html").read_text() == "mine"
    with pytest.raises(OutputError, match="exists"):
        write(bert, Path("page.html"))
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--force"])
    assert leaving.value.code == 0
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(OutputError, match="a report is a page"):
        check_target(Path("tuned/model.safetensors"), force=True)
    with pytest.raises(OutputError, match="nowhere is no folder"):
        check_target(Path("nowhere/page.html"), force=False)
    Path("folder.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write(bert, Path("folder.html"), force=True)


def test_the_page_needs_no_torch():
    code = (
        "import sys, deltamerge.apps.report.page\nassert not {'torch', 'matplotlib', 'pydantic'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_real_fine_tune(shared_data):
    found = inspect(str(shared_data / "sentiment"), str(shared_data / "base"))
    drawn = Page(page(found))
    cells = drawn.shapes("‖Δ‖/‖W‖ · bert.encoder.layer", "cell")
    assert (len(cells), max(float(cell["data-value"]) for cell in cells)) == (18, pytest.approx(0.204, abs=5e-4))


def test_force_without_a_page_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["inspect", "tuned", "--base", "base", "--force"])
    assert leaving.value.code == 2
    assert "--force is for the FILE of --report" in capsys.readouterr().err


RECORD: dict[str, Any] = {
    "method": "dare", "mask": "random", "density": 0.1, "objective": "output_change", "scope": "layer",
    "search": "auto", "chosen": "calibrated", "why": "it is better", "value": 1.0, "plain": {"q": 0.1, "value": 4.0},
    "searched": {"q": 0.4}, "path": [["q", 0.1, 4.0], ["q", 1.0, 2.0], ["q", 0.4, 1.0]],
    "q": {"bert.encoder.layer.0.output.dense.weight": 0.4, "bert.encoder.layer.1.output.dense.weight": 0.2},
}  # fmt: skip


def with_run(found: Report, record: dict[str, Any] = RECORD) -> Report:
    made = Run(deltamerge="0", seed=0, choices=choices({"m": record}, {}, "lock"), densities={})
    return found.model_copy(update={"run": made})


def test_what_a_lock_says_is_drawn(bert):
    drawn = Page(page(with_run(bert)))
    card = "output_change over q"
    (vanilla,) = drawn.shapes(card, "reference")
    assert float(vanilla["data-value"]) == 0.1
    assert "vanilla DARE: q = density, 1/q = 10" in drawn.words
    dots = [s for s in drawn.shapes(card, "first") if "data-x" in s]
    assert [(float(d["data-x"]), float(d["data-value"])) for d in dots] == [(0.1, 4.0), (0.4, 1.0), (1.0, 2.0)]
    heights = [float(d["cy"]) for d in dots]
    assert heights[0] < heights[2] < heights[1]
    across = [percent(d["cx"]) for d in dots]
    assert (across[1] - across[0]) / (across[2] - across[0]) == pytest.approx(math.log10(4), abs=1e-3)
    (best,) = [shape for shape in drawn.shapes(card, "best") if "cx" in shape]
    assert (best["cx"], float(best["data-value"])) == (dots[1]["cx"], 1.0)
    cells = drawn.shapes("q · bert.encoder.layer", "cell")
    assert {cell["data-layer"]: float(cell["data-value"]) for cell in cells} == {"0": 0.4, "1": 0.2}
    assert "How q of m was chosen" not in Page(page(bert)).words


HOSTILE = {
    "a word": {"path": [["q", "x", 1.0]]},
    "nothing": {"path": [], "q": {}},
    "huge": {"path": [["q", 1e308, -1e308], ["q", 1e-320, 1e308], ["q", -1.0, 0.0]], "value": 1e308},
    "not finite": {"path": [["q", math.inf, math.nan]], "searched": {"q": math.nan}, "q": {"a": math.inf}},
    "zero": {"density": 0.0, "q": {"bert.encoder.layer.0.output.dense.weight": 0.0}},
    "names": {"why": EVIL, "method": EVIL, "searched": {"q": EVIL}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_lock_from_a_stranger_is_drawn_or_refused(bert, case):
    if case in ("not finite", "zero"):
        with pytest.raises(InputError, match="lock: calibration"):
            with_run(bert, RECORD | HOSTILE[case])
        return
    text = page(with_run(bert, RECORD | HOSTILE[case]))
    assert not {"script", "img"} & {tag for tag, _, _ in Page(text).elements}


@pytest.mark.parametrize("broken", [{"mask": "no"}, {"plain": 3}, {"path": 3}, {"q": {"a": "b"}}])
def test_a_lock_that_no_run_wrote_is_refused(broken):
    with pytest.raises(InputError, match="lock: calibration"):
        choices({"m": RECORD | broken}, {}, "lock")


def test_what_changed_is_what_pruning_left(tmp_path):
    base, tune = tiny_bert_pair(tmp_path, dtype=torch.float32)
    prune = "{method: magnitude, density: [{filter: layer.1, value: 0.5}, {value: 0.25}]}"
    (tmp_path / "r.yaml").write_text(f"base_model: {base}\nmodels: [{{model: {tune}, prune: {prune}}}]\n")
    drawn = Page(page(inspect(str(run(tmp_path / "r.yaml").folder), str(base))))
    cells = drawn.shapes("entries changed · bert.encoder.layer", "cell")
    assert len(cells) == 12
    assert {(c["data-layer"], float(c["data-value"])) for c in cells} == {("0", 0.25), ("1", 0.5)}


def test_measured_errors_are_those_of_the_drawn_mask(bert):
    found = with_activations(bert)
    layers = [
        one.model_copy(update={"dare_measured": 2 * one.dare_error, "least_squares_measured": None})
        for one in found.activations.layers
    ]
    found = found.model_copy(update={"activations": found.activations.model_copy(update={"layers": layers})})
    drawn = Page(page(found))
    dots = drawn.shapes("measured error over predicted, a point a layer", "first")
    dots = [dot for dot in dots if "data-x" in dot]
    assert len(dots) == len(layers)
    assert all(float(dot["data-value"]) == pytest.approx(2 * float(dot["data-x"])) for dot in dots)


def test_pictures_depend_on_the_figures_alone(bert):
    found = with_run(with_activations(bert))
    made = pictures.pictures(found)
    assert list(made) == list(pictures.PICTURES)
    assert made == pictures.pictures(found)
    for text in made.values():
        root = ElementTree.fromstring(text)
        panels = root.findall("{http://www.w3.org/2000/svg}svg")
        assert panels
        assert all(float(panel.get("y")) + float(panel.get("height")) <= float(root.get("height")) for panel in panels)
    hostile = pictures.pictures(with_run(found, RECORD | HOSTILE["names"]))
    assert not re.search("<(script|img)", "".join(hostile.values()))


def test_pictures_of_a_run(tmp_path):
    base, tune = tiny_bert_pair(tmp_path, tokenizer=True)
    rows = [json.dumps({"text": " ".join(f"w{(7 * i + j) % 90 + 4}" for j in range(6))}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "r.yaml").write_text(
        f"base_model: {base}\nmodels: [{{model: {tune}, prune: {{method: dare, density: 0.3, q: output_change}}}}]\n"
        "calibration: {data: rows.jsonl, length: 8, sequences: 8, seeds: 1}\n"
    )
    plain, drawn = (run(tmp_path / "r.yaml", tmp_path / n, pictures=n == "drawn").folder for n in ("plain", "drawn"))
    assert {p.name for p in drawn.iterdir()} - {p.name for p in plain.iterdir()} == set(pictures.PICTURES)
    for name in pictures.PICTURES:
        assert (drawn / name).read_text().startswith("<svg ")
        assert f"]({name})" in (drawn / "README.md").read_text()
        assert name in (drawn / "recipe.lock").read_text()
    same = {p.name for p in plain.iterdir()} - {"README.md", "recipe.lock"}
    assert all((plain / name).read_bytes() == (drawn / name).read_bytes() for name in same)


def test_the_page_begins_with_its_conclusion(bert, tmp_path):
    tiny_llama(tmp_path / "base", seed=0)
    tiny_llama(tmp_path / "same", seed=1, base=tmp_path / "base", sigma=0.0)
    same = inspect(str(tmp_path / "same"), str(tmp_path / "base"))
    total = bert.total
    said = {
        "alone": (bert, f"{1 - total.unchanged:.1%} of the entries, by {total.relative_norm:.2%} of its norm. Most of"),
        "rows": (with_activations(bert), "On 4 rows, at density 0.1, the expected error of DARE is 0.25, and 0.25 at"),
        "nothing": (same, "is its base: no entry differs. There is nothing to prune or to merge."),
    }
    for found, part in said.values():
        drawn = Page(page(found.model_copy(update={"warnings": ["it may have another base"]})))
        words = [word for word in drawn.words if word.strip()]
        conclusion, warning = words[words.index(f"on {found.base}") + 1 :][:2]
        assert part in conclusion
        assert (conclusion.count(". "), conclusion[-1], warning) == (1, ".", "Warning: it may have another base.")


def test_axes_have_names(bert):
    drawn = Page(page(with_run(with_activations(bert))))
    words = [word for word in drawn.words if word.strip()]
    assert {"layer", "output_change (smaller is better)", "error (smaller is better)"} <= {*words}
    assert {"predicted error", "measured error"} <= {*words}
    maps = {where for _, attributes, where in drawn.elements if "data-layer" in attributes}
    assert len(maps) == 5
    assert words.count("layer") == 3 + len(maps) + 1  # columns, maps, the table of the figures


def test_a_heat_map_follows_its_figures_and_a_flat_one_is_left_out(bert):
    found = with_activations(bert)
    flat = {one.name: 0.5 + 0.001 * i for i, one in enumerate(found.activations.layers)}
    layers = [
        one.model_copy(update={"coherence": flat[one.name], "least_squares_q": 0.9 + flat[one.name] * 0.1 * (i % 2)})
        for i, one in enumerate(found.activations.layers)
    ]
    found = found.model_copy(update={"activations": found.activations.model_copy(update={"layers": layers})})
    drawn = Page(page(found))
    assert drawn.shapes("coherence D/A · bert.encoder.layer", "cell") == []
    assert "0.5 to 0.511 in all layers and modules" in drawn.words
    cells = drawn.shapes("q of least squares · bert.encoder.layer", "cell")
    shades = {float(cell["fill-opacity"]) for cell in cells}
    assert (min(shades), max(shades)) == (svg.FAINT, 1.0)
    assert {"0.9", "0.951"} <= {*drawn.words}
    assert "coherence" not in "".join(pictures.pictures(found).values())
