"""A running model follows edits of its recipe: equal to a full load of the same recipe, bit for bit; and back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import transformers
from calibration_rows import rows
from conftest import load_tensors, make_checkpoint, tiny_llama
from running import run
from tiny_models import make

from deltamerge.apps.chain.live import Write
from deltamerge.apps.serve.fine_tunes import ServedModel
from deltamerge.apps.serve.hot import HotMerge, HotServer
from deltamerge.cli import main
from deltamerge.errors import InputError, OutputError, RecipeError

Tensors = dict[str, torch.Tensor]
RECIPE = """\
merge_method: {method}
base_model: base
models:
  - model: a
    parameters: {{weight: {a}{more}}}
  - model: b
    parameters: {{weight: {b}}}
dtype: bfloat16
"""
ONE = "model.layers.1.mlp.up_proj.weight"


def write(folder: Path, a: str = "0.5", b: str = "0.3", method: str = "task_arithmetic", more: str = "") -> None:
    (folder / "merge.yaml").write_text(RECIPE.format(method=method, a=a, b=b, more=more))


def one_weight(value: float) -> str:
    """A weight for one tensor, and another for all."""
    return f"[{{filter: layers.1.mlp.up_proj, value: {value}}}, {{value: 0.5}}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b, c: a real tiny decoder and fine-tunes of it."""
    folder = tmp_path_factory.mktemp("hot")
    _, base = make("LlamaForCausalLM", folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        tuned = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        make_checkpoint(folder / name, tuned, config=config)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same models, and merged: the result of merge.yaml."""
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).symlink_to(made / name)
    write(tmp_path)
    run(tmp_path / "merge.yaml", tmp_path / "merged")
    return tmp_path


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def bits(state: Tensors) -> dict[str, bytes]:
    return {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in state.items()}


def full(folder: Path, name: str) -> dict[str, bytes]:
    """What a full load of a run of the recipe, as it is now, has."""
    run(folder / "merge.yaml", folder / name)
    return bits(loaded(folder / name).state_dict())


def test_edits_equal_a_full_load_and_are_undone(folder: Path) -> None:
    model = loaded(folder / "merged")
    hot, states = HotMerge(model, folder / "merged", folder / "merge.yaml", workers=1), [bits(model.state_dict())]
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert hot.update().tensors == ()
    edits: list[tuple[dict[str, str], int | None]] = [
        ({"a": one_weight(0.9)}, 1),
        ({"a": one_weight(0.7), "b": "0.31"}, None),
        ({"a": one_weight(0.7), "b": "0.31", "method": "ties", "more": ", density: 0.4"}, None),
        ({"a": "0.5"}, None),
    ]
    for number, (edit, count) in enumerate(edits):
        write(folder, **edit)
        done = hot.update()
        assert len(done.tensors) == (done.of if count is None else count)
        states.append(bits(model.state_dict()))
        assert states[-1] == full(folder, f"full-{number}")
    assert states[4] == states[0]
    text = (folder / "merge.yaml").read_text()
    (folder / "merge.yaml").write_text(
        text.replace("  - model: b", "  - {model: c, parameters: {weight: 0.1}}\n  - model: b")
    )
    hot.update()
    assert bits(model.state_dict()) == full(folder, "full-c") != states[0]
    for state in reversed(states):
        hot.undo()
        assert bits(model.state_dict()) == state
    hot.undo()  # the update that changed nothing
    with pytest.raises(InputError, match="nothing to undo"):
        hot.undo()
    assert addresses == [tensor.data_ptr() for tensor in model.state_dict().values()]


def test_only_what_changes_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = HotMerge(loaded(folder / "merged"), folder / "merged", folder / "merge.yaml", workers=1)
    computed = []
    from deltamerge.apps.serve import hot as module

    real = module.execute
    monkeypatch.setattr(
        module, "execute", lambda tasks, *a, **k: computed.extend(t.name for t in tasks) or real(tasks, *a, **k)
    )
    write(folder, a=one_weight(0.9))
    assert hot.update().tensors == (ONE,) == tuple(computed)
    write(folder)
    assert hot.update().tensors == (ONE,)  # read from the folder
    assert computed == [ONE]


def test_a_model_that_is_replaced_is_an_edit(folder: Path) -> None:
    model = loaded(folder / "merged")
    hot = HotMerge(model, folder / "merged", folder / "merge.yaml", workers=1)
    write(folder, b="0.4")
    hot.update()
    state = {n: t * 1.5 for n, t in load_tensors(folder / "c").items()}
    (folder / "b").unlink()
    make_checkpoint(folder / "b", state, config=json.loads((folder / "base" / "config.json").read_text()))
    before = bits(model.state_dict())
    assert hot.update().tensors
    assert bits(model.state_dict()) == full(folder, "full") != before
    with pytest.raises(InputError, match="models have changed since"):
        hot.undo()
    assert bits(model.state_dict()) == bits(loaded(folder / "full").state_dict())


def test_what_cannot_be_is_refused_and_nothing_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder / "merged")
    hot = HotMerge(model, folder / "merged", folder / "merge.yaml", workers=1)
    before = bits(model.state_dict())
    for edit, kind, said in (
        ({"a": "x"}, RecipeError, "weight"),
        ({"a": "1.0e+41", "b": "1.0e+41"}, OutputError, "not finite"),
    ):
        write(folder, **edit)
        with pytest.raises(kind, match=said):
            hot.update()
    write(folder)
    text = (folder / "merge.yaml").read_text()
    for more, said in (
        ("output: {quantization: int8}\n", "makes other tensors"),
        ("output: {kind: delta}\n", "output delta"),
    ):
        (folder / "merge.yaml").write_text(text + more)
        with pytest.raises((InputError, RecipeError), match=said):
            hot.update()
    (folder / "merge.yaml").write_text(text.replace("bfloat16", "float32"))
    with pytest.raises(InputError, match="makes other tensors"):
        hot.update()
    write(folder, b="0.2")
    real, count = Write.put, [0]

    def put(write: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        real(write)

    with monkeypatch.context() as patched:
        patched.setattr(Write, "put", put)
        with pytest.raises(KeyboardInterrupt):
            hot.update()
    assert count[0] > 3
    assert bits(model.state_dict()) == before
    with pytest.raises(InputError, match="in the model, and in"):
        HotMerge(loaded(folder / "merged").float(), folder / "merged", folder / "merge.yaml")
    os.utime(folder / "c" / "model.safetensors")
    HotMerge(model, folder / "merged", folder / "merge.yaml")
    os.utime(folder / "a" / "model.safetensors")
    with pytest.raises(InputError, match="is older than its sources"):
        HotMerge(model, folder / "merged", folder / "merge.yaml")


@pytest.mark.parametrize("form", ["int8", "{scheme: fp8, block: [8, 8]}", "{scheme: int4, group: 8}"])
def test_quantised_results_are_written_in_codes(folder: Path, form: str) -> None:
    more = f"output: {{quantization: {form}}}\n"

    def edit(**how: str) -> None:
        write(folder, **how)
        with (folder / "merge.yaml").open("a") as file:
            file.write(more)

    edit()
    run(folder / "merge.yaml", folder / "coded")
    state = load_tensors(folder / "coded")
    hot, before = HotMerge(state, folder / "coded", folder / "merge.yaml", workers=1), bits(state)
    assert hot.update().tensors == ()
    for number, (how, one) in enumerate((({"a": one_weight(0.9)}, True), ({"b": "0.31"}, False))):
        edit(**how)
        done = hot.update()
        assert all(name.startswith(ONE.removesuffix("weight")) for name in done.tensors) == one
        run(folder / "merge.yaml", folder / f"coded-{number}")
        assert bits(state) == bits(load_tensors(folder / f"coded-{number}")) != before
    edit(a="1.0e+41", b="1.0e+41")
    with pytest.raises(OutputError, match="not finite"):
        hot.update()
    for _ in range(3):
        hot.undo()
    assert bits(state) == before
    edit(a=one_weight(0.9))
    served = ServedModel(folder / "coded")
    server = HotServer("http://127.0.0.1:9", folder / "coded", folder / "merge.yaml", workers=1)
    plan, keys = server._merge.plan()
    names = [name for name, key in server._merge.keys.items() if keys[name] != key]
    changes = served.changes(server._written(plan, keys, names))
    touched = dict(served.weights(changes, served.touched(changes)))
    assert bits(load_tensors(folder / "coded") | touched) == bits(load_tensors(folder / "coded-0"))


def test_a_calibration_is_made_again_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32)
    tiny_llama(tmp_path / "tuned", seed=1, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")

    def edit(weight: float, density: float = 0.2) -> None:
        prune = f"{{method: magnitude, density: {density}, q: {{objective: output_change, search: grid}}}}"
        (tmp_path / "merge.yaml").write_text(
            f"merge_method: task_arithmetic\nbase_model: ./base\n"
            f"models: [{{model: ./tuned, name: t, prune: {prune}, parameters: {{weight: {weight}}}}}]\n"
            "calibration: {data: calib.jsonl, sequences: 4, length: 8}\n"
        )

    edit(1)
    run(tmp_path / "merge.yaml", tmp_path / "merged")
    state = load_tensors(tmp_path / "merged")
    before, made = bits(state), []
    from deltamerge.apps.serve import hot as module

    real = module.shared_values
    monkeypatch.setattr(module, "shared_values", lambda nodes, known: made.append(1) or real(nodes, known))
    hot = HotMerge(state, tmp_path / "merged", tmp_path / "merge.yaml", workers=1)
    assert hot.update().tensors == ()
    for number, (weight, density, calibrations) in enumerate(((0.9, 0.2, 0), (1, 0.1, 1), (1, 0.2, 1))):
        edit(weight, density)
        assert hot.update().tensors
        run(tmp_path / "merge.yaml", tmp_path / f"full-{number}")
        assert bits(state) == bits(load_tensors(tmp_path / f"full-{number}"))
        assert len(made) == calibrations
    with (tmp_path / "merge.yaml").open("a") as file:
        file.write("output: {quantization: int8, rounding: inputs}\n")
    with pytest.raises(InputError, match="rounding: inputs is not merged hot"):
        hot.update()
    assert bits(state) == before


class Server(BaseHTTPRequestHandler):
    """The routes of vLLM 0.32.0's entrypoints/rl/online/api_router.py, with our engine's model behind them."""

    model: ServedModel
    weights: Tensors
    version = "default"
    calls: list[str]
    fails = False

    def do_GET(self) -> None:
        assert self.path == "/weight_info"
        self.say(200, {"weight_version": type(self).version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        route, own = urlsplit(self.path).path, type(self)
        own.calls.append(self.path)
        if route == "/init_weight_transfer_engine":
            own.model = ServedModel(body["init_info"]["base"])
            own.weights = {name: own.model.base[name] for name in own.model.base}
        elif route == "/update_weights":
            if own.fails:
                self.say(500, {"error": "no memory"})
                return
            changes = own.model.changes(body["update_info"]["delta"])
            own.weights.update(own.model.weights(changes, own.model.touched(changes)))
            own.model.at = changes
        elif route == "/finish_weight_update":
            own.version = body["weight_version"]
        elif route not in ("/pause", "/resume", "/start_weight_update"):
            self.say(404, {"detail": "Not Found"})
            return
        self.say(200, {})

    def say(self, code: int, answer: dict[str, Any]) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.calls, Server.version, Server.fails = [], "default", False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_is_updated(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*words: str) -> int:
        with pytest.raises(SystemExit) as leaving:
            main(["serve", "merge.yaml", "--vllm", url, "--model", "merged", "-q", *words])
        return int(leaving.value.code or 0)

    monkeypatch.chdir(folder)
    write(folder, a=one_weight(0.9))
    assert serve() == 0
    assert Server.calls == [
        "/init_weight_transfer_engine", "/pause?mode=wait", "/start_weight_update", "/update_weights",
        "/finish_weight_update", "/resume",
    ]  # fmt: skip
    run(folder / "merge.yaml", folder / "full")
    assert bits(Server.weights) == bits(load_tensors(folder / "full"))
    first = Server.version
    assert json.loads((folder / "merged-hot" / first / "delta.json").read_text())["tensors"].keys() == {ONE}
    assert serve() == 0  # nothing to do
    assert len(Server.calls) == 6
    write(folder, b="0.2")
    assert serve() == 0
    run(folder / "merge.yaml", folder / "full-2")
    assert bits(Server.weights) == bits(load_tensors(folder / "full-2"))
    Server.fails = True
    write(folder, b="0.1")
    assert serve() == 1
    assert Server.calls[-1] == "/resume"
    assert bits(Server.weights) == bits(load_tensors(folder / "full-2"))
    Server.fails = False
    calls = len(Server.calls)
    assert serve("--store", "other") == 1  # the server's weights are not of that store
    assert len(Server.calls) == calls
    assert serve("--undo") == 0
    assert bits(Server.weights) == bits(load_tensors(folder / "merged"))
    assert Server.version == "base"
    assert Server.calls.count("/init_weight_transfer_engine") == 1
    with pytest.raises(OutputError, match="Connection refused"):
        HotServer("http://127.0.0.1:9", folder / "merged", folder / "merge.yaml").update()
    with pytest.raises(OutputError, match="404"):
        HotServer(f"{url}/x", folder / "merged", folder / "merge.yaml")._ask("POST", "/nothing")
