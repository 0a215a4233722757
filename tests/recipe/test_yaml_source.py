"""YAML to values with positions: what is read, what is refused and where."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deltamerge.errors import Problem, RecipeError
from deltamerge.recipe import yaml_source


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        yaml_source.loads(text, "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("Off", "Off"), ("y", "y"),
        ("true", True), ("False", False), ("TRUE", True),
        ("null", None), ("~", None), ("", None), ("'null'", "null"),
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2.5e+3", -2500.0), ("1e999", math.inf),
        ("0", 0), ("-7", -7), ("+3", 3), ("'3'", "3"), ("!!str 3", "3"), ("!!int 3", 3),
        ("010", "010"), ("0o17", "0o17"), ("0x1F", "0x1F"), ("1_000", "1_000"), ("0b1", "0b1"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        (".nan", ".nan"), ("-.inf", "-.inf"), ("=", "="), ("9" * 30, "9" * 30), ("1e", "1e"), ("7B", "7B"),
        ("[1, a]", [1, "a"]), ("{no: off, null: 1, 3: x}", {"no": "off", "null": 1, "3": "x"}),
        ("\n  - &a {x: 1}\n  - *a", [{"x": 1}, {"x": 1}]),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)  # fmt: skip
def test_values_are_yaml_1_2(text: str, value: object) -> None:
    read = yaml_source.loads(f"key: {text}", "r.yaml").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_merge_keys_are_expanded_own_keys_first() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {x: 3, z: 4}\nc:\n  <<: [*a, *b]\n  y: 5\nd: {<<: *a}\n"
    data = yaml_source.loads(text, "r.yaml").data
    assert data["c"] == {"x": 1, "y": 5, "z": 4}
    assert data["d"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1:1: empty\nhint: a recipe is a mapping: base_model: …, models: …"),
        ("# only a comment\n", "r.yaml:1:1: empty"),
        ("- a\n- b", "r.yaml:1:1: must be a mapping of keys to values"),
        ("null", "r.yaml:1:1: must be a mapping"),
        ("a: 1\nb: 2\na: 3", "r.yaml:3:1: a: duplicate key, first given on line 1\nhint: remove one of the two"),
        ("m:\n  - {x: 1, x: 2}", "r.yaml:2:12: m[0].x: duplicate key, first given on line 2"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1: a second document"),
        ("a: !!python/object/apply:os.system [ls]", "r.yaml:1:4: a: the tag !!python/object/apply:os.system is not"),
        ("a: !env HOME", "r.yaml:1:4: a: the tag !env is not allowed"),
        ("a: !!binary aGk=", "r.yaml:1:4: a: the tag !!binary is not allowed"),
        ("a: !!int x", "r.yaml:1:4: a: not !!int: 'x'"),
        ("!foo a: 1", "r.yaml:1:1: a key must be plain text"),
        ("? [1, 2]\n: 3", "r.yaml:1:3: a key must be plain text"),
        ("a: {<<: 3}", "r.yaml:1:9: a: << takes a mapping"),
        ("a: *b", "r.yaml:1:4: not YAML: found undefined alias"),
        ("a:\n\tb: 1", "r.yaml:2:1: not YAML: found character that cannot start any token\nhint: indent with spaces"),
        ("a: b: c", "hint: quote a value that contains"),
        ("a: @x", "hint: quote a value that starts with this character"),
        ("a: [1", "not YAML"),
        ("a: 'x", "not YAML"),
        ("a: \x00", "r.yaml:1:4: control character U+0000"),
        ("a: 1\nb: \ud800", "r.yaml:2:4: control character U+D800"),
        ("a: " + "[" * 200, "r.yaml:1:67: nested more than 64 deep\nhint: a recipe is nearly flat"),
        ("a: " + "[" * 100_000, "nest"),
        ("- " * 100_000 + "a", "nest"),
        ("a: &a [*a, *a]", "r.yaml:1:4: nested more than 64 deep\nhint: does an alias contain itself?"),
        ("&a {<<: *a}", "nested more than 64 deep"),
        ("a: " + "x" * 2**20, "r.yaml:1:1: larger than 1 MiB"),
    ],
)
def test_refused(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize("link", ["[{0}]", "{{{1}}}", "{{<<: [{0}]}}"])
def test_alias_bombs_are_refused(link: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 20):
        names = [f"*a{i - 1}"] * 10
        keyed = ", ".join(f"k{j}: {name}" for j, name in enumerate(names))
        lines.append(f"a{i}: &a{i} {link.format(', '.join(names), keyed)}")
    assert "more than 100000 values once aliases are expanded" in refused("\n".join(lines))


def test_every_duplicate_is_reported_once() -> None:
    assert refused("a: 1\na: 2\nb: {c: 1, c: 2}").count("duplicate") == 2


TEXT = """\
base_model: x
models:
  - model: a
    prune: {density: 0.5, q: [1, 2]}
"""


@pytest.mark.parametrize(
    ("loc", "value", "key"),
    [
        (("base_model",), (1, 13), (1, 1)),
        (("models",), (3, 3), (2, 1)),
        (("models", 0), (3, 5), (3, 5)),
        (("models", 0, "prune"), (4, 12), (4, 5)),
        (("models", 0, "prune", "q"), (4, 30), (4, 27)),
        (("models", 0, "prune", "q", 1), (4, 34), (4, 34)),
        (("models", 0, "prune", "missing"), (4, 12), (4, 12)),
        (("models", 0, "x", "y", 3), (3, 5), (3, 5)),
        (("models", 7), (3, 3), (3, 3)),
        ((), (1, 1), (1, 1)),
    ],
)
def test_positions(loc: yaml_source.Loc, value: tuple[int, int], key: tuple[int, int]) -> None:
    read = yaml_source.loads(TEXT, "r.yaml")
    assert read.locate(loc) == value
    assert read.locate(loc, key=True) == key


def test_problem_has_place_and_position() -> None:
    problem = yaml_source.loads(TEXT, "r.yaml").problem(("models", 0, "prune", "q", 1), "is odd", "even it")
    assert problem.render("r.yaml") == "r.yaml:4:34: models[0].prune.q[1]: is odd\nhint: even it"


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffa: naïve\r\nb: 2\r\n".encode())
    read = yaml_source.load(path)
    assert read.data == {"a": "naïve", "b": 2}
    assert read.path == str(path)
    for raw, message in [
        (b"a: 1\nb: \xff\xfe", "r.yaml:2:4: not UTF-8: byte 0xff\nhint: save the file as UTF-8"),
        (b"a" * (2**20 + 1), "r.yaml:1:1: larger than 1 MiB"),
        (b"", "r.yaml:1:1: empty"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(RecipeError) as caught:
            yaml_source.load(path)
        assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "none.yaml", f"none.yaml: no such file\nhint: looked in {tmp_path}"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "a\0b", "cannot be read: "),
    ]:
        with pytest.raises(RecipeError) as caught:
            yaml_source.load(path)
        assert message in str(caught.value)


def test_pure_python_yaml_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pure(yaml.SafeLoader):
        yaml_implicit_resolvers = yaml_source.Loader.yaml_implicit_resolvers

    text = TEXT + "c: {no: 010, x: 1e-3}\nd: 1:30\n"
    compiled = yaml_source.loads(text, "r.yaml")
    monkeypatch.setattr(yaml_source, "Loader", Pure)
    assert yaml_source.loads(text, "r.yaml") == compiled
    assert "duplicate key" in refused("a: 1\na: 2")


YAMLISH = st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@,? \n\t~<0.1e\r\u2028é"), max_size=60)


@given(st.one_of(st.text(max_size=200), YAMLISH))
def test_any_text_is_read_or_refused_in_place(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        assert isinstance(yaml_source.loads(text, "r.yaml").data, dict)
    except RecipeError as error:
        problems = error.problems
    assert all(problem.line and problem.column for problem in problems)


KEYS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(KEYS, PLAIN, max_size=4))
def test_what_a_yaml_writer_writes_is_read_back(value: dict[str, object]) -> None:
    # quoted, since PyYAML leaves strings such as 1e5 plain, which YAML 1.2 reads as numbers
    assert yaml_source.loads(yaml.safe_dump(value, default_style='"'), "r.yaml").data == value
