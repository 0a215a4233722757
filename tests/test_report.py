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

import pytest
import torch
from conftest import make_checkpoint, tiny_bert_pair, tiny_llama

from deltamerge import svg
from deltamerge.cli import main
from deltamerge.errors import OutputError
from deltamerge.influence import Activations, Influence, LayerInfluence, Massive
from deltamerge.inspect import Report
from deltamerge.report import check_target, module_of, page, write
from deltamerge.study import inspect

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
            part = svg.FAINT + (1 - svg.FAINT) * truth[name] / max(truth.values())
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
    code = "import sys, deltamerge.report\nassert not {'torch', 'numba', 'matplotlib', 'pydantic'} & sys.modules.keys()"
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
