"""The engine on a simulated GPU: the CPU's bytes, no race, little waiting, and one line where it cannot go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import kept_recipes
import pytest
import torch
from backend_choice import available, computed_by
from conftest import make_checkpoint, needs_kernels
from raw_tensors import read_checkpoint, write_checkpoint
from running import make_plan, run
from simulated_gpu import GPU, Refused, out_of_memory, simulated

from deltamerge.engine.execute import computed
from deltamerge.engine.worker import Job, Worker
from deltamerge.errors import InputError
from deltamerge.files import outbox
from deltamerge.files.outbox import Outbox
from deltamerge.formats.safetensors import read_header
from deltamerge.methods.ops import dense, subtract
from deltamerge.methods.prune.bits import mask_key
from deltamerge.methods.prune.dare import dare
from deltamerge.methods.prune.della import della
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph

PAIRS = [("F16", "F16"), ("BF16", "F32")]
TINY = {"q.weight": (5, 24)}
EVERY = [(kind, name) for kind in ("merges", "pruned") for name in kept_recipes.RECIPES[kind]()]
# one of each way that a tensor goes: by one loop, sorted rows, positions, lists, float64 on the host
SOME = ["linear", "ties", "breadcrumbs_ties", "dare_linear", "dare_linear-sparse", "della", "nuslerp-columns",
        "arcee_fusion", "sce-some"]  # fmt: skip


def make_inputs(folder: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[str, str]], shapes: dict) -> None:
    monkeypatch.setattr(kept_recipes, "DTYPES", pairs)
    for model, name in enumerate(kept_recipes.MODELS):
        write_checkpoint(folder / name, kept_recipes.inputs(shapes, model))


def compare(folder: Path, name: str, text: str, workers: int = 1, devices: int = 1) -> GPU:
    """Run a recipe on both; the simulated GPU that made the same bytes."""
    path = folder / "recipe.yaml"
    path.write_text(text)
    cpu = run(path, folder / f"{name} cpu", workers=workers, device="cpu").folder
    with simulated(devices=devices) as gpu:
        made = run(path, folder / f"{name} gpu", workers=workers, device="cuda:all").folder
    assert read_bytes(cpu) == read_bytes(made), name
    assert gpu.launches
    return gpu


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, (_, array) in read_checkpoint(folder).items()}


def test_it_makes_the_cpus_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path, monkeypatch, PAIRS, TINY)
    for name in SOME:
        compare(tmp_path, name, kept_recipes.MERGES[name])


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of recipe, with inputs of every pair of dtypes."""

    @cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        kept_recipes.make_inputs(folder, kind)
        return folder / kind

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_it_makes_the_cpus_bytes_of_every_method_and_dtype(
    kind: str, name: str, every_dtype: Callable[[str], Path]
) -> None:
    compare(every_dtype(kind), name, kept_recipes.RECIPES[kind]()[name], workers=2)


def test_gpus_share_the_tasks_of_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes whole tensors, whose tiles stay there from pass to pass."""
    make_inputs(tmp_path, monkeypatch, PAIRS, {f"{n}.weight": (9, 24) for n in "abcd"})
    name, do, both, seen = "ties", Worker.do, threading.Barrier(2, timeout=60), set[str]()

    def together(worker: Worker, job: Job) -> None:
        if job.running.device not in {"cpu", *seen}:
            seen.add(job.running.device)
            both.wait()
        do(worker, job)

    monkeypatch.setattr(Worker, "do", together)
    gpu = compare(tmp_path, name, kept_recipes.MERGES[name], devices=2)
    assert (seen, sorted(gpu.launched)) == ({"cuda:0", "cuda:1"}, [0, 1])
    stored = sum(len(data) for model in kept_recipes.MODELS for data in read_bytes(tmp_path / model).values())
    assert gpu.uploaded <= stored + 4 * 2 * 4096


def one_tensor(folder: Path, rows: int, columns: int = 64) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=generator)
    for number, name in enumerate(kept_recipes.MODELS):
        noise = 0.1 * torch.randn(rows, columns, generator=generator)
        make_checkpoint(folder / name, {"w": (base + number * noise).bfloat16()})


# launches, waits of the host and uploads of one tile: a few steps of torch for each model and pass, and about 250 for
# each stream of random words
BOUNDS = {
    "task_arithmetic": (19, 1, 4), "dare_linear": (1627, 4, 4), "ties": (153, 10, 4), "nuslerp": (63, 2, 2),
    "breadcrumbs_ties": (181, 13, 4), "dare_linear-sparse": (888, 14, 5), "della": (897, 7, 4),
    "arcee_fusion": (49, 21, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_a_tile_takes_few_launches_and_the_host_seldom_waits(name: str, tmp_path: Path) -> None:
    """Of one tile of one tensor: of more the numbers are multiples."""
    one_tensor(tmp_path, 96)
    gpu = compare(tmp_path, name, kept_recipes.MERGES[name])
    launches, waits, uploads = BOUNDS[name]
    assert (gpu.launches <= launches, gpu.synchronisations <= waits) == (True, True), (
        gpu.kernels,
        gpu.synchronisations,
    )
    assert gpu.uploaded <= uploads * 96 * 64 * 2 + 4096  # stored tiles once, whatever the passes


def test_more_blocks_and_more_elements_are_no_more_launches(tmp_path: Path) -> None:
    """Of one tile, which on a GPU is a large one wherever tensors are made: of merges, and of calibration's masks."""
    counts = []
    for rows in (96, 6144):
        one_tensor(tmp_path / str(rows), rows)
        infos = [read_header(tmp_path / str(rows) / n / "model.safetensors").tensors["w"] for n in ("a", "base")]
        graph, shape, key = Graph(), (rows, 64), mask_key(1, "t", "w")
        reads = [graph.read(info) for info in infos]
        delta = graph.node(subtract, reads, shape=shape, dtypes=("BF16", "BF16"))
        made = [
            graph.node(dare, reads, shape=shape, key=key, density=0.01),
            graph.node(della, [delta], shape=shape, key=key, density=0.4, epsilon=0.2),
        ]
        with simulated() as gpu, Reader() as reader:
            for delta in made:
                computed({"w": graph.node(dense, [delta], shape=(rows, 64))}, reader, device="cuda", workers=1)
        counts.append(gpu.launches)
    assert counts[0] == counts[1]


def test_memory_that_runs_out_halves_the_tile_and_then_is_one_line(tmp_path: Path) -> None:
    one_tensor(tmp_path, 2048)
    path = tmp_path / "recipe.yaml"
    path.write_text(kept_recipes.MERGES["task_arithmetic"])
    cpu = run(path, tmp_path / "cpu", workers=1, device="cpu").folder
    sizes: list[int] = []
    with simulated() as gpu:

        def fail(name: str) -> None:
            sizes.append(gpu.asked)
            if gpu.asked > 280_000:
                out_of_memory(name)

        gpu.failing = fail
        made = run(path, tmp_path / "gpu", workers=1, device="cuda").folder
    assert max(sizes) > 280_000
    assert read_bytes(cpu) == read_bytes(made)
    with simulated() as gpu:
        gpu.failing = out_of_memory
        with pytest.raises(InputError, match="too little memory for a tile of 65,536 elements of w"):
            run(path, tmp_path / "none", workers=1, device="cuda")
    with simulated(limit=1 << 22) as gpu:  # a tile is chosen that fits what is free
        run(path, tmp_path / "small", workers=1, device="cuda")


def test_the_simulation_sees_what_cuda_would_get_wrong() -> None:
    with simulated():
        there = torch.arange(4.0, device="cuda")
        with pytest.raises(Refused, match="same device"):
            there + torch.ones(4)
        pinned = torch.ones(8, pin_memory=True)
        sent = pinned.to("cuda", non_blocking=True)
        pinned.fill_(2.0)
        with pytest.raises(Refused, match="pinned memory was written"):
            sent.cpu()
    with simulated():
        there = torch.arange(4.0, device="cuda")
        back = torch.zeros(4, pin_memory=True)
        back.copy_(there, non_blocking=True)
        assert not torch.equal(back, torch.arange(4.0))
        torch.cuda.synchronize()
        assert torch.equal(back, torch.arange(4.0))
        with torch.cuda.stream(torch.cuda.Stream()):
            other = there * 2
        with pytest.raises(Refused, match="another stream"):
            other + 1
        torch.cuda.current_stream().wait_event(other_event := torch.cuda.Event())
        assert other_event.query()


def test_on_the_cpu_nothing_of_cuda_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's path too: a GPU that is not asked for is somebody else's."""
    one_tensor(tmp_path, 8)
    monkeypatch.setattr("deltamerge.engine.backends.fused_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was initialised"))
    for name in ("stream", "current_stream", "Stream", "is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was asked"))
    path = tmp_path / "recipe.yaml"
    path.write_text(kept_recipes.MERGES["ties"])
    run(path, tmp_path / "out", device="cpu")


NANS = {"F16": 0x7E00, "BF16": 0x7FC0, "F32": 0x7FC00000}


@pytest.mark.parametrize("dtype", NANS)
def test_nan_has_the_same_bits_everywhere(dtype: str, tmp_path: Path) -> None:
    torch_type = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    bits = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FFFFFFF, 0x3F800000], dtype=torch.int32)
    for name, value in (("base", torch.zeros(4)), ("a", bits.view(torch.float32)), ("b", torch.ones(4))):
        make_checkpoint(tmp_path / name, {"w": value})
    path = tmp_path / "recipe.yaml"
    weight = "parameters: {weight: 1}"
    out = str(torch_type).removeprefix("torch.")
    path.write_text(
        f"merge_method: linear\nmodels: [{{model: ./a, {weight}}}, {{model: ./b, {weight}}}]\n"
        f"dtype: float32\nout_dtype: {out}\n"
    )
    found = set()
    for backend in available():
        with computed_by(backend):
            found.add(nan_bits(run(path, tmp_path / backend, device="cpu", allow_nonfinite=True).folder))
    with simulated():
        found.add(nan_bits(run(path, tmp_path / "gpu", device="cuda", allow_nonfinite=True).folder))
    assert found == {(NANS[dtype],) * 3}


def nan_bits(folder: Path) -> tuple[int, ...]:
    ((_, array),) = read_checkpoint(folder).values()
    return tuple(int(x) for x in array.view(f"u{array.itemsize}").reshape(-1)[:3])


AUTO = {
    "ties": (set(), "nothing of it is faster on the GPU"),
    "della": ({"torch"}, "the GPU is for 1 tensors that are sorted"),
    "arcee_fusion": ({"torch"}, "the GPU is for 1 tensors that are sorted or decomposed"),
}


@needs_kernels  # without them a GPU is for all that torch makes
@pytest.mark.parametrize("name", AUTO)
def test_auto_takes_a_gpu_for_what_it_does_faster(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_tensor(tmp_path, 8)
    backends, said = AUTO[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(kept_recipes.MERGES[name])
    cpu = run(path, tmp_path / "cpu", device="cpu").folder
    assert not [note for note in make_plan(path).notes if "device auto" in note]  # no GPU is shown
    monkeypatch.setattr("deltamerge.run.options.shows_gpu", lambda: True)
    planned = make_plan(path)
    assert said in " ".join(planned.notes)
    assert {task.backend for task in planned.tasks} == (backends or {"fused"})
    with simulated() as gpu:
        made = run(path, tmp_path / "gpu").folder
    assert bool(gpu.launches) == bool(backends)
    without = run(path, tmp_path / "driver").folder  # the machine shows one, and torch sees none
    assert read_bytes(cpu) == read_bytes(made) == read_bytes(without)


def test_float8_is_read_by_index(tmp_path: Path) -> None:
    """torch has kernels for that only on some devices: what is sparse looks at bytes."""
    generator = torch.Generator().manual_seed(0)
    for name in kept_recipes.MODELS:
        dtype = torch.float8_e5m2 if name == "base" else torch.float8_e4m3fn
        make_checkpoint(tmp_path / name, {"w.weight": torch.randn(9, 24, generator=generator).to(dtype)})
    for name in ("dare_linear", "dare_linear-sparse", "della"):
        compare(tmp_path, name, kept_recipes.MERGES[name] + "dtype: bfloat16\n")


def test_inputs_are_hashed_by_the_threads_that_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor's bytes once, by whoever sends them to the GPU."""
    make_inputs(tmp_path, monkeypatch, PAIRS, {f"{n}.weight": (9, 24) for n in "abcd"})
    both, read, names = threading.Barrier(2, timeout=60), Reader.read_hashed, list[str]()
    sizes: list[int] = []

    def seen(reader: Reader, info: Any, start: int, into: Any) -> Any:
        name, sizes[len(sizes) :] = threading.current_thread().name, [into.nbytes]
        if name not in names and len(set(names)) < 2:
            names.append(name)
            both.wait()
        return read(reader, info, start, into)

    monkeypatch.setattr(Reader, "read_hashed", seen)
    path = tmp_path / "recipe.yaml"
    path.write_text(kept_recipes.MERGES["task_arithmetic"])
    with simulated():
        run(path, tmp_path / "gpu", workers=2, device="cuda")
    assert len(names) == 2
    stored = sum(len(data) for model in kept_recipes.MODELS for data in read_bytes(tmp_path / model).values())
    assert sum(sizes) == stored


def test_tiles_come_back_into_memory_that_is_written_and_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned, so that the GPU sends them by itself, and enough for all workers: none is read back for its hash."""
    for name, value in {"LEAST": 1 << 12, "SLAB": 1 << 14, "READ": 1 << 12, "ROOM": 1 << 14}.items():
        monkeypatch.setattr(outbox, name, value)
    make_inputs(tmp_path, monkeypatch, [("BF16", "BF16")], {f"{n}.weight": (128, 64) for n in range(8)})
    lend, forget, pinned, forgotten = Outbox.lend, Outbox._forget, list[bool](), list[int]()

    def lent(box: Outbox, position: int, nbytes: int) -> Any:
        memory = lend(box, position, nbytes)
        if GPU.current is not None:
            pinned.append(GPU.current.is_pinned(torch.from_numpy(memory)))
        return memory

    monkeypatch.setattr(Outbox, "lend", lent)
    monkeypatch.setattr(Outbox, "_forget", lambda box: (forgotten.append(GPU.current is not None), forget(box))[1])
    compare(tmp_path, "task_arithmetic", kept_recipes.MERGES["task_arithmetic"], workers=4)
    assert len(pinned) == 8  # as many as there is room for, in whatever order they come
    assert all(pinned)
    assert not any(forgotten)
