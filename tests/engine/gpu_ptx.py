"""Compiles loops for sm_90 without a GPU and prints, as JSON, what arithmetic is in their PTX.

A test runs it in a process of its own, with the folders of the tests on the path: Triton's interpreter must be off."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import triton
from test_kernels import STEPS, Models, floats
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltamerge.engine.backends import TorchBackend, steps
from deltamerge.engine.fused.loops import Source
from deltamerge.engine.fused.on_gpu import Loop
from deltamerge.engine.graph import schedule
from deltamerge.io.gpu import functions
from deltamerge.io.reader import Reader

TYPES = {"BF16": "*i16", "F16": "*fp16", "F32": "*fp32"}
OUTPUTS = {"BF16": "*i16", "F16": "*i16", "F32": "*fp32"}


def ptx(loop: Loop) -> str:
    source: Source = loop.source
    stored = {f"s{i}_at": TYPES[x.info.dtype] for i, x in enumerate(source.assembly.sources)}
    signature = {
        "out_at": OUTPUTS[source.assembly.output], "counts_at": "*i64", "sums_at": "*fp64", **stored,
        "ints_at": "*i64", "floats_at": "*fp32", "table_at": "*fp32", "ranks_at": "*i64", "start": "i64", "stop": "i64",
        **(dict.fromkeys(("blocks", "BLOCK", "RUNS"), "i32") if source.by_block else {}),
        "SIZE": "constexpr",
    }  # fmt: skip
    made = triton.compile(
        ASTSource(fn=loop.loop, signature=signature, constexprs={"SIZE": 2048}),
        target=GPUTarget("cuda", 90, 32),
        options=dict(functions.OPTIONS),
    )
    return str(made.asm["ptx"])


def main(names: list[str]) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        tensors = [floats((64, 97), seed).to(torch.bfloat16) for seed in range(3)]
        models = Models(Path(folder), *tensors)
        backend = TorchBackend("cpu")
        for name in names:
            root = STEPS[name](models)
            plan = schedule(root)
            values = {id(node): value for node, value in models.known.items()}
            loop = backend.loop(steps(plan.passes[-1], plan.frees[-1], root, ()), root, values, reader)
            assert loop is not None, name
            text = ptx(loop)
            words = Counter(re.findall(r"^\s*(?:@%?!?\w+ )?([a-z]+(?:\.[a-z0-9]+)*)", text, re.M))
            found[name] = {
                word: count for word, count in words.items() if word.startswith(("fma", "div", "rcp", "sqrt"))
            }
            found[name] |= {"ftz": text.count(".ftz"), "approx": text.count(".approx"), "lines": len(text.splitlines())}
    print(json.dumps(found))


if __name__ == "__main__":
    from deltamerge.io import gpu

    with mock.patch.object(gpu, "available", return_value=True):
        main(sys.argv[1:])
