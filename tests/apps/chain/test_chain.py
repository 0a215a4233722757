"""Chains: what is written comes back through every door; what is foreign, damaged or out of order is refused."""

from __future__ import annotations

import bz2
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_bert_pair
from format_reader import State, documented, read_chain
from pydantic import TypeAdapter

import deltamerge as dm
from deltamerge.apps.chain.live import Write
from deltamerge.apps.serve.fine_tunes import ServedModel
from deltamerge.cli import main
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.formats.delta.parts import Part
from deltamerge.models.chain import folder as folders
from deltamerge.models.chain.folder import VERSION, between, line
from deltamerge.models.references import Models

NAMES = ["000001", "000002", "000003", "000004"]
Tensors = dict[str, torch.Tensor]
PARTS: TypeAdapter[Part] = TypeAdapter(Part)


def states(count: int, seed: int = 0) -> list[Tensors]:
    """The base and what every step makes of it: some entries change, some back again, one tensor never, one wholly."""
    generator = torch.Generator().manual_seed(seed)
    now = {
        "a": torch.randn(70, 33, generator=generator).bfloat16(),
        "b": torch.randn(129, generator=generator),
        "kept": torch.arange(5, dtype=torch.int64),
        "none": torch.zeros(0, 4, dtype=torch.float16),
        "whole": torch.randn(8, 8, generator=generator).half(),
    }
    found = [now]
    for step in range(count):
        new = {name: tensor.clone() for name, tensor in now.items()}
        at = torch.randperm(new["a"].numel(), generator=generator)[:40]
        new["a"].view(-1)[at] = (found[0]["a"] * (1 + step % 2)).view(-1)[at]
        new["b"][step::7] += 0.01
        new["whole"] = (new["whole"] + 0.5).half()
        if step == 0:
            new["b"][3], new["a"][0, 0] = -0.0, 0.0
        found.append(new)
        now = new
    return found


def same(a: Tensors, b: Tensors) -> bool:
    def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def call(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as leaving, redirect_stdout(out), redirect_stderr(err):
        main(list(words))
    return int(leaving.value.code or 0), out.getvalue(), err.getvalue()


def succeed(*words: object) -> dict[str, Any]:
    code, out, err = call(*map(str, words))
    assert code == 0, err
    return json.loads(out) if out.startswith("{") else {}


def refused(*words: object) -> str:
    code, _, err = call(*map(str, words))
    assert code in (1, 2), err
    assert "Traceback" not in err
    return str(err)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned-1…4, and their chain by `extract`, once over the base and once over the checkpoint before."""
    folder = tmp_path_factory.mktemp("made")
    for number, state in enumerate(states(4)):
        make_checkpoint(folder / ("base" if not number else f"tuned-{number}"), state)
    chain, more = folder / "chain", ("--workers", 1, "-q")
    succeed("extract", folder / "tuned-1", folder / "base", "--out", chain / NAMES[0], *more)
    for number in (2, 3, 4):
        base = folder / ("base" if number != 3 else "tuned-2")
        words = ("extract", folder / f"tuned-{number}", "--base", base, "--out", chain / NAMES[number - 1])
        succeed(*words, "--after", chain / NAMES[number - 2], *more)
    return folder


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made / "chain", tmp_path / "chain")
    return tmp_path / "chain"


def test_every_door_leads_to_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    base = load_tensors(made / "base")
    for number, name in enumerate(NAMES, 1):
        wanted = load_tensors(made / f"tuned-{number}")
        succeed("apply", f"chain/{name}", "--base", "base", "--out", tmp_path / name, "--workers", 1, "-q")
        assert same(load_tensors(tmp_path / name), wanted)
        state = {n: t.clone() for n, t in base.items()}
        addresses = {n: t.data_ptr() for n, t in state.items()}
        delta = dm.load_delta(made / "chain" / name)
        assert (delta.name, delta.after) == (name, None if number == 1 else NAMES[number - 2])
        assert delta.apply_(state) == number
        assert same(state, wanted)
        assert addresses == {n: t.data_ptr() for n, t in state.items()}  # in place
        assert dm.load_delta(made / "chain" / name).apply_(state) == 0  # twice is once
        before = made / (f"tuned-{number - 1}" if number > 1 else "base")
        flat = {n: t.clone().view(-1) for n, t in load_tensors(before).items()}
        for patch in dm.load_delta(made / "chain" / name, before):  # patches are over the version before
            flat[patch.name][slice(None) if patch.indices is None else patch.indices.long()] = patch.values
        assert same({n: t.view(wanted[n].shape) for n, t in flat.items()}, wanted)
    with pytest.raises(InputError, match="a: holds steps"):
        next(dm.load_delta("chain"))
    assert dm.load_delta("chain").apply_(base) == 4  # a chain's own folder is its newest version
    assert same(base, wanted)
    listed = succeed("list", "chain", "--json")
    assert [one["name"] for one in listed["versions"]] == NAMES
    assert [one["after"] for one in listed["versions"]] == [None, *NAMES[:-1]]
    checked = succeed("verify", "chain", "--base", "base", "--json")
    assert [one["state"] for one in checked["versions"]] == [one["state"] for one in listed["versions"]]
    code, out, _ = call("list", "chain")
    assert (code, len(out.splitlines())) == (0, 5)
    found = succeed("diff", "base+chain/000002", "tuned-2", "--json")
    assert (found["changed"], found["tensors"]) == (0, [])


def test_the_documented_reader_reads_a_chain(made: Path) -> None:
    page: dict[str, Any] = {}
    exec(documented("def positions"), page)

    def arrays(folder: Path) -> State:
        kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
        integers = {2: np.uint16, 4: np.uint32, 8: np.uint64}
        return {
            name: (kinds[t.dtype], tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().view(integers[t.itemsize]))
            for name, t in load_tensors(folder).items()
        }

    found = read_chain(made / "chain", arrays(made / "base"), page["positions"], page["load_file"])
    assert list(found) == NAMES
    for number, state in enumerate(found.values(), 1):
        wanted = arrays(made / f"tuned-{number}")
        assert state.keys() == wanted.keys()
        for name, (*kind, bits) in state.items():
            assert (kind, bits.tobytes()) == ([*wanted[name][:2]], wanted[name][2].tobytes())


def test_soups_are_made_straight_from_the_chain(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    tuned = [load_tensors(made / f"tuned-{number}") for number in (2, 3, 4)]
    recipes = {
        "plus": "models: [{model: base+chain/000002..000004}]",
        "over": "base_model: base\nmodels: [{model: chain/000002..000004, name: run}]",
        "each": "models: [{model: tuned-2}, {model: tuned-3}, {model: tuned-4}]",
    }
    results = {}
    for name, text in recipes.items():
        text = f"merge_method: linear\nparameters: {{weight: 1}}\n{text}\n"
        (made / f"{name}.yaml").write_text(text)
        succeed("run", f"{name}.yaml", "--out", tmp_path / name, "--workers", 2, "-q")
        results[name] = load_tensors(tmp_path / name)
    assert same(results["plus"], results["each"])
    assert same(results["over"], results["each"])
    exact = np.mean([t["whole"].double().numpy() for t in tuned], axis=0)
    assert np.abs(results["plus"]["whole"].double().numpy() - exact).max() <= 2**-10 * np.abs(exact).max()
    assert between(made / "chain" / "000002..000004") == NAMES[1:]
    for reference, said in {
        "base+chain/000004..000002": "does not come after",
        "base+chain/000002..000009": "has no version 000009",
        "chain/000009": "has no version 000009",
    }.items():
        (made / "bad.yaml").write_text(
            f"merge_method: linear\nparameters: {{weight: 1}}\nbase_model: base\nmodels: [{{model: {reference}}}]\n"
        )
        assert said in refused("check", "bad.yaml")


def other(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def swap(chain: Path) -> None:
    (chain / NAMES[1]).rename(chain / "x")
    (chain / NAMES[2]).rename(chain / NAMES[1])
    (chain / "x").rename(chain / NAMES[2])


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def replayed(chain: Path) -> None:
    shutil.copytree(chain / NAMES[1], chain / "000005")
    other(chain / "000005" / VERSION, lambda said: said.update(name="000005"))


def foreign(chain: Path) -> None:
    shutil.rmtree(chain / NAMES[2])
    for number, state in enumerate(states(3, seed=5)):
        make_checkpoint(chain.parent / f"other-{number}", state)
    o = chain.parent / "other"
    succeed("extract", f"{o}-1", f"{o}-0", "--out", chain / "o" / NAMES[0], "-q")
    for i in (1, 2):
        succeed(
            "extract",
            f"{o}-{i + 1}",
            f"{o}-{i}",
            "--out",
            chain / "o" / NAMES[i],
            "--after",
            chain / "o" / NAMES[i - 1],
            "-q",
        )
    shutil.move(chain / "o" / NAMES[2], chain / NAMES[2])
    shutil.rmtree(chain / "o")


def relinked(chain: Path) -> None:
    """A version that says that it comes after another than it was made from, consistently."""
    state = json.loads((chain / NAMES[2] / VERSION).read_text())["after"]["state"]
    first = line(chain / NAMES[0])[0].state
    assert state != first
    other(chain / NAMES[2] / VERSION, lambda said: said.update(after={"name": NAMES[0], "state": first}))
    shutil.rmtree(chain / NAMES[1])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a version is missing": (lambda c: shutil.rmtree(c / NAMES[1]), "has no version 000002"),
    "reordered": (swap, "is version 00000"),
    "replayed": (replayed, "ends"),
    "foreign": (foreign, "comes after"),
    "relinked": (relinked, "was made from other content"),
    "manifest corrupt": (lambda c: flip(c / NAMES[2] / "delta.json", 200), ""),
    "values corrupt": (lambda c: flip(c / NAMES[2] / "delta.safetensors", -3), ""),
    "truncated": (lambda c: (c / NAMES[2] / "delta.safetensors").write_bytes(b"12345678"), "bytes, not"),
    "no version.json": (lambda c: (c / NAMES[2] / VERSION).unlink(), "ends"),
    "version.json torn": (lambda c: (c / NAMES[2] / VERSION).write_text('{"format":'), "not valid JSON"),
    "another alphabet": (
        lambda c: other(c / NAMES[2] / VERSION, lambda said: said["after"].update(name="é")),
        "after.name: String should match",
    ),
    "later format": (lambda c: other(c / NAMES[2] / VERSION, lambda said: said.update(version=2)), "upgrade"),
    "other file of version.json": (
        lambda c: other(c / NAMES[2] / VERSION, lambda said: said["files"].pop("delta.safetensors")), "does not list"),
    "after itself": (
        lambda c: other(c / NAMES[1] / VERSION, lambda said: said["after"].update(name=NAMES[3])), "after itself"),
    "other state": (
        lambda c: other(c / NAMES[2] / VERSION, lambda said: said.update(state="0" * 32)), "another state"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_refused_before_the_first_write(made: Path, chain: Path, fault: str) -> None:
    spoil, said = BAD[fault]
    state = load_tensors(made / "base")
    before = {name: tensor.clone() for name, tensor in state.items()}
    spoil(chain)
    with pytest.raises(DeltamergeError) as refusal:
        dm.load_delta(chain).apply_(state)
    assert said in f"{refusal.value}\n{refusal.value.hint}"
    assert same(state, before)
    assert said in refused("verify", chain, "--base", made / "base", "--workers", 1).replace("\n", " ")
    target = chain.parent / "out"
    assert said in refused("apply", chain, "--base", made / "base", "--out", target, "--workers", 1)
    assert not target.exists()


def test_apply_in_memory_is_all_or_nothing(made: Path, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, wanted = load_tensors(made / "base"), load_tensors(made / "tuned-4")

    def copied() -> Tensors:
        return {name: tensor.clone() for name, tensor in base.items()}

    for change, said in {
        "a": (lambda s: s["a"].view(-1)[5:6].add_(1), "a is not the base's, nor any version's"),
        "cast": (lambda s: s.update(b=s["b"].double()), "b is F64 [129], the delta was made from F32 [129]"),
        "missing": (lambda s: s.pop("kept"), "kept is not there"),
    }.values():
        state = copied()
        change(state)
        before = {name: tensor.clone() for name, tensor in state.items()}
        with pytest.raises(InputError) as refusal:
            dm.load_delta(chain).apply_(state)
        assert said in str(refusal.value)
        assert same(state, before)
    for fails in range(3):  # a write that fails undoes those before it
        state, writes = copied(), list[Any]()

        def put(write: Any, real: Any = Write.put, at: int = fails, writes: Any = writes) -> None:
            writes.append(write)
            if len(writes) == at + 1:
                where = slice(0, 1) if write.where is None else write.where[:1]
                write.line.view(-1)[where] = 7
                raise RuntimeError("the device is gone")
            real(write)

        with monkeypatch.context() as patched:
            patched.setattr(Write, "put", put)
            with pytest.raises(RuntimeError, match="gone"):
                dm.load_delta(chain).apply_(state)
        assert len(writes) > fails
        assert same(state, base)
    strided = {n: t.clone().t().contiguous().t() if t.dim() == 2 else t.clone() for n, t in base.items()}
    strided["extra"] = torch.ones(2)
    dm.load_delta(chain / NAMES[1]).apply_(strided)
    assert dm.load_delta(chain).apply_(strided) == 2  # from the version where it is
    assert same({n: t for n, t in strided.items() if n != "extra"}, wanted)


def test_squash_keeps_the_states_and_refuses_old_names(
    made: Path, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    before = {version.name: version.state for version in line(chain / NAMES[3])}
    assert succeed("squash", chain, "--keep", 4, "--json")["into"] is None
    (chain / NAMES[0] / "mine.txt").write_text("mine")
    assert "holds files that no run wrote" in refused("squash", chain, "--keep", 1, "--base", made / "base")
    (chain / NAMES[0] / "mine.txt").unlink()
    assert "not the one this delta was made from" in refused("squash", chain, "--keep", 1, "--base", made / "tuned-4")
    assert folders.names(chain) == NAMES
    live = load_tensors(made / "tuned-1")
    done = succeed("squash", chain, "--keep", 1, "--base", made / "base", "--workers", 1, "--json")
    assert (done["into"], done["folded"]) == (NAMES[2], NAMES[:2])
    assert folders.names(chain) == NAMES[2:]
    assert {version.name: version.state for version in line(chain / NAMES[3])} == {n: before[n] for n in NAMES[2:]}
    assert not [path for path in chain.iterdir() if path.name.startswith(".") and path.is_dir()]
    for number in (3, 4):
        state = load_tensors(made / "base")
        dm.load_delta(chain / NAMES[number - 1]).apply_(state)
        assert same(state, load_tensors(made / f"tuned-{number}"))
    said = refused("apply", chain / NAMES[0], "--base", made / "base", "--out", chain.parent / "out")
    assert "version 000001 was folded into 000003 by squash" in said
    with pytest.raises(InputError, match="version 000001, which squash has folded into 000003"):
        dm.load_delta(chain).apply_(live)
    succeed("verify", chain, "--base", made / "base")
    succeed("squash", chain, "--keep", 0, "--base", made / "base")
    assert folders.names(chain) == NAMES[3:]
    assert [one.name for one in line(chain / NAMES[3])[0].note.folded] == NAMES[:3]  # type: ignore[union-attr]
    names = [one.name for one in dm.follow(chain, after=NAMES[1], timeout=0)]
    assert names == NAMES[3:]


def test_extract_refuses_what_would_not_be_a_chain(made: Path, chain: Path) -> None:
    more = ("--out", chain / "000005", "--after", chain / NAMES[3], "-q", "--workers", 1)
    grown = load_tensors(made / "tuned-4") | {"new": torch.ones(2)}
    make_checkpoint(chain.parent / "grown", grown)
    for words, said in {
        (made / "tuned-2", made / "tuned-3", *more): "is neither the result of 000004 nor the base of its chain",
        (chain.parent / "grown", made / "base", *more): "adds new",
        (
            made / "tuned-2",
            made / "base",
            "--out",
            chain / "000005",
            "--after",
            chain / NAMES[1],
        ): "comes after 000002 already",
        (made / "tuned-2", made / "base", "--out", made / "000005", "--after", chain / NAMES[1]): "is no name in",
        (made / "tuned-2", made / "base", "--out", chain): "is a chain",
        (
            made / "tuned-2",
            made / "base",
            "--out",
            chain / "000005",
            "--after",
            made / "tuned-1",
        ): "is no version of a chain",
        (made / "tuned-2", made / "base", *more, "--lora", "4"): "takes no --lora",
    }.items():
        assert said in refused("extract", *words)
        assert folders.names(chain) == NAMES
    succeed("extract", made / "tuned-1", made / "base", *more)  # back again
    state = load_tensors(made / "base")
    assert dm.load_delta(chain).apply_(state) == 5
    assert same(state, load_tensors(made / "tuned-1"))


def test_tensors_are_views_of_what_is_stored(made: Path) -> None:
    """Opened twice, they are the same; they count the bytes of the base and of every version that changes them."""
    reference = f"{made}/base+{made}/chain/{NAMES[3]}"
    first, again, before = (
        Models().open(one, made, weights=True).tensors for one in (reference, reference, reference[:-1] + "3")
    )
    assert all(first[name].tensor is again[name].tensor for name in first)
    view = first["a"].tensor
    assert view.inputs[0] is before["a"].tensor
    assert first["kept"].kind == "stored"
    leaves = list(view.leaves())
    assert {leaf.path for leaf in leaves} == {
        made / "base" / "model.safetensors",
        *(made / "chain" / name / "delta.safetensors" for name in NAMES),
    }
    assert view.read_nbytes == sum(leaf.nbytes for leaf in leaves)


FEW = ("--ratio", 4), ("--density", 0.3, "--values", "int8"), ()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned-1…3, and a chain whose first versions add parts, then codes; the last one is exact."""
    folder, generator = tmp_path_factory.mktemp("few"), torch.Generator().manual_seed(5)
    state = {"a": torch.randn(96, 40, generator=generator).bfloat16(), "b": torch.randn(60, 64, generator=generator)}
    make_checkpoint(folder / "base", state)
    for number, how in enumerate(FEW, 1):
        state = {name: (t + torch.randn(t.shape, generator=generator) / 16).to(t.dtype) for name, t in state.items()}
        make_checkpoint(folder / f"tuned-{number}", state)
        after = ("--after", folder / "chain" / NAMES[number - 2]) if number > 1 else ()
        words = ("--base", folder / "base", "--out", folder / "chain" / NAMES[number - 1], "--workers", 1, "-q")
        succeed("extract", folder / f"tuned-{number}", *words, *after, *how)
    return folder


def by_the_documented_reader(chain: Path, base: Tensors) -> list[Tensors]:
    """Return each version: float32(base) + value, rounded as the record says; sums of parts in float64."""
    reader: dict[str, Any] = {}
    for word in ("def positions", "def sum_of_parts", "def rounded_by_chance"):
        exec(documented(word), reader)
    now, found = base, list[Tensors]()
    for name in NAMES[: len(FEW)]:
        arrays = reader["load_file"](chain / name / "delta.safetensors")
        said = json.loads((chain / name / "delta.json").read_text())
        records = said.get("tensors") or json.loads(bz2.decompress(arrays["tensors"].tobytes()))
        at, made = 0, dict(now)
        for tensor, record in records.items():
            if not record["count"] or "values" not in record:
                continue
            flat, (m, n) = now[tensor].float().flatten().numpy().copy(), now[tensor].shape
            if record["values"] == "parts":
                parts = [PARTS.validate_python(part) for part in record["parts"]]
                size = sum(part.nbytes(m, n) for part in parts)
                flat += reader["sum_of_parts"](record, arrays["parts"][at : at + size]).reshape(-1)
                at += size
            else:
                where = reader["positions"](record, tensor, arrays)
                flat[where] += reader["added"](record, tensor, arrays, where)
            if "rounding" in record:
                bits = reader["rounded_by_chance"](flat, record["dtype"])
                flat = (bits.astype(np.uint32) << 16).view(np.float32)
            made[tensor] = torch.from_numpy(flat).reshape(m, n).to(now[tensor].dtype)
        found.append(made)
        now = made
    return found


def test_versions_that_add_values(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that adds is over what the one before makes, rounded once to the dtype; the next begins from that."""
    monkeypatch.chdir(few)
    base = load_tensors(few / "base")
    kinds = [json.loads((few / "chain" / name / "delta.json").read_text()) for name in NAMES[: len(FEW)]]
    assert [(kind["version"], kind["semantics"]) for kind in kinds] == [(5, "add"), (1, "add"), (2, "replace")]
    wanted = [*by_the_documented_reader(few / "chain", base)[:2], load_tensors(few / "tuned-3")]
    assert not any(same(one, load_tensors(few / f"tuned-{i}")) for i, one in enumerate(wanted[:2], 1))
    switch, served = dm.Switch(live := {n: t.clone() for n, t in base.items()}), ServedModel(few / "base")
    before = base
    for name, state in zip(NAMES, wanted, strict=False):
        succeed("apply", f"chain/{name}", "--base", "base", "--out", tmp_path / name, "--workers", 1, "-q")
        assert same(load_tensors(tmp_path / name), state)
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {few}/base+{few}/chain/{name}}}]\n")
        succeed("run", recipe, "--out", tmp_path / f"read-{name}", "--workers", 1, "-q")
        assert same(load_tensors(tmp_path / f"read-{name}"), state)
        patched = {n: t.clone() for n, t in before.items()}
        for patch in dm.load_delta(f"chain/{name}", before):
            where = slice(None) if patch.indices is None else patch.indices.long()
            patched[patch.name].view(-1)[where] = patch.values
        assert same(patched, state)
        applied = {n: t.clone() for n, t in before.items()}
        assert dm.load_delta(f"chain/{name}").apply_(applied) == 1
        assert same(applied, state)
        switch.to(f"chain/{name}")
        assert same(live, state)
        assert same(dict(served.weights(served.changes(f"chain/{name}"), base)), state)
        before = {n: t.clone() for n, t in state.items()}
    switch.to(None)
    assert same(live, base)
    assert dm.load_delta("chain/000001").apply_(before, base="base") == -2
    assert same(before, wanted[0])
    succeed("verify", "chain", "--base", "base")
    shutil.copytree("chain", tmp_path / "chain")
    succeed("squash", tmp_path / "chain", "--keep", 1, "--base", "base", "-q")
    for name in NAMES[1:3]:
        succeed("apply", tmp_path / "chain" / name, "--base", "base", "--out", tmp_path / name, "--force", "-q")
        assert same(load_tensors(tmp_path / name), wanted[int(name) - 1])
    with pytest.raises(InputError, match="values to add to the base's, which cannot be told without them"):
        next(dm.load_delta("chain/000002"))
    other = {name: tensor + 1 for name, tensor in wanted[0].items()}
    with pytest.raises(InputError, match="the base's tensor is not the one this delta was made from"):
        next(dm.load_delta("chain/000002", other))


def test_a_plain_delta_is_named_over_its_base(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    succeed("extract", "tuned-4", "base", "--values", "float32", "--density", 0.5, "--out", tmp_path / "delta+1", "-q")
    (made / "one.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: base+{tmp_path}/delta+1, parameters: {{weight: 1}}}}]\n"
    )
    succeed("run", "one.yaml", "--out", tmp_path / "one", "-q")
    succeed("apply", tmp_path / "delta+1", "--base", "base", "--out", tmp_path / "two", "-q")
    assert same(load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two"))
    (made / "one.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: tuned-1+{tmp_path}/delta+1, parameters: {{weight: 1}}}}]\n"
    )
    assert "not the one this delta was made from" in refused("run", "one.yaml", "--out", tmp_path / "three", "-q")


def test_follow_yields_versions_as_they_come(made: Path, tmp_path: Path) -> None:
    chain, marker = tmp_path / "chain", tmp_path / "at"
    assert list(dm.follow(chain, timeout=0)) == []
    chain.mkdir()
    followed = dm.follow(chain, poll=0.001, timeout=0, marker=marker)
    state, came = load_tensors(made / "base"), []

    def publish(name: str) -> None:
        shutil.copytree(made / "chain" / name, chain / f".{name}.0123456789abcdef.adding")
        (chain / f".{name}.0123456789abcdef.adding").rename(chain / name)

    publish(NAMES[0])
    publish(NAMES[1])
    for delta in followed:
        came.append(delta.name)
        assert delta.apply_(state) == 1
        if len(came) == 2:
            publish(NAMES[2])
    assert came == NAMES[:3]
    assert same(state, load_tensors(made / "tuned-3"))
    assert marker.read_text() == "000003\n"
    publish(NAMES[3])
    assert [one.name for one in dm.follow(chain, timeout=0, marker=marker)] == NAMES[3:]
    assert [one.name for one in dm.follow(chain, timeout=0, latest=True)] == NAMES[3:]
    assert [one.name for one in dm.follow(chain, timeout=0, after=NAMES[2])] == NAMES[3:]
    with pytest.raises(InputError, match="has no version 000009"):
        next(dm.follow(chain, after="000009", timeout=0))
    shutil.copytree(chain / NAMES[3], chain / "000005")
    other(chain / "000005" / VERSION, lambda said: said.update(name="000005"))
    with pytest.raises(InputError, match=r"000004.*000005.* all come after 000003"):
        list(dm.follow(chain, timeout=0))


@pytest.mark.parametrize("what", ["bytes", "utf-16", "a folder"])
def test_a_marker_that_is_no_text_is_one_line(tmp_path: Path, what: str):
    marker = tmp_path / "at"
    if what == "a folder":
        marker.mkdir()
    else:
        marker.write_bytes(b"\xff\x00\x9d" if what == "bytes" else "000001\n".encode("utf-16"))
    with pytest.raises(InputError, match="so it names no version") as caught:
        next(dm.follow(tmp_path / "chain", timeout=0, marker=marker))
    assert str(caught.value).startswith(f"{marker}: ")
    assert str(caught.value).isprintable()
    assert "remove it" in (caught.value.hint or "")


def test_a_chains_base_may_name_its_tensors_otherwise(tmp_path: Path):
    base, first = tiny_bert_pair(tmp_path)
    later = {name: tensor * 1.5 for name, tensor in load_tensors(first).items()}
    make_checkpoint(tmp_path / "later", later, config=json.loads((first / "config.json").read_text()))
    chain = tmp_path / "chain"
    succeed("extract", first, "--base", base, "--out", chain / NAMES[0], "-q")
    succeed("extract", tmp_path / "later", "--base", base, "--out", chain / NAMES[1], "--after", chain / NAMES[0], "-q")
    succeed("apply", chain, "--base", base, "--out", tmp_path / "made", "-q")
    assert same(load_tensors(tmp_path / "made"), later)
