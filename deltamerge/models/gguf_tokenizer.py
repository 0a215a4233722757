"""The tokenizer that a GGUF file describes, as files: transformers' own conversion."""

from __future__ import annotations

import json
from pathlib import Path

from deltamerge.files.descriptors import scratch
from deltamerge.formats.gguf.parts import SUFFIX
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.tokenizer_files import CONFIG, TOKENIZER

LOCAL = ("is_local", "local_files_only")  # where transformers read it, which is no matter of the tokenizer


def is_described(checkpoint: Checkpoint) -> bool:
    """Whether a model's tokenizer is one that its GGUF file describes, and no file beside it."""
    return checkpoint.files[:1] != () and checkpoint.files[0].suffix == SUFFIX and not _beside(checkpoint.path)


def _beside(folder: Path) -> bool:
    return (folder / TOKENIZER).is_file()


def described(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's files by name; none where transformers cannot make them."""
    from transformers import AutoTokenizer

    file = checkpoint.files[0]
    try:
        with scratch(file.parent) as folder:
            (folder / file.name).symlink_to(file.resolve())  # alone: what lies beside it may be another model's
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
            tokenizer.save_pretrained(folder / "made")
            found = {path.name: path.read_bytes() for path in sorted((folder / "made").iterdir()) if path.is_file()}
    except Exception:  # whatever transformers raises for a tokenizer that it does not know
        return {}
    if CONFIG in found:
        config = {key: value for key, value in json.loads(found[CONFIG]).items() if key not in LOCAL}
        found[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found
