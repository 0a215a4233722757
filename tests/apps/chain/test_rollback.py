"""From any version of a chain to any other: exact, all or nothing, and where a pin says."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from test_chain import NAMES, Tensors, call, refused, same, states, succeed

import deltamerge as dm
from deltamerge.apps.chain.live import Write
from deltamerge.errors import InputError
from deltamerge.models.chain.folder import read_note


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollback")
    found = states(4)
    make_checkpoint(folder / "base", found[0])
    with dm.DeltaWriter(folder / "chain", base=folder / "base") as writer:
        for state in found[1:]:
            writer.write(state)
    return folder


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "chain", tmp_path / "chain")
    return tmp_path / "chain"


def copied(state: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_any_version_becomes_any_other(made: Path) -> None:
    wanted = states(4)
    for start, end in itertools.product(range(5), range(1, 5)):
        state = copied(wanted[start])
        addresses = [tensor.data_ptr() for tensor in state.values()]
        assert dm.load_delta(made / "chain" / NAMES[end - 1]).apply_(state) == end - start
        assert same(state, wanted[end])
        assert addresses == [tensor.data_ptr() for tensor in state.values()]


def test_what_is_no_version_needs_the_base_by_name(made: Path) -> None:
    wanted, delta = states(4), dm.load_delta(made / "chain" / NAMES[1])
    torn = copied(wanted[3]) | {"b": wanted[4]["b"].clone()}  # of two versions
    before = copied(torn)
    with pytest.raises(InputError, match="is not the base's, nor any version's"):
        delta.apply_(torn)
    assert same(torn, before)
    assert delta.apply_(torn, base=made / "base") == 2
    assert same(torn, wanted[2])
    for wrong in ({"a": torn["a"].float()}, {"kept": torn["kept"][:2]}):
        state = copied(wanted[3]) | wrong
        with pytest.raises(InputError, match="the delta was made from"):
            delta.apply_(state, base=made / "base")
        assert same(state, copied(wanted[3]) | wrong)


def test_going_back_is_all_or_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, delta = states(4), dm.load_delta(made / "chain" / NAMES[0])
    state = copied(wanted[4])
    make_checkpoint(tmp_path / "other", {**wanted[0], "b": wanted[0]["b"] + 1})
    with pytest.raises(InputError, match="the base's tensor is not the one"):
        delta.apply_(state, base=tmp_path / "other")
    assert same(state, wanted[4])
    real, count = Write.put, [0]

    def put(write: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        real(write)

    with monkeypatch.context() as patched:
        patched.setattr(Write, "put", put)
        with pytest.raises(KeyboardInterrupt):
            delta.apply_(state)
    assert count[0] == 4  # two are undone
    assert same(state, wanted[4])


def test_servers_go_to_the_pinned_version(chain: Path, made: Path, tmp_path: Path) -> None:
    wanted, marker = states(4), tmp_path / "at"
    state, switched = copied(wanted[0]), copied(wanted[0])
    switch, came = dm.Switch(switched), list[str]()
    followed = dm.follow(chain, latest=True, poll=0.001, timeout=0.02, marker=marker)
    orders = [(NAMES[1], False), (NAMES[2], False), (NAMES[0], False), (None, True)]
    for version in followed:
        came.append(version.name)
        version.apply_(state)
        switch.to(chain)
        number = NAMES.index(version.name) + 1
        assert same(state, wanted[number])
        assert same(switched, wanted[number])
        if orders:
            name, release = orders.pop(0)
            succeed("pin", chain if release else chain / str(name), *(["--release"] if release else []), "-q")
    assert came == [NAMES[3], NAMES[1], NAMES[2], NAMES[0], NAMES[3]]
    assert marker.read_text() == f"{NAMES[3]}\n"


@pytest.mark.parametrize("pinned", [True, False])
def test_a_server_that_died_on_its_way_goes_on(chain: Path, tmp_path: Path, pinned: bool) -> None:
    """It had got from the second version to the fourth, or not, when it died."""
    wanted, marker = states(4), tmp_path / "at"
    for held in (2, 4):
        marker.write_text(f"{NAMES[1]}\n")
        succeed("pin", chain / NAMES[3], "-q")
        next(dm.follow(chain, timeout=0, marker=marker))
        assert marker.read_text() == f"{NAMES[1]} {NAMES[3]}\n"
        succeed(*(["pin", chain / NAMES[1]] if pinned else ["pin", chain, "--release"]), "-q")
        state = copied(wanted[held])
        for version in dm.follow(chain, timeout=0, marker=marker):
            version.apply_(state)
        assert same(state, wanted[2 if pinned else 4])
        assert marker.read_text() == f"{NAMES[1 if pinned else 3]}\n"


@pytest.mark.parametrize("held", [2, 4])
def test_a_server_that_died_on_its_way_back_comes_up_again(chain: Path, tmp_path: Path, held: int) -> None:
    wanted, marker = states(4), tmp_path / "at"
    marker.write_text(f"{NAMES[3]} {NAMES[1]}\n")  # from the newest to the second; the pin was released since
    state = copied(wanted[held])
    for version in dm.follow(chain, timeout=0, marker=marker):
        version.apply_(state)
    assert same(state, wanted[4])


def test_a_state_ahead_of_its_marker_goes_back(chain: Path, tmp_path: Path) -> None:
    wanted, marker = states(4), tmp_path / "at"
    marker.write_text(f"{NAMES[1]}\n")  # the process died when it had the third, and had not said so
    succeed("pin", chain / NAMES[1], "-q")
    state = copied(wanted[3])
    for version in dm.follow(chain, timeout=0, marker=marker):
        version.apply_(state)
    assert same(state, wanted[2])


def test_a_pinned_version_stays(chain: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert succeed("list", chain, "--json")["pinned"] is None
    succeed("pin", chain / NAMES[1], "-q")
    assert succeed("list", chain, "--json")["pinned"] == NAMES[1]
    assert [line.endswith("  pinned") for line in call("list", str(chain))[1].splitlines()[1:]] == [
        False, True, False, False
    ]  # fmt: skip
    assert "is pinned" in refused("squash", chain, "--keep", 1)
    succeed("squash", chain, "--keep", 2, "-q")  # it is what the others are folded into
    assert dm.load_delta(chain).name == NAMES[1]
    succeed("pin", chain / NAMES[3], "-q")
    assert "is pinned" in refused("remove", chain / NAMES[3])
    with dm.DeltaWriter(chain, base=made / "base") as writer:  # which holds the chain
        succeed("pin", chain / NAMES[2], "-q")
        writer.write(states(4)[2]).result()
    assert dm.load_delta(chain).name == NAMES[2]
    assert (note := read_note(chain / "000005")) is not None
    assert note.after is not None
    assert note.after.name == NAMES[3]
    assert "is no version of a chain" in refused("pin", made / "base")
    assert "is no chain" in refused("pin", made / "base", "--release")
    (chain / "pinned").write_text("../x\n")
    assert "names no version" in refused("list", chain)
    succeed("pin", chain, "--release", "-q")
    assert dm.load_delta(chain).name == "000005"


def test_a_folded_state_needs_the_base_by_name(chain: Path, made: Path) -> None:
    wanted, state = states(4), copied(states(4)[1])
    succeed("squash", chain, "--keep", 2, "--base", made / "base", "-q")
    with pytest.raises(InputError, match="which squash has folded into 000002"):
        dm.load_delta(chain).apply_(state)
    assert torch.equal(state["b"], wanted[1]["b"])
    assert dm.load_delta(chain).apply_(state, base=made / "base") == 3
    assert same(state, wanted[4])
