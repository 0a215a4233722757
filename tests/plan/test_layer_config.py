"""What is repaired in config.json where layers are stacked."""

from __future__ import annotations

from typing import Any

import pytest

from deltamerge.errors import InputError
from deltamerge.plan.layer_config import count_keys, repair

WHISPER = {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}
T5 = {"num_layers": 4, "num_decoder_layers": 4}
VISUAL = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}}
PAIR = {s: {"model_type": "bert", "num_hidden_layers": 4} for s in ("encoder", "decoder")}
VISION = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}


@pytest.mark.parametrize(
    ("config", "prefix", "alone", "keys"),
    [
        ({"num_hidden_layers": 4, "hidden_size": 4}, "model.layers", True, ["num_hidden_layers"]),
        ({"n_layer": 4}, "h", True, ["n_layer"]),
        ({"n_layers": 4, "n_heads": 4}, "transformer.layer", True, ["n_layers"]),
        ({"num_layers": 4, "num_hidden_layers": 4}, "transformer.h", True, ["num_hidden_layers", "num_layers"]),
        ({"num_hidden_layers": 4}, "model.decoder.layers", True, ["num_hidden_layers"]),
        ({"num_hidden_layers": 5}, "model.layers", True, []),
        ({"num_hidden_layers": True}, "model.layers", True, []),
        (WHISPER, "model.encoder.layers", True, ["encoder_layers", "num_hidden_layers"]),
        (WHISPER, "model.decoder.layers", False, ["decoder_layers"]),
        (T5, "encoder.block", True, ["num_layers"]),
        (T5, "decoder.block", False, ["num_decoder_layers"]),
        ({"num_layers": 4}, "decoder.block", False, []),
        (VISION, "language_model.model.layers", True, ["text_config.num_hidden_layers"]),
        (VISION, "vision_tower.layers", True, ["vision_config.num_hidden_layers"]),
        ({"text_config": {"num_hidden_layers": 4}}, "model.layers", True, ["text_config.num_hidden_layers"]),
        (VISUAL, "model.visual.blocks", True, ["vision_config.depth"]),
        ({"vlm_config": VISUAL}, "vlm.visual.blocks", True, ["vlm_config.vision_config.depth"]),
        ({"vlm_config": VISUAL}, "vlm.language_model.layers", True, ["vlm_config.text_config.num_hidden_layers"]),
        (PAIR, "encoder.encoder.layer", True, ["encoder.num_hidden_layers"]),
        (PAIR, "decoder.bert.encoder.layer", True, ["decoder.num_hidden_layers"]),
    ],
)
def test_the_keys_that_count_layers(config: dict[str, Any], prefix: str, alone: bool, keys: list[str]) -> None:
    found = count_keys(config, prefix, 4, alone=alone)
    assert [".".join((*section, key)) for section, key in found] == keys


A = {
    "num_hidden_layers": 3, "architectures": ["X", "Y", "Z"], "eos_token_id": [1, 2, 3], "layer_types": ["f", "s", "f"],
    "no_rope_layers": [1, 0, 1], "mlp_only_layers": [0], "max_window_layers": 2, "hidden_size": 3,
    "norm_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1],
}  # fmt: skip
B = {"num_hidden_layers": 2, "layer_types": ["x", "y"], "no_rope_layers": [5, 6], "mlp_only_layers": [0, 1]}


def test_lists_follow_their_layers() -> None:
    sources = [("a", A, 0), ("a", A, 1), ("b", B, 1), ("a", A, 0)]
    config, notes = repair(A, "model.layers", 3, sources, True)
    assert config == A | {
        "num_hidden_layers": 4,
        "layer_types": ["f", "s", "y", "f"],
        "no_rope_layers": [1, 0, 6, 1],
        "mlp_only_layers": [0, 2, 3],
    }
    assert notes == [
        "num_hidden_layers 3 → 4",
        "layer_types follows the layers",
        "no_rope_layers follows the layers",
        "mlp_only_layers follows the layers",
        "max_window_layers: 2 is kept: check it",
    ]
    assert A["layer_types"] == ["f", "s", "f"]


def test_a_section_is_repaired_in_its_place() -> None:
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["f", "s"]}, "num_hidden_layers": 2, "x": [1, 2]}
    new, _ = repair(config, "language_model.layers", 2, [("a", config, 1)] * 3, True)
    assert new == config | {"text_config": {"num_hidden_layers": 3, "layer_types": ["s", "s", "s"]}}


def test_a_model_without_the_list_is_named() -> None:
    with pytest.raises(InputError, match=r"b: its config\.json has no layer_types for layer 1"):
        repair(A, "model.layers", 3, [("a", A, 0), ("b", {}, 1)], True)


@pytest.mark.parametrize(
    ("outputs", "count", "wanted"),
    [
        ({"out_features": ["stage3"], "out_indices": [3]}, 4, {"out_features": ["stage4"], "out_indices": [4]}),
        ({"out_features": ["stage3"], "out_indices": [3]}, 2, {"out_features": ["stage2"], "out_indices": [2]}),
        ({"out_features": ["stage1", "stage2"], "out_indices": [1, 2]}, 2, {}),
        ({"out_features": ["stage1", "stage3"], "out_indices": [1, 3]}, 4, {}),
        ({"out_features": ["stage1", "stage3"], "out_indices": [1, 3]}, 2, None),
    ],
)
def test_a_backbone_s_stages_follow(outputs: dict[str, Any], count: int, wanted: dict[str, Any] | None) -> None:
    config = {"num_hidden_layers": 3, "stage_names": ["stem", "stage1", "stage2", "stage3"], **outputs}
    sources = [("a", config, i % 3) for i in range(count)]
    if wanted is None:
        with pytest.raises(InputError, match=r"out_features names layer 3, and the stack has 2"):
            repair(config, "encoder.layer", 3, sources, True)
        return
    new, _ = repair(config, "encoder.layer", 3, sources, True)
    names = ["stem", *(f"stage{i + 1}" for i in range(count))]
    assert new == config | {"num_hidden_layers": count, "stage_names": names} | wanted
