"""The command line of mergekit-yaml and mergekit-multi: what its flags are here, and a word about those without use."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deltamerge.recipe.yaml_source import Loc

META = "deltamerge.mergekit_flags"
_STREAMED = "tensors are streamed in tiles, and --memory caps them"
# Flags without a meaning here, and why; docs/howto/from-mergekit.md has the same table. "--x/--no-x": both.
WITHOUT_USE = {
    "--allow-crimes/--no-allow-crimes": "tensors fit by name and shape, whatever architecture they are of",
    "--async-write/--no-async-write": _STREAMED,
    "--clone-tensors/--no-clone-tensors": _STREAMED,
    "--copy-tokenizer/--no-copy-tokenizer": "always copied; tokenizer_source in the recipe chooses whose",
    "--lazy/--no-lazy": "a document is made again only if its result would differ",
    "--lazy-unpickle/--no-lazy-unpickle": _STREAMED,
    "--low-cpu-memory/--no-low-cpu-memory": _STREAMED,
    "--safe-serialization/--no-safe-serialization": "always safetensors; --allow-pickles reads torch's files",
    "--trust-remote-code/--no-trust-remote-code": "no code of a model is run",
    "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings": "rows are matched token by token: "
    "tokenizer_source in the recipe",
    "--write-model-card/--no-write-model-card": "always written",
}
# Those that take a value.
VALUES_WITHOUT_USE = {
    "--intermediate-dir": "intermediate results lie in OUT-intermediate, or where output.path of each document says",
    "--lora-merge-cache": "adapters are added as tensors are read",
    "--lora-merge-dtype": "adapters are added in float32",
    "--write-threads": "--workers is the number of threads",
}
# mergekit's commands, without "mergekit-", and what is used for them here.
COMMANDS = {
    "extract-lora": "deltamerge extract MODEL --base BASE --lora 32",
    "moe": "a recipe with merge_method: moe, then deltamerge run RECIPE",
    "tokensurgeon": "a recipe with tokenizer: {transplant: MODEL}, then deltamerge run RECIPE",
    "layershuffle": "a recipe with slices, in the order of their layers, then deltamerge run RECIPE",
    "multi": "deltamerge run RECIPE: a file may have several documents, which name one another",
    "evolve": "deltamerge search RECIPE",
    "yaml": "deltamerge run RECIPE --out DIR",
    "legacy": "deltamerge run RECIPE --out DIR",
    "pytorch": "deltamerge run RECIPE --out DIR",
}
SHORT = {"--intermediate-dir": "-I", "--num-threads": "-j"}
_EVERY = "--multi-gpu"
_GPU = "--cuda", "--gpu-rich", "--read-to-gpu", _EVERY
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True, slots=True)
class MergekitFlags:
    """What mergekit's flags ask for: a folder, a device and threads where ours say nothing, and keys of the recipe."""

    out: str | None = None
    device: str | None = None
    workers: int | None = None
    settings: Mapping[Loc, str] | None = None
    without_use: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """Return a line about the flags that have no use."""
        return f"no effect here: {'; '.join(self.without_use)}" if self.without_use else None


def given_flags(context: click.Context) -> MergekitFlags:
    """Return the flags of mergekit's that a command was given. UsageError: a value is none."""
    given: dict[str, Any] = context.meta.get(META, {})
    settings: dict[Loc, str] = {}
    if "--random-seed" in given:
        settings[("seed",)] = str(given["--random-seed"])
    if "--out-shard-size" in given:
        settings[("output", "shard_size")] = str(_bytes(given["--out-shard-size"]))
    if "--transformers-cache" in given and "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_CACHE"] = given["--transformers-cache"]
    known = {**{names.partition("/")[0]: why for names, why in WITHOUT_USE.items()}, **VALUES_WITHOUT_USE}
    useless = tuple(f"{name} ({known[name]})" for name in given if name in known)
    gpu = "cuda" if any(given.get(name) for name in _GPU) else None
    return MergekitFlags(
        given.get("--out-path"), "cuda:all" if given.get(_EVERY) else gpu, given.get("--num-threads"), settings, useless
    )


def mergekit_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take mergekit's flags; they are not in its help."""
    for name in reversed([*_GPU]):
        command = _option(f"{name}/{name.replace('--', '--no-', 1)}", default=None)(command)
    for names in WITHOUT_USE:
        command = _option(names, default=None)(command)
    for name in (*VALUES_WITHOUT_USE, "--out-path", "--out-shard-size", "--transformers-cache"):
        command = _option(name)(command)
    for name, type_ in {"--random-seed": click.IntRange(0), "--num-threads": click.IntRange(1)}.items():
        command = _option(name, type=type_)(command)
    return command


def _option(names: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    name = names.partition("/")[0]
    short = [SHORT[name]] if name in SHORT else []

    def keep(context: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None:
            context.meta.setdefault(META, {})[name] = value

    return click.option(names, *short, hidden=True, expose_value=False, callback=keep, **more)


def _bytes(text: str) -> int:
    """Parse mergekit's size of a shard. It says parameters and counts bytes ("5B" is 5 · 10⁹)."""
    found = _COUNT.fullmatch(text.strip())
    if found is None:
        raise click.UsageError(f"--out-shard-size {text}: not a size such as 5B or 500M")
    return max(1, int(float(found[1]) * _UNITS[found[2].lower()]))
