"""The paper's experiments: the frame that runs them, each at toy scale, and the page made of their results."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deltamerge.apps.report.svg import Point

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
frame = importlib.import_module("benchmarks.paper.frame")


def experiments() -> list[frame.Experiment]:
    return importlib.import_module("benchmarks.paper.__main__").experiments()


def counting(calls: list[int]) -> frame.Experiment:
    def run(setting: frame.Setting) -> dict[str, int]:
        def measure() -> int:
            calls.append(setting.seed)
            return 7 + setting.seed

        return {"value": setting.once("value", {"q": 0.1}, measure)}

    return frame.Experiment("table-1", "Counting", run, lambda record: frame.table(["value"], [[record["value"]]]), 0.1)


def test_what_was_measured_is_kept_by_what_it_was_made_of(tmp_path: Path) -> None:
    calls: list[int] = []
    experiment = counting(calls)
    for seed, again in ((0, False), (0, False), (1, False), (0, True)):
        setting = frame.Setting(toy=True, seed=seed, work=tmp_path, again=again)
        assert frame.measure(experiment, setting)["record"] == {"value": 7 + seed}
        assert frame.measure(experiment, setting)["record"] == {"value": 7 + seed}
    assert calls == [0, 1, 0]


def test_only_what_is_kept_is_taken(tmp_path: Path) -> None:
    experiment = counting([])
    kept_only = frame.Setting(work=tmp_path, kept_only=True)
    with pytest.raises(frame.NotKept):
        frame.measure(experiment, kept_only)
    assert not list(tmp_path.iterdir())
    frame.measure(experiment, frame.Setting(work=tmp_path))
    assert frame.measure(experiment, kept_only)["record"] == {"value": 7}


def test_a_result_in_which_something_lacks_is_not_finished(tmp_path: Path) -> None:
    def run(setting: frame.Setting) -> dict[str, int | None]:
        try:
            return counting([]).run(setting)
        except frame.NotKept:
            return {"value": None}

    experiment = dataclasses.replace(counting([]), run=run)
    for kept_only in (True, False):
        result = frame.measure(experiment, frame.Setting(work=tmp_path, kept_only=kept_only))
        frame.save(experiment, result, tmp_path)
        assert frame.finished(experiment, tmp_path) != kept_only
        assert ("**Not finished**" in frame.markdown([experiment], tmp_path)) == kept_only


def test_a_folder_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    setting = frame.Setting(work=tmp_path)

    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise KeyboardInterrupt

    def make(path: Path) -> None:
        path.mkdir()
        (path / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        setting.folder("tuned", {"lr": 1}, fail)
    assert [file.name for file in setting.folder("tuned", {"lr": 1}, make).iterdir()] == ["whole"]
    assert setting.folder("tuned", {"lr": 1}, fail) != setting.folder("tuned", {"lr": 2}, make)


def test_a_page_has_what_was_measured_and_names_what_was_not(tmp_path: Path) -> None:
    experiment = counting([])
    page, results = tmp_path / "docs" / "results.md", tmp_path / "results"
    frame.report([experiment], results, page)
    assert "Not measured yet: table-1." in page.read_text()
    result = frame.measure(experiment, frame.Setting(seed=3, work=tmp_path))
    frame.save(experiment, result, results)
    frame.report([experiment], results, page)
    assert "## Counting\n\n| value |\n| --- |\n| 10 |\n" in page.read_text()
    assert "python -m benchmarks.paper table-1 --seed 3" in page.read_text()
    kept = json.loads((results / "table-1.json").read_text())
    assert {"command", "commit", "seed", "machine", "versions", "seconds", "scale"} <= kept.keys()


def test_the_page_is_current() -> None:
    assert frame.PAGE.read_text(encoding="utf-8") == frame.markdown(experiments()), (
        "python -m benchmarks.paper --report"
    )


def test_every_experiment_has_its_own_name() -> None:
    names = [experiment.name for experiment in experiments()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> frame.Setting:
    """Shared, as in a run of all: what one experiment has trained the next one uses."""
    importlib.import_module("benchmarks.pruning.quality").quiet()
    return frame.Setting(toy=True, work=tmp_path_factory.mktemp("paper"))


SLOW = {"fig-3", "table-3", "table-4", "table-13", "table-g1"}  # a second or more


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "experiment",
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.name in SLOW else []) for e in experiments()],
)
def test_an_experiment_at_toy_scale(setting: frame.Setting, tmp_path: Path, experiment: frame.Experiment) -> None:
    result = json.loads(json.dumps(frame.measure(experiment, setting)))
    assert result["scale"] == "toy"
    shown = experiment.show(result["record"])
    cells = {line.count("|") for line in shown.splitlines() if line.startswith("|")}
    assert cells, "a table"
    frame.save(experiment, result, tmp_path / "results")
    frame.report([experiment], tmp_path / "results", tmp_path / "results.md")
    assert shown.strip() in (tmp_path / "results.md").read_text(encoding="utf-8")
    plots = [path.name for path in tmp_path.glob("results/*.svg")]
    assert plots == ([f"{experiment.name}.svg"] if experiment.draw else [])


def test_pictures_have_the_answer_as_title_and_at_most_a_dozen_rows(tmp_path: Path) -> None:
    drawing = importlib.import_module("benchmarks.drawing")
    answer = "Sixteen methods were compared, and <one> of them keeps 96 % of the score on average"
    drawing.draw_bars(tmp_path / "bars.svg", answer, {"methods": [Point(f"m{i}", 90 - i, 50) for i in range(16)]}, "%")
    root = ElementTree.parse(tmp_path / "bars.svg").getroot()
    words = [one.text for one in root.iter() if one.tag.endswith("text")]
    titles = [one.text or "" for one in root.iter() if one.get("class") == "title"]
    assert " ".join(titles) == answer
    assert max(map(len, titles)) <= 40
    assert {"m0", "m11"} <= {*words}
    assert "m12" not in words
    curves = {"a": [(0.01, 50.0), (0.1, 80.0)]}
    drawing.draw_lines(tmp_path / "lines.svg", answer, {"t": curves}, "density", ["%"], levels={"t": {"whole": 99.0}})
    root = ElementTree.parse(tmp_path / "lines.svg").getroot()
    (level,) = (one for one in root.iter() if one.get("class") == "reference")
    tops = [float(one.get("cy", 0)) for one in root.iter() if one.tag.endswith("circle")]
    assert float(level.get("y1", 0)) < min(tops)  # above both points
    assert level.get("y1") == level.get("y2")
    assert "whole" in [one.text for one in root.iter() if one.tag.endswith("text")]
