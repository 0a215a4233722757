"""Fine-tunes of one base swapped in a SGLang engine, by deltas: greedy tokens, and seconds, beside reloading.

    python benchmarks/sglang_swap.py BASE TUNED TUNED… [--rounds 2] [--folder .bench/vllm] [--json PATH]

BASE is a small causal model's folder, TUNED fine-tunes of it. The engine computes on the CPU with torch's kernels, in a
process of its own. What a full reload (`update_weights_from_disk`) answers to every prompt is the reference. Then
`EngineSwitch` goes through all fine-tunes and the base, and through the versions of a chain of them, while clients'
requests are in flight, which end first or begin after. Every answer must be the reference's, token by token. A delta of
another base must be refused, and change nothing.

An environment, since SGLang 0.5.23 asks for CUDA's packages, and its kernels for the CPU are not on the package index:
that of `make vllm`, `pip install --no-deps sglang==0.5.23 orjson ipython traitlets gguf`, and a module `sgl_kernel`
whose every name raises when it is called. Nothing of it is called where the processor has no AMX.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
from vllm_swap import CLIENTS, PROMPTS, TOKENS, chained, extracted, of_another_base

import deltamerge as dm
from deltamerge.errors import InputError

HOW = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}


def measure(base: Path, models: list[Path], folder: Path, rounds: int) -> dict[str, Any]:
    from sglang.srt.entrypoints.engine import Engine

    from deltamerge.run.sglang_switch import EngineSwitch

    names = [*(model.name for model in models), "base"]
    deltas: list[Path | None] = [*extracted(base, models, folder / "store")]
    chain = chained(base, models, folder / "-".join(["chain", *names[:-1]]))
    foreign = of_another_base(base, models, folder / "foreign")
    versions = [version.path for version in dm.follow(chain, timeout=0)]
    turns = [(turn, *one) for turn in range(rounds) for one in zip(names, [*deltas, None], strict=True)]
    turns += [("chain", *one) for one in zip(names, [*versions, None], strict=True)]
    engine = Engine(
        model_path=str(base), device="cpu", attention_backend="torch_native", dtype="bfloat16", log_level="warning",
        mem_fraction_static=0.2, max_total_tokens=2048, max_running_requests=CLIENTS + 1, context_length=256,
        disable_overlap_schedule=True, disable_radix_cache=True, skip_server_warmup=True, disable_cuda_graph=True,
    )  # fmt: skip

    def answers() -> list[list[int]]:
        return [engine.generate(prompt, HOW)["output_ids"] for prompt in PROMPTS]

    wanted, reloads, wrong, rows, asked = {}, {}, list[str](), [], 0
    for name, model in zip(names, [*models, base], strict=True):  # the base last: the engine holds it then
        time.sleep(0.5)  # SGLang reloads only when what it has answered is cleared away
        begun = time.perf_counter()
        done, said, *_ = engine.update_weights_from_disk(str(model))
        reloads[name] = time.perf_counter() - begun
        assert done, said
        wanted[name] = answers()
        print(f"reload of {name}: {reloads[name]:.2f} s", flush=True)
    apart = len({json.dumps(found) for found in wanted.values()})
    assert apart == len(names), "two of the models answer alike: nothing would be proved"
    switch, now, stop = EngineSwitch(engine, base), "base", asyncio.Event()

    async def client(number: int) -> None:
        nonlocal asked
        for at in itertools.count(number):
            if stop.is_set():
                return
            prompt, before = at % len(PROMPTS), now
            found = (await engine.async_generate(PROMPTS[prompt], HOW))["output_ids"]
            asked += 1
            if found not in (wanted[before][prompt], wanted[now][prompt]):
                wrong.append(f"a client's {PROMPTS[prompt]!r} between {before} and {now}")

    clients = [
        engine.loop.create_task(client(number)) for number in range(CLIENTS)
    ]  # run while the engine is waited for
    for turn, name, delta in turns:
        before, now = now, name
        begun = time.perf_counter()
        switch.to(delta)
        seconds = time.perf_counter() - begun
        found = answers()
        wrong += [f"{name}: {p!r}" for p, a, b in zip(PROMPTS, found, wanted[name], strict=True) if a != b]
        rows.append({"from": before, "to": name, "round": turn, "seconds": seconds})
        print(f"{before} -> {delta or name}: {seconds:.2f} s, {len(wrong)} wrong of {asked} asked", flush=True)
    try:
        switch.to(foreign)
        wrong.append("a delta of another base was taken")
    except InputError as error:
        refused = str(error)
    wrong += ["after a refusal"] * (answers() != wanted["base"])
    stop.set()
    engine.loop.run_until_complete(asyncio.gather(*clients))
    engine.shutdown()
    return {"reload": reloads, "swaps": rows, "clients_answers": asked, "wrong": wrong, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="TUNED")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".bench/vllm"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = measure(given.base, given.models, given.folder, given.rounds)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"refused: {found['refused']}")
    print(f"{found['clients_answers']} answers to clients, {len(found['wrong'])} wrong")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
