"""Config, tokenizer, chat template and processor files: copied, changed only where the merge changes them."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.dtypes import PLAIN, TORCH_NAMES
from deltamerge.io.files import refuse_link
from deltamerge.io.strict_json import read_json
from deltamerge.plan.planner import Plan
from deltamerge.plan.vocabulary_config import edit_config
from deltamerge.run.tokenizer import Files, as_json, content_of, edit_tokenizer

TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "spiece*", "sentencepiece*",
)  # fmt: skip
GENERATION = "generation_config.json"
MODEL = (
    GENERATION, "preprocessor_config.json", "processor_config.json", "image_processor*.json",
    "video_processor*.json", "feature_extractor*.json",
)  # fmt: skip


def asset_files(plan: Plan) -> dict[str, Path]:
    """Output name -> source of every file copied as it is; config.json is written by `config`."""
    template = plan.inputs.template.checkpoint.path
    return {**_matching(template, MODEL), **tokenizer_files(plan)}


def tokenizer_files(plan: Plan) -> dict[str, Path]:
    """Output name -> source of the tokenizer's files; those of an adapter that is pruned itself lie beside it."""
    source = plan.pruned_adapter or (plan.inputs.vocabulary or plan.inputs.template).checkpoint
    return _matching(source.path, TOKENIZER)


def copied_files(folder: Path) -> dict[str, Path]:
    """What goes with the weights of a finished run in `folder`: config, tokenizer, processor files, recipe."""
    return _matching(folder, (*MODEL, *TOKENIZER, "config.json", "recipe.yaml"))


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    found = {n: folder / n for n in names if any(fnmatchcase(n, p) for p in patterns)}
    found = {n: p for n, p in found.items() if not n.endswith((".safetensors", ".index.json"))}
    for path in found.values():
        with errors.context(str(folder)):
            refuse_link(path)
    return found


def config(plan: Plan) -> dict[str, Any]:
    """The template's config with the output's dtype and vocabulary size."""
    result = dict(plan.config)
    dtypes = {output.dtype for output in plan.outputs if output.dtype in PLAIN}
    wanted = TORCH_NAMES[dtypes.pop()] if len(dtypes) == 1 else None
    stated = result.get("dtype", result.get("torch_dtype"))
    if wanted is not None and stated != wanted:
        result["dtype"] = result["torch_dtype"] = wanted
    if plan.vocabulary is not None:
        result = edit_config(result, plan.vocabulary, plan.inputs.template)
    elif plan.inputs.vocabulary is not None:
        size = plan.inputs.vocabulary.checkpoint.config.get("vocab_size")
        if size is not None and "vocab_size" in result:
            result["vocab_size"] = size
    return result


def assets(plan: Plan) -> Files:
    """Every output file but weights, card, recipe and lock: copied, or written where the merge changes it."""
    files: Files = dict(asset_files(plan))
    source = plan.inputs.template.checkpoint.path / "config.json"
    merged = config(plan)
    files["config.json"] = source if merged == read_json(source) else as_json(merged, ascii=True)
    if plan.vocabulary is not None and GENERATION in files:
        stated = content_of(files, GENERATION)
        edited = edit_config(stated, plan.vocabulary, plan.inputs.template)
        if edited != stated:
            files[GENERATION] = as_json(edited, ascii=True)
    edit_tokenizer(files, plan.vocabulary, plan.chat_template)
    return files


def write_files(files: Files, folder: Path) -> None:
    """Put `files` into `folder`. InputError: one that is copied has vanished."""
    for name, source in files.items():
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
            continue
        try:
            shutil.copyfile(source, folder / name)
        except FileNotFoundError as error:
            raise InputError(f"{source}: vanished during the run") from error
