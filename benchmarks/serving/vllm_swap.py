"""Fine-tunes of one base swapped in a vLLM server under load, by deltas: greedy tokens, and seconds, beside reloading.

    make vllm MODELS="BASE TUNED TUNED…"                    (vLLM in an environment of its own)
    python -m benchmarks.serving.vllm_swap BASE TUNED TUNED… [--rounds 2] [--in-place] [--json PATH]

BASE is a small causal model's folder, TUNED fine-tunes of it. The server is vLLM's AsyncLLM on the CPU, its engine in a
process of its own. What a full reload (vLLM's `reload_weights`, from a checkpoint's folder) answers to every prompt is
the reference. Then, while clients ask on without pause, the server goes through all fine-tunes and the base by
`update_weights({"delta": …})`: requests in flight end first, later ones wait; and then through the versions of a chain,
as `dm.follow` yields them: the first fine-tune, the second after it, and so on. After every swap the clients wait, the
prompts are asked again, and every answer must be the reference's, token by token. So must the clients' be, or what a
full reload answers when all prompts are asked at once: products of a batch may be rounded otherwise than those of one
row. A delta of another base must be refused, and change nothing.

--in-place has vLLM compute with unpacked weights on the CPU too, as on a GPU, and writes single positions where they
are few.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "OMP_NUM_THREADS": "1"}
os.environ |= {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}

PROMPTS = [
    "Sort these numbers in ascending order: 92, 68, 65, 88, 48, 22\nAnswer:",
    "Reverse this list of words: what, You, truth, work, or, telephone\nAnswer:",
    "Sort these numbers in ascending order: 86, 39, 71\nAnswer:",
    "Reverse this list of words: Smith, share, C\nAnswer:",
    "The capital of France is",
]
TOKENS, CLIENTS = 16, 2


class Server:
    """A server, what it answers, and which model it holds."""

    def __init__(self, base: Path, *, in_place: bool) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(base), max_model_len=256, max_num_seqs=CLIENTS + 1, enforce_eager=True, dtype="bfloat16",
            weight_transfer_config={"backend": "deltamerge"}, disable_log_stats=True, seed=0,
            worker_extension_cls="benchmarks.serving.vllm_unpacked.Unpacked" if in_place else "",
        )  # fmt: skip
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.numbers = itertools.count()

    async def answer(self, prompt: str) -> list[int]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        tokens: list[int] = []
        async for output in self.engine.generate(prompt, how, str(next(self.numbers))):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def answers(self) -> list[list[int]]:
        return [await self.answer(prompt) for prompt in PROMPTS]

    async def answers_at_once(self) -> list[list[int]]:
        return await asyncio.gather(*map(self.answer, PROMPTS))

    async def reload(self, folder: Path) -> float:
        """Seconds of vLLM's own reload of a checkpoint."""
        await self.engine.pause_generation(mode="wait")
        begun = time.perf_counter()
        await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        seconds = time.perf_counter() - begun
        await self.engine.resume_generation()
        return seconds

    async def swap(self, delta: Path | None) -> tuple[float, float]:
        """Seconds of an update by a delta, and of the pause that it took."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        paused = time.perf_counter()
        await self.engine.pause_generation(mode="wait")
        try:
            begun = time.perf_counter()
            await self.engine.start_weight_update()
            named = {"delta": None if delta is None else str(delta)}
            await self.engine.update_weights(WeightTransferUpdateRequest(update_info=named))
            await self.engine.finish_weight_update()
            seconds = time.perf_counter() - begun
        finally:
            await self.engine.resume_generation()
        return seconds, time.perf_counter() - paused


def extracted(base: Path, models: list[Path], store: Path) -> list[Path]:
    """The deltas of models, made where they are not there."""
    if left := [model for model in models if not (store / model.name).exists()]:
        command = [sys.executable, "-m", "deltamerge", "extract", *left, "--base", base, "--out"]
        command.append(store if len(left) > 1 else store / left[0].name)
        subprocess.run([*map(str, command), "--workers", "1", "-q"], check=True)
    return [store / model.name for model in models]


def chained(base: Path, models: list[Path], chain: Path) -> Path:
    """A chain whose versions are the models, one after the other, made where it is not there."""
    for number, model in enumerate(models):
        before, version = chain / f"{number:06d}", chain / f"{number + 1:06d}"
        if version.exists():
            continue
        command = [
            sys.executable,
            "-m",
            "deltamerge",
            "extract",
            model,
            "--base",
            models[number - 1] if number else base,
        ]
        command += ["--out", version, *(["--after", before] if number else [])]
        subprocess.run([*map(str, command), "--workers", "1", "-q"], check=True)
    return chain


def of_another_base(base: Path, models: list[Path], folder: Path) -> Path:
    """A delta, of one tensor, between two fine-tunes; the tensor is the first in which the base differs from both."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder, ignore_errors=True)
    states = [load_file(one / "model.safetensors") for one in (base, *models[:2])]
    name = next(n for n in states[0] if all(bool((states[0][n] != other[n]).any()) for other in states[1:]))
    for model, state in zip(models[:2], states[1:], strict=True):
        (folder / model.name).mkdir(parents=True)
        shutil.copy(model / "config.json", folder / model.name)
        save_file({name: state[name]}, folder / model.name / "model.safetensors")
    return extracted(folder / models[0].name, [folder / models[1].name], folder / "store")[0]


async def measure(base: Path, models: list[Path], folder: Path, rounds: int, *, in_place: bool) -> dict[str, Any]:
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    import deltamerge as dm

    server, names = Server(base, in_place=in_place), [*(model.name for model in models), "base"]
    wanted, at_once, reloads = {}, {}, {}
    for name, model in zip(names, [*models, base], strict=True):  # the base last: the server holds it then
        reloads[name] = await server.reload(model)
        wanted[name], at_once[name] = await server.answers(), await server.answers_at_once()
        print(f"reload of {name}: {reloads[name]:.2f} s", flush=True)
    apart = len({json.dumps(found) for found in wanted.values()})
    assert apart == len(names), "two of the models answer alike: nothing would be proved"
    deltas: list[Path | None] = [*extracted(base, models, folder / "store")]
    chain = chained(base, models, folder / "-".join(["chain", *names[:-1]]))
    foreign = of_another_base(base, models, folder / "foreign")
    turns = [(turn, *one) for turn in range(rounds) for one in zip(names, [*deltas, None], strict=True)]
    versions = [version.path for version in dm.follow(chain, timeout=0)]
    turns += [("chain", *one) for one in zip(names, [*versions, None], strict=True)]
    init = {"base": str(base), "in_place": True if in_place else None}
    await server.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init))

    now, wrong, asked, flying, stop, may_ask = "base", list[str](), 0, 0, asyncio.Event(), asyncio.Event()
    may_ask.set()

    async def client(number: int) -> None:
        nonlocal asked, flying
        for at in itertools.count(number):
            await may_ask.wait()
            if stop.is_set():
                return
            prompt, before = at % len(PROMPTS), now
            flying += 1
            found = await server.answer(PROMPTS[prompt])
            flying -= 1
            asked += 1
            if found not in [answers[name][prompt] for answers in (wanted, at_once) for name in (before, now)]:
                wrong.append(f"a client's {PROMPTS[prompt]!r} between {before} and {now}")

    async def alone() -> list[list[int]]:
        may_ask.clear()
        while flying:
            await asyncio.sleep(0.01)
        found = await server.answers()
        may_ask.set()
        return found

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    rows = []
    for turn, name, delta in turns:
        while flying < CLIENTS:
            await asyncio.sleep(0.01)
        before, now = now, name  # a client's request that waits for the swap is answered by the new one
        seconds, pause = await server.swap(delta)
        found = await alone()
        wrong += [f"{name}: {p!r}" for p, a, b in zip(PROMPTS, found, wanted[name], strict=True) if a != b]
        rows.append({"from": before, "to": name, "round": turn, "seconds": seconds, "paused": pause})
        said = f"{seconds:.2f} s, paused {pause:.2f} s, {len(wrong)} wrong of {asked} asked"
        print(f"{before} -> {delta or name}: {said}", flush=True)
    try:
        await server.swap(foreign)
        wrong.append("a delta of another base was taken")
    except Exception as error:
        refused = str(error).splitlines()[-1][:300]
    wrong += ["after a refusal"] * (await alone() != wanted["base"])
    stop.set()
    await asyncio.gather(*clients)
    server.engine.shutdown()
    return {"reload": reloads, "swaps": rows, "clients_answers": asked, "wrong": wrong, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="TUNED")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".bench/vllm"))
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if len(given.models) < 2:
        parser.error("two fine-tunes at least")
    given.folder.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(measure(given.base, given.models, given.folder, given.rounds, in_place=given.in_place))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    first = [row["seconds"] for row in found["swaps"] if row["round"] == 0]
    later = [row["seconds"] for row in found["swaps"] if row["round"] not in (0, "chain")]
    chain = [row["seconds"] for row in found["swaps"] if row["round"] == "chain"]
    reload = sorted(found["reload"].values())[len(found["reload"]) // 2]
    for what, seconds in (("first", first), ("known", later), ("of a chain", chain)):
        if seconds:
            middle = sorted(seconds)[len(seconds) // 2]
            print(f"swaps, {what}: median {middle:.2f} s, {middle / reload:.2f} of a reload ({reload:.2f} s)")
    print(f"refused: {found['refused']}")
    print(f"{found['clients_answers']} answers to clients, {len(found['wrong'])} wrong")
    shutil.rmtree(given.folder / "foreign", ignore_errors=True)
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
