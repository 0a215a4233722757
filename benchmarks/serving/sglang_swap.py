"""Fine-tunes of one base swapped in a SGLang engine, by deltas: greedy tokens, and seconds, beside reloading.

    python -m benchmarks.serving.sglang_swap BASE TUNED TUNED… [--swaps 100] [--folder .bench/vllm]

BASE is a small causal model's folder, TUNED fine-tunes of it. The engine computes on the CPU with torch's kernels, in a
process of its own. What a full reload (`update_weights_from_disk`) answers to every prompt is the reference. Then
`EngineSwitch` goes twice through all fine-tunes and the base, and every answer must be the reference's, token by token.
A delta of another base must be refused, and change nothing. Then clients ask without pause, and the engine goes from
one to another `--swaps` times, as drawn from a generator: each answer must be the reference's, alone or with others, of
one that was served between its question and itself, as `vllm_load` has it.

An environment, since SGLang 0.5.23 asks for CUDA's packages, and its kernels for the CPU are not on the package index:
that of `make vllm`, `pip install --no-deps sglang==0.5.23 orjson ipython traitlets gguf`, and a module `sgl_kernel`
whose every name raises when it is called. Nothing of it is called where the processor has no AMX.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
from benchmarks.serving.vllm_load import CLIENTS, Load
from benchmarks.serving.vllm_swap import PROMPTS, TOKENS, extracted, of_another_base
from deltamerge.errors import InputError

HOW = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}


class Loop:
    """An engine's event loop in a thread of its own, so that several threads may call the engine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        threading.Thread(target=loop.run_forever, daemon=True).start()

    def run_until_complete(self, work: Any) -> Any:
        async def done() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result()


class Asked:
    """An engine as `Load` asks it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def answer(self, prompt: str) -> str:
        return json.dumps(self.engine.generate(prompt, HOW)["output_ids"])

    def together(self) -> list[str]:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return [*pool.map(self.answer, PROMPTS)]


def under_load(asked: Asked, switch: Any, deltas: dict[str, Path | None], wanted: Any, swaps: int) -> int:
    """How many answers are of no version that was served."""
    generator = np.random.default_rng(0)
    with Load(asked, wanted) as load:
        for turn in range(swaps):
            before = load.served[-1]
            name = str(generator.choice([one for one in deltas if one != before]))
            load.served.append(name)
            begun = time.perf_counter()
            switch.to(deltas[name])
            load.done += 1
            seconds, count = time.perf_counter() - begun, load.asked
            while load.asked < count + CLIENTS:
                time.sleep(0.01)
            said = f"{seconds:.2f} s; {len(load.wrong)} wrong of {load.asked}"
            print(f"{turn + 1}: {before} -> {name}: {said}", flush=True)
    print(f"{swaps} swaps, {load.asked} answers ({load.of_one} of one version alone), {len(load.wrong)} wrong")
    print(*load.wrong[:5], sep="\n")
    return len(load.wrong)


def measure(base: Path, models: list[Path], folder: Path, swaps: int) -> int:
    """How many models answer otherwise than they should, and answers under load."""
    from sglang.srt.entrypoints.engine import Engine

    from deltamerge import EngineSwitch

    names = [*(model.name for model in models), "base"]
    deltas: list[Path | None] = [*extracted(base, models, folder / "store"), None]
    foreign = of_another_base(base, models, folder / "foreign")
    engine = Engine(
        model_path=str(base), device="cpu", attention_backend="torch_native", dtype="bfloat16", log_level="error",
        mem_fraction_static=0.4, max_total_tokens=2048, max_running_requests=3, context_length=256,
        disable_overlap_schedule=True, disable_radix_cache=True, skip_server_warmup=True, disable_cuda_graph=True,
    )  # fmt: skip

    engine.loop = Loop(engine.loop)
    asked = Asked(engine)

    def answers() -> list[list[int]]:
        return [engine.generate(prompt, HOW)["output_ids"] for prompt in PROMPTS]

    wanted, may, wrong = {}, {}, 0
    for name, model in zip(names, [*models, base], strict=True):  # the base last: the engine holds it then
        time.sleep(0.5)  # SGLang reloads only when what it has answered is cleared away
        begun = time.perf_counter()
        done, said, *_ = engine.update_weights_from_disk(str(model))
        seconds = time.perf_counter() - begun
        assert done, said
        wanted[name] = answers()
        may[name] = [{json.dumps(one), other} for one, other in zip(wanted[name], asked.together(), strict=True)]
        print(f"reload of {name}: {seconds:.2f} s", flush=True)
    apart = len({json.dumps(found) for found in wanted.values()})
    assert apart == len(names), "two of the models answer alike: nothing would be proved"
    switch = EngineSwitch(engine, base)
    for name, delta in 2 * [*zip(names, deltas, strict=True)]:
        begun = time.perf_counter()
        switch.to(delta)
        seconds = time.perf_counter() - begun
        differs = answers() != wanted[name]
        wrong += differs
        print(f"to {name}: {seconds:.2f} s, {'other tokens' if differs else 'the same tokens'}", flush=True)
    try:
        switch.to(foreign)
        wrong += 1
    except InputError as error:
        print(f"refused: {error}")
    wrong += answers() != wanted["base"]
    wrong += under_load(asked, switch, dict(zip(names, deltas, strict=True)), may, swaps)
    engine.shutdown()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="TUNED")
    parser.add_argument("--folder", type=Path, default=Path(".bench/vllm"))
    parser.add_argument("--swaps", type=int, default=100)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if measure(given.base, given.models, given.folder, given.swaps) else 0)


if __name__ == "__main__":
    main()
