"""Scalars, gradients and filters, against mergekit's rules written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from deltamerge.recipe.values import Filter, Scalar, Value, chain, leaves, lookup, value_for
from deltamerge.tensors.names import layer_index, layer_position

ADAPTER: TypeAdapter[Value] = TypeAdapter(Value)
MLP = "model.layers.3.mlp.up_proj.weight"
ATTENTION = "model.layers.3.self_attn.q_proj.weight"


def value(plain: object) -> Value:
    return ADAPTER.validate_python(plain)


# mergekit's `t` of its slerp example: filters whose values are gradients
SLERP_T = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


@pytest.mark.parametrize(
    ("plain", "tensor", "t", "wanted"),
    [
        (0.5, MLP, 0.3, 0.5),
        (True, MLP, 0.3, True),
        ("no", MLP, 0.3, False),
        ("0.5", MLP, 0.3, 0.5),
        (["-1", "5e-1"], MLP, 1.0, 0.5),
        ([1, 0.7, 0.1], MLP, 0.0, 1.0),
        ([1, 0.7, 0.1], MLP, 0.5, 0.7),
        ([1, 0.7, 0.1], MLP, 1.0, 0.1),
        ([0, 1], MLP, 0.25, 0.25),
        ([3], MLP, 0.9, 3.0),
        ([True, False], MLP, 0.99, True),
        ([True, False], MLP, 1.0, False),
        ({"filter": "mlp", "value": 2}, MLP, 0.0, 2),
        ({"filter": "mlp", "value": 2}, ATTENTION, 0.0, None),
        ([{"filter": "*", "value": 4}], ATTENTION, 0.0, 4),
        ([{"filter": "mlp", "value": 0.5}, {"value": 0}], ATTENTION, 0.0, 0),
        ([{"value": 1}, {"filter": "mlp", "value": 2}], MLP, 0.0, 1),
        ([{"filter": "MLP", "value": 2}], MLP, 0.0, None),
        (SLERP_T, ATTENTION, 0.5, 0.3),
        (SLERP_T, MLP, 0.125, 0.75),
        (SLERP_T, "model.norm.weight", 0.0, 0.5),
    ],
)
def test_resolve(plain: object, tensor: str, t: float, wanted: Scalar | None) -> None:
    assert value_for(value(plain), tensor, t) == (wanted if wanted is None else pytest.approx(wanted, abs=1e-15))


@pytest.mark.parametrize("plain", ["abc", None, [], [1, "x"], [1, None], [[1]], [{"value": "x"}], [1, {"value": 2}],
                                   {"filter": 3, "value": 1}, {"filter": "x"}, {"value": 1, "vale": 2}, float("nan"),
                                   float("inf"), [{"value": [{"value": 1}]}], [{"value": []}]])  # fmt: skip
def test_what_is_no_value(plain: object) -> None:
    with pytest.raises(ValidationError) as caught:
        value(plain)
    assert caught.value.error_count() == 1


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 1))
def test_gradients_are_piecewise_linear(points: list[float], t: float) -> None:
    wanted = np.interp(t * (len(points) - 1), np.arange(len(points)), points)
    assert value_for(tuple(points), "x", t) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ([{"a": 1}, {"a": 2}], 1),
        ([{}, {"a": 2}], 2),
        ([{"b": 1}, {}], 9),
        ([{"a": {"filter": "mlp", "value": 1}}, {"a": 2}], 1),
        ([{"a": {"filter": "norm", "value": 1}}, {"a": 2}], 2),
        ([{"a": {"filter": "norm", "value": 1}}, {"a": [{"filter": "head", "value": 3}]}], 9),
        ([{"a": 0}, {"a": 2}], 0),
        ([{"a": False}, {"a": True}], False),
    ],
)
def test_lookup_takes_the_first_level_that_matches(levels: list[dict[str, object]], wanted: Scalar) -> None:
    read = [{key: value(plain) for key, plain in level.items()} for level in levels]
    assert lookup("a", MLP, 0.5, *read, default=9) == wanted
    assert lookup("a", MLP, 0.5, *read) == (None if wanted == 9 else wanted)


VALUES = st.one_of(
    st.none(),
    st.floats(0, 1),
    st.lists(st.floats(0, 1), min_size=1, max_size=3).map(tuple),
    st.lists(
        st.builds(
            Filter,
            filter=st.sampled_from(["mlp", "attn", "norm", "*", None]),
            value=st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
)


@given(st.lists(VALUES, max_size=4), st.sampled_from([MLP, ATTENTION, "model.norm.weight", "x"]), st.floats(0, 1))
def test_a_chain_resolves_as_a_lookup(values: list[Value | None], tensor: str, t: float) -> None:
    chained = chain(*values)
    levels = [{} if one is None else {"a": one} for one in values]
    assert (None if chained is None else value_for(chained, tensor, t)) == lookup("a", tensor, t, *levels)


def test_leaves_say_where_they_stand() -> None:
    assert list(leaves(value(SLERP_T)))[4:7] == [((0, "value", 4), 1), ((1, "value", 0), 1), ((1, "value", 1), 0.5)]
    assert list(leaves(value({"value": [1, 2]}))) == [(("value", 0), 1), (("value", 1), 2)]
    assert list(leaves(0.5)) == [((), 0.5)]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.7.mlp.weight", 7),
        ("bert.encoder.layer.11.attention.self.query.weight", 11),
        ("h.0.attn.c_attn.weight", 0),
        ("model.layers.2.mlp.experts.5.w1.weight", 2),
        ("model.embed_tokens.weight", None),
        ("layer1.conv2.weight", None),
        ("blocks.²", None),
        ("a." + "9" * 50, None),
        ("", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


def test_layer_position() -> None:
    assert [layer_position(f"layers.{i}.weight", 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert layer_position("layers.0.weight", 1) == 1
    assert layer_position("embed.weight", 5) == 0
    assert layer_position("layers.9.weight", 5) == 1
