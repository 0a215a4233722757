"""Models that calibration can run, by config.json and transformers' source, and errors and advice of that code.

The source is read, and never run, to tell which models can run.

Calibration feeds texts (`input_ids`, and `decoder_input_ids` of an encoder-decoder) or pictures (`pixel_values`), and
nothing else.
"""

from __future__ import annotations

import ast
import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deltamerge.engine.devices import is_out_of_memory
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.models.config_class import folders_near, models_folder

GIVEN = {"text": ("input_ids", "texts"), "picture": ("pixel_values", "pictures")}
ALWAYS = frozenset({"self", "attention_mask"})
# a decoder's input beside an encoder: the text itself, or the second of a pair of texts
DECODER = frozenset({"decoder_input_ids", "decoder_attention_mask"})
# heads of encoder-decoders whose forward makes the decoder's inputs, or that have no decoder
ALONE = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification", "EncoderModel")
LONGEST_CLASS = 80
HINT = "prune it without calibration: method dare or magnitude, with a number as q or none"


@dataclass(frozen=True, slots=True)
class Forward:
    """The names of the parameters of a model's forward, and the names `needed` because they have no default."""

    names: tuple[str, ...]
    needed: frozenset[str]


def has_decoder_inputs(config: Mapping[str, Any]) -> bool:
    """Tell whether a model's decoder is to be given texts beside its encoder."""
    architecture = (config.get("architectures") or ["none"])[0]
    return config.get("is_encoder_decoder") is True and not architecture.endswith(ALONE)


def check_family(config: Mapping[str, Any], kind: str) -> None:
    """Raise InputError for a model that cannot run on texts, or pictures, alone. `kind` is "text" or "picture"."""
    architecture = (config.get("architectures") or [None])[0]
    if architecture is None:
        raise InputError("its config.json names no architecture", hint='"architectures": ["LlamaForCausalLM"]')
    if not architecture.isidentifier():
        raise InputError(
            f"its config.json names no class: {architecture[:LONGEST_CLASS]!a}", hint="correct architectures"
        )
    root = models_folder()
    if root is None:
        return
    source = _source(root, architecture, str(config.get("model_type"))[:LONGEST_CLASS])
    if source is None or not _is_exported(source, architecture):
        raise InputError(f"transformers has no model class {architecture!r}", hint="remote code is never run")
    forward = _forward(source, architecture)
    if forward is None:
        return
    given, word = GIVEN[kind]
    if "return_loss" in forward.names:
        raise InputError(f"{architecture} has two towers, and calibration gives {word} alone", hint=HINT)
    if given not in forward.names:
        takes = next((name for name in forward.names if name not in ALWAYS), "nothing")
        other = "set calibration.task: image-classification, and give pictures" if takes == "pixel_values" else HINT
        raise InputError(f"{architecture} takes {takes}, and calibration gives {word}", hint=other)
    if lacking := sorted(forward.needed - ALWAYS - {given, *DECODER}):
        raise InputError(f"{architecture} needs {', '.join(lacking)}, and calibration gives {word} alone", hint=HINT)


@cache
def _source(root: Path, architecture: str, model_type: str) -> str | None:
    """Return the source of the module that defines a class, in the folder of the model's type or any other; None:
    not found."""
    wanted = re.compile(rf"^class {re.escape(architecture)}\(", re.MULTILINE)
    for path in _modules(root, model_type):
        text = path.read_text(encoding="utf-8")
        if wanted.search(text):
            return text
    return None


def _is_exported(source: str, architecture: str) -> bool:
    """Tell whether `transformers.NAME` is the class: its module lists it, or lists nothing."""
    listed = re.search(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)
    return listed is None or re.search(rf"[\"']{re.escape(architecture)}[\"']", listed[1]) is not None


def _modules(root: Path, model_type: str) -> Iterator[Path]:
    """Yield modules with models: first of the folder of the type, and of folders whose name the type begins with."""
    near = folders_near(model_type)
    for name in near:
        yield from sorted((root / name).glob("modeling_*.py"))
    yield from sorted(path for path in root.glob("*/modeling_*.py") if path.parent.name not in near)


@cache
def _forward(source: str, architecture: str) -> Forward | None:
    """Return the parameters of a class's forward; None if it is inherited from another module."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    name: str | None = architecture
    seen: set[str] = set()
    while name is not None and name in classes and name not in seen:
        seen.add(name)
        for item in classes[name].body:
            if isinstance(item, ast.FunctionDef) and item.name == "forward":
                return _parameters(item.args)
        name = next((base.id for base in classes[name].bases if isinstance(base, ast.Name)), None)
    return None


def _parameters(args: ast.arguments) -> Forward:
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    needed = {*names[: len(names) - len(args.defaults)]}
    needed |= {arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None}
    return Forward((*names, *(arg.arg for arg in args.kwonlyargs)), frozenset(needed))


OWN = Path(__file__).resolve().parents[1]
LONGEST = 200


@contextmanager
def running(what: str, hint: str | None = None) -> Iterator[None]:
    """Turn an error of code that is not deltamerge's into an InputError that begins with `what`."""
    try:
        yield
    except (DeltamergeError, MemoryError):
        raise
    except Exception as error:
        if is_own(error) or is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {reason(error)}", hint=hint) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice on lengths and padding."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_own(error: Exception) -> bool:
    """Tell whether deltamerge itself raised an error, rather than code that it called.

    Functions of torch are called through the modes that watch them.
    """
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[-1].name == "__torch_function__":
        frames.pop()
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(OWN)


def reason(error: Exception) -> str:
    """Return an error on one line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    shown = first if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {first}"
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
