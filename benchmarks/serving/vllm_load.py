"""A hundred swaps of a vLLM server's weights while clients ask without pause: every answer must be of one version.

    python -m benchmarks.serving.vllm_load BASE TUNED TUNED… [--swaps 100] [--python VENV/bin/python] [--json PATH]
    python -m benchmarks.serving.vllm_load BASE-INT8 --chain RUN-INT8 --dtype bfloat16

BASE is a small causal model's folder, TUNED fine-tunes of it, which become the versions of a chain; or `--chain` is
one over BASE. `--python` has vLLM and deltamerge. The server is `vllm.entrypoints.openai.api_server` on the CPU. The
reference is what it answers to every prompt after vLLM's own reload of each version's checkpoint, asked one by one and
all at once: products of a batch may be rounded otherwise than those of one row. Then the server goes from a version to
another, forwards and back, as drawn from a generator: requests in flight end first, later ones wait. An answer must be
the reference's of a version that was served between its question and itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.vllm_swap import PROMPTS, TOKENS, chained
from deltamerge.models.chain.folder import names
from deltamerge.run.apply import apply

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1",
}  # fmt: skip
CLIENTS = 2


class Server:
    """A server in a process of its own; None for `port`: as the system gives it."""

    def __init__(self, python: Path, base: Path, log: Path, port: int, dtype: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
        command += ["--dtype", dtype, "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
        command += ["--weight-transfer-config", '{"backend": "deltamerge"}', "--served-model-name", "model"]
        command += ["--no-enable-prefix-caching", "--uvicorn-log-level", "warning"]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=out, stderr=out)
        deadline = time.monotonic() + 900
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server has not started: {log}")
            with suppress(OSError):
                self.ask("GET", "/health")
                return
            time.sleep(1)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=900) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:500]}") from None

    def answer(self, prompt: str) -> str:
        body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        return str(self.ask("POST", "/v1/completions", body)["choices"][0]["text"])

    def answers(self) -> list[set[str]]:
        """What may be answered to each prompt: alone, and with the others."""
        alone = [self.answer(prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = [*pool.map(self.answer, PROMPTS)]
        return [{*pair} for pair in zip(alone, together, strict=True)]

    def reload(self, folder: Path) -> None:
        """Load a checkpoint as vLLM does by itself."""
        self.ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def swap(self, delta: Path | None, name: str) -> tuple[float, float]:
        """Seconds of an update, and of the pause that it took."""
        paused = time.monotonic()
        self.ask("POST", "/pause?mode=wait")
        try:
            begun = time.monotonic()
            self.ask("POST", "/start_weight_update")
            self.ask("POST", "/update_weights", {"update_info": {"delta": None if delta is None else str(delta)}})
            self.ask("POST", "/finish_weight_update", {"weight_version": name})
            seconds = time.monotonic() - begun
        finally:
            self.ask("POST", "/resume")
        return seconds, time.monotonic() - paused


class Load:
    """Clients that ask without pause, and what they were told that no version says."""

    def __init__(self, server: Any, wanted: dict[str, list[set[str]]]) -> None:
        self.server, self.wanted = server, wanted
        self.served, self.done = ["base"], 0  # versions in order, and which of them the server has for certain
        self.asked, self.wrong = 0, list[str]()
        self.of_one = 0  # answers that only one of all versions gives
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            prompt = number % len(PROMPTS)
            number += 1
            first = self.done
            try:
                found = self.server.answer(PROMPTS[prompt])
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            between = self.served[first:]
            giving = [name for name, answers in self.wanted.items() if found in answers[prompt]]
            with self._lock:
                self.asked += 1
                self.of_one += len(giving) == 1
                if not {*giving} & {*between}:
                    self.wrong.append(f"{PROMPTS[prompt]!r} between {between}: {found!r}, which is of {giving}")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    folder, base = given.folder, given.base.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    models = [model.resolve() for model in given.models]
    if (chain := given.chain) is None:
        chain = chained(base, models, folder / "-".join(["load", *(model.name for model in models)]))
    versions: dict[str, Path | None] = {"base": None} | {name: chain.resolve() / name for name in names(chain)}
    server = Server(given.python, base, folder / "server.log", given.port, given.dtype)
    try:
        wanted = {}
        for name, delta in [*versions.items()][::-1]:  # the base last: the server holds it then
            made = base if delta is None else (folder / f"whole-{name}").resolve()
            if delta is not None:
                apply(str(delta), str(base), made, workers=1, force=True)
            server.reload(made)
            wanted[name] = server.answers()
            print(f"reference of {name}: {sorted(wanted[name][0])[0][:50]!r}", flush=True)
        apart = len({json.dumps([sorted(one) for one in answers]) for answers in wanted.values()})
        assert apart == len(wanted), "two of the models answer alike: nothing would be proved"
        server.ask("POST", "/init_weight_transfer_engine", {"init_info": {"base": str(base)}})
        generator, rows = np.random.default_rng(given.seed), []
        with Load(server, wanted) as load:
            for turn in range(given.swaps):
                before = load.served[-1]
                name = str(generator.choice([one for one in versions if one != before]))
                load.served.append(name)
                seconds, paused = server.swap(versions[name], name)
                load.done += 1
                asked = load.asked
                while load.asked < asked + CLIENTS:  # some are asked of this version
                    time.sleep(0.01)
                rows.append({"from": before, "to": name, "seconds": seconds, "paused": paused})
                said = f"{seconds:.2f} s, paused {paused:.2f} s; {len(load.wrong)} wrong of {load.asked}"
                print(f"{turn + 1}: {before} -> {name}: {said}", flush=True)
        return {"swaps": rows, "answers": load.asked, "answers_of_one": load.of_one, "wrong": load.wrong}
    finally:
        server.process.terminate()
        server.process.wait(60)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs="*", metavar="TUNED")
    parser.add_argument("--chain", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--folder", type=Path, default=Path(".bench/vllm"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if (given.chain is None) != bool(given.models):
        parser.error("TUNED, or --chain")
    found = measure(given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    for what in ("seconds", "paused"):
        times = sorted(row[what] for row in found["swaps"])
        print(f"{what}: median {statistics.median(times):.2f}, largest {times[-1]:.2f}")
    print(f"{len(found['swaps'])} swaps, {found['answers']} answers ({found['answers_of_one']} of one version alone)")
    print(f"wrong: {len(found['wrong'])}", *found["wrong"][:5], sep="\n")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
