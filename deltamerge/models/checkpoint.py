"""Checkpoints: headers are read first and bytes on demand; quantised weights are read as float32."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import input_error
from deltamerge.formats.components import (
    CONFIG,
    PIPELINE,
    RUNNING_SUM,
    Component,
    check_folder,
    folders_of,
    is_composed,
    listed_folders,
    named_by,
    read_config,
    split,
)
from deltamerge.formats.quantised.detect import HINT, SCHEMES, Scheme, keys_of, moved, orphans, reader_of, scheme_of
from deltamerge.formats.safetensors import Header
from deltamerge.formats.weight_files import (
    ALLOW,
    GGUF,
    MISTRAL,
    PICKLES,
    is_distributed,
    is_weights,
    join,
    open_weights,
    parts_of,
    read_weights,
    weight_source,
)
from deltamerge.formats.weight_files import INDEX as INDEX
from deltamerge.formats.weight_files import SINGLE as SINGLE
from deltamerge.models.token_text import TEXT, Spelling
from deltamerge.tensors.dtypes import CODES, FLOATING, PLAIN
from deltamerge.tensors.tensor import TensorInfo as TensorInfo

if TYPE_CHECKING:
    from deltamerge.formats.components import RunningSum
    from deltamerge.formats.gguf.file import GgufHeader
    from deltamerge.formats.peft.adapter import Adapter
    from deltamerge.formats.quantised.scheme import StoredWeight

DELTA = "delta.json"


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer's vocabulary.

    `ids` maps tokens to ids, in the order of ids; `added` has the tokens that are matched before the model sees the
    text, as tokenizer.json lists them (without the id); `plain` is the number of the model's own tokens; `spelling` is
    their spelling.
    """

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    plain: int
    spelling: Spelling = TEXT


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's tensors and their places, from its headers.

    reference       its reference in the recipe
    tensors         in transformers' order: files by name, each file in the order of its header
    files           the weight files
    revision        a commit; None for a local folder, like `hub_id`
    is_delta        the folder is a delta artifact, which has no tensors and no files until it is put over `base`
                    (`models.delta_over_base`)
    quantised       how decoded weights were stored
    components      the folders that hold its weights; a plain model has one, ""
    config_file     the name of the file that `config` was read from; "" if there is none
    tokens, chat_template   for a planned model: the future content of its files, if they are not copies
    """

    reference: str
    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any]
    revision: str | None = None
    hub_id: str | None = None
    is_delta: bool = False
    base: Checkpoint | None = field(default=None, compare=False, repr=False)
    adapter: Adapter | None = None
    quantised: Scheme | None = field(default=None, compare=False, repr=False)
    components: tuple[Component, ...] = (Component(),)
    config_file: str = CONFIG
    tokens: Tokens | None = field(default=None, compare=False, repr=False)
    chat_template: str | None = field(default=None, compare=False, repr=False)
    running_sum: RunningSum | None = None

    @property
    def base_reference(self) -> str:
        """`reference` without its adapter."""
        return self.reference if self.adapter is None else self.reference.removesuffix(f"+{self.adapter.reference}")

    @property
    def is_simple(self) -> bool:
        """Whether all weights lie in the model's own folder, so that tensors have the names of its files."""
        return all(not component.folder for component in self.components)

    @property
    def sources(self) -> tuple[Checkpoint | Adapter, ...]:
        """The model's folder, and its adapter's."""
        return (self,) if self.adapter is None else (self, self.adapter)


def open_checkpoint(
    path: Path,
    *,
    reference: str | None = None,
    revision: str | None = None,
    hub_id: str | None = None,
    pickles: bool = False,
    sums: bool = False,
) -> Checkpoint:
    """Return the checkpoint in the folder `path`, from its config, index and headers; no weight is read.

    The weights are in `model.safetensors`, or an index and its shards, or a delta artifact, or the only other
    `.safetensors` file. Or they are the components of a diffusers pipeline or a sentence-transformers model. `path` may
    also be a weight file without a config. `pickles`: torch's files are read if there are no safetensors. `sums`: a
    running sum is allowed, whose tensors are no model's. InputError: no such folder, no (valid) config.json, no
    safetensors weights, an adapter, a shard that is missing or contradicts the index, or a faulty header.
    """
    reference = reference or str(path)
    with errors.context(reference):
        if not path.is_dir():
            return replace(_lone(path, reference, pickles=pickles), revision=revision, hub_id=hub_id)
        if is_distributed(names := LocalFolder(path).names()):
            return _distributed(path, names, reference)
        found = open_folder(LocalFolder(path), reference, revision, hub_id, pickles=pickles, sums=sums)
        if not sums or not os.path.isfile(path / RUNNING_SUM):
            return found
        from deltamerge.formats.components import read_running_sum

        summed = read_running_sum(path)
        return found if summed is None else summed_up(found, summed)


def _distributed(path: Path, names: Collection[str], reference: str) -> Checkpoint:
    """Return the model in a folder of torch's distributed checkpoints.

    Its config, tokenizer and other files are in the folder itself, in its parent or in the parent's parent; otherwise
    it has none.
    """
    from deltamerge.formats.dcp import read_distributed

    tensors, files = read_distributed(path, names)
    for home in (path, path.parent, path.parent.parent):
        if (home / CONFIG).is_file():
            return Checkpoint(reference, home, tensors, files, read_config(home))
    return Checkpoint(reference, path, tensors, files, {}, config_file="")


def summed_up(checkpoint: Checkpoint, summed: RunningSum) -> Checkpoint:
    """Return a running sum: its tensors, and the metadata of its file.

    InputError: a tensor has a dtype that no average has.
    """
    if not FLOATING.issuperset(summed.dtypes.values()):
        raise InputError(f"{RUNNING_SUM}: is damaged", hint="make the running sum again from its checkpoints")
    return replace(checkpoint, tensors=summed.marked(checkpoint.tensors), running_sum=summed)


class Folder(Protocol):
    """A model's folder: a local folder, or a folder on the hub, whose files are fetched when needed."""

    @property
    def path(self) -> Path: ...

    def names(self, inner: str = "") -> list[str]:
        """Return the names in a subfolder; none if it does not exist."""

    def read(self, paths: Sequence[Path]) -> list[Header]:
        """Return the headers of weight files."""

    def read_gguf(self, paths: Sequence[Path]) -> list[GgufHeader]:
        """Return the headers of GGUF files."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    path: Path

    def names(self, inner: str = "") -> list[str]:
        if inner and not check_folder(self.path, inner):
            return []
        try:
            return os.listdir(self.path / inner)
        except OSError as error:
            raise input_error(error) from error

    def read(self, paths: Sequence[Path]) -> list[Header]:
        return [read_weights(path) for path in paths]

    def read_gguf(self, paths: Sequence[Path]) -> list[GgufHeader]:
        from deltamerge.formats.gguf.file import read_gguf_header

        return [read_gguf_header(path) for path in paths]


def open_folder(
    folder: Folder, reference: str, revision: str | None, hub_id: str | None, *, pickles: bool, sums: bool = False
) -> Checkpoint:
    """Return the checkpoint in a folder whose configs, lists and indexes are present.

    InputError: as for `open_checkpoint`.
    """
    path, names = folder.path, folder.names()
    if RUNNING_SUM in names and not sums:
        raise InputError("is the running sum of an average, no model", hint="average it first: merge_method: linear")
    file = config_file_of(names)
    if is_delta(names):
        config = read_config(path, file)
        return Checkpoint(reference, path, {}, (), config, revision, hub_id, is_delta=True, config_file=file)
    if not is_composed(names):
        source = weight_source(names, pickles=pickles)
        if source.endswith(GGUF):
            return _gguf(folder, source, reference, revision, hub_id)
        source, tensors, files = open_weights(path, names, folder.read, pickles=pickles)
        file = config_file_of(names, source)
        config = read_config(path, file) if file else {}
        component = replace(named_by(source), config=config)
        return Checkpoint(
            reference, path, tensors, files, config, revision, hub_id, components=(component,), config_file=file
        )
    tensors, files, components = {}, (), []
    for inner in listed_folders(path):
        there = folder.names(inner)
        if not any(map(is_weights, there)):
            continue
        with errors.context(inner):
            source, found, shards = open_weights(path / inner, there, folder.read, pickles=pickles)
            config = read_config(path / inner) if CONFIG in there else {}
        component = replace(named_by(source, inner), config=config)
        tensors |= {component.at(name): replace(info, name=component.at(name)) for name, info in found.items()}
        files += shards
        components.append(component)
    if not components:
        raise InputError("no component has weights", hint="download the folders that its list names")
    file = file if file in names else ""
    config = read_config(path, file) if file else {}
    return Checkpoint(
        reference, path, tensors, files, config, revision, hub_id, components=tuple(components), config_file=file
    )


def _gguf(folder: Folder, name: str, reference: str, revision: str | None, hub_id: str | None) -> Checkpoint:
    """Return the checkpoint in the GGUF file `name` of a folder, with the folder's config.json if there is one."""
    from deltamerge.formats.gguf.model import open_model

    names = folder.names()
    files = tuple(folder.path / part for part in parts_of(name, names))
    is_there = CONFIG in names
    model = open_model(folder.read_gguf(files), with_config=not is_there)
    config = read_config(folder.path) if is_there else model.config
    file = CONFIG if is_there else ""
    return Checkpoint(
        reference, folder.path, model.tensors, files, config, revision, hub_id, quantised=model.scheme, config_file=file
    )


def config_file_of(names: Collection[str], source: str = "") -> str:
    """Return the file that holds a model's config; "" for Mistral's own files and GGUF, which have none."""
    if PIPELINE in names:
        return PIPELINE
    has_own = source.startswith(MISTRAL) or source.endswith(GGUF)
    return "" if has_own and CONFIG not in names else CONFIG


def _lone(path: Path, reference: str, *, pickles: bool) -> Checkpoint:
    """Return the checkpoint of a single weight file, without a config or any other file."""
    if not path.exists():
        raise InputError("no such folder")
    if path.suffix == GGUF:
        found = _gguf(LocalFolder(path.parent), path.name, reference, None, None)
        return found if found.config_file else replace(found, path=path)
    if path.suffix in PICKLES and not pickles:
        raise InputError("is a PyTorch pickle file; deltamerge never unpickles", hint=ALLOW)
    if path.suffix not in (".safetensors", *PICKLES):
        raise InputError("is a file, not a model's folder")
    tensors = join({path.name: read_weights(path)}, None)
    return Checkpoint(reference, path, tensors, (path,), {}, config_file="")


def with_configs(components: Sequence[Component], path: Path) -> tuple[Component, ...]:
    """Components with the configs that their folders below `path` have."""
    found = []
    for component in components:
        there = not component.folder or check_folder(path, component.folder)
        is_config = there and (path / component.at(CONFIG)).is_file()
        config = read_config(path / component.folder) if is_config else {}
        found.append(replace(component, config=config))
    return tuple(found)


def by_component(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[str, list[Checkpoint | None]]]:
    """Yield the folders of all components, in order, each with every model's checkpoint there.

    A component's checkpoint has its own names and config. None: the model lacks the component.
    """
    split_up = [_split(checkpoint) for checkpoint in checkpoints]
    for folder in dict.fromkeys(folder for parts in split_up for folder in parts):
        yield folder, [parts.get(folder) for parts in split_up]


def recombined(checkpoint: Checkpoint, parts: Mapping[str, Checkpoint]) -> dict[str, TensorInfo]:
    """Return the tensors of a model's components, as from `by_component`, under their names in the model."""
    of = {component.folder: component for component in checkpoint.components}
    named = {}
    for folder, part in parts.items():
        for own, info in part.tensors.items():
            name = of.get(folder, Component(folder)).at(own)
            named[name] = info if info.name == name else replace(info, name=name)
    return named


def _split(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    if checkpoint.is_simple:
        return {"": checkpoint}
    folders = folders_of(checkpoint.components)
    tensors: dict[str, dict[str, TensorInfo]] = {component.folder: {} for component in checkpoint.components}
    for name, info in checkpoint.tensors.items():
        folder, own = split(name, folders)
        tensors.setdefault(folder, {})[own] = info
    configs = {component.folder: dict(component.config) for component in checkpoint.components}
    return {
        folder: replace(checkpoint, tensors=own, config=configs.get(folder, {}), components=(Component(),))
        for folder, own in tensors.items()
    }


def is_delta(names: Collection[str]) -> bool:
    """Tell whether the names of a model's files show a delta artifact."""
    return DELTA in names and SINGLE not in names and INDEX not in names


# Quantised checkpoints: each weight is one float32 tensor, computed from its codes when it is read.


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with each quantised weight as one float32 tensor under its plain name, and without companions.

    Tensors keep the order of their codes. `quantised` records how they were stored; the config is unchanged.
    InputError, naming scheme and tensor: a scheme without a decoder, or parts that do not fit one another.
    """
    if not checkpoint.is_simple:
        inner = {folder: decoded(part) for folder, (part,) in by_component([checkpoint]) if part is not None}
        found = next((part.quantised for part in inner.values() if part.quantised is not None), None)
        return replace(checkpoint, tensors=recombined(checkpoint, inner), quantised=found)
    scheme = scheme_of(checkpoint.config, checkpoint.tensors)
    if scheme is None:
        return checkpoint
    if why := moved(checkpoint.config, checkpoint.tensors):
        raise InputError(f"is quantised ({scheme}), and {why}: they are not the model's own", hint=HINT)
    if lone := orphans(scheme, checkpoint.tensors):
        raise InputError(f"is quantised ({scheme}): {lone[0]} belongs to no weight", hint="download the model again")
    from deltamerge.formats.quantised.scheme import StoredWeight

    decoders = {name: _decoder(scheme, name) for name in scheme.weights}
    settings = next((value for _, value in keys_of(checkpoint.config) if isinstance(value, Mapping)), {})
    weight_of = {parts[0]: name for name, parts in scheme.weights.items()}
    companions = {*scheme.dropped, *(part for parts in scheme.weights.values() for part in parts[1:])}
    dtype = plain_dtype(checkpoint, companions)
    tensors: dict[str, TensorInfo] = {}
    for stored, info in checkpoint.tensors.items():
        if stored in companions:
            continue
        if stored not in weight_of:
            tensors[stored] = info
            continue
        name = weight_of[stored]
        parts = tuple(checkpoint.tensors[part] for part in scheme.weights[name])
        with errors.context(name), errors.context(str(scheme)):
            made = decoders[name](StoredWeight(name, parts, settings))
        tensors[name] = replace(made, saved_as=dtype)
    known = {part: checkpoint.tensors[part] for part in (*weight_of, *companions)}
    plain = {name: tensors[name] for name in scheme.weights}
    return replace(checkpoint, tensors=tensors, quantised=replace(scheme, stored=known, plain=plain))


def plain_dtype(checkpoint: Checkpoint, companions: Collection[str] = ()) -> str:
    """Return the dtype of a quantised model's weights without quantisation.

    It is the config's, otherwise the most frequent of its plain tensors without `companions`, otherwise bfloat16.
    """
    config: Mapping[str, Any] = checkpoint.config
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, Mapping) else {}):
        said = CODES.get(str(settings.get("dtype") or settings.get("torch_dtype")))
        if said in PLAIN:
            return str(said)
    others = (info for name, info in checkpoint.tensors.items() if name not in companions)
    usual = Counter(info.dtype for info in others if info.dtype in PLAIN and len(info.shape) > 1)
    return usual.most_common(1)[0][0] if usual else "BF16"


def _decoder(scheme: Scheme, weight: str) -> Callable[[StoredWeight], TensorInfo]:
    """Return the reader of one weight. InputError: none reads it, or config.json names a scheme of other forms."""
    kind = scheme.kinds[weight]
    if not kind and scheme.name in SCHEMES:
        scales = weight.endswith(("_scale", "_scales", "_scale_inv"))
        what = f"{weight} belongs to no weight" if scales else f"the scales of {weight} are missing"
        raise InputError(f"is quantised ({scheme}): {what}", hint="download the model again")
    read = reader_of(kind, scheme.name)
    if read is None:
        raise _unknown(scheme, weight)
    return read


def _unknown(scheme: Scheme, first: str) -> InputError:
    count = sum(kind == scheme.kinds[first] for kind in scheme.kinds.values())
    some = f"{count} tensors such as {first} are" if count > 1 else f"{first} is"
    return InputError(f"is quantised ({scheme}): {some} stored as codes, which cannot be merged", hint=HINT)
