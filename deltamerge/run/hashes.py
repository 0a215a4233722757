"""Hashes of the files that a run reads and writes: for its lock, and to resume an unfinished run."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.files.descriptors import flat, read_at
from deltamerge.files.hashes import Digests, Pieces, hash_whole, inside, learn, seal, sha256_of, size_of
from deltamerge.files.hashes import hash_bytes as hash_bytes
from deltamerge.files.hashes import hash_output as hash_output
from deltamerge.files.ownership import DATA as DATA
from deltamerge.formats.components import CONFIG as CONFIG_FILE
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.tokenizer_files import CONFIG, GENERATION, JINJA, MAP, TOKENIZER
from deltamerge.outputs.output import output_of
from deltamerge.plan.planner import Plan
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Tensor
from deltamerge.version import __version__

if TYPE_CHECKING:
    from deltamerge.calibrate.spec import CalibrationInput

WORKERS_AN_INPUT_HASHER = 4  # merging threads per thread that hashes other bytes

Mine = Callable[[int, int], bool]


def hash_input(path: Path, pieces: Pieces | None = None) -> str:
    """Return "xxh3-64k:<hex>" of a local file, by `files.hashes`. It guards against accidents, not against forgery.

    Pieces that `pieces` has are not read again. A file of the hub's cache gets "sha256:<hex>", which the hub already
    knows and `check_blobs` compares.
    """
    if known := sha256_of(path):
        progress.here().skip(path.stat().st_size)
        return f"sha256:{known}"
    found = learn_pieces(path, pieces or Pieces())
    return f"xxh3-64k:{hash_whole(found)}"


def learn_pieces(path: Path, pieces: Pieces, but: Iterable[tuple[int, int]] = ()) -> Digests:
    """Hash the unknown pieces of a file outside some byte ranges. Return all known hashes."""
    try:
        known = pieces.of(path)
        wanted = ~(known.there | inside(known, but))
        progress.here().skip(known.size - size_of(known, wanted))
        if wanted.any():
            with errors.context(str(path)), path.open("rb", buffering=0) as file:
                learn(known, wanted, lambda offset, out: read_at(file.fileno(), offset, flat(out)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return known


def describe_files(
    paths: Iterable[Path],
    workers: int,
    hash_file: Callable[[Path], str] = hash_output,
    root: Path | None = None,
    name: Callable[[Path], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return {hash, size} by file name, or by path below `root`, or by `name`.

    Files are hashed side by side, the largest first.
    """
    ordered = sorted(paths, key=lambda path: -path.stat().st_size)

    def hashed(path: Path) -> str:
        with progress.joined(hashing):
            return hash_file(path)

    with progress.phase("hashing", sum(path.stat().st_size for path in ordered)) as hashing:
        if workers == 1:
            hashes = list(map(hashed, ordered))
        else:
            with ThreadPoolExecutor(workers) as pool:
                hashes = list(pool.map(hashed, ordered))
    name = name or (lambda path: path.relative_to(root).as_posix() if root else path.name)
    names = [name(path) for path in ordered]
    sizes = [path.stat().st_size for path in ordered]
    return {n: {"hash": h, "size": size} for n, h, size in zip(names, hashes, sizes, strict=True)}


def input_files(model: Checkpoint) -> list[Path]:
    """Return the files of an input that a run depends on: weights and config."""
    named = [CONFIG_FILE if model.config_file == "" else model.config_file]
    named += [component.at(CONFIG_FILE) for component in model.components if component.folder]
    configs = [path for name in dict.fromkeys(named) if (path := model.path / name).is_file()]
    return [*model.files, *configs]


def input_name(model: Checkpoint, path: Path) -> str:
    """Return a file's name in a lock. In a component's folder it is the path below the model's folder."""
    inside = not model.is_simple and path.is_relative_to(model.path)
    return path.relative_to(model.path).as_posix() if inside else path.name


def describe_input(
    model: Checkpoint, workers: int, files: Iterable[Path] | None = None, pieces: Pieces | None = None
) -> dict[str, Any]:
    """Return an input's commit (if from the hub) and its files, or some of them."""
    chosen = input_files(model) if files is None else files
    hash_file = partial(hash_input, pieces=pieces)
    entry: dict[str, Any] = {"files": describe_files(chosen, workers, hash_file, name=partial(input_name, model))}
    if model.quantised is not None and model.quantised.weights:
        entry["quantised"] = str(model.quantised)
    commits = [source.revision or "" for source in model.sources]
    if all(commits):
        entry["commit"] = "+".join(commits)
    elif any(commits):
        entry["commits"] = commits
    return entry


def tokenizer_files(plan: Plan, model: Checkpoint) -> list[Path]:
    """Return the files of a model for vocabulary and chat template; for a mixture, the files for its routers."""
    tokenizes = plan.mixture is not None and model.reference == plan.inputs.template.checkpoint.reference
    wanted = [TOKENIZER, CONFIG] * (plan.vocabulary is not None or tokenizes)
    wanted += [MAP, GENERATION] * (plan.recipe.transplant is not None)
    wanted += [CONFIG, JINJA] * (plan.recipe.chat_template is not None)
    return [path for name in dict.fromkeys(wanted) if (path := model.path / name).is_file()]


def files_read(plan: Plan) -> list[tuple[Checkpoint, list[Path]]]:
    """Return every checkpoint once, with its files that the output depends on. Some lend only their tokenizer."""
    read = [(model, [*input_files(model), *tokenizer_files(plan, model)]) for model in plan.inputs.checkpoints]
    lender = plan.inputs.vocabulary
    if lender is not None and all(model.reference != lender.checkpoint.reference for model, _ in read):
        read.append((lender.checkpoint, tokenizer_files(plan, lender.checkpoint)))
    return [(model, list(dict.fromkeys(files))) for model, files in read]


def describe_inputs(
    plan: Plan, workers: int, mine: Mine = lambda position, total: True, pieces: Pieces | None = None
) -> dict[str, Any]:
    """Return commit and files of every input, limited to the files that are `mine` by position and total.

    `pieces` are the hashes that are already known.
    """
    inputs: dict[str, Any] = {}
    for model, chosen in _chosen(plan, mine):
        inputs[model.reference] = describe_input(model, workers, chosen, pieces)
    known: set[str] = set()
    for source in plan.sources:
        if source.calibration.data not in known:
            inputs[f"{DATA} of {source.model}" if known else DATA] = _describe_data(source, workers)
        known.add(source.calibration.data)
    return inputs


def _chosen(plan: Plan, mine: Mine) -> Iterator[tuple[Checkpoint, list[Path]]]:
    read = files_read(plan)
    total, position = sum(len(files) for _, files in read), 0
    for model, files in read:
        yield model, [file for i, file in enumerate(files, position) if mine(i, total)]
        position += len(files)


def hashed_as_read(source: Tensor, backend: str) -> Tensor | None:
    """Return the stored tensor whose bytes a backend hashes as it reads `source`. None: it does not hash them."""
    codes = source.coded if backend == "fused" else None
    if codes is not None:
        return codes.codes.tensor if codes.bits else None
    return source if source.kind == "stored" else None


def hash_ahead(plan: Plan, mine: Mine, pieces: Pieces) -> None:
    """Hash, beside the run, the bytes that it does not hash as it reads, and add them to `pieces`."""
    merged: defaultdict[Path, list[tuple[int, int]]] = defaultdict(list)
    for task in plan.tasks if output_of(plan).hashes_as_read else ():
        if not task.root.is_source:
            sources = (node for node in depth_first(task.root) if node.is_source)
            for one in (one for source in sources if (one := hashed_as_read(source, task.backend)) is not None):
                merged[one.path].append((one.begin, one.begin + one.nbytes))
    paths = [path for _, files in _chosen(plan, mine) for path in files if not sha256_of(path)]
    total = sum(path.stat().st_size for path in paths if path.exists())
    with progress.phase("hashing inputs", total) as hashing:
        _side_by_side([partial(learn_pieces, path, pieces, merged[path]) for path in paths], hashing, plan.workers)


def _side_by_side(works: list[Callable[[], Any]], phase: progress.Phase, workers: int) -> None:
    """Do all jobs on a few daemon threads, which an interrupted run does not wait for. Raise the first error."""
    failures: list[BaseException] = []
    todo = iter(works)
    taking = threading.Lock()

    def go() -> None:
        with progress.joined(phase):
            while not failures:
                with taking:
                    work = next(todo, None)
                if work is None:
                    return
                try:
                    work()
                except BaseException as failure:
                    failures.append(failure)

    count = min(len(works), max(1, workers // WORKERS_AN_INPUT_HASHER))
    threads = [threading.Thread(target=go, daemon=True) for _ in range(count - 1)]
    for thread in threads:
        thread.start()
    go()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _describe_data(source: CalibrationInput, workers: int) -> dict[str, Any]:
    from deltamerge.calibrate.rows.files import is_of_hub, local_files, place_of
    from deltamerge.calibrate.rows.hub import commit

    data = source.calibration.data
    root = place_of(data, source.folder)
    found = describe_files(
        local_files(data, source.folder), workers, hash_input, root=root if root.is_dir() else root.parent
    )
    commits = {"commit": commit(data)} if is_of_hub(data, source.folder) else {}
    return {"files": found, **commits}


def facts(plan: Plan, recipe_text: str) -> dict[str, Any]:
    """Return the facts that decide the bytes of the output, by readable names: files by seals, hub files by hash.

    No file is read. An unfinished run goes on only if all facts are unchanged.
    """
    layout = xxh3_128()
    for file in plan.layout.files:
        layout.update(file.header)
    found: dict[str, Any] = {
        "deltamerge": __version__,
        "the recipe": xxh3_128(recipe_text.encode()).hexdigest(),
        "the tensors of the output": layout.hexdigest(),
    }
    for model, files in files_read(plan):
        for path in files:
            found[f"{model.reference}: {input_name(model, path)}"] = _identity(path)
    for source in plan.sources:
        found |= _data_facts(source)
    return found


def _data_facts(source: CalibrationInput) -> dict[str, Any]:
    from deltamerge.calibrate.rows.files import is_of_hub, local_files
    from deltamerge.calibrate.rows.hub import commit

    data = source.calibration.data
    found: dict[str, Any] = {f"{DATA}: {path.name}": _identity(path) for path in local_files(data, source.folder)}
    return found | ({f"{DATA}: {data}": commit(data)} if is_of_hub(data, source.folder) else {})


def _identity(path: Path) -> list[int | str] | str:
    if known := sha256_of(path):
        return known
    return [*seal(path), socket.gethostname()]
