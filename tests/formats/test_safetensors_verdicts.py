"""Every header is accepted by deltamerge and by the official reader, or refused by both, but for DIFFERENCES."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from deltamerge.errors import InputError
from deltamerge.formats.safetensors import Header, header_length, parse_header

# What only the official reader accepts: how deltamerge refuses it, and why. Nothing is accepted by deltamerge alone.
DIFFERENCES = {
    "does not begin with {": "the format's description demands { as the first byte: a file is of one kind only",
    "and nothing else": "a key that is not known may change what the bytes mean; tensor entries are objects",
    "key .* twice": "the format's description forbids it: readers differ in which of the two they believe",
    "unknown dtype \"\\{'": "a dtype is a string; the official reader takes an object by accident of its parser",
    "printable characters": "names reach terminals, logs and Markdown, and are file names of other formats",
    "at most 64": "no framework has tensors of more dimensions or of sizes from 2**63 on",
    "more than 200,000 tensors": "memory is bounded before it is spent",
    "holds more than": "memory is bounded before it is spent",
}
DTYPES = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def official(raw: bytes) -> dict[str, Any] | None:
    try:
        return {name: (t["dtype"], t["shape"]) for name, t in deserialize(raw)}  # type: ignore[no-untyped-call]  # Rust
    except SafetensorError:
        return None


def ours(raw: bytes) -> Header | str:
    """The header, or why it is refused."""
    try:
        length = header_length(raw[:8], len(raw))
        return parse_header(raw[8 : 8 + length], Path("x"), len(raw))
    except InputError as error:
        return str(error)


def of_text(text: bytes, data: int) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


def compare(raw: bytes) -> bool:
    """Whether both accept `raw`; they agree, or differ as DIFFERENCES says."""
    truth, header = official(raw), ours(raw)
    if isinstance(header, str):
        known = any(re.search(message, header) for message in DIFFERENCES)
        assert truth is None or known, f"only deltamerge refuses {raw!r}: {header}"
        return False
    assert truth is not None, f"only deltamerge accepts {raw!r}"
    assert {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()} == truth
    return True


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def pair(first: str, second: str) -> str:
    return f'{{"a":{first},"b":{second}}}'


F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
NONE = '{"dtype":"F32","shape":[0],"data_offsets":[%d,%d]}'
HUGE = (1 << 64) - 1

AGREED: dict[str, tuple[str, int, bool]] = {
    "plain": (f"{{{entry()}}}", 8, True),
    "padded": (f"{{{entry()}}}  \n", 8, True),
    "padded with NUL": (f"{{{entry()}}}\0", 8, False),
    "empty": ("{}", 0, True),
    "empty, with data": ("{}", 8, False),
    "metadata null": (f'{{"__metadata__":null,{entry()}}}', 8, True),
    "metadata only": ('{"__metadata__":{}}', 0, True),
    "metadata of a number": (f'{{"__metadata__":{{"a":1}},{entry()}}}', 8, False),
    "metadata of null": (f'{{"__metadata__":{{"a":null}},{entry()}}}', 8, False),
    "metadata a list": (f'{{"__metadata__":[],{entry()}}}', 8, False),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},{entry()}}}', 8, False),
    "metadata with half a pair": (f'{{"__metadata__":{{"a":"\\ud800"}},{entry()}}}', 8, False),
    "metadata with a pair": (f'{{"__metadata__":{{"a":"\\ud83d\\ude00"}},{entry()}}}', 8, True),
    "metadata with an escaped escape": (f'{{"__metadata__":{{"a":"\\\\ud800"}},{entry()}}}', 8, True),
    "metadata with -0": (f'{{"__metadata__":{{"a-0":"-0"}},{entry()}}}', 8, True),
    "a field twice": (
        f"{{{entry(more=',' + chr(34) + 'dtype' + chr(34) + ':' + chr(34) + 'F32' + chr(34))}}}",
        8,
        False,
    ),
    "a field missing": ('{"a":{"shape":[2],"data_offsets":[0,8]}}', 8, False),
    "-0 size": (f"{{{entry(shape='[-0]', offsets='[0,0]')}}}", 0, False),
    "-0 offset": (f"{{{entry(offsets='[-0,8]')}}}", 8, False),
    "2e0": (f"{{{entry(shape='[2e0]')}}}", 8, False),
    "2.0": (f"{{{entry(shape='[2.0]')}}}", 8, False),
    "+2": (f"{{{entry(shape='[+2]')}}}", 8, False),
    "02": (f"{{{entry(shape='[02]')}}}", 8, False),
    "true": (f"{{{entry(shape='[true,2]')}}}", 8, False),
    "NaN": (f"{{{entry(shape='[NaN]')}}}", 8, False),
    "null shape": (f"{{{entry(shape='null')}}}", 8, False),
    "scalar": (f"{{{entry(shape='[]', offsets='[0,4]')}}}", 4, True),
    "no elements": (f"{{{entry(shape='[0,5]', offsets='[0,0]')}}}", 0, True),
    "overflow": (f"{{{entry(shape='[4294967296,4294967296]', offsets='[0,0]')}}}", 0, False),
    "overflow of bits": (f"{{{entry(shape='[2305843009213693952]', offsets='[0,0]')}}}", 0, False),
    "overflow before a 0": (f"{{{entry(shape='[4294967296,4294967296,0]', offsets='[0,0]')}}}", 0, False),
    "overflow after a 0": (f"{{{entry(shape='[0,4294967296,4294967296]', offsets='[0,0]')}}}", 0, True),
    "2**64": (f"{{{entry(shape='[0,18446744073709551616]', offsets='[0,0]')}}}", 0, False),
    "descending offsets": (f"{{{entry(offsets='[8,0]')}}}", 8, False),
    "three offsets": (f"{{{entry(offsets='[0,8,8]')}}}", 8, False),
    "a hole before": (f"{{{entry(offsets='[4,12]')}}}", 12, False),
    "trailing bytes": (f"{{{entry()}}}", 9, False),
    "truncated": (f"{{{entry()}}}", 7, False),
    "the same place": (pair(F32, F32), 8, False),
    "no elements at one place": (pair(NONE % (0, 0), NONE % (0, 0)), 0, True),
    "no elements amid another": (pair(F32, NONE % (4, 4)), 8, False),
    "no elements at the end": (pair(F32, NONE % (8, 8)), 8, True),
    "no elements beyond": (pair(F32, NONE % (9, 9)), 8, False),
    "in reverse": (pair(F32.replace("0,8", "8,16"), F32), 16, True),
    "a name that is half a pair": (f'{{"\\ud800":{F32}}}', 8, False),
    "a name that is a pair": (f'{{"\\ud83d\\ude00":{F32}}}', 8, True),
    "64 dimensions": (f"{{{entry(shape=str([1] * 63 + [2]))}}}", 8, True),
    "lower case": (f"""{{{entry(dtype='"f32"')}}}""", 8, False),
    "a list of dtypes": (f"""{{{entry(dtype='["F32"]')}}}""", 8, False),
    "a comma more": (f"{{{entry()},}}", 8, False),
    "a comment": (f"{{/**/{entry()}}}", 8, False),
    "two objects": (f"{{{entry()}}}{{}}", 8, False),
    "a form feed": (f"{{\f{entry()}}}", 8, False),
    "F4 within a byte": (f"""{{{entry('"F4"', "[3]", "[0,2]")}}}""", 2, False),
    "F6 within a byte": (f"""{{{entry('"F6_E2M3"', "[5]", "[0,4]")}}}""", 4, False),
    "C128": (f"""{{{entry('"C128"', "[1]", "[0,16]")}}}""", 16, False),
    "I4": (f"""{{{entry('"I4"', "[2]", "[0,1]")}}}""", 1, False),
}
DIFFERENT: dict[str, tuple[str, int, str]] = {
    "a space first": (f" {{{entry()}}}", 8, "does not begin with {"),
    "a newline first": (f"\n{{{entry()}}}", 8, "does not begin with {"),
    "a key more": (f"""{{{entry(more=',"x":1')}}}""", 8, "and nothing else"),
    "a list for an entry": ('{"a":["F32",[2],[0,8]]}', 8, "and nothing else"),
    "an object for a dtype": (f"""{{{entry(dtype='{"F32":null}')}}}""", 8, "unknown dtype \"\\{'"),
    "a tensor twice": (f"{{{entry()},{entry()}}}", 8, "key .* twice"),
    "metadata's key twice": (f'{{"__metadata__":{{"a":"1","a":"2"}},{entry()}}}', 8, "key .* twice"),
    "65 dimensions": (f"{{{entry(shape=str([1] * 64 + [2]))}}}", 8, "at most 64"),
    "2**63 and a 0": (f'{{{entry(shape=f"[0,{1 << 63}]", offsets="[0,0]")}}}', 0, "at most 64"),
    "2**64 - 1 and a 0": (f'{{{entry(shape=f"[{HUGE},0]", offsets="[0,0]")}}}', 0, "at most 64"),
    "no name": (f'{{"":{F32}}}', 8, "printable characters"),
    "a newline in a name": (f'{{"a\\n":{F32}}}', 8, "printable characters"),
    "a long name": (f'{{"{"x" * 1001}":{F32}}}', 8, "printable characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREED)
def test_both_readers_agree(name: str) -> None:
    text, data, accepted = AGREED[name]
    assert compare(of_text(text.encode(), data)) is accepted


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbf{}", b'{"\xff":1}', b'{"\xed\xa0\x80":1}', b"", b"[]", b"null"])
def test_what_is_no_json_object_is_refused_by_both(raw: bytes) -> None:
    assert not compare(of_text(raw, 0))
    assert official(of_text(raw, 0)) is None


@pytest.mark.parametrize("name", DIFFERENT)
def test_deliberate_differences(name: str) -> None:
    text, data, message = DIFFERENT[name]
    raw = of_text(text.encode(), data)
    refused = ours(raw)
    assert official(raw) is not None
    assert isinstance(refused, str)
    assert re.search(message, refused)
    assert message in DIFFERENCES


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_official_reader(dtype: str) -> None:
    nbytes = DTYPES[dtype]
    raw = of_text(f"""{{{entry(f'"{dtype}"', "[4,2]", f"[0,{nbytes}]")}}}""".encode(), nbytes)
    assert compare(raw)
    header = ours(raw)
    assert isinstance(header, Header)
    assert header.tensors["a"].nbytes == nbytes


NUMBERS = ["-0", "0", "1", "2", "3", "4", "8", "2.0", "1e0", "true", "null", '"2"', str(1 << 32), str(1 << 62),
           str((1 << 63) - 1), str(1 << 63), str(HUGE), str(1 << 64), "9" * 400]  # fmt: skip
names = st.sampled_from(['"a"', '"b"', '"__metadata__"', '""', '"\\ud800"', '"\\u00e9"', '"\\ud83d\\ude00"', '"a-0"'])
lists = st.lists(st.sampled_from(NUMBERS), max_size=4).map(lambda items: f"[{','.join(items)}]")
dtypes = st.one_of(st.sampled_from([*DTYPES, "F33", "f32", ""]).map(json.dumps), st.sampled_from(["1", "null", "[]"]))
spaces = st.sampled_from(["", "", "", " ", "\n", "\t\r"])


@st.composite
def tensor(draw: st.DrawFn) -> str:
    """An entry of a header, mostly well formed."""
    fields = {'"dtype"': draw(dtypes), '"shape"': draw(lists), '"data_offsets"': draw(lists)}
    if draw(st.booleans()):  # offsets that fit where the shape is small
        sizes = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype, begin = draw(st.sampled_from(list(DTYPES))), draw(st.sampled_from([0, 0, 0, 8]))
        count = 1
        for size in sizes:
            count *= size
        end = begin + count * DTYPES[dtype] // 8
        fields = {'"dtype"': f'"{dtype}"', '"shape"': str(sizes), '"data_offsets"': f"[{begin},{end}]"}
    pairs = [f"{key}:{draw(spaces)}{value}" for key, value in draw(st.permutations(list(fields.items())))]
    change = draw(st.integers(0, 15))
    if change == 0:
        pairs.pop()
    elif change == 1:
        pairs.append(draw(st.sampled_from(['"x":1', '"shape":[2]', '"x":null'])))
    return "{" + ",".join(pairs) + "}"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_made_up_headers_agree(data: st.DataObject) -> None:
    entries = data.draw(st.lists(st.tuples(names, tensor()), min_size=1, max_size=2))
    if data.draw(st.booleans()):
        strings = st.sampled_from(['{"a":"b"}', "null", "{}", '{"a":1}', '{"\\ud800":"a"}', '{"a":"\\udfff"}', "[]"])
        entries.append(('"__metadata__"', data.draw(strings)))
    space = data.draw(spaces)
    text = "{" + ",".join(f"{name}:{space}{value}" for name, value in entries) + "}" + data.draw(spaces)
    found = [int(end) for end in re.findall(r'data_offsets":\s*\[\d+,(\d+)\]', text)]
    size = max([0, *(end for end in found if end < 1000)]) + data.draw(st.sampled_from([0, 0, 0, 0, 1]))
    compare(of_text(text.encode(), size))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_headers_agree(data: st.DataObject) -> None:
    whole = f'{{"__metadata__":{{"k":"v-0"}},"a":{F32},"b":{{"dtype":"F4","shape":[2,2],"data_offsets":[8,10]}}}}'
    raw = bytearray(of_text(whole.encode(), 10))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(8, len(raw) - 11))
        piece = data.draw(st.sampled_from([b"", b" ", b"0", b"-0", b"9", b"1", b"[", b"{", b"}", b",", b'"', b"\\",
                                           b"\0", b"\\ud800", b"null", b"\xff", b"F", b"e", b"."]))  # fmt: skip
        end = place + data.draw(st.integers(0, 2))
        raw[place:end] = piece
    raw[:8] = (len(raw) - 18 + data.draw(st.sampled_from([0, 0, 0, 1, -1]))).to_bytes(8, "little")
    compare(bytes(raw))
