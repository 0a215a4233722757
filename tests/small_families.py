"""A tiny model of every config class that the installed transformers has: numbers shrunk by what their keys say.

A family is a key of transformers' table of configs. What no rule fits is in `SPECIAL`, as data.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

LARGEST = 8_000_000  # parameters of a model that counts as small
VOCABULARY = 96
TASKS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "SEQUENCE_CLASSIFICATION",
    "CTC", "AUDIO_CLASSIFICATION", "TEXT_TO_WAVEFORM", "PRETRAINING", "",
)  # fmt: skip

# The first pattern that finds a key says its size.
SIZES = {
    r"vocab_size|^n_words$|^vocab$": VOCABULARY,
    r"^(pad|unk)_token_id$": 0,
    r"bos_token_id|start_token_id": 1,
    r"eos_token_id": 2,
    r"(image|video|audio|boi|eoi|vision|soi|img)\w*_(token_id|token_index)$": 5,
    r"(max_position|n_positions|max_\w*_positions|n_ctx|context_length|max_seq_len|max_sequence_length|n_embd_per)": 64,
    r"q_lora_rank|kv_lora_rank|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim": 8,
    r"kv_shared_layers$": 0,
    r"rotary_dim$": 4,
    r"head_dim$|^d_kv$|head_size$|_key_dim$|_value_dim$": 8,
    r"(key_value_heads|kv_heads)$|multi_query_group_num": 2,
    r"(attention_heads|n_heads?|num_heads|num_\w*_heads)$": 4,
    r"experts_per_tok|num_selected_experts|^top_?k(_experts)?$|moe_k$|moe_top_?k": 2,
    r"^(num|n)_(\w+_)?experts$|^moe_num_experts$|num_experts$": 4,
    r"topk_group|n_group": 1,
    r"first_k_dense_replace": 1,
    r"(intermediate|ffn|mlp|feed_?forward|inner|fc)\w*_?(size|dim|channels|hidden)$|^d_ff$|d_inner$|_ffn$": 48,
    r"(^|_)(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|width|hidden_dim|n_state|emb_dim|channels"
    r"|projection_dim|rnn_width|proj_dim|lru_width)$": 32,
    r"hidden_(size|dim)|_hidden$|embed_dim|embedding_dim|_(size|dim|width)$(?<!patch_size)(?<!image_size)(?<!kernel_size)"
    r"(?<!window_size)(?<!block_size)(?<!chunk_size)(?<!group_size)(?<!merge_size)(?<!num_channels)": 32,
    r"^(image|img|input|spatial)_size$|^(image|img)_resolution$": 32,
    r"patch_size$": 8,
    r"chunk_size|block_size|window_size|sliding_window|block_length": 8,
    r"(d|ssm|mamba)_?state(_size)?$|state_size": 8,
    r"n_groups$|num_groups$": 1,
    r"num_queries|query_length|num_query_tokens|resampler_n_latents|num_latents": 4,
    r"codebook_size|num_embeddings|num_code": 32,
}  # fmt: skip

LAYERS = re.compile(
    r"^(num|n)_(hidden_)?(layers?|blocks|stages)$|^(?!num_kv_shared)(.*_)?(layers|depth|num_blocks|n_layers?|num_loops)$"
)
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
TOWER = re.compile("vision|audio|visual|speech|image|encoder")
KEPT = re.compile("feat_extract_layers")
WIDTHS = (32, 48)  # sizes that grow with the width of a way
COUNTS = re.compile(r"layers?$|depth|blocks$|experts|_token_id$|vocab|image_size|img_size")
# Lists of a number a stage: the value of each stage, the last for those that follow.
LISTS = {
    r"(^|_)num_(attention_|\w*)heads$|^heads$|num_heads": [2],
    r"^(depths?|layers|num_blocks|num_layers|depth_per_stage|layers_per_block|stage_layers|stage_num_blocks)$|"
    r"(_depths?|_layers|_blocks|_repeats)$": [1],
    r"hidden_sizes?$|embed_dims?$|embedding_dims?$|(^|_)dims$|channels$|widths$|filters$|embed_dim$|decoder_hidden_sizes|key_dim":
    [32, 32, 64, 64],
    r"^(image|img|input)_size$": [32],
}  # fmt: skip
NULLS: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

ROPE = ("rope_parameters", "rope_scaling")
MROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}  # half of a head

# What no rule fits, by family: settings over those of the rules, in sections as the config has them.
RESNET = {
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8],
                        "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "use_timm_backbone": False, "backbone": None,
}  # fmt: skip
BY_KIND = {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), MROPE)}
FORECAST = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"), RESNET),
    "cohere_compass": {"text_config": BY_KIND},
    "cohere_compass_text": BY_KIND,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), FORECAST),
}


def families() -> list[str]:
    """Every family, in the order of their names."""
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def classes(family: str) -> Iterator[type[Any]]:
    """The model classes of a family, those with a language model's head first; without any in transformers' tables,
    those of the module beside its config that are made from it.
    """
    seen = []
    for task in TASKS:
        key = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
        names = getattr(modeling_auto, key).get(family, ())
        for name in (names,) if isinstance(names, str) else names:
            found = getattr(transformers, name, None)
            if found is not None and found not in seen:
                seen.append(found)
                yield found
    if seen:
        return
    config = configuration_auto.CONFIG_MAPPING[family]
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    for name, found in vars(module).items():
        own = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if own and found.__module__ == module.__name__ and found.config_class is config and "PreTrained" not in name:
            yield found


@dataclass(frozen=True, slots=True)
class Way:
    """How numbers are shrunk: what widths become, whether lists shrink too, whether what is null gets a number, whether
    only counts (layers, experts, tokens) do, whether rotary embeddings have sections (time, height, width), and whether
    layers are the first ones, whatever their kinds.
    """

    width: int = 32
    lists: bool = True
    nulls: bool = False
    counts: bool = False
    mrope: bool = False
    first: bool = False


WAYS = (
    *(Way(width, lists, nulls) for nulls in (False, True) for width in (32, 64) for lists in (True, False)),
    Way(first=True), Way(counts=True), Way(counts=True, nulls=True),
)  # fmt: skip


def size_of(key: str, way: Way) -> int | None:
    found = next((size for pattern, size in SIZES.items() if re.search(pattern, key)), None)
    if found is None or (way.counts and not COUNTS.search(key)):
        return None
    return found * way.width // 32 if found in WIDTHS else found


def listed(key: str, values: list[int], way: Way) -> list[int] | None:
    """The values of a list that has one for each stage of a model."""
    found = next((sizes for pattern, sizes in LISTS.items() if re.search(pattern, key)), None)
    if found is None or not way.lists or way.counts:
        return None
    return [min(value, found[min(i, len(found) - 1)] * way.width // 32) for i, value in enumerate(values)]


def shorter(values: list[Any], count: int, way: Way) -> list[Any]:
    """The first values of a list that has one for each layer; the last is of another kind, if there is another."""
    if way.first:
        return values[:count]
    first = values[: count - 1]
    return [*first, next((v for v in values if isinstance(v, str) and v not in first), values[len(values[:count]) - 1])]


def shrunk(settings: Mapping[str, Any], way: Way, part: str = "") -> dict[str, Any]:
    """The settings of a config, or of its section `part`, that make it small, sections inside it too."""
    made: dict[str, Any] = {}
    old = next((settings[key] for key in DEPTHS if type(settings.get(key)) is int), 0)
    layers = 2 if TOWER.search(part) else 3
    for key, value in settings.items():
        if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
            made[key] = shrunk(value, way, key)
            if "model_type" in value:
                made[key]["model_type"] = value["model_type"]
        elif key in ROPE and way.mrope and not any(isinstance(v, dict) for v in (value or {}).values()):
            made[key] = MROPE | {k: v for k, v in (value or {}).items() if isinstance(v, str | float)} | SECTIONS
        elif isinstance(value, list) and value and (way.lists or not isinstance(value[0], int)):
            cut = shorter(value, layers, way) if len(value) == old and not way.counts else value
            new = listed(key, cut, way) if all(type(v) is int for v in value) else None
            made |= {key: cut if new is None else new} if new is not None or cut is not value else {}
        elif type(value) is int or (value is None and (way.nulls or key.endswith("_token_id"))):
            size = layers if LAYERS.search(key) else size_of(key, way)
            if value is not None and value == settings.get(re.sub("(key_value|kv)_heads", "attention_heads", key)):
                size = size_of("num_attention_heads", way) if "heads" in key else size
            if size is not None and (value is None or key.endswith("_id") or size < value) and not KEPT.search(key):
                made[key] = size
        elif value is None and way.nulls and key in NULLS:
            made[key] = NULLS[key]
    return made


def over(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, section by section."""
    made = dict(settings)
    for key, value in changes.items():
        inside = isinstance(value, dict) and key.endswith("config")
        made[key] = over(made.get(key) or {}, value) if inside else value
    return made


@cache
def has_sections(kind: type[Any]) -> bool:
    """Whether the models of a config have rotary embeddings in sections."""
    module = sys.modules[kind.__module__]
    paths = Path(str(module.__file__)).parent.glob("modeling_*.py")
    return any("mrope_section" in path.read_text() for path in paths)


def config_of(family: str, way: Way) -> Any:
    """The small config of a family."""
    kind = configuration_auto.CONFIG_MAPPING[family]
    way = replace(way, mrope=has_sections(kind))
    return kind(**over(shrunk(kind().to_dict(), way), SPECIAL.get(family, {})))


class Unbuilt(Exception):  # no error of the package: the family is left out, with this reason
    """transformers makes no small model of a family."""


def build(family: str) -> Any:
    """A small bfloat16 model of a family with random weights, none of them constant.

    Unbuilt: none of its classes can be made, or is small.
    """
    tried: dict[str, str] = {}
    for kind in classes(family):
        for way in WAYS:
            try:
                config = config_of(family, way)
                with torch.device("meta"):
                    count = sum(p.numel() for p in kind(config).parameters())
                if count > LARGEST:
                    tried.setdefault(kind.__name__, f"{count:,} parameters")
                    continue
                torch.manual_seed(0)
                return shaken(kind(config).eval().to(torch.bfloat16), 0.05, 1)
            except Exception as error:
                text = " ".join(str(error).split()).replace("Class validation error for validator ", "")
                tried.setdefault(kind.__name__, f"{type(error).__name__}: {text[:160]}")
    raise Unbuilt("; ".join(f"{name}: {why}" for name, why in tried.items()) or "no model class")


def shaken(model: Any, deviation: float, seed: int) -> Any:
    """A model, changed in place by normal noise in every floating-point parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * deviation
                parameter.copy_((parameter.float() + noise).to(parameter.dtype))
    return model
