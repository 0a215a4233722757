"""What vLLM answers with extracted LoRAs and with mixtures of experts, beside transformers and PEFT.

    VLLM_PYTHON=… python -m benchmarks.serving.vllm_outputs BASE TASK [--lora LORA …] [--moe MIXTURE …]

VLLM_PYTHON is a Python with vLLM. Asked are the first 20 test rows of a task of benchmarks/smollm2.py, greedily. Both
sides compute in bfloat16 on the CPU, not in the same order: answers may part where two tokens are nearly equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
ROWS, RANK = 20, 64


def plain(model: Any, folder: Path, rows: list[Any], tokens: int) -> list[str]:
    """Answers in transformers."""
    from transformers import AutoTokenizer

    from benchmarks import smollm2

    made = smollm2.answers(model.eval(), AutoTokenizer.from_pretrained(folder), [row.text for row in rows], tokens)
    return [text.strip() for text in made]


def serve(path: Path) -> None:
    """In vLLM's Python: a line for every model of the file."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(path.read_text())
    settings = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "dtype": "bfloat16", "seed": 0}
    greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"])

    def report(engine: Any, folder: str, **more: Any) -> None:
        outputs = engine.generate(asked["texts"], greedy, use_tqdm=False, **more)
        ours, theirs, labels = [one.outputs[0].text.strip() for one in outputs], asked["plain"][folder], asked["labels"]
        right = [sum(a == b for a, b in zip(some, labels, strict=True)) for some in (ours, theirs)]
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(
            f"{folder}: right in vLLM {right[0]}, in transformers {right[1]}, the same {same} of {len(labels)}",
            flush=True,
        )

    if asked["loras"]:
        engine = LLM(asked["base"], enable_lora=True, max_lora_rank=RANK, max_loras=1, **settings)
        report(engine, asked["base"])
        for number, folder in enumerate(asked["loras"], 1):
            report(engine, folder, lora_request=LoRARequest(Path(folder).name, number, folder))
        del engine
    for folder in asked["moes"]:
        report(LLM(folder, **settings), folder)


def main() -> None:
    """Ask transformers here, and vLLM in its own Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("task")
    parser.add_argument("--lora", type=Path, nargs="*", default=[])
    parser.add_argument("--moe", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from benchmarks import smollm2

    rows, tokens = smollm2.rows(options.task, "test")[:ROWS], smollm2.NEW_TOKENS[options.task]

    def loaded(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    found = {str(one.absolute()): plain(loaded(one), one, rows, tokens) for one in (options.base, *options.moe)}
    for one in options.lora:
        adapted = PeftModel.from_pretrained(loaded(options.base), one).get_base_model()
        found[str(one.absolute())] = plain(adapted, options.base, rows, tokens)
    asked = {
        "base": str(options.base.absolute()), "loras": [str(one.absolute()) for one in options.lora],
        "moes": [str(one.absolute()) for one in options.moe], "plain": found, "tokens": tokens,
        "texts": [row.text for row in rows], "labels": [row.label for row in rows],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "asked.json"
        path.write_text(json.dumps(asked))
        command = [os.environ["VLLM_PYTHON"], __file__, "--serve", str(path)]
        subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS)


if __name__ == "__main__":
    serve(Path(sys.argv[2])) if sys.argv[1:2] == ["--serve"] else main()
