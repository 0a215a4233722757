"""Hints for users who type the flags of mergekit-yaml and mergekit-multi."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

_DEVICE = "--device cuda[:N]; a GPU is found by itself"
_STREAMED = "not needed: tensors are streamed in tiles; --memory 2GB is a cap"
_THREADS = "--workers N"
_INTERMEDIATE = "they lie in OUT-intermediate, or where output.path of each document says"
# docs/from-mergekit.md has the same table
FLAGS = {
    "--allow-crimes": "not needed: tensors must fit by name and shape, whatever architecture they are of",
    "--async-write": _STREAMED,
    "--clone-tensors": _STREAMED,
    "--copy-tokenizer": "always done; tokenizer_source in the recipe chooses whose",
    "--cuda": _DEVICE,
    "--gpu-rich": _DEVICE,
    "--intermediate-dir": _INTERMEDIATE,
    "-I": _INTERMEDIATE,
    "--lazy": "always so: a document is made again only if its result would differ",
    "--lazy-unpickle": _STREAMED,
    "--lora-merge-cache": "not needed: adapters are added as tensors are read",
    "--lora-merge-dtype": "not needed: adapters are added in float32",
    "--low-cpu-memory": _STREAMED,
    "--multi-gpu": "one GPU a process: --part I/N --device cuda:N, then --finish",
    "--num-threads": _THREADS,
    "-j": _THREADS,
    "--out-path": "--out FOLDER",
    "--out-shard-size": "output: {shard_size: 5GB} in the recipe",
    "--random-seed": "seed: N in the recipe",
    "--read-to-gpu": _DEVICE,
    "--safe-serialization": "always done; --allow-pickles reads torch's files, and runs nothing in them",
    "--transformers-cache": "the environment variable HF_HOME",
    "--trust-remote-code": "never: no code of a model is run",
    "--unsafe-truncate-embeddings": "tokenizer_source in the recipe: rows are matched token by token",
    "--verbosity": "deltamerge plan RECIPE tells everything before a run",
    "-v": "deltamerge plan RECIPE tells everything before a run",
    "--write-model-card": "always done",
    "--write-threads": _THREADS,
}


def hints(error: click.ClickException, arguments: Sequence[str]) -> Iterator[str]:
    """For an error in a command's arguments, what to type instead of each argument that is mergekit's."""
    if not isinstance(error, click.UsageError) or error.ctx is None or error.ctx.command.name != "run":
        return
    extra = error.message.startswith("Got unexpected extra argument")
    if not extra and not isinstance(error, click.NoSuchOption):
        return
    names = (argument.partition("=")[0].replace("--no-", "--", 1) for argument in arguments)
    known = [name for name in dict.fromkeys(names) if name in FLAGS]
    if extra or known:
        yield "mergekit-yaml RECIPE OUT is here: deltamerge run RECIPE --out OUT"
    yield from (f"{name}: {FLAGS[name]}" for name in known)
