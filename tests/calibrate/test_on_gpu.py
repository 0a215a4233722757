"""Calibration on a simulated GPU: nothing of the host among its tensors, and what the CPU finds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_guard
import pytest
import torch
from calibration_rows import rows
from conftest import tiny_bert_pair, tiny_llama
from running import calibrate, make_plan, run
from simulated_gpu import GPU, out_of_memory, simulated
from test_stage import RUNS, recipe

from deltamerge.apps.inspect import study
from deltamerge.apps.recommend.prune import recommend_prune
from deltamerge.calibrate.merge import coefficients
from deltamerge.calibrate.model.devices import Ahead, Arrivals, Resident
from deltamerge.calibrate.q import subject as subjects
from deltamerge.calibrate.q.subject import Subject
from deltamerge.cli import main
from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

BY_ROW = ["least-squares-row"]
LEARNED = ["learned", "learned-row"]


def check(folder: Path | str, name: str) -> None:
    folder = Path(folder)
    if not (folder / "calib.jsonl").exists():
        tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
        rows(folder / "calib.jsonl")
    path = recipe(folder, name, RUNS[name])
    cpu = dict(calibrate(path, device="cpu")["t"])
    with simulated() as gpu:
        found = dict(calibrate(path, device="cuda")["t"])
    assert gpu.launches
    assert found["value"] == pytest.approx(cpu["value"], rel=1e-3)
    assert found["q"].keys() == cpu["q"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ROW)
def test_it_finds_what_the_cpu_finds(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name not in BY_ROW + LEARNED])
def test_it_finds_what_the_cpu_finds_by_every_search(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_it_learns_what_the_cpu_learns(name: str, tmp_path: Path) -> None:
    gpu_guard.call(tmp_path, "test_on_gpu", "check", str(tmp_path), name)


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]], int]:
    """A recipe, what is found on a GPU where all fits, and the bytes that are sent there."""
    folder = tmp_path_factory.mktemp("plenty")
    base = tiny_llama(folder / "base", seed=0, layers=3)
    tiny_llama(folder / "tuned", seed=1, layers=3, base=base, sigma=0.05, tokenizer=True)
    rows(folder / "calib.jsonl")
    path = folder / "recipe.yaml"
    path.write_text(
        "base_model: ./base\nmodels: [{model: ./tuned, name: t, prune: {method: dare, density: 0.3, "
        "q: output_change, include: [q_proj]}}]\ncalibration: {data: calib.jsonl, sequences: 2, length: 8, seeds: 2}\n"
    )
    found, gpu = walked(path)
    return path, found, gpu.uploaded


def walked(
    path: Path,
    device: str = "cuda",
    fails: Callable[[GPU], bool] = lambda gpu: False,
    walks: int = 2,
    **simulation: int,
) -> tuple[list[list[float]], GPU]:
    """The output change of a candidate under two masks, in each walk; the first launch that `fails` has no memory."""
    with simulated(**simulation) as gpu, Reader() as reader:
        failed: list[str] = []

        def fail(name: str) -> None:
            if not failed and fails(gpu):
                failed.append(name)
                out_of_memory(name)

        gpu.failing = fail
        ((stage, spec),) = make_plan(path, device=device).specs.items()
        subject = Subject(spec.source, *spec.models(stage.inputs), reader)
        objective, q = subject.output_change("search"), {p.stored: 0.5 for p in spec.pruned}
        found = [subject.of_masks(objective, [q], range(2))[0] for _ in range(walks)]
        assert subject.passes == 1 + 2 * walks
        subject.forget()
    return found, gpu


def test_weights_that_do_not_fit_stream_by(
    plenty: tuple[Path, list[list[float]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's are read on a thread and sent on a stream of their own while the block before is computed."""
    path, found, stored = plenty
    sent: list[tuple[str, TensorInfo]] = []
    send, begin = Arrivals.send, Ahead.begin

    def seen(arrivals: Arrivals, info: TensorInfo) -> Any:
        sent.append((threading.current_thread().name, info))
        return send(arrivals, info)

    def done(ahead: Ahead[Any], infos: Any) -> None:  # no block is so short that it ends before
        begin(ahead, infos)
        wait(ahead._begun.values())

    monkeypatch.setattr(Arrivals, "send", seen)
    monkeypatch.setattr(Ahead, "begin", done)
    scarce, _ = walked(path, limit=int(1.4 * stored))
    assert scarce == found
    once = {(info.path, info.name): info.nbytes for _, info in sent}
    assert sum(info.nbytes for _, info in sent) > 1.3 * sum(once.values())
    late = {info.name.split(".")[2] for thread, info in sent if "layers" in info.name and thread == "MainThread"}
    assert late <= {"0"}  # of the first block, which no other is before


def test_gpus_share_candidates_and_masks(plenty: tuple[Path, list[list[float]], int]) -> None:
    """What is found is what one GPU finds, to the last digit."""
    path, alone, _ = plenty
    shared, gpu = walked(path, "cuda:1,0", walks=1, devices=2)
    assert shared == alone[:1]
    assert min(gpu.launched[0], gpu.launched[1]) > gpu.launches / 4


@pytest.mark.slow
@pytest.mark.parametrize("thread", ["MainThread", "device_0"])
def test_where_memory_runs_out_nothing_stays_on_the_device(
    thread: str, plenty: tuple[Path, list[list[float]], int]
) -> None:
    """The walk begins again."""
    path, found, stored = plenty
    there = [0]

    def fails(gpu: GPU) -> bool:
        there[0] += threading.current_thread().name == thread
        return there[0] > 600

    relieved, gpu = walked(path, "cuda:all", fails, devices=2)
    assert relieved == found
    assert gpu.uploaded > 1.3 * stored


@pytest.mark.slow
def test_gpus_share_a_search(tmp_path: Path) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.bfloat16, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    path = recipe(tmp_path, "shared", RUNS["global"])
    with simulated() as gpu:
        alone = dict(calibrate(path, device="cuda")["t"])
    with simulated(devices=2) as both:
        shared = dict(calibrate(path, device="cuda:all")["t"])
    assert shared == alone
    assert both.launches < 1.5 * gpu.launches  # a mask is drawn by each
    assert min(both.launched[0], both.launched[1]) > both.launches / 4


def learn_shared(folder: str) -> None:
    """Steps of several batches."""
    place = Path(folder)
    tiny_bert_pair(place, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(place / "calib.jsonl")
    path = recipe(place, "learned", RUNS["learned-row"])
    steps = subjects.Rows.steps
    with patch.object(subjects.Rows, "steps", lambda reader, rows, step: steps(reader, rows, step=step, size=2)):
        found = []
        for devices in (1, 2):
            with simulated(devices=devices) as gpu:
                found.append(dict(calibrate(path, device="cuda:all")["t"]))
        assert found[0] == found[1]
        assert min(gpu.launched[0], gpu.launched[1]) > gpu.launches / 5


@pytest.mark.slow
def test_gpus_share_the_batches_that_scales_are_learned_on(tmp_path: Path) -> None:
    gpu_guard.call(tmp_path, "test_on_gpu", "learn_shared", str(tmp_path))


def test_a_gpu_that_is_not_there_or_too_small_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    path = recipe(tmp_path, "one", RUNS["least-squares"])
    with pytest.raises(SystemExit) as left:
        main(["calibrate", str(path), "--device", "cuda"])
    said = capsys.readouterr().err
    assert (left.value.code, "torch sees 0 CUDA devices" in said, "bug" in said) == (1, True, False)
    asked: dict[str, Callable[[], Any]] = {"one": lambda: calibrate(path, device="cuda")}
    for more in ("", ", coefficients: layer"):
        whole = recipe(tmp_path, f"whole{len(more)}", "{method: dare, density: 0.3}", f", per: merge{more}")
        asked[f"merge{more}"] = partial(calibrate, whole, device="cuda")
    for method in ("regmean", "regmean_plus", "fisher"):
        by_rows = recipe(tmp_path, method, "{method: magnitude, density: 1.0}", "", f"merge_method: {method}\n")
        asked[method] = partial(run, by_rows, tmp_path / f"out-{method}", device="cuda")
    measured = {"data": tmp_path / "calib.jsonl", "sequences": 8, "length": 12}
    for name, studied in {"inspect": study.inspect, "recommend": partial(recommend_prune, density=0.3)}.items():
        both = str(tmp_path / "tuned"), str(tmp_path / "base")
        asked[name] = partial(studied, *both, calibration=measured, device="cuda")
    for ask in asked.values():
        with simulated() as gpu:
            gpu.failing = out_of_memory
            with pytest.raises(InputError, match="too little memory"):
                ask()


WHOLE = """base_model: ./base
merge_method: task_arithmetic
parameters: {lambda: 0.1}
models:
- {model: ./a, parameters: {weight: 0.5}}
- {model: ./b, parameters: {weight: 0.7}}
- {model: ./c, parameters: {weight: 0.4}}
prune: {method: dare, density: 0.6}
calibration: {data: calib.jsonl, sequences: 4, length: 8, per: merge%s}
"""


def whole_merge(folder: Path, more: str = "") -> Path:
    """The recipe of a merge of three fine-tunes that is calibrated as a whole."""
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("abc", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(folder / "calib.jsonl")
    path = folder / "whole.yaml"
    path.write_text(WHOLE % more)
    return path


def on_gpus(path: Path, devices: int) -> tuple[dict[str, Any], GPU]:
    with simulated(devices=devices) as gpu:
        return dict(calibrate(path, device="cuda:all")["merge"]), gpu


@pytest.mark.parametrize("more", [", seeds: 1", ", coefficients: row"])
def test_fine_tunes_of_a_merge_share_the_third_of_a_gpu(more: str, tmp_path: Path) -> None:
    """A third for each of three would leave no memory to compute with."""
    path = whole_merge(tmp_path, more)
    rooms = []
    init = Resident.__init__

    def seen(resident: Resident, *given: Any) -> None:
        init(resident, *given)
        rooms.append(resident.room.left)
        if len(rooms) == 3:
            raise InputError("enough")

    with simulated(limit=9 << 20), patch.object(Resident, "__init__", seen), pytest.raises(InputError, match="enough"):
        calibrate(path, device="cuda")
    assert sum(rooms) <= 3 << 20


def test_what_one_gpu_does_alone_is_said(tmp_path: Path) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    said = {
        "learned": None,
        "wanda": "device cuda:0,1: the first GPU alone measures what layers are given, or gradients",
        "global": None,
    }
    for name, line in said.items():
        path = recipe(tmp_path, name, RUNS[name])
        assert [note for note in make_plan(path, device="cuda:0,1").notes if "GPU" in note] == [line] * bool(line)
        assert not [note for note in make_plan(path, device="cuda:1").notes if "GPU" in note]


@pytest.mark.slow
def test_gpus_share_the_search_for_the_lambda_of_a_merge(tmp_path: Path) -> None:
    path = whole_merge(tmp_path, ", seeds: 2")
    (alone, gpu), (shared, both) = on_gpus(path, 1), on_gpus(path, 2)
    assert shared == alone
    assert both.launches < 1.5 * gpu.launches  # a mask is drawn by each
    assert min(both.launched[0], both.launched[1]) > both.launches / 4


def fit_shared(folder: str) -> None:
    path = whole_merge(Path(folder), ", coefficients: row")
    cpu = dict(calibrate(path, device="cpu")["merge"])
    (alone, gpu), (shared, both) = on_gpus(path, 1), on_gpus(path, 2)
    assert shared == alone
    assert shared["held_out"]["calibrated"] == pytest.approx(cpu["held_out"]["calibrated"], rel=1e-3)
    with patch.object(coefficients, "FITTED_PASSES", 15):  # each GPU draws all deltas, whatever the steps
        (_, some), (_, halves) = on_gpus(path, 1), on_gpus(path, 2)
    steps = gpu.launches - some.launches
    of_each = [both.launched[i] - halves.launched[i] for i in range(2)]
    assert sum(of_each) < 1.1 * steps, (of_each, steps)
    assert min(of_each) > steps / 4  # of three fine-tunes one has two


def fit_with_base(folder: str) -> None:
    path = whole_merge(Path(folder), ", coefficients: layer")
    of_base = "models:\n- {model: ./base, calibration: {data: calib.jsonl, sequences: 6}}\n"
    path.write_text(path.read_text().replace("models:\n", of_base))
    with patch.object(coefficients, "FITTED_PASSES", 12):
        cpu = dict(calibrate(path, device="cpu")["merge"])
        (alone, _), (shared, _) = on_gpus(path, 1), on_gpus(path, 2)
    assert shared == alone
    assert shared["held_out"]["calibrated"] == pytest.approx(cpu["held_out"]["calibrated"], rel=1e-3)
    assert shared["path"][0][-1] == pytest.approx(cpu["path"][0][-1], rel=1e-3)


@pytest.mark.slow
def test_gpus_share_the_fine_tunes_whose_coefficients_are_fitted(tmp_path: Path) -> None:
    gpu_guard.call(tmp_path, "test_on_gpu", "fit_shared", str(tmp_path))


@pytest.mark.slow
def test_gpus_share_the_base_too_where_its_answers_are_kept(tmp_path: Path) -> None:
    gpu_guard.call(tmp_path, "test_on_gpu", "fit_with_base", str(tmp_path))


def test_auto_calibrates_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    path = recipe(tmp_path, "auto", RUNS["least-squares"])
    monkeypatch.setattr("deltamerge.run.options.shows_gpu", lambda: True)
    (note,) = [note for note in make_plan(path).notes if note.startswith("device auto: ")]
    of_gpu = note.partition(";")[0].removeprefix("device auto: the GPU is for ")
    assert "calibration" in of_gpu.split(" and ")
    assert not kernels.available() or of_gpu == "calibration"  # without them it is for what they do, too
    with simulated() as gpu:
        found = dict(calibrate(path)["t"])
    assert gpu.launches
    assert found["value"] == pytest.approx(dict(calibrate(path, device="cpu")["t"])["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("cache", "include"),
    [(1 << 31, ", include: [q_proj]"), pytest.param(0, "", marks=pytest.mark.slow)],
)
def test_a_mask_is_drawn_once_or_once_a_walk(
    cache: int, include: str, plenty: tuple[Path, list[list[float]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that no loop draws: whatever the candidates, mask by mask; again in a walk only where it was not kept."""
    path = plenty[0].with_name("sampled.yaml")
    text = plenty[0].read_text().replace("density: 0.3", "density: 0.4, sampling: magnitude")
    path.write_text(text.replace(", include: [q_proj]", include))
    drawn: list[Any] = []
    computed = subjects.computed

    def seen(roots: dict[str, Any], *given: Any, **more: Any) -> Any:
        drawn.extend(roots.values())
        return computed(roots, *given, **more)

    monkeypatch.setattr(subjects, "computed", seen)
    ((stage, spec),) = make_plan(path, device="cuda").specs.items()
    source = replace(spec.source, cache=cache)
    with simulated(), Reader() as reader:
        subject = Subject(source, *spec.models(stage.inputs), reader)
        change, qs = subject.output_change("search"), [{p.stored: q for p in spec.pruned} for q in (0.2, 0.4, 0.8)]
        for _ in range(2):
            subject.of_masks(change, qs, range(2))
    masks = 2 * len(spec.pruned)
    assert len(drawn) == masks if cache else masks < len(drawn) <= 2 * masks


def test_a_batch_follows_its_tokens_and_the_logits_of_each(
    plenty: tuple[Path, list[list[float]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows of 8 tokens over a vocabulary of 96."""
    ((stage, spec),) = make_plan(plenty[0], device="cuda").specs.items()
    for name, room, rows_of in (("BATCH", 3, 3), ("BATCH_TOKENS", 5 * 8, 5), ("LOGITS_BYTES", 2 * 8 * 96 * 4, 2)):
        with monkeypatch.context() as changed, simulated(), Reader() as reader:
            changed.setattr(subjects, name, room)
            subject = Subject(spec.source, *spec.models(stage.inputs), reader)
            assert max(len(batch["input_ids"]) for batch in subject.batches["held"].inputs) == rows_of


def test_the_backward_pass_of_attention_adds_in_one_order(
    plenty: tuple[Path, list[list[float]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in one of CUDA's fused attentions, in the forward pass that is differentiated and where it is repeated."""
    seen: list[tuple[bool, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*given: Any, **more: Any) -> Any:
        cuda = torch.backends.cuda
        seen.append((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))
        return attend(*given, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ((stage, spec),) = make_plan(plenty[0], device="cpu").specs.items()
    with Reader() as reader:
        subject = Subject(spec.source, *spec.models(stage.inputs), reader)
        # the model is on the CPU, whose attention is the same: what is asked of torch is what a GPU would be given
        subject.model.device = torch.device("cuda")
        monkeypatch.setattr(subject.model, "_placed", lambda tensor: tensor)
        spark = torch.zeros((), requires_grad=True)
        batch = subject.batches["search"].inputs[0]
        made = subject.model.differentiable(batch, lambda names: {n: t + spark for n, t in subject.tune(names).items()})
        made.hidden.sum().backward()
    assert len(seen) >= 2 * len(subject.model.blocks)
    assert set(seen) == {(False, False, True)}
