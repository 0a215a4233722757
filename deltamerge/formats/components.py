"""The descriptions in a model's folder: its config, its components, the front matter of its card, a running sum's file.

A diffusers pipeline lists its components in model_index.json (`unet`, `vae`, `text_encoder`), a sentence-transformers
model its modules in modules.json (``, `1_Pooling`, `2_Dense`). A tensor of a component is named by its folder, a slash
and its name in the file: `unet/conv_in.weight`. A plain model is one component, whose folder is "".
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deltamerge import errors
from deltamerge.errors import InputError, context
from deltamerge.files.descriptors import is_plain_folder, refuse_link
from deltamerge.files.strict_json import read_json, read_list

if TYPE_CHECKING:
    from deltamerge.tensors.tensor import TensorInfo


PIPELINE = "model_index.json"
MODULES = "modules.json"
MAX_COMPONENTS = 100

_STEMS = r"(?P<stem>model|diffusion_pytorch_model|consolidated)"
_WEIGHTS = re.compile(rf"{_STEMS}(\.(?P<variant>[\w-]+))?\.safetensors|{_STEMS.replace('stem', 'indexed')}"
                      r"\.safetensors\.index(\.(?P<of>[\w-]+))?\.json")  # fmt: skip
_PICKLED = re.compile(
    r"(?P<stem>pytorch_model|diffusion_pytorch_model)(\.(?P<variant>[\w-]+))?\.bin(\.index(\.(?P<of>[\w-]+))?\.json)?"
)


@dataclass(frozen=True, slots=True)
class Component:
    """A folder of weights, and how its weight files are called.

    folder    below the model's, with slashes; "" is the model's own
    stem      `model`, or `diffusion_pytorch_model` in diffusers
    variant   `fp16` of diffusion_pytorch_model.fp16.safetensors, else ""
    config    its config.json; empty if it has none
    """

    folder: str = ""
    stem: str = "model"
    variant: str = ""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def at(self, name: str) -> str:
        """Return the name, or path below the model's folder, of the item `name` in this component."""
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def single(self) -> str:
        """The path of the weight file, if there is only one."""
        return self.at(f"{self.stem}{self._dotted}.safetensors")

    @property
    def index(self) -> str:
        """The path of the index of several weight files."""
        return self.at(f"{self.stem}.safetensors.index{self._dotted}.json")

    def shard(self, number: int, count: int) -> str:
        """Return the path of weight file `number`, from 1, of several."""
        return self.at(f"{self.stem}{self._dotted}-{number:05d}-of-{count:05d}.safetensors")

    @property
    def _dotted(self) -> str:
        return f".{self.variant}" if self.variant else ""


def named_by(source: str, folder: str = "") -> Component:
    """Return the component with the weight file or index `source`; its output has the same name, as safetensors.

    A plain transformers model gets `model.safetensors` whatever its variant, which loads without further arguments.
    """
    if pickled := _PICKLED.fullmatch(source):
        stem = "model" if pickled["stem"] == "pytorch_model" else pickled["stem"]
        return Component(folder, stem, pickled["variant"] or pickled["of"] or "")
    if (found := _WEIGHTS.fullmatch(source)) is None:
        return Component(folder)
    stem, variant = found["stem"] or found["indexed"], found["variant"] or found["of"] or ""
    return Component(folder, stem, variant if folder or stem != "model" else "")


def is_composed(names: Collection[str]) -> bool:
    """Tell whether a model's file names show a model of several components."""
    return PIPELINE in names or MODULES in names


def listed_folders(path: Path) -> list[str]:
    """Return the folders of components that a model's index lists, whether they are there or not; "" is the model's
    own.

    InputError: no valid index, or a folder that does not lie below the model's.
    """
    name = PIPELINE if (path / PIPELINE).is_file() else MODULES
    if name == PIPELINE:
        listed: list[Any] = [key for key, value in read_json(path / name).items() if _is_component(key, value)]
    else:
        modules = read_list(path / name)
        listed = [module.get("path") if isinstance(module, dict) else None for module in modules]
    with errors.context(name):
        if len(listed) > MAX_COMPONENTS:
            raise InputError(f"lists {len(listed)} components, more than {MAX_COMPONENTS}")
        for folder in listed:
            if not isinstance(folder, str) or not (folder == "" or is_plain_folder(folder)):
                hint = "components lie in folders below the model's, under plain names"
                raise InputError(f"{str(folder)[:80]!r} is no folder of a component", hint=hint)
    return list(dict.fromkeys(listed))


def check_folder(path: Path, folder: str) -> bool:
    """Tell whether the folder of a component exists.

    InputError: it is, or lies behind, a link out of the model's folder.
    """
    at = path
    for part in folder.split("/"):
        at = at / part
        refuse_link(at)
    return at.is_dir()


def folders_of(components: Iterable[Component]) -> tuple[str, ...]:
    """Return the folders of components, the longest first, so that the first that a name begins with is its own."""
    return tuple(sorted((c.folder for c in components if c.folder), key=lambda folder: (-len(folder), folder)))


def split(name: str, folders: Sequence[str]) -> tuple[str, str]:
    """Return the folder of a tensor's component, from `folders_of`, and the tensor's name there."""
    for folder in folders:
        if name.startswith(folder) and name[len(folder) : len(folder) + 1] == "/":
            return folder, name[len(folder) + 1 :]
    return "", name


def _is_component(key: str, value: Any) -> bool:
    """Tell whether an entry of model_index.json is a component: [library, class], [null, null] where it is left out."""
    plain = isinstance(value, list) and len(value) == 2 and not key.startswith("_")
    return plain and all(isinstance(part, str) for part in value)


# config.json.


CONFIG = "config.json"
LONGEST = 80


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """Return the config in `folder`, by its file's `name`.

    InputError: no such file, not JSON, or a key of another type.
    """
    config = read_json(folder / name)
    with context(name):
        check_config(config)
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """InputError: a key that deltamerge uses has a value of another type. null counts as an absent key."""
    for key, (is_right, wanted) in KEYS.items():
        value = config.get(key)
        if value is not None and not is_right(value):
            raise InputError(f"{key} must be {wanted}, got {kind(value)}")
    for name, value in (config.get("label2id") or {}).items():
        if not _counts(value):
            raise InputError(f"label2id: {name[:LONGEST]!r} must be an integer, got {kind(value)}")
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            with context(key[:LONGEST]):
                for inner in ("vocab_size", "model_type", "tie_word_embeddings"):
                    is_right, wanted = KEYS[inner]
                    if value.get(inner) is not None and not is_right(value[inner]):
                        raise InputError(f"{inner} must be {wanted}, got {kind(value[inner])}")


def code_of(config: Mapping[str, Any]) -> list[str]:
    """Return the modules that a config's `auto_map` names, as files; with the repository's name if it is another."""
    found = []
    table = config.get("auto_map")
    for value in table.values() if isinstance(table, dict) else ():
        for name in value if isinstance(value, list | tuple) else [value]:
            if isinstance(name, str) and re.fullmatch(r"[\w./-]+(--[\w.-]+)?", name):
                found.append(name.rpartition(".")[0] + ".py")
    return list(dict.fromkeys(found))


def kind(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if isinstance(value, bool):
        return str(value).lower()
    names = {str: "text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _counts(value: Any) -> bool:
    """Tell whether a value is an integer, or a string of its digits."""
    if isinstance(value, str):
        return value.isdecimal() and len(value) < 10
    return isinstance(value, int) and not isinstance(value, bool)


Check = tuple[Callable[[Any], bool], str]
INTEGER: Check = (_is(int), "an integer")
NUMBER: Check = (_is(int, float), "a number")
TEXT: Check = (_is(str), "text")
OBJECT: Check = (_is(dict), "an object")
FLAG: Check = (_is(bool), "true or false")
KEYS: Mapping[str, Check] = {
    "architectures": (_texts, "a list of texts"),
    "model_type": TEXT,
    "problem_type": TEXT,
    "vocab_size": INTEGER,
    "num_labels": INTEGER,
    "id2label": OBJECT,
    "label2id": OBJECT,
    "max_position_embeddings": NUMBER,
    "n_positions": NUMBER,
    "tie_word_embeddings": FLAG,
    "is_encoder_decoder": FLAG,
}


# The front matter of a model card: the YAML between two lines of ---.


MATTER_BYTES = 1 << 16


def front_matter(card: Path) -> dict[str, object]:
    """Return the front matter of the file `card`; empty without a card or a valid YAML mapping."""
    if not card.is_file():  # reading a pipe would wait
        return {}
    try:
        with card.open("rb") as file:
            text = file.read(MATTER_BYTES).decode("utf-8", "replace")
    except OSError:
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        content = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an impossible date
        return {}
    return content if isinstance(content, dict) else {}


def card(matter: Mapping[str, object], title: str) -> list[str]:
    """Return the first lines of a card: its front matter, and `title`, in Markdown, as its heading."""
    return ["---", yaml.safe_dump(dict(matter), sort_keys=False).rstrip(), "---", "", f"# {title}", ""]


# Running sums: the records beside the tensors, with which a later run continues the sum.
#
#     {"format": 1, "schedule": "constant", "decay": null, "total": 20.0,
#      "models": ["run/step-100", …], "dtypes": {"model.norm.weight": "BF16", …}}
#
# Its tensors are Σ w_i x_i in float32, added from left to right; `total` is Σ w_i, added the same way.


RUNNING_SUM = "running_sum.json"
SUM_FORMAT = 1
SCHEDULES = ("constant", "ema")
"""Schedules under which a further checkpoint keeps the earlier weights in proportion."""


@dataclass(frozen=True, slots=True)
class RunningSum:
    """The content of a running sum.

    models     the names of its checkpoints, in order
    total      the sum of their weights, a float32
    schedule   that the weights are of; `decay` is the ema's
    dtypes     of the tensors of an average that is made of it
    """

    models: tuple[str, ...]
    total: float
    schedule: str
    decay: float | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict, compare=False)

    def describe(self) -> dict[str, Any]:
        """Return the content of its file."""
        return {
            "format": SUM_FORMAT, "schedule": self.schedule, "decay": self.decay, "total": self.total,
            "models": list(self.models), "dtypes": dict(self.dtypes),
        }  # fmt: skip

    def marked(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors of its folder, with an average's dtypes for outputs."""
        return {name: replace(info, saved_as=self.dtypes.get(name)) for name, info in tensors.items()}


def read_running_sum(folder: Path) -> RunningSum | None:
    """Return the record in the folder's file.

    None: there is no file. InputError: it is damaged, or has a later version.
    """
    path = folder / RUNNING_SUM
    if not os.path.isfile(path):  # False if a path cannot be examined; opening it raises the error
        return None
    said = read_json(path)
    with errors.context(RUNNING_SUM):
        if said.get("format") != SUM_FORMAT:
            raise InputError(f"has format {str(said.get('format'))[:20]}, this version reads {SUM_FORMAT}")
        models, total, decay, dtypes = (said.get(key) for key in ("models", "total", "decay", "dtypes"))
        schedule = said.get("schedule")
        sound = (
            isinstance(models, list) and models and all(isinstance(name, str) for name in models)
            and isinstance(total, float | int) and not isinstance(total, bool) and math.isfinite(total) and total > 0
            and schedule in SCHEDULES
            and (isinstance(decay, float) and 0 < decay < 1 if schedule == "ema" else decay is None)
            and isinstance(dtypes, dict) and all(isinstance(code, str) for code in dtypes.values())
        )  # fmt: skip
        if not sound:
            raise InputError("is damaged", hint="make the running sum again from its checkpoints")
        assert isinstance(models, list)
        assert isinstance(dtypes, dict)
        assert isinstance(total, float | int)
        return RunningSum(tuple(models), float(total), str(schedule), decay, dtypes)
