"""recipe.lock: what a run read and wrote, by content; sorted YAML, made to be diffed and verified."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from deltamerge import __version__, errors
from deltamerge.calibrate.hub_rows import commit
from deltamerge.calibrate.rows import is_of_hub, local_files
from deltamerge.chosen import Run, choices
from deltamerge.errors import InputError, VerifyError
from deltamerge.graph import Node, depth_first
from deltamerge.io.blobs import sha256_of
from deltamerge.io.checkpoint import Checkpoint, is_stored
from deltamerge.io.files import flat, input_error, read_at
from deltamerge.io.pieces import Known, Pieces, hash_whole, inside, learn
from deltamerge.io.safetensors_file import read_header
from deltamerge.planner import Plan
from deltamerge.stages import Calibrated, Source, locked
from deltamerge.tokenizer.files import CONFIG, JINJA, TOKENIZER

if TYPE_CHECKING:
    from deltamerge.budget import Choice

FORMAT = 1
CARD = "README.md"
LOCK_NAME = "recipe.lock"
ROWS = ".rows"
DATA = "calibration data"
HASH_BYTES = 1 << 23
MAX_BYTES = 1 << 26
MAX_DEPTH = 64
MAX_EVENTS = 1_000_000


def hash_output(path: Path) -> str:
    """ "blake3:<hex>" of a file's bytes, as `b3sum` prints it: what others get is known by a cryptographic hash."""
    from blake3 import blake3

    return f"blake3:{_digest(path, blake3(max_threads=blake3.AUTO))}"


def hash_input(path: Path, pieces: Pieces | None = None) -> str:
    """ "xxh3-64k:<hex>" of a local file, by `io.pieces`: as fast as it is read, against accidents, not against forgery.

    What `pieces` know is not read. A file of the hub's cache is "sha256:<hex>", which the hub already knows and
    `check_blobs` compares.
    """
    if known := sha256_of(path):
        return f"sha256:{known}"
    found = learn_pieces(path, pieces or Pieces())
    return f"xxh3-64k:{hash_whole(found)}"


def learn_pieces(path: Path, pieces: Pieces, but: Iterable[tuple[int, int]] = ()) -> Known:
    """Hash the pieces of a file that are not known, but those within ranges of its bytes; what is known then."""
    try:
        known = pieces.of(path)
        wanted = ~(known.there | inside(known, but))
        if wanted.any():
            with errors.context(str(path)), path.open("rb", buffering=0) as file:
                learn(known, wanted, lambda offset, out: read_at(file.fileno(), offset, flat(out)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return known


def _digest(path: Path, hasher: Any) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(min(HASH_BYTES, os.fstat(file.fileno()).st_size) or 1))
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return str(hasher.hexdigest())


def describe_files(
    paths: Iterable[Path], workers: int, hash_file: Callable[[Path], str] = hash_output, root: Path | None = None
) -> dict[str, dict[str, Any]]:
    """File name, or path below `root`, -> {hash, size}, hashed side by side, the largest first."""
    ordered = sorted(paths, key=lambda path: -path.stat().st_size)
    if workers == 1:
        hashes = list(map(hash_file, ordered))
    else:
        with ThreadPoolExecutor(workers) as pool:
            hashes = list(pool.map(hash_file, ordered))
    names = [path.relative_to(root).as_posix() if root else path.name for path in ordered]
    sizes = [path.stat().st_size for path in ordered]
    return {n: {"hash": h, "size": size} for n, h, size in zip(names, hashes, sizes, strict=True)}


def input_files(model: Checkpoint) -> list[Path]:
    """The files of an input that a run depends on: its weights and config."""
    config = model.path / "config.json"
    return [*model.files, *([config] if config.is_file() else [])]


def describe_input(
    model: Checkpoint, workers: int, files: Iterable[Path] | None = None, pieces: Pieces | None = None
) -> dict[str, Any]:
    """An input's commit (if from the hub) and its files, or some of them."""
    chosen = input_files(model) if files is None else files
    entry: dict[str, Any] = {"files": describe_files(chosen, workers, partial(hash_input, pieces=pieces))}
    commits = [source.revision or "" for source in model.sources]
    if all(commits):
        entry["commit"] = "+".join(commits)
    elif any(commits):
        entry["commits"] = commits
    return entry


def tokenizer_files(plan: Plan, model: Checkpoint) -> list[Path]:
    """The files of a model that the output's vocabulary and chat template depend on."""
    wanted = [TOKENIZER, CONFIG] * (plan.vocabulary is not None)
    wanted += [CONFIG, JINJA] * (plan.recipe.chat_template is not None)
    return [path for name in dict.fromkeys(wanted) if (path := model.path / name).is_file()]


def files_read(plan: Plan) -> list[tuple[Checkpoint, list[Path]]]:
    """Every checkpoint, once, with the files of it that the output depends on; one may lend its tokenizer alone."""
    read = [(model, [*input_files(model), *tokenizer_files(plan, model)]) for model in plan.inputs.checkpoints]
    lender = plan.inputs.vocabulary
    if lender is not None and all(model.reference != lender.checkpoint.reference for model, _ in read):
        read.append((lender.checkpoint, tokenizer_files(plan, lender.checkpoint)))
    return [(model, list(dict.fromkeys(files))) for model, files in read]


Mine = Callable[[int, int], bool]


def describe_inputs(
    plan: Plan, workers: int, mine: Mine = lambda position, total: True, pieces: Pieces | None = None
) -> dict[str, Any]:
    """For every input its commit (if from the hub) and its files; only those that are `mine` by position and total.

    `pieces` are what is known of the files already.
    """
    inputs: dict[str, Any] = {}
    for model, chosen in _chosen(plan, mine):
        inputs[model.reference] = describe_input(model, workers, chosen, pieces)
    for source in plan.sources[:1]:
        inputs[DATA] = _describe_data(source, workers)
    return inputs


def _chosen(plan: Plan, mine: Mine) -> Iterator[tuple[Checkpoint, list[Path]]]:
    read = files_read(plan)
    total, position = sum(len(files) for _, files in read), 0
    for model, files in read:
        yield model, [file for i, file in enumerate(files, position) if mine(i, total)]
        position += len(files)


def hash_ahead(plan: Plan, mine: Mine, pieces: Pieces) -> None:
    """Tell `pieces` of what a run will not hash as it reads it, while it does."""
    merged: defaultdict[Path, list[tuple[int, int]]] = defaultdict(list)
    for task in plan.tasks if plan.recipe.output.kind == "model" else ():
        if task.backend == "fused" and task.root.kind != "read":
            infos = (node.parameter("tensor") for node in depth_first(task.root) if node.kind == "read")
            for info in filter(is_stored, infos):
                merged[info.path].append((info.begin, info.begin + info.nbytes))
    for _, files in _chosen(plan, mine):
        for path in files:
            if not sha256_of(path):
                learn_pieces(path, pieces, merged[path])


def _describe_data(source: Source, workers: int) -> dict[str, Any]:
    data = source.calibration.data
    root = source.folder / data
    found = describe_files(
        local_files(data, source.folder), workers, hash_input, root=root if root.is_dir() else root.parent
    )
    commits = {"commit": commit(data)} if is_of_hub(data, source.folder) else {}
    return {"files": found, **commits}


def facts(plan: Plan, recipe_text: str) -> dict[str, Any]:
    """What the bytes of the output follow from, by names for people; files by size and time, hub files by their hash.

    Cheap: no file is read. An unfinished run goes on only if all of it is as it was.
    """
    from xxhash import xxh3_128

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
            found[f"{model.reference}: {path.name}"] = _identity(path)
    for source in plan.sources:
        data = source.calibration.data
        found |= {f"{DATA}: {path.name}": _identity(path) for path in local_files(data, source.folder)}
        if is_of_hub(data, source.folder):
            found[f"{DATA}: {data}"] = commit(data)
    return found


def _identity(path: Path) -> list[int] | str:
    if known := sha256_of(path):
        return known
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def write_lock(
    plan: Plan,
    path: Path,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    calibration: dict[str, Any] | None = None,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """Write the lock `path`; returns what it says. `choice` are the densities that a budget allowed."""
    content = {
        "deltamerge": __version__,
        "format": FORMAT,
        "seed": plan.recipe.seed,
        "inputs": inputs,
        "outputs": outputs,
        **({"calibration": calibration} if calibration else {}),
        **({"densities": choice.densities} if choice is not None else {}),
    }
    path.write_text(yaml.safe_dump(content, sort_keys=True), encoding="utf-8")
    return content


def write_calibration(plan: Plan, found: Mapping[Node, Calibrated], path: Path) -> dict[str, Any]:
    """What the lock `path` says of every calibrated model; q's of rows go to a safetensors file beside it, NAME.rows.

    Not named .safetensors: loaders that take every such file of a folder would take it for weights.
    """
    calibration: dict[str, Any] = {}
    rows: dict[str, NDArray[np.float32]] = {}
    for node, spec in plan.specs.items():
        calibrated = found[node]
        calibration[spec.name] = entry = {**calibrated.record, "q": calibrated.scalars}
        if calibrated.rows:
            entry["rows"] = path.with_suffix(ROWS).name
            rows |= {f"{spec.name}:{name}": value for name, value in sorted(calibrated.rows.items())}
    if rows:
        from safetensors.numpy import save_file

        save_file(rows, path.with_suffix(ROWS))
    return calibration


def locked_calibration(plan: Plan, lock: dict[str, Any], path: Path) -> dict[Node, Calibrated]:
    """The q's that a lock has for a plan's stages; VerifyError where it has none that fit."""
    found: dict[Node, Calibrated] = {}
    file = path.with_suffix(ROWS)
    for node, spec in plan.specs.items():
        entry = (lock.get("calibration") or {}).get(spec.name) or {}
        rows: dict[str, NDArray[np.float32]] = {}
        if entry.get("rows"):
            if not file.is_file():
                raise VerifyError(f"{file}: missing, it holds the q's of rows", hint="copy it beside the lock")
            prefix = f"{spec.name}:"
            rows = {n.removeprefix(prefix): v for n, v in read_rows(path).items() if n.startswith(prefix)}
        found[node] = locked(lock, spec, rows, str(path))
    return found


def read_rows(path: Path) -> dict[str, NDArray[np.float32]]:
    """The q's of rows beside the lock `path`, by "model:tensor"; none where there is no such file."""
    from safetensors.numpy import load_file

    file = path.with_suffix(ROWS)
    if not file.is_file():
        return {}
    read_header(file)  # ours names what is wrong with it
    return dict(load_file(file))


def chosen(path: Path) -> Run | None:
    """How the run that left the lock `path` chose q; None where there is none. InputError: the lock is none."""
    if not path.is_file():
        return None
    lock = read_lock(path)
    densities = locked_densities(lock, path) if lock.get("densities") else {}
    return Run(
        deltamerge=str(lock.get("deltamerge", "unknown")),
        seed=lock["seed"] if isinstance(lock.get("seed"), int) else 0,
        choices=choices(lock.get("calibration") or {}, read_rows(path), str(path)),
        densities=densities,
    )


def locked_densities(lock: dict[str, Any], path: Path) -> dict[str, float]:
    """The densities that a budget allowed. VerifyError: the lock has none."""
    found = lock.get("densities")
    if not isinstance(found, dict) or not all(isinstance(p, float | int) and 0 < p <= 1 for p in found.values()):
        raise VerifyError(f"{path}: has no densities", hint="run without --locked")
    return {str(name): float(p) for name, p in found.items()}


class _Part(BaseModel):
    """What must be so in a part of a lock; what is besides is kept as it is."""

    model_config = ConfigDict(extra="allow")


class _File(_Part):
    hash: str
    size: int


class _Input(_Part):
    files: dict[str, _File]


class _Calibration(_Part):
    objective: str
    scope: str
    search: str
    q: dict[str, float]
    rows: str | None = None


class _Lock(_Part):
    inputs: dict[str, _Input] = {}
    outputs: dict[str, _File]
    calibration: dict[str, _Calibration] = {}


def read_lock(path: Path) -> dict[str, Any]:
    """A lock's content; InputError if it is none, is larger than 64 MB, or nested as no lock is."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes")
        text = raw.decode("utf-8")
        depth = 0
        for count, event in enumerate(yaml.parse(text, loader)):  # first: nodes take much, and are composed recursively
            if count > MAX_EVENTS:
                raise InputError(f"{path}: holds more than {MAX_EVENTS:,} values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"{path}: nested more than {MAX_DEPTH} deep")
        content = yaml.load(text, Loader=loader)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such lock", hint="a finished `deltamerge run` leaves one") from error
    except OSError as error:
        raise InputError(f"{path}: {input_error(error)}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date that is none
        raise InputError(f"{path}: not a readable lock") from error
    if not isinstance(content, dict) or "outputs" not in content:
        raise InputError(f"{path}: not a deltamerge lock")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: lock format {str(content.get('format'))[:80]!r} is unknown",
            hint="use the deltamerge that wrote it",
        )
    try:
        _Lock.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return content


def check_inputs(lock: dict[str, Any], inputs: dict[str, Any], path: Path) -> None:
    """Refuse inputs that are not the ones the lock was made from, naming each file that differs."""
    wrong: list[str] = []
    known = lock.get("inputs") or {}
    for reference in sorted(known.keys() | inputs.keys()):
        then, now = known.get(reference), inputs.get(reference)
        if reference == DATA and now is None:  # the q's are in the lock: the data is not needed
            continue
        if then is None or now is None:
            wrong.append(f"{reference}: {'not in the lock' if then is None else 'in the lock, not in the recipe'}")
            continue
        names = then["files"].keys() | now["files"].keys()
        wrong += [f"{reference}: {f} differs" for f in sorted(names) if then["files"].get(f) != now["files"].get(f)]
        if reference == DATA and then.get("commit") != now.get("commit"):
            wrong.append(f"{reference}: commit {now.get('commit')}, the lock has {then.get('commit')}")
    if wrong:
        raise VerifyError("\n".join([f"{path}: the inputs are not those of the lock", *wrong]))


def verify(folder: Path, workers: int) -> list[str]:
    """Check every output hash of `folder`'s lock; the names checked, or VerifyError naming each that fails."""
    lock = read_lock(folder / LOCK_NAME)
    wrong: list[str] = []
    present: list[Path] = []
    for name, entry in sorted(lock["outputs"].items()):
        path = folder / name
        if Path(name).name != name:
            wrong.append(f"{name}: not a file name")
        elif not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry.get("size"):
            wrong.append(f"{name}: {path.stat().st_size} bytes, the lock says {entry.get('size')}")
        else:
            present.append(path)
    for name, found in describe_files(present, workers).items():
        if found["hash"] != lock["outputs"][name].get("hash"):
            wrong.append(f"{name}: content differs from the lock")
    if wrong:
        raise VerifyError("\n".join([f"{folder}: verification failed", *sorted(wrong)]))
    return sorted(lock["outputs"])
