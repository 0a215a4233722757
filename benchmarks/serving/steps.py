"""Bytes of one AdamW step: our deltas beside Fireworks' arc_v3 and XOR + zstd-1, of two models, three learning rates.

    python -m benchmarks.serving.steps --encoder ../shared/data/sentiment --decoder BASE --arc VENV/bin/python

Float32 masters are trained on the task rows with AdamW at a constant rate; what each step changes are their casts to
bfloat16, early (the sixth step) and late. BASE is a causal model (SmolLM2-135M in bfloat16), VENV has
fireworks-delta-compression 0.1.0 (MIT), which judges and nothing of which is used otherwise. Pairs are kept in --dir.

`arrays` are bytes of what is stored of the tensors, without names and hashes: our arrays, arc's patches, XOR's frames.
`whole` are our manifest and safetensors file; arc's in a safetensors file with its checksums; XOR's frames in one. All
of arc's candidates are waited for, of which it keeps the smallest. Speeds are million elements of a tensor a second of
processor time on one core, of the coding alone (what changed is known) and of whole files, with hashes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import tasks
from deltamerge.apps.chain.live import load_delta
from deltamerge.formats.delta.manifest import Base
from deltamerge.formats.delta.positions import CODINGS
from deltamerge.formats.delta.steps import STEP_TILE, decode_tile, encode_tile
from deltamerge.formats.delta.tensor_writer import BaseTensor
from deltamerge.formats.delta.writer import ArtifactWriter

RATES = (1e-6, 3e-6, 1e-5)
EARLY = 5
State = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]

JUDGE = """
import json, sys, zstd
from fireworks_delta_compression import delta_compress_dicts
from fireworks_delta_compression.backends import arc3
from safetensors.torch import load_file, save
arc3._CANDIDATE_WAIT_MULTIPLIER = 1e9
import torch
a, b = load_file(sys.argv[1]), load_file(sys.argv[2])
patches, sums = delta_compress_dicts(a, b, "arc_v3")
frames = {}
for name in a:
    bits = (a[name].view(torch.int16) ^ b[name].view(torch.int16)).numpy().tobytes()
    frames[name] = torch.frombuffer(bytearray(zstd.compress(bits, 1)), dtype=torch.uint8)
found = {}
for kind, arrays, more in (("arc_v3", patches, {n: str(s) for n, s in sums.items()}), ("xor", frames, None)):
    found[kind] = {"arrays": sum(t.numel() for t in arrays.values()), "whole": len(save(arrays, metadata=more))}
print(json.dumps(found))
"""


def encoder(folder: Path) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tasks.rows("sentiment", "train")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()

    def batch(i: int) -> dict[str, Any]:
        own = [rows[order[(16 * i + j) % len(rows)]] for j in range(16)]
        texts = [row.text for row in own]
        inputs = tokenizer(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([int(row.label) for row in own])}

    return AutoModelForSequenceClassification.from_pretrained(folder).float(), batch


def decoder(folder: Path) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer("\n".join(row.text for row in tasks.rows("sentiment", "train"))).input_ids)

    def batch(i: int) -> dict[str, Any]:
        start = 256 * i % (len(ids) - 256)
        own = ids[start : start + 256].view(2, 128)
        return {"input_ids": own, "labels": own}

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch


def make_pairs(make: Callable[[Path], Any], base: Path, lr: float, late: int, out: Path) -> None:
    """The bfloat16 weights before and after the steps EARLY and `late`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = make(base)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
        for i in range(late + 1):
            is_kept = i in (EARLY, late)
            if is_kept:
                save(model, out / f"{i}-old.safetensors")
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=make is decoder):
                loss = model(**batch(i)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if is_kept:
                save(model, out / f"{i}-new.safetensors")


def save(model: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().bfloat16() for name, p in model.named_parameters()}, path)


def bits_of(tensor: torch.Tensor) -> Array:
    return tensor.view(torch.int16).numpy().view(np.uint16).reshape(-1)


def write(folder: Path, old: State, new: State, **options: Any) -> Any:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ArtifactWriter(folder, Base(id="base"), **options) as writer:
        for name, tensor in old.items():
            bits, shape = bits_of(tensor), tuple(tensor.shape)
            base = BaseTensor(name, "BF16", shape, lambda start, stop, bits=bits: bits[start:stop])
            out, result = writer.tensor(name, "BF16", shape, base), bits_of(new[name])
            for start, stop in tiles_of(result.size):
                out.write(start, result[start:stop])
        return writer.finish()


def tiles_of(size: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last element of each tile of a tensor."""
    yield from ((start, min(start + STEP_TILE, size)) for start in range(0, size, STEP_TILE))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    found = call()
    return time.process_time() - begun, found


def coding_seconds(old: State, new: State) -> tuple[float, float]:
    """To encode and to decode all tiles, positions given."""
    encoding = decoding = 0.0
    for name, tensor in old.items():
        for start, stop in tiles_of(tensor.numel()):
            base, result = bits_of(tensor)[start:stop], bits_of(new[name])[start:stop]
            where = np.flatnonzero(base != result)
            took, code = seconds(partial(encode_tile, base, where, result[where], "BF16"))
            encoding += took
            took, _ = seconds(partial(decode_tile, code, base, "BF16"))
            decoding += took
    return encoding, decoding


def measure(before: Path, after: Path, work: Path, arc: Path) -> dict[str, Any]:
    old, new = load_file(before), load_file(after)
    size = sum(tensor.numel() for tensor in old.values())
    writing, ours = seconds(lambda: write(work / "steps", old, new))
    others = write(work / "others", old, new, codings=CODINGS)
    state = {name: tensor.clone() for name, tensor in old.items()}
    applying, _ = seconds(lambda: load_delta(work / "steps").apply_(state))
    assert all(np.array_equal(bits_of(state[name]), bits_of(new[name])) for name in new)
    encoding, decoding = coding_seconds(old, new)
    judged = subprocess.run([arc, "-c", JUDGE, before, after], check=True, capture_output=True, text=True)
    rates = {"encode": encoding, "decode": decoding, "write": writing, "apply": applying}
    return {
        "elements": size,
        "changed": ours.entries,
        "steps": {"arrays": sum(ours.stored.values()), "whole": ours.nbytes},
        "version 1": {"arrays": sum(others.stored.values()), "whole": others.nbytes},
        **json.loads(judged.stdout),
        "speed": {name: round(size / took / 1e6) for name, took in rates.items()},
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    kinds = ("steps", "version 1", "arc_v3", "xor")
    yield "| step | changed | steps | version 1 | arc_v3 | XOR + zstd-1 | of arc | of XOR | whole: of arc | of XOR |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, one in found.items():
        shares = [one["steps"][of] / one[kind][of] for of in ("arrays", "whole") for kind in ("arc_v3", "xor")]
        kilobytes = " | ".join(f"{one[kind]['arrays'] / 1e3:,.1f}" for kind in kinds)
        ratios = " | ".join(f"{share:.2f}" for share in shares)
        yield f"| {name} | {100 * one['changed'] / one['elements']:.2f} % | {kilobytes} | {ratios} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--decoder", type=Path)
    parser.add_argument("--arc", type=Path, required=True, help="a Python that has fireworks-delta-compression")
    parser.add_argument("--dir", type=Path, default=Path(".bench/steps"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for model, folder, make, late in (
        ("encoder", arguments.encoder, encoder, 200),
        ("decoder", arguments.decoder, decoder, 40),
    ):
        for lr in RATES if folder else ():
            pairs = arguments.dir / f"{model}-{lr:g}"
            if not (pairs / f"{late}-new.safetensors").exists():
                make_pairs(make, folder, lr, late, pairs)
            for at in (EARLY, late):
                before, after = (pairs / f"{at}-{when}.safetensors" for when in ("old", "new"))
                found[f"{model}, lr {lr:g}, step {at + 1}"] = measure(before, after, arguments.dir, arguments.arc)
    print("\n".join(lines(found)))
    print(json.dumps({name: one["speed"] for name, one in found.items()}))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
