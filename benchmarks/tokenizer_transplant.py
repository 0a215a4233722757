"""A model before and after `tokenizer.transplant`, by bits per byte of text that neither tokenizer was trained on.

    python benchmarks/tokenizer_transplant.py MODEL WORK

MODEL is a causal language model with its tokenizer. The other tokenizer is made here, as no second language model
comes without a hub: byte-level BPE of 16,384 tokens, trained on docstrings and METADATA of installed packages. Its
donor is no language model either, but an embedding: the co-occurrence of its tokens within 5 places (positive pointwise
mutual information), cut to 128 dimensions by a randomised SVD. The text that is measured is the METADATA of `HELD_OUT`,
which is not trained on. Needs scipy.
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from deltamerge.recipe.file import read_text
from deltamerge.run.options import Options
from deltamerge.run.runner import run

HELD_OUT = ("rich", "pydantic", "hypothesis", "huggingface_hub", "safetensors", "click", "peft", "tqdm")
TRAINED = ("numpy", "torch", "transformers", "scipy", "peft", "datasets", "pydantic", "sympy", "networkx", "PIL")
TOKENS, WIDTH, WINDOW, LENGTH, CHARACTERS = 16_384, 128, 5, 512, 2500
METHODS = ("omp, k: 64", "omp, k: 8", "common, k: 64", "common, k: 8", "mean")


def descriptions(*, held_out: bool) -> list[str]:
    """The long descriptions of installed packages."""
    found = {}
    for one in distributions():
        name = (one.metadata["Name"] or "").replace("-", "_").lower()
        if (name in HELD_OUT) == held_out:
            found[name] = one.metadata.get_payload() or one.metadata.get("Description") or ""
    return [found[name] for name in sorted(found)]


def docstrings(limit: int = 12_000_000) -> list[str]:
    """Docstrings of installed packages, to about `limit` characters."""
    found, size = [], 0
    sites = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    for path in sorted(p for site in sites for name in TRAINED for p in (site / name).rglob("*.py")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [text for text in texts if text and len(text) > 80]
        size = sum(map(len, found[-len(texts) :])) + size if texts else size
        if size > limit:
            break
    return found


def make_donor(folder: Path) -> None:
    """The other tokenizer, and an embedding of its tokens as a checkpoint."""
    folder.mkdir(parents=True)
    texts = [*descriptions(held_out=False), *docstrings()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(
        folder
    )
    ids = np.concatenate([np.array(one.ids, np.int32) for one in tokenizer.encode_batch(texts)])
    print(f"trained on {sum(map(len, texts)) / 1e6:.1f} M characters, {len(ids) / 1e6:.1f} M tokens", flush=True)
    counts = csr_matrix((TOKENS, TOKENS), dtype=np.float32)
    for offset in range(1, WINDOW + 1):
        ones = np.full(len(ids) - offset, 1 / offset, np.float32)
        counts = counts + csr_matrix((ones, (ids[:-offset], ids[offset:])), counts.shape)
    counts = (counts + counts.T).tocoo()
    rows, total = np.asarray(counts.sum(1)).ravel(), counts.sum()
    contexts = rows**0.75
    ratio = np.log(counts.data * contexts.sum() / (rows[counts.row] * contexts[counts.col]))
    kept = (ratio > 0) & (total > 0)
    information = csr_matrix((ratio[kept], (counts.row[kept], counts.col[kept])), counts.shape)
    basis = np.random.default_rng(0).standard_normal((TOKENS, WIDTH + 16)).astype(np.float32)
    for _ in range(3):
        basis = np.linalg.qr(information @ basis)[0]
    left, values, _ = np.linalg.svd((information.T @ basis).T, full_matrices=False)
    table = torch.from_numpy(((basis @ left) * np.sqrt(values))[:, :WIDTH].astype(np.float32))
    save_file({"model.embed_tokens.weight": table.contiguous()}, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": TOKENS, "hidden_size": WIDTH, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 0, "eos_token_id": 0}))


def bits_per_byte(folder: Path, texts: list[str]) -> tuple[float, float]:
    """Bits per byte of the texts, each in pieces of `LENGTH` tokens, and tokens per byte."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    bits, size, tokens = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        start = torch.tensor([tokenizer.bos_token_id])
        for piece in ids.split(LENGTH):
            row = torch.cat([start, piece])[None]
            with torch.inference_mode():
                logits = model(input_ids=row).logits[0, :-1].float()
            bits += float(torch.nn.functional.cross_entropy(logits, piece, reduction="sum")) / np.log(2)
            tokens += len(piece)
        size += len(text.encode())
    return bits / size, tokens / size


def main() -> None:
    """Print a table of the model as it is, and of each method."""
    model, work = sys.argv[1], Path(sys.argv[2])
    if not (work / "donor" / "config.json").exists():
        make_donor(work / "donor")
    texts = [text[:CHARACTERS] for text in descriptions(held_out=True)]
    print(f"{len(texts)} texts, {sum(len(t.encode()) for t in texts):,} bytes")
    print(f"{'before':20} {bits_per_byte(Path(model), texts)[0]:.3f} bits per byte", flush=True)
    for method in METHODS:
        recipe = f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n"
        recipe += f"tokenizer: {{transplant: {work.absolute()}/donor, method: {method}}}\n"
        out = run(read_text(recipe, work / "recipe"), work / method.replace(", k: ", "-"), Options()).folder
        found, tokens = bits_per_byte(out, texts)
        print(f"{method:20} {found:.3f} bits per byte, {tokens:.3f} tokens per byte", flush=True)


if __name__ == "__main__":
    main()
