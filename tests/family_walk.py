"""What the package makes of every family of the installed transformers: merged, stacked, as a delta, calibrated.

Each is judged from the files alone, in float64. A family has a process of its own, with a limit of time and memory.

    python tests/family_walk.py                         walks all; writes family_results.json and families.md
    python tests/family_walk.py --only llama t5         walks these again
    python tests/family_walk.py --only                  writes docs/measurements/families.md anew
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from calibration_rows import rows
from conftest import write_tokenizer
from raw_tensors import ARRAYS, DIGITS, LARGEST, LEAST, Stored, read_checkpoint, widened
from reference_recipe import Place, Recipe, Unsure
from running import make_plan, run
from small_families import VOCABULARY, Unbuilt, build, families, shaken

from deltamerge.apps.chain.extract import extract
from deltamerge.errors import DeltamergeError
from deltamerge.run.apply import apply
from deltamerge.tensors.names import EMBEDDING, TASK_HEAD

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "family_results.json"
PAGE = HERE.parent / "docs" / "measurements" / "families.md"
SECONDS = 120
BYTES = 6 << 30
SIDE = 32
DENSITY = 0.3
MERGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {
        "models": [
            {"model": "./a", "parameters": {"weight": 0.6}},
            {"model": "./b", "parameters": {"weight": 0.7}},
        ],
    },
    "dare_ties": {
        "models": [
            {"model": "./a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "./b", "parameters": {"weight": 0.7, "density": 0.6}},
        ],
    },
    "slerp": {"models": [{"model": "./base"}, {"model": "./a"}], "parameters": {"t": 0.3}},
}


class Wrong(Exception):  # no error of the package: what it made is not what it has to be
    """A result that differs from its reference."""


class Made:
    """A family's folders `base`, `a` and `b`: two fine-tunes of a base; and what transformers says of loading them."""

    def __init__(self, family: str, folder: Path) -> None:
        model = build(family)
        self.folder, self.kind = folder, type(model)
        self.count = sum(p.numel() for p in model.parameters())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.save_pretrained(folder / "base")
        for seed, name in enumerate("ab", 2):
            model.load_state_dict(state)
            shaken(model, 0.02, seed).save_pretrained(folder / name)
            write_tokenizer(folder / name, VOCABULARY)
        write_tokenizer(folder / "base", VOCABULARY)
        self.tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
        self.lengths = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        self.known = set(model.state_dict())
        self.files = {name: read_checkpoint(folder / name) for name in ("base", "a", "b")}
        self.own = self.faults("base")

    def recipe(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
        return path

    def faults(self, name: str) -> dict[str, list[str]]:
        """The keys that transformers misses, does not expect or cannot fit in a folder, numbers as `*`: a few families
        do not load what they have saved.
        """
        with torch.random.fork_rng(devices=[]):
            _, info = self.kind.from_pretrained(self.folder / name, output_loading_info=True, dtype=torch.bfloat16)
        return {key: sorted({re.sub(r"\d+", "*", str(name)) for name in names}) for key, names in info.items() if names}

    def check_loads(self, name: str) -> None:
        if (found := self.faults(name)) != self.own:
            raise Wrong(f"transformers loads it with {shown(found)}, and the base with {shown(self.own)}")


def shown(faults: Mapping[str, list[str]]) -> str:
    return (
        ", ".join(f"{key}: {', '.join(names[:3])} ({len(names)})" for key, names in faults.items()) or "nothing amiss"
    )


def merged(made: Made) -> str:
    """Three merges, each tensor the reference's to within a rounding, and one of them loaded."""
    for method, settings in MERGES.items():
        content = {"merge_method": method, "base_model": "./base", **settings}
        path = made.recipe(method, content)
        run(path, made.folder / method, workers=1)
        out = read_checkpoint(made.folder / method)
        if out.keys() != made.files["base"].keys():
            raise Wrong(f"{method}: tensors {sorted(out.keys() ^ made.files['base'].keys())[:3]}")
        inputs = {f"./{name}": {n: wide(t) for n, t in files.items()} for name, files in made.files.items()}
        models = [m for m in settings["models"] if m["model"] != "./base"]
        judge = Recipe(content, inputs, [], None, None)  # type: ignore[arg-type]
        for name, tensor in out.items():
            place = Place(name, 0.0, models, [settings.get("parameters", {})], [name] * len(models), name)
            check(judge, place, method, tensor, [files[name] for files in made.files.values()])
    made.check_loads("task_arithmetic")
    return "ok"


def wide(tensor: Stored) -> np.ndarray[Any, Any]:
    return widened(tensor) if tensor[0] in ARRAYS else tensor[1]


def check(judge: Recipe, place: Place, method: str, tensor: Stored, sources: list[Stored]) -> None:
    code, array = tensor
    if code != sources[0][0]:
        raise Wrong(f"{method}: {place.name} is {code}, not {sources[0][0]}")
    same = all(s[1].tobytes() == sources[0][1].tobytes() for s in sources)
    if same or code not in ARRAYS:
        if not any(array.tobytes() == s[1].tobytes() for s in sources[: 1 if same else None]):
            raise Wrong(f"{method}: {place.name}, {'the same in all models' if same else code}, is not copied")
        return
    try:
        with np.errstate(all="ignore"):
            wanted = judge.made(place)
    except Unsure:
        return
    got = widened(tensor)
    if got.shape != wanted.size.shape:
        raise Wrong(f"{method}: {place.name} has shape {got.shape}, not {wanted.size.shape}")
    if (wrong := np.argwhere(wanted.misses(got, DIGITS[code], LEAST[code], LARGEST[code]))).size:
        at = tuple(wrong[0])
        raise Wrong(f"{method}: {place.name}{[*map(int, at)]} is {got[at]!r}, not {wanted.either[0][at]!r}")


def stacked(made: Made) -> str:
    """Stacks of layers, of each tower alone: each loads and holds what its layers held, or is refused.

    What is said of a tower is what is said of its layers in order, with one or all of them twice; layers out of order,
    which a config of several kinds of layer seldom follows, are tried besides.
    """
    told: dict[str, None] = {}
    done = 0
    for number, (module, count) in enumerate(towers(made, told)):
        order = [(0, count - 1), (1, count)] if count > 2 else [(0, count)] * 2
        for which, ranges in enumerate((order, [(count - 1, count), (0, 1)])):
            name = f"stack-{number}-{which}"
            try:
                run(made.recipe(name, layers(ranges, module)), made.folder / name, workers=1)
            except DeltamergeError as error:
                told |= {} if which else {line(error): None}
                continue
            held(made, name)
            made.check_loads(name)
            done += 1
    if not done:
        return f"refused: {next(iter(told))}"
    return "ok" if not told else f"ok, and refused: {next(iter(told))}"


def layers(ranges: list[tuple[int, int]], module: str | None) -> dict[str, Any]:
    """The recipe of a stack."""
    pairs = zip(ranges, ("./base", "./a"), strict=True)
    slices = {"slices": [{"sources": [{"model": model, "layer_range": list(pair)}]} for pair, model in pairs]}
    return {"merge_method": "passthrough", **(slices if module is None else {"modules": {module: slices}})}


def towers(made: Made, told: dict[str, None]) -> Iterator[tuple[str | None, int]]:
    """The module of each container of layers that can be stacked, and its number of layers; None: there is one."""
    path = made.recipe("towers", layers([(0, 1), (0, 1)], None))
    try:
        yield None, make_plan(path, workers=1).stacks[0].old
    except DeltamergeError as error:
        if (found := re.search(r"could stack (\S+(?: or \S+)*)", str(error))) is None:
            told[line(error)] = None
            return
    else:
        return
    containers = found[1].split(" or ")
    for container in containers:
        others = {part for other in containers if other != container for part in other.split(".")}
        own = [part for part in container.split(".") if part not in others and not part.isdigit()]
        numbers = {
            name.removeprefix(f"{container}.").split(".")[0]
            for name in made.files["base"]
            if name.startswith(container)
        }
        if own:
            yield own[0], len({number for number in numbers if number.isdigit()})


def held(made: Made, name: str) -> None:
    """Each tensor of a stack is one that a model has at a place of that name."""
    homes: dict[str, set[bytes]] = {}
    for files in made.files.values():
        for there, (_, array) in files.items():
            homes.setdefault(re.sub(r"\d+", "*", there), set()).add(array.tobytes())
    for there, (_, array) in read_checkpoint(made.folder / name).items():
        if array.tobytes() not in homes.get(re.sub(r"\d+", "*", there), ()):
            raise Wrong(f"{name}: {there} is no tensor of a layer")


def as_delta(made: Made) -> str:
    """A fine-tune as a delta, put back on its base: byte for byte the fine-tune."""
    base, delta, back = (str(made.folder / name) for name in ("base", "delta", "back"))
    extract(str(made.folder / "a"), base, Path(delta))
    apply(delta, base, Path(back), workers=1)
    got, wanted = read_checkpoint(Path(back)), made.files["a"]
    if got.keys() != wanted.keys():
        raise Wrong(f"tensors {sorted(got.keys() ^ wanted.keys())[:3]}")
    for name, (code, array) in wanted.items():
        if code != got[name][0] or array.tobytes() != got[name][1].tobytes():
            raise Wrong(f"{name} is not the fine-tune's")
    return "ok"


def calibrated(made: Made) -> str:
    """One q, searched on rows; every pruned delta keeps its mean, or is divided by the q that was chosen for it."""
    names = inspect.signature(made.kind.forward).parameters
    picture = "pixel_values" in names and "input_ids" not in names
    (pictures if picture else texts)(made.folder)
    content = {
        "base_model": "./base",
        "models": [
            {"model": "./a", "name": "a", "prune": {"method": "dare", "density": DENSITY, "q": "output_change"}}
        ],
        "calibration": {"data": "pictures" if picture else "rows.jsonl", "sequences": 4, "length": 12, "seeds": 1},
        "dtype": "float32",
    }
    path = made.recipe("calibrated", content)
    try:
        make_plan(path, workers=1, device="cpu")
    except DeltamergeError as error:
        return f"refused: {line(error)}"
    try:
        run(path, made.folder / "calibrated", workers=1, device="cpu")
    except DeltamergeError as error:
        return f"late: {line(error)}"
    lock = yaml.safe_load((made.folder / "calibrated" / "recipe.lock").read_text())
    record = lock["calibration"]["a"]
    out = read_checkpoint(made.folder / "calibrated")
    for name, tensor in out.items():
        vector = sum(side != 1 for side in tensor[1].shape) < 2 or EMBEDDING.search(name) is not None
        vector |= any(table.endswith(name.removesuffix(".weight")) for table in made.tables)
        vector |= name not in made.known and tensor[1].shape in made.lengths  # under a name that is converted
        wanted = expected(name, vector, out, record)
        check_scale(name, wide(tensor), *(wide(made.files[model][name]) for model in ("base", "a")), wanted)
    return "ok"


def check_scale(name: str, out: Any, base: Any, tune: Any, wanted: list[float]) -> None:
    """Wrong: kept entries of a delta that are not divided by the tensor's q, or are too many or too few."""
    delta = tune - base
    there = np.abs(delta) > 1e-3
    if out.dtype != np.float64 or there.sum() < 64:
        return
    ratio = ((out - base)[there] / delta[there]).reshape(-1)
    kept = np.abs(ratio) > 1e-4
    share, slack = kept.mean(), 6 * (DENSITY * (1 - DENSITY) / kept.size) ** 0.5
    if share == 1 and np.allclose(ratio, 1, atol=1e-3) and re.search(TASK_HEAD, name):
        return
    if abs(share - DENSITY) > slack:
        raise Wrong(f"{name}: {share:.3f} of its delta is kept, not {DENSITY}")
    factor = np.median(ratio[kept])
    if not np.allclose(ratio[kept], factor, rtol=0.02):
        raise Wrong(f"{name}: its kept entries are not all divided by one q")
    if not any(np.isclose(factor * q, 1, rtol=0.02) for q in wanted):
        raise Wrong(f"{name}: divided by {1 / factor:.3f}, not {wanted[0]:.3f}")


def expected(name: str, vector: bool, names: Iterable[str], record: Mapping[str, Any]) -> list[float]:
    """What the q of a tensor may be, by the lock: 1 for vectors and embeddings alone, or where 1 was searched.

    Tensors that are not calibrated are listed by pattern, of which others may be calibrated.
    """
    if name in record["q"]:
        return [float(record["q"][name])]
    groups = [group for group in record.get("not_calibrated", ()) if group["tensors"] == starred(name)]
    listed = [float(group["q"]) for group in groups if group["q"] != 1 or vector]
    whole = sum(group["count"] for group in groups) == sum(starred(other) == starred(name) for other in names)
    if not whole and any(candidate["q"] == 1 for candidate in record.get("candidates", ())):
        return [*listed, 1.0]
    return listed or [1.0 if vector else DENSITY]


def starred(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def texts(folder: Path) -> None:
    rows(folder / "rows.jsonl", 12)


def pictures(folder: Path) -> None:
    from PIL import Image

    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "a")
    (folder / "pictures").mkdir()
    for i in range(12):
        values = np.random.Generator(np.random.PCG64(i)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / "pictures" / f"{i}.png")


CELLS: dict[str, Callable[[Made], str]] = {
    "merge": merged, "stack": stacked, "delta": as_delta, "calibrate": calibrated,
}  # fmt: skip


def line(error: BaseException) -> str:
    return " ".join(str(error).split())


def outcome(cell: Callable[[Made], str], made: Made) -> str:
    """What becomes of one cell: "ok", "refused: …", "wrong: …" or "crashed: …"."""
    try:
        said = cell(made)
    except DeltamergeError as error:
        said = f"refused: {line(error)}"
    except Wrong as error:
        said = f"wrong: {line(error)}"
    except Exception as error:
        said = f"crashed: {type(error).__name__}: {line(error)}"
    return said.replace(f"{made.folder}/", "")[:400]


def examine(family: str, folder: Path, cells: Mapping[str, Any] = CELLS, keep: Callable[[Any], object] = id) -> Any:
    """A family's row of the table; `keep` is given it as far as it is known, after each cell."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        made = Made(family, folder)
    except Unbuilt as error:
        return {"unbuilt": str(error)[:300]}
    except Exception as error:
        return {"unbuilt": f"not saved and loaded by transformers: {type(error).__name__}: {line(error)[:200]}"}
    found: dict[str, Any] = {"class": made.kind.__name__, "parameters": made.count}
    found |= {"own": shown(made.own)[:200]} if made.own else {}
    for name, cell in cells.items():
        found[name] = outcome(cell, made)
        keep(found)
    return found


@dataclass(frozen=True)
class Started:
    """A family that a process of its own examines, in a temporary folder."""

    family: str
    cells: Mapping[str, Any]
    folder: Path
    pid: int

    @classmethod
    def of(cls, family: str, cells: Mapping[str, Any] = CELLS) -> Started:
        folder = Path(tempfile.mkdtemp(prefix="family-"))
        if pid := os.fork():
            return cls(family, cells, folder, pid)
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            signal.alarm(SECONDS)
            log = os.open(os.environ.get("FAMILY_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            warnings.simplefilter("ignore")
            os.chdir(folder)
            note = folder / "row.json"
            note.write_text(
                json.dumps(examine(family, folder / "models", cells, lambda r: note.write_text(json.dumps(r))))
            )
        finally:
            os._exit(0)

    def row(self) -> Any:
        """What it found; a cell that it did not reach has run out of time or memory."""
        note = self.folder / "row.json"
        try:
            found = json.loads(note.read_text()) if note.exists() else {"unbuilt": "out of time or memory"}
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if "unbuilt" in found:
            return found
        return found | {cell: "crashed: out of time or memory" for cell in self.cells if cell not in found}


def each(wanted: Sequence[str], cells: Mapping[str, Any] = CELLS, jobs: int = 1) -> Iterator[tuple[str, Any]]:
    """The rows of families, as they are done, `jobs` at a time."""
    preload()
    todo, running = list(reversed(wanted)), {}
    while todo or running:
        while todo and len(running) < jobs:
            started = Started.of(todo.pop(), cells)
            running[started.pid] = started
        pid, _ = os.waitpid(-1, 0)
        if (done := running.pop(pid, None)) is not None:
            yield done.family, done.row()


def preload() -> None:
    """Import what every family needs, once for all processes."""
    from transformers import (  # noqa: F401  # forked processes have them
        AutoModel,
        AutoTokenizer,
        BertModel,
        CLIPModel,
        LlamaForCausalLM,
        MixtralForCausalLM,
        Qwen2VLForConditionalGeneration,
        T5Model,
        ViTImageProcessor,
        WhisperModel,
    )

    import deltamerge.calibrate.stage  # noqa: F401  # as above


def walk(only: list[str], cells: list[str], jobs: int, path: Path = RESULTS) -> None:
    """Write the rows of the families `only` to the results."""
    kept = json.loads(path.read_text())["families"] if path.exists() else {}
    for family, row in each(only, {cell: CELLS[cell] for cell in cells}, jobs):
        kept[family] = row if "unbuilt" in row else {k: v for k, v in kept.get(family, {}).items() if k in CELLS} | row
        kept[family] = {
            k: kept[family][k] for k in ("unbuilt", "class", "parameters", "own", *CELLS) if k in kept[family]
        }
        print(family, {k: v for k, v in row.items() if k in cells and not v.startswith("ok")}, flush=True)
        rows = dict(sorted(kept.items()))
        path.write_text(json.dumps({"transformers": transformers.__version__, "families": rows}, indent=1) + "\n")


MEANS = {
    "merge": "`task_arithmetic`, `dare_ties` and `slerp` give the reference's value in every entry, and transformers "
    "loads the result without a missing or an unexpected key",
    "stack": "slices of its layers load in the same way, and hold what the layers held; each of several towers",
    "delta": "a fine-tune, extracted and applied to its base, is the fine-tune byte for byte",
    "calibrate": "a `q` is searched, and every pruned tensor is divided by its own",
}
INTRODUCTION = """\
# Families

What deltamerge makes of every architecture that transformers {version} can build small: {built} of its {all} config
classes. `make families` generates this page: it builds a tiny model of each with random weights, and two fine-tunes of
it, and judges the files alone, in float64. The package has no table of architectures.

| | ✓ says that | of {built} |
|---|---|---|
{means}
Anything else is refused, with the reason: by `check`, or (*run*) by the run, which asks transformers.

| family | class | parameters | merge | stack | delta | calibrate |
|---|---|---|---|---|---|---|
"""
OWN = """
## Not loaded by transformers itself

What transformers says of loading what it has saved of these, and of what deltamerge made of it.

| family | |
|---|---|
"""
LEFT = """
## Not built

| family | reason |
|---|---|
"""


def page(results: Mapping[str, Any]) -> str:
    """docs/measurements/families.md of the results."""
    rows = results["families"]
    built = {family: row for family, row in rows.items() if "unbuilt" not in row}
    counts = {cell: sum(row[cell].startswith("ok") for row in built.values()) for cell in CELLS}
    means = "".join(f"| {cell} | {MEANS[cell]} | {count} |\n" for cell, count in counts.items())
    text = INTRODUCTION.format(version=results["transformers"], built=len(built), all=len(rows), means=means)
    for family, row in built.items():
        said = " | ".join(in_words(row[cell], row["class"]) for cell in CELLS)
        text += f"| {family} | {row['class']} | {row['parameters']:,} | {said} |\n"
    own = [f"| {f} | {plain(row['own'])} |\n" for f, row in built.items() if "own" in row]
    left = [f"| {f} | {plain(row['unbuilt'])} |\n" for f, row in rows.items() if "unbuilt" in row]
    return "".join([text, *([OWN, *own] if own else []), *([LEFT, *left] if left else [])])


def in_words(said: str, name: str) -> str:
    """One cell of the page."""
    if said.startswith("ok"):
        return "✓"
    kind, _, reason = said.partition(": ")
    reason = (
        reason.removeprefix("calibration of a: ").replace(f"{name} ", "").replace("./base: ", "").replace("./a: ", "")
    )
    return plain({"refused": reason, "late": f"*run*: {reason}"}.get(kind, f"**{kind}**: {reason}"))


def plain(text: str) -> str:
    """Text for a cell of a table: one line of bounded length, without what Markdown would read."""
    cut = text if len(text) <= 140 else f"{text[:139].rpartition(' ')[0]} …"
    return re.sub(r"([|<>_`\[\]])", r"\\\1", cut)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=families())
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    walk(asked.only, asked.cells, asked.jobs, asked.results)
    if asked.results == RESULTS:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
