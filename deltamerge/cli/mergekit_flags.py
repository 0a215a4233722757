"""mergekit's command lines: accept its flags, warn about flags without effect, translate its commands."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deltamerge.recipe.yaml_source import Loc

META = "deltamerge.mergekit_flags"
_STREAMED = "tensors are streamed in tiles, and --memory caps them"
# Flags without effect here, and why; docs/howto/from-mergekit.md has the same table. "--x/--no-x": both flags.
WITHOUT_USE = {
    "--allow-crimes/--no-allow-crimes": "tensors fit by name and shape, whatever architecture they are of",
    "--async-write/--no-async-write": _STREAMED,
    "--clone-tensors/--no-clone-tensors": _STREAMED,
    "--i-understand-this-is-not-useful-without-training": "one model for all experts is a note",
    "--copy-tokenizer/--no-copy-tokenizer": "always copied; tokenizer_source in the recipe chooses whose",
    "--lazy/--no-lazy": "a document is made again only if its result would differ",
    "--lazy-unpickle/--no-lazy-unpickle": _STREAMED,
    "--load-in-4bit": "the base reads the prompts block by block",
    "--load-in-8bit": "the base reads the prompts block by block",
    "--low-cpu-memory/--no-low-cpu-memory": _STREAMED,
    "--safe-serialization/--no-safe-serialization": "always safetensors; --allow-pickles reads torch's files",
    "--trust-remote-code/--no-trust-remote-code": "no code of a model is run",
    "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings": "rows are matched token by token: "
    "tokenizer_source in the recipe",
    "--write-model-card/--no-write-model-card": "always written",
}
# Flags without effect that take a value.
VALUES_WITHOUT_USE = {
    "--intermediate-dir": "intermediate results lie in OUT-intermediate, or where output.path of each document says",
    "--lora-merge-cache": "adapters are added as tensors are read",
    "--lora-merge-dtype": "adapters are added in float32",
    "--write-threads": "--workers is the number of threads",
}
# Flags of WITHOUT_USE that ask for the default.
DONE_ANYWAY = frozenset({"--copy-tokenizer", "--lazy", "--safe-serialization", "--write-model-card"})
# Flags of mergekit-extract-lora that `extract` accepts and that have no effect.
OF_LORA_WITHOUT_USE = {
    "--distribute-scale/--no-distribute-scale": "both factors have the same scale",
    "--embed-lora/--no-embed-lora": "embeddings stay whole, or with --whole drop are left out",
    "--save-module": "what has no factors is in the adapter as it is",
    "--sv-epsilon": "--lora energy:0.95 leaves out small singular values",
}
# Flags of mergekit-evolve that `search` accepts and that have no effect.
_IN_MEMORY = "candidates are judged in memory, as `study` in the recipe says"
OF_EVOLVE_WITHOUT_USE = {
    "--batch-size": _IN_MEMORY,
    "--force-population-size": "study.sampler in the recipe chooses the method",
    "--i-understand-the-depths-of-the-evils-i-am-unleashing": "rows that no trial has seen decide",
    "--in-memory/--no-in-memory": _IN_MEMORY,
    "--merge-cuda/--no-merge-cuda": "--device",
    "--num-gpus": "--device, or --ray for several machines",
    "--reshard/--no-reshard": _IN_MEMORY,
    "--save-final-model/--no-save-final-model": "--keep best writes the best model",
    "--sigma0": "study.sampler in the recipe chooses the method",
    "--strategy": "--ray judges candidates side by side",
    "--task-search-path": _IN_MEMORY,
    "--timeout": "--trials",
    "--vllm/--no-vllm": _IN_MEMORY,
    "--wandb/--no-wandb": "the study is a database that optuna-dashboard shows",
    "--wandb-entity": "the study is a database that optuna-dashboard shows",
    "--wandb-project": "the study is a database that optuna-dashboard shows",
}
_TAKE_VALUES = frozenset({
    "--batch-size", "--force-population-size", "--num-gpus", "--save-module", "--sigma0", "--strategy", "--sv-epsilon",
    "--task-search-path", "--timeout", "--wandb-entity", "--wandb-project",
})  # fmt: skip
# mergekit's commands, without "mergekit-": their arguments and options, each with a placeholder for a missing value,
# and the command here.
COMMANDS: dict[str, tuple[dict[str, str], str]] = {
    "extract-lora": (
        {"--model": "MODEL", "--base-model": "BASE", "--max-rank": "128", "--out-path": "OUT"},
        "deltamerge extract {} --base {} --lora {} --out {}",
    ),
    "moe": ({"0": "CONFIG", "1": "OUT"}, "deltamerge run {} --out {}"),
    "tokensurgeon": (
        {"2": "OUT", "0": "MODEL", "1": "DONOR", "--k": "64"},
        "deltamerge run RECIPE --out {}; the recipe: {{merge_method: passthrough, models: {}, "
        "tokenizer: {{transplant: {}, k: {}}}}}",
    ),
    "layershuffle": ({"0": "OUT"}, "deltamerge run RECIPE --out {}, with the layers as slices of the recipe"),
    "multi": ({"0": "CONFIG", "--out-path": "OUT"}, "deltamerge run {} --out {}"),
    "evolve": (
        {"--max-fevals": "100"},
        "deltamerge search RECIPE --trials {}, with values of the recipe open: weight: {{search: [0, 1]}}",
    ),
    "yaml": ({"0": "CONFIG", "1": "OUT"}, "deltamerge run {} --out {}"),
    "legacy": ({"--base-model": "BASE"}, "deltamerge init MODEL … --base {}, then deltamerge run recipe.yaml"),
    "pytorch": ({"0": "CONFIG", "1": "OUT"}, "deltamerge run {} --out {}"),
}
_SHORT_OF = {"-k": "--k"}  # short options of mergekit's commands
# Commands that other tools have, and ours.
SYNONYMS = {
    "evaluate": "eval", "quantize": "convert", "validate": "check", "upload": "push", "tune": "search",
    "version": "--version", "help": "--help",
}  # fmt: skip
SHORT = {
    "--intermediate-dir": "-I", "--num-threads": "-j", "--include-regex": "-i", "--exclude-regex": "-e",
    "--strategy": "-s",
}  # fmt: skip
MAX_RANK = "128"  # of mergekit-extract-lora
_EVERY = "--multi-gpu"
_GPU = "--cuda", "--gpu-rich", "--read-to-gpu", _EVERY
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True, slots=True)
class MergekitFlags:
    """The options that mergekit's flags ask for, used where ours are not given. `settings` are keys of the recipe."""

    out: str | None = None
    device: str | None = None
    workers: int | None = None
    settings: Mapping[Loc, str] | None = None
    without_use: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    base: str | None = None
    lora: str | None = None
    whole: str | None = None
    targets: tuple[str, ...] = ()
    trials: int | None = None

    @property
    def out_path(self) -> Path | None:
        """Return the output folder."""
        return None if self.out is None else Path(self.out)

    @property
    def warning(self) -> str | None:
        """Return a line that names the flags without effect."""
        return f"no effect here: {'; '.join(self.without_use)}" if self.without_use else None


def given_flags(context: click.Context) -> MergekitFlags:
    """Return the mergekit flags that a command was given. UsageError: a value is malformed."""
    given: dict[str, Any] = context.meta.get(META, {})
    settings: dict[Loc, str] = {}
    if "--random-seed" in given:
        settings[("seed",)] = str(given["--random-seed"])
    if "--out-shard-size" in given:
        settings[("output", "shard_size")] = str(_bytes(given["--out-shard-size"]))
    if "--transformers-cache" in given and "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_CACHE"] = given["--transformers-cache"]
    tables = WITHOUT_USE, VALUES_WITHOUT_USE, OF_LORA_WITHOUT_USE, OF_EVOLVE_WITHOUT_USE
    known = {names.partition("/")[0]: why for table in tables for names, why in table.items()}
    useless = tuple(
        f"{name} ({known[name]})" for name, value in given.items() if name in known and not _done(name, value)
    )
    gpu = "cuda" if any(given.get(name) for name in _GPU) else None
    if "--exclude-regex" in given:
        raise click.UsageError("--exclude-regex: name the weights that get factors instead, with --target PATTERN")
    return MergekitFlags(
        given.get("--out-path", given.get("--storage-path")),
        "cuda:all" if given.get(_EVERY) else gpu,
        given.get("--num-threads"),
        settings,
        useless,
        models=(given["--model"],) if "--model" in given else (),
        base=given.get("--base-model"),
        lora=str(given["--max-rank"]) if "--max-rank" in given else MAX_RANK if "--model" in given else None,
        whole="drop" if given.get("--skip-undecomposable") else None,
        targets=given.get("--include-regex", ()),
        trials=given.get("--max-fevals"),
    )


def _done(name: str, value: Any) -> bool:
    """Return whether a flag without effect asks for the default."""
    return value is (name in DONE_ANYWAY) if isinstance(value, bool) else False


def mergekit_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command accept mergekit's flags, without showing them in its help."""
    for name in reversed([*_GPU]):
        command = _option(f"{name}/{name.replace('--', '--no-', 1)}", default=None)(command)
    command = _without_use(WITHOUT_USE, command)
    for name in (*VALUES_WITHOUT_USE, "--out-path", "--out-shard-size", "--transformers-cache"):
        command = _option(name)(command)
    for name, type_ in {"--random-seed": click.IntRange(0), "--num-threads": click.IntRange(1)}.items():
        command = _option(name, type=type_)(command)
    return command


def lora_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let `extract` accept the flags of mergekit-extract-lora, without showing them in its help."""
    for name in ("--model", "--base-model"):
        command = _option(name)(command)
    command = _option("--max-rank", type=click.IntRange(1))(command)
    command = _option("--skip-undecomposable", is_flag=True, default=None)(command)
    for name in ("--include-regex", "--exclude-regex"):
        command = _option(name, multiple=True, default=None)(command)
    return _without_use(OF_LORA_WITHOUT_USE, mergekit_flags(command))


def evolve_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let `search` accept the flags of mergekit-evolve, without showing them in its help."""
    command = _option("--max-fevals", type=click.IntRange(1))(command)
    command = _option("--storage-path")(command)
    command = _option("--random-seed", type=click.IntRange(0))(command)
    theirs = ("--allow-crimes/--no-allow-crimes", "--trust-remote-code/--no-trust-remote-code")
    shared = {name: WITHOUT_USE[name] for name in (*theirs, "--load-in-4bit", "--load-in-8bit")}
    return _without_use(OF_EVOLVE_WITHOUT_USE | shared, command)


def _without_use(table: Mapping[str, str], command: Callable[..., Any]) -> Callable[..., Any]:
    for names in table:
        more = {"multiple": names == "--save-module"} if names in _TAKE_VALUES else {"is_flag": True}
        command = _option(names, default=None, **more)(command)
    return command


def ours(name: str, arguments: Sequence[str]) -> str | None:
    """Return our command line for mergekit's command `name`. None: mergekit has no such command."""
    found = COMMANDS.get(name.removeprefix("mergekit-"))
    if found is None:
        return None
    wanted, line = found
    given: dict[str, str] = {}
    rest = iter(arguments)
    leading = True
    for argument in rest:
        if not argument.startswith("-"):
            if leading:
                given[str(len(given))] = argument
            continue
        leading = False
        option, equals, value = argument.partition("=")
        option = _SHORT_OF.get(option, option)
        if option in wanted:
            given[option] = value if equals else next(rest, wanted[option])
    return line.format(*(shlex.quote(given[key]) if key in given else default for key, default in wanted.items()))


def _option(names: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    name = names.partition("/")[0]
    short = [SHORT[name]] if name in SHORT else []

    def keep(context: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None and value != ():
            context.meta.setdefault(META, {})[name] = value

    return click.option(names, *short, hidden=True, expose_value=False, callback=keep, **more)


def _bytes(text: str) -> int:
    """Parse mergekit's size of a shard. It says parameters and counts bytes ("5B" is 5 · 10⁹)."""
    found = _COUNT.fullmatch(text.strip())
    if found is None:
        raise click.UsageError(f"--out-shard-size {text}: not a size such as 5B or 500M")
    return max(1, int(float(found[1]) * _UNITS[found[2].lower()]))
