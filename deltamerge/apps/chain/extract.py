"""Extract a delta artifact, a version of a chain, or a LoRA from a fine-tune and its base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError, RecipeError, UsageError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.entry import hash_of
from deltamerge.methods.registry import PRUNE
from deltamerge.models.chain.dialect import Dialect
from deltamerge.models.chain.diffs import CHECKSUMS
from deltamerge.models.chain.folder import (
    NAME,
    Named,
    Note,
    Opened,
    Version,
    base_contents,
    check_successor,
    contents,
    head,
    is_chain,
    is_version,
    line,
    notes,
    open_version,
    resolve,
    state_of,
    stored_files,
    write_note,
)
from deltamerge.models.chain.mirror import Mirror, WrittenDiffs, style_of, write_difference
from deltamerge.models.chain.publish import one_writer
from deltamerge.models.checkpoint import Checkpoint, decoded
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.references import Models, as_made_from
from deltamerge.recipe.file import RecipeFile, read_text
from deltamerge.recipe.prune import Advice, choose
from deltamerge.recipe.yaml_source import dumped
from deltamerge.run.options import Options
from deltamerge.run.plans import make_plans
from deltamerge.run.runner import Result, run
from deltamerge.tensors.reader import Reader, elements


@dataclass(frozen=True, slots=True)
class Link:
    """The version `name` that is to come after the last of `versions`, which the reference `after` names."""

    after: str
    versions: tuple[Version, ...]
    name: str

    @classmethod
    def begin(cls, after: str, out: Path) -> Link:
        """Return the link of a version that will be the folder `out`.

        InputError: `after` is no version, or `after` or `out` already has a successor. UsageError: `out` lies
        elsewhere.
        """
        path = resolve(Path(after))
        if path is None or not is_version(path):
            raise InputError(f"{after}: is no version of a chain", hint="--after chain/000119")
        path = path.resolve()
        if out.resolve().parent != path.parent or not NAME.fullmatch(out.name):
            raise UsageError(f"--out {out}: is no name in {path.parent}", hint=f"--out {path.parent / '000120'}")
        versions = line(path, Opened())
        for name, note in notes(path.parent).items():
            before = None if note is None or note.after is None else note.after.name
            if before == out.name or (before == path.name and name != out.name):
                raise InputError(f"{path.parent}: {name} comes after {before} already", hint=f"--after {name}")
        if out.name in {version.name for version in versions}:
            raise InputError(f"{out}: cannot come after itself")
        if is_chain(Path(after)):
            after = str(Path(after) / path.name)
        elif path.name != Path(after).name:  # a link to a version
            after = str(Path(after).parent / path.name)
        return cls(after, versions, out.name)

    def base(self, reference: str, *, pickles: bool = False) -> str:
        """Return the reference that the version is compared with. InputError: `reference` is neither of these two.

        It is `reference` itself if the version before makes it. It is the version before if `reference` is the chain's
        base.
        """
        first = self.versions[0].delta.manifest
        end, origin = self.versions[-1].contents, base_contents(first)
        in_base = {name: first.tensors[name].base_name or name if name in first.tensors else name for name in end}
        differing = [n for n in end if in_base[n] in origin and end[n] != origin[in_base[n]]] or list(end)[:1]
        found = Models().open(reference, Path.cwd(), weights=True, pickles=pickles)
        with errors.context(reference):
            form = decoded(found)
            tensors = form.tensors
            if as_made_from(form, self.versions[0].delta) is not form:
                hint = "extract RUN --quantized, of the plain model's chain"
                raise InputError(f"{self.after} has its codes, and --after makes versions of weights", hint=hint)
        name = min(differing, key=lambda name: math.prod(end[name].shape), default="")
        if not name:
            return reference
        with Reader() as reader:
            have = {
                each: hash_of(elements(reader, tensors[each]), math.prod(tensors[each].shape))
                for each in {name, in_base[name]} & tensors.keys()
            }
        if have.get(name) == end[name].hash:
            return reference
        if in_base[name] in origin and have.get(in_base[name]) == origin[in_base[name]].hash:
            return f"{reference}+{self.after}"
        raise InputError(
            f"{reference}: is neither the result of {self.versions[-1].name} nor the base of its chain: {name} differs",
            hint=f"the chain is of {self.versions[0].delta.manifest.base}",
        )

    def finish(self, folder: Path) -> None:
        """Write the version.json of the artifact in `folder`.

        InputError: the artifact was not made from the result of the version before.
        """
        opened, before = DeltaFile.open(folder), self.versions[-1]
        if open_version(before.path).state != before.state:
            raise InputError(f"{before.path}: was replaced by another process meanwhile", hint="run it again")
        check_successor(before.contents, opened.manifest, before.name)
        note = Note(
            name=self.name,
            base=before.base,
            state=state_of(contents(opened.manifest)),
            after=Named(name=before.name, state=before.state),
            files=stored_files(folder, opened.files),
        )
        write_note(folder, note)


def extract(
    model: str,
    base: str,
    out: Path | None = None,
    *,
    density: float | None = None,
    method: str | None = None,
    q: float | None = None,
    values: str | None = None,
    after: str | None = None,
    lora: Mapping[str, Any] | None = None,
    size: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Result:
    """Run the recipe of one fine-tune, `model` of `base` (folders or hub ids), whose output is a delta.

    With `lora` (keys of a recipe's output: rank, energy, budget, …) the output is an adapter. `calibration` weighs its
    factors. With `size` (`bytes` or `ratio`) the bytes of the artifact are distributed, and rows teach its codes.
    Without `density` all changes are kept, and stored as final values. `values` stores values to add, in this format.
    With a density, `pruning` decides, and `calibration` chooses q. By default `out` is NAME-delta or NAME-lora in the
    current folder. `options` are the options of `run`.

    With `after`, a version of a chain, `out` is the next version beside it. `base` is then the checkpoint of `after`,
    or the base of the chain. UsageError: a method, a q or rows without a density; `after` with a LoRA, or without
    `out`. RecipeError, without a line: a method is unknown or needs more settings.
    """
    if lora is None and size is None and density is None and calibration is not None:
        hint = "--density 0.01, or --budget 8MB"
        raise UsageError("--calibration is for --density, whose q it chooses, --budget and --lora", hint=hint)
    if after is not None:
        if lora is not None or out is None:
            raise UsageError("--after needs --out, and takes no --lora", hint="a version is a delta artifact")
        link, options = Link.begin(after, out), options or Options()
        with one_writer(out.resolve().parent, "adding"):
            base, options = link.base(base, pickles=options.pickles), replace(options, ending=link.finish)
            chosen: dict[str, Any] = {"density": density, "method": method, "q": q, "calibration": calibration}
            chosen |= {"values": values, "size": size}
            return extract(model, base, out, **chosen, options=options)
    if out is not None and not (options and options.ending) and is_chain(out):
        raise UsageError(f"--out {out}: is a chain", hint=f"--out {out}/NAME --after {out}/BEFORE")
    given: dict[str, Any] = {"density": density, "method": method, "q": q, "values": values}
    file = _recipe(model, base, **given, lora=lora, size=size, calibration=calibration)
    with _as_asked():
        return run(file, out or Path(name_of(model, lora=lora is not None)), options)


def look_at(models: Sequence[str], base: str, options: Options, **given: Any) -> None:
    """Plan the extraction of each model, with the arguments of `extract`. Raise the errors that headers show.

    The plans are not kept: a file may change before its model's turn comes, so `extract` reads the headers then.
    """
    for model in models:
        file = _recipe(model, base, **given)
        with _as_asked():
            make_plans(file, Path(name_of(model, lora=given["lora"] is not None)), options)


@contextmanager
def _as_asked() -> Iterator[None]:
    """Let an error of the made recipe name no line of it."""
    try:
        yield
    except RecipeError as error:
        raise error.of("extract") from None


def _recipe(
    model: str,
    base: str,
    *,
    density: float | None,
    method: str | None,
    q: float | None,
    values: str | None,
    lora: Mapping[str, Any] | None,
    size: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None,
) -> RecipeFile:
    """Return the recipe of an extraction."""
    if density is None and (method is not None or q is not None):
        raise UsageError("--method and --q need --density", hint="--density 0.01 keeps a hundredth of the delta")
    if model.rstrip("/") == base.rstrip("/"):
        raise InputError(f"{model}: is the base itself", hint="name a fine-tune, and behind it its base")
    output = _output(values)
    if lora is not None:
        output = {"kind": "peft", **lora, **({} if values is None else {"values": values})}
    recipe: dict[str, Any] = {"base_model": base, "models": [{"model": model}], "output": output}
    if calibration is not None:
        recipe["calibration"] = dict(calibration)
    if density is not None:
        recipe["prune"] = pruning(density, method, q, rows=calibration is not None).prune
    if size is not None:
        recipe |= {"prune": {"method": "budget", **size}, "output": _output(None) | {"semantics": "add"}}
    with _as_asked():
        return replace(_file(recipe), made_for="extract" if lora is None else "extract --lora")


def extract_as(
    style: str, model: str, base: str | None, out: Path, *, after: str | None, workers: int, pickles: bool = False
) -> list[WrittenDiffs]:
    """Write versions in another project's layout, and return them.

    `style` is "slime", "slime:overwrite" or "skyrl". If `model` is a chain, `out` is a folder of versions, and gets the
    versions that it lacks. Otherwise `out` is one version: the first over `base`, or the next version after `after`
    beside it. `base` is then the checkpoint of `after`, or the base of all versions.

    UsageError: `out` or `after` is not named like a version, or is not the next one. InputError: a model cannot be
    read, is quantised, or differs from its base in more than values. OutputError: the disk.
    """
    dialect, _ = style_of(style)
    if is_chain(Path(model)):
        if after is not None:
            raise UsageError("--after is for a model: a chain has its own order")
        versions = line(Path(model) / head(Path(model)))
        origin = _plain(base or str(versions[0].delta.manifest.base), pickles, versions[0].delta)
        with Mirror(out, style) as mirror, errors.context(model):
            return mirror.catch_up(versions, origin, workers)
    if base is None:
        raise UsageError("name the base once: as BASE, or with --base")
    number = dialect.number(out)
    if number < 1:
        raise UsageError(
            f"--out {out}: is no version of {dialect.name}'s", hint=f"--out {out.parent}/{dialect.title(1)}"
        )
    with Mirror(out.parent, style) as mirror:
        if number != mirror.newest + 1:
            raise UsageError(f"--out {out}: the next version is {dialect.title(mirror.newest + 1)}")
        previous = None if after is None else dialect.resolve(Path(after))
        if (0 if previous is None else dialect.number(previous)) != number - 1 or (
            previous is not None and previous.resolve().parent != out.resolve().parent
        ):
            hint = (
                f"--after {out.parent / dialect.title(number - 1)}" if number > 1 else "the first comes after the base"
            )
            raise UsageError(f"--out {out}: does not come after {after or 'the base'}", hint=hint)
        old = _plain(base, pickles)
        if previous is not None and not _made_by(dialect, previous, old):
            old = dialect.over(previous, old, f"{base}+{after}")
        return [write_difference(mirror, old, _plain(model, pickles), workers)]


def _made_by(dialect: Dialect, version: Path, model: Checkpoint) -> bool:
    """Return whether a model is the checkpoint of a version, by the smallest tensor that its line changes."""
    diffs = {name: diff for one in dialect.line(version) for name, diff in (one.diffs or {}).items()}
    known = [name for name in diffs if name in model.tensors]
    name = min(known, key=lambda name: math.prod(model.tensors[name].shape), default=None)
    if name is None:
        return True
    with Reader() as reader:
        bits = elements(reader, model.tensors[name])(0, math.prod(model.tensors[name].shape))
    return CHECKSUMS[diffs[name].algorithm](flat(bits)) == diffs[name].checksum


def _plain(reference: str, pickles: bool, delta: DeltaFile | None = None) -> Checkpoint:
    """Return a model with its stored tensors, or with the tensors that a `delta` changes.

    InputError: it is quantised, and the delta does not change its codes; or it has several components.
    """
    found = Models().open(reference, Path.cwd(), weights=True, pickles=pickles)
    with errors.context(reference):
        if not found.is_simple:
            raise InputError("has several components", hint="a folder of versions for each")
        form = decoded(found)
        if (form if delta is None else as_made_from(form, delta)).quantised is not None:
            raise InputError("is quantised, and other projects' versions of it are not written", hint="name it in bf16")
    return found


def curve(
    model: str,
    base: str,
    sizes: Sequence[Mapping[str, Any]],
    *,
    calibration: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> list[tuple[int, float]]:
    """Return the bytes of each size (bytes or ratio), and an estimate of the share of the delta's squares it loses."""
    from deltamerge.outputs import shares

    plans, options = [], replace(options or Options(), ending=None)
    for size in sizes:
        recipe: dict[str, Any] = {"base_model": base, "models": [{"model": model}]}
        recipe |= {"prune": {"method": "budget", **size}, "output": _output(None) | {"semantics": "add"}}
        recipe |= {} if calibration is None else {"calibration": dict(calibration)}
        with _as_asked():
            plans.append(make_plans(_file(recipe), Path(name_of(model, lora=False)), options)[-1])
    found = [nbytes for one in plans if (nbytes := shares.bytes_of(one)) is not None]
    return shares.curve(plans[found.index(max(found))], found)


def _file(recipe: Mapping[str, Any]) -> RecipeFile:
    return read_text(dumped(dict(recipe)), Path.cwd() / "extract")


def pruning(density: float, method: str | None, q: float | None, *, rows: bool) -> Advice:
    """Return the pruning for a density: `method` and `q` if given, otherwise the method that keeps most of a fine-tune.

    `rows`: whether there is calibration data, which chooses q. UsageError: q is given twice.
    """
    if method is None and q is None:
        return choose(density, rows=rows)
    method = method or "magnitude"
    measured = method in PRUNE and PRUNE[method].needs_activations
    if rows and q is not None and not measured:
        raise UsageError("--q and --calibration both give q", hint="keep one of the two")
    prune: dict[str, Any] = {"method": method, "density": density}
    chosen = "output_change" if rows and q is None else q
    return Advice(prune if chosen is None else prune | {"q": chosen}, "as asked for")


def name_of(model: str, *, lora: bool) -> str:
    """Return the folder's name of a model where none is given."""
    name = Path(model.partition("@")[0]).name or "model"
    return f"{name}-{'lora' if lora else 'delta'}"


def name_in_store(model: str) -> str:
    """Return the name of a model's folder in a store. UsageError: its name cannot be one."""
    name = Path(model.partition("@")[0]).name
    if NAME.fullmatch(name) is None:
        raise UsageError(f"{model}: {name!r} is no name in a store", hint="extract it by itself, with --out")
    return name


def _output(values: str | None) -> dict[str, Any]:
    return {"kind": "delta"} if values is None else {"kind": "delta", "semantics": "add", "values": values}
