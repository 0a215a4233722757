"""What a stranger's recipe may cost `check` and `plan`: memory, time of the processor, and what is printed."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama
from running import make_plan

from deltamerge.calibrate.rows import files as rows
from deltamerge.errors import InputError, UsageError
from deltamerge.plan import memory
from deltamerge.run import options
from deltamerge.tensors import patterns

BASED = "base_model: ./base\nmerge_method: ties\nparameters: {density: 0.5, weight: 1}\n"
ONE = BASED + "models: [{model: ./a}]\n"
STACK = "base_model: ./base\nmerge_method: passthrough\n"
PRUNED = "base_model: ./base\nmodels: [{model: ./a}]\nprune: {method: dare, density: 0.5, %s}\n"
CALIBRATED = PRUNED % "q: output_change" + "calibration: {length: 8, data: %s}\n"
SLOW = ", ".join(f"'({'.|' * n}.)*[A-Z]{{{m}}}$'" for n in range(1, 9) for m in range(1, 50))


def many(count: int, text: str) -> str:
    return "".join(text.replace("#", str(i)) for i in range(count))


# what is refused, with a part of what is said of it
REFUSED = {
    "layers": (STACK + "slices: [{sources: [{model: ./a, layer_range: [0, 1000000000]}]}]\n", "layers"),
    "slices": (STACK + "slices:\n" + many(5000, "- {sources: [{model: ./a, layer_range: [0, 2]}]}\n"), "models"),
    "their sum": (STACK + "slices:\n" + many(900, "- {sources: [{model: ./a, layer_range: [0, 9999]}]}\n"), "layers"),
    "models": (BASED + "models:\n" + many(14000, "- {model: ./a, name: n#}\n"), "models"),
    "modules": (BASED + "modules:\n" + many(12000, "  m#: {models: [{model: ./a}]}\n"), "models"),
    "documents": ("---\n".join(f"name: d{i}\n" + BASED + "models:\n" + many(40, "- {model: ./a, name: n#}\n")
                               for i in range(60)), "models"),
    "patterns": (PRUNED % f"exclude: [{SLOW}]", "to search"),
    "a long pattern": (PRUNED % f"exclude: ['{'(a|b)*' * 9000}']", "more than 1000 characters"),
    "classes": (PRUNED % f"exclude: ['{'(?i)' + '[^a]' * 100_000}']", "more than 1000 characters"),
    "tags": (many(40_000, "k#: !x 1\n"), "the tag !x is not allowed"),
    "a long tag": ("a: !" + "x" * 900_000 + " 1\n", "is not allowed"),
    "unknown keys": (many(30_000, "k#: 1\n"), "unknown key"),
    "long keys": (many(100, "? k#" + "x" * 9000 + "\n: 1\n"), "unknown key"),
    "the same key": ("a: 1\n" * 20_000, "duplicate key"),
    "wrong types": (BASED + "models:\n" + many(12_000, "- {model: 1, name: 2, parameters: 3}\n"), "must be text"),
    "a long name": (BASED + f"models: [{{model: {'x' * 900_000}}}]\n", "longer than"),
    "laughs": ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
                                                     for a, b in zip("abcdefg", "bcdefgh", strict=True)), "aliases"),
    "itself": ("a: &a [*a]\n", "nested"),
    "deep": ("a: " + "[" * 100_000, "nest"),
    "infinite": (ONE.replace("0.5", "1e400"), "finite"),
    "digits": (ONE.replace("0.5", "9" * 5000), "number"),
    "a gradient": (ONE.replace("0.5", "[" + "0.5," * 90_000 + "]"), "more than 1000 items"),
    "filters": (ONE.replace("0.5", "[" + many(20_000, "{filter: x#, value: 1},") + "]"), "more than 1000 items"),
    "a seed": (ONE + f"seed: 1{'0' * 100}\n", "integer"),
    "seeds": (CALIBRATED % "c.txt, seeds: 100000000000", "must be at most 64"),
    "rows": (CALIBRATED % "c.txt, sequences: 100000000000", "must be at most 100,000"),
    "many documents": ("---\na: 1\n" * 100_000, "more than 64 documents"),
    "the disk": (CALIBRATED % "/", "holds"),
    "processes": (CALIBRATED % "/proc", "calibration data"),
}  # fmt: skip
# what may be made, and is planned
PLANNED = {
    "a merge key": "a: &a {" + many(20_000, "k#: 1,") + "}\n" + "e: &e {q: 1}\nx: {<<: [*a," + "*e," * 15_000 + "]}\n",
    "models": BASED + "models:\n" + many(1000, "- {model: ./a, name: n#}\n"),
    "shards": ONE + "output: {shard_size: 1B}\n",
    "a huge shard": ONE + "output: {shard_size: 999999999999999TiB}\n",
    "large numbers": CALIBRATED % "c.txt, sequences: 100000, seeds: 64",
    "columns": PRUNED % ("protect: {columns: {'.': [" + "9223372036854775806," * 40_000 + "]}}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded")
    base = tiny_llama(folder / "base", seed=0)
    tiny_llama(folder / "a", seed=1, base=base)
    (folder / "c.txt").write_text("a b c\n" * 100)
    return folder


# One process for a table of recipes: each has a share of the processor's time, after which the system ends it.
SCRIPT = """
import resource, sys
from pathlib import Path
from deltamerge.cli import main
from deltamerge.tensors import patterns
patterns.SECONDS = 0.2
for name in sys.stdin.read().split("\\n"):
    for command in sys.argv[1:]:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 30, -1))
        print(f"\\n=== {command} {name}", flush=True)
        try:
            main([command, name])
        except SystemExit as leaving:
            print(f"\\n=== exit {leaving.code}", flush=True)
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss has the parent's too
print(f"\\n=== peak {int(high.split()[1]) >> 10}", flush=True)
"""
MEGABYTES = 700
PRINTED = 64_000


def outcomes(folder: Path, table: dict[str, str], command: str) -> dict[tuple[str, str], tuple[int, str]]:
    """Exit code and output of the command for each text; fails where one took more than its share."""
    for number, text in enumerate(table.values()):
        (folder / f"r{number}.yaml").write_text(text)
    names = "\n".join(f"r{number}.yaml" for number in range(len(table)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command], input=names, stdout=-1, stderr=-2, text=True, cwd=folder, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )  # fmt: skip
    *parts, peak = done.stdout.split("\n=== ")
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:])
    assert int(peak.removeprefix("peak ")) < MEGABYTES
    found = {}
    for said, code in zip(parts[1::2], parts[2::2], strict=True):
        (command, name), text = said.partition("\n")[0].split(), said.partition("\n")[2]
        found[command, list(table)[int(name[1:-5])]] = int(code.removeprefix("exit ")), text
    return found


COMMANDS = pytest.mark.parametrize("command", ["plan", pytest.param("check", marks=pytest.mark.slow)])


@COMMANDS
def test_what_is_too_large_is_refused_in_few_words(folder: Path, command: str) -> None:
    table = {case: text for case, (text, _) in REFUSED.items()}
    found = outcomes(folder, table, command)
    assert len(found) == len(table)
    for (command, case), (code, said) in found.items():
        assert code == 1, (command, case, said[:500])
        assert REFUSED[case][1] in said, (command, case, said[:500])
        assert len(said) < PRINTED, (command, case, len(said))
        assert max(map(len, said.splitlines())) < 1500, (command, case)


@pytest.mark.slow
@COMMANDS
def test_what_is_large_is_planned_or_refused(folder: Path, command: str) -> None:
    for (_, case), (code, said) in outcomes(folder, PLANNED, command).items():
        assert code in (0, 1), (command, case, said[:500])
        assert len(said) < PRINTED, (command, case, len(said))


def test_all_patterns_of_a_recipe_share_their_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, name = "(.|.|.|.|.)*[A-Z]$", "model.layers.0.mlp.weight"
    patterns.start_anew()
    said = []
    with monkeypatch.context() as little:
        little.setattr(patterns, "SECONDS", 0.02)
        little.setattr(patterns, "SECONDS_IN_ALL", 0.05)
        for _ in range(6):
            with pytest.raises(InputError) as caught:
                patterns.finds(slow, name)
            said.append(str(caught.value))
    assert "takes more than 0.02 s to search" in said[0]
    assert "the patterns before it take more than 0.05 s to search all names" in said[-1]
    patterns.start_anew()
    assert patterns.finds("mlp", name)
    # all is spent, however fast this machine is; another recipe is not charged for that
    monkeypatch.setattr(patterns._spent, "seconds", patterns.SECONDS_IN_ALL)
    with pytest.raises(InputError, match="the patterns before it take more than 10 s"):
        patterns.finds("mlp", name)
    (folder / "again.yaml").write_text(PRUNED % "exclude: [mlp]")
    assert make_plan(folder / "again.yaml").outputs


def test_the_sources_of_all_tensors_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "r.yaml").write_text(STACK + "slices:\n" + "- {sources: [{model: ./a, layer_range: [0, 2]}]}\n" * 5)
    assert len(make_plan(folder / "r.yaml").outputs) > 60
    monkeypatch.setattr(memory, "SOURCES", 60)
    with pytest.raises(InputError, match="more than 60"):
        make_plan(folder / "r.yaml")


def test_a_folder_of_pictures_is_listed_up_to_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ENTRIES", 20)
    (tmp_path / "p" / "x").mkdir(parents=True)
    for number in range(19):
        (tmp_path / "p" / "x" / f"{number}.png").touch()
    (tmp_path / "p" / "round").symlink_to(".")
    with pytest.raises(InputError, match="more than 20 files"):
        rows.read("p", folder=tmp_path)
    (tmp_path / "p" / "x" / "0.png").unlink()
    assert len(rows.read("p", folder=tmp_path)) == 18


def test_workers_are_counted_before_there_are_any(folder: Path) -> None:
    (folder / "w.yaml").write_text(ONE)
    with pytest.raises(UsageError, match="1000000 workers"):
        make_plan(folder / "w.yaml", workers=1_000_000)
    assert make_plan(folder / "w.yaml", workers=options.MOST_WORKERS).outputs
