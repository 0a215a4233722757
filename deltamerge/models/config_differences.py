"""The keys of config.json by which models compute different things: one comparison for all callers.

Meanings are compared: an absent key is its class's default (`config_class`), and different spellings are one key
(`rope_theta` beside `rope_parameters`). Keys of bookkeeping, and keys that matter only in training, are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deltamerge.errors.shown import shown, some
from deltamerge.models.config_class import UNKNOWN, ConfigClass, class_named, class_of_type

Config = Mapping[str, Any]
Kind = Literal["positions", "function", "tokens"]

LONGEST = 160
RELATIVE = 2.0**-23  # models compute in float32 at most; a GGUF file stores its numbers so

# Keys on how a model is stored, called, trained or sampled, not on its function.
BOOKKEEPING = re.compile(
    r"_.*|name_or_path|model_name|architectures|transformers_version|torch_dtype|dtype|use_cache|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|auto_map|torchscript|use_bfloat16|chunk_size_feed_forward"
    r"|gradient_checkpointing|pretraining_tp|return_dict.*|output_.*|(\w+_)?vocab_size|tokenizer_class|prefix"
    r"|task_specific_params|quantization_config|compression_config|quantization|.*dropout.*|.*_pdrop|.*layer_?drop"
    r"|drop_path_rate|.*_loss(_.*)?|aux_loss_alpha|seq_aux|router_.*(coef|coefficient|noise|jitter.*)|initializer_.*"
    r"|(\w+_)?init(_.*)?|rescale_prenorm_residual|use_flash_attn|deterministic_flash_attn|attn_implementation"
    r"|mask_(time|feature)_.*|apply_spec_augment|max_length|min_length|do_sample|early_stopping|num_beam.*"
    r"|temperature|top_[kp]|typical_p|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size"
    r"|num_return_sequences|diversity_penalty|bad_words_ids|remove_invalid_values|tie_encoder_decoder|unsloth_.*"
)
TOKENS = re.compile(r".*_token_(ids?|index)|(begin_)?suppress_tokens|forced_decoder_ids")
# Keys that give places in a weight their meaning: their head, their angle, their function.
HEADS = re.compile(
    r".*heads?(_kv)?|.*head_dim|.*head_size|d_kv|multi_query|new_decoder_architecture|.*key_value_groups"
    r"|partial_rotary_factor|rotary_dim|rope_interleaved?"
)
ACTIVATION = re.compile(r"(?!classifier|summary)(.*_)?(act|activation)(_.*)?|feed_forward_proj|is_gated_act")
SPELLED = {
    "swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh", "gelu_python": "gelu",
}  # fmt: skip
NEAR = frozenset({"gelu", "gelu_pytorch_tanh"})  # a function and its approximation
SIZE = re.compile(r".*(_size|_dim|_layers?|_channels|_heads?)|d_model|n_embd|dim|width|depths?|stages")
# Model types whose classes compute the same where their keys agree.
ALIKE = (
    frozenset({"llama", "mistral"}), frozenset({"roberta", "xlm-roberta", "camembert"}),
    frozenset({"gpt2", "gpt-sw3"}), frozenset({"t5", "mt5"}),
)  # fmt: skip
WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "layer_types")
TYPE = "model_type"
THETA, SCALING, LOCAL, PARTIAL = "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"
PARAMETERS = "rope_parameters"
LOCAL_SCALING = "rope_local_scaling"
FULL, SLIDING = "full_attention", "sliding_attention"
THETAS = (THETA, "rotary_emb_base", "global_rope_theta")
LOCALS = (LOCAL, "local_rope_theta")
PARTS = (PARTIAL, "rotary_pct", "rope_pct")
ROPE = frozenset({PARAMETERS, SCALING, *THETAS, *LOCALS, *PARTS})
BOUNDED = ("yarn", "llama3", "longrope")  # kinds that count from the length that a model was trained with


class _Absent:
    """A key that a config's class has not."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Difference:
    """A key in which configs differ.

    key      with its sections, by dots: `text_config.rope_theta`
    values   its meaning in each model, by the model's name
    kind     `positions`: places in the weights mean different things; `function`: another function is computed;
             `tokens`: a token has another id
    """

    key: str
    values: Mapping[str, Any]
    kind: Kind

    def said(self) -> str:
        """Return the values and their models: "1000000 in ./a and ./b, 10000 in ./base"."""
        groups: list[tuple[Any, list[str]]] = []
        for name, value in self.values.items():
            group = next((names for other, names in groups if same(other, value)), None)
            if group is None:
                groups.append((value, [name]))
            else:
                group.append(name)
        return ", ".join(f"{in_words(value)} in {some(names, 4)}" for value, names in groups)

    def agrees(self, names: Sequence[str]) -> bool:
        """Tell whether the models of these names have one value."""
        return all(same(self.values[names[0]], self.values[name]) for name in names[1:])


def differences(models: Sequence[tuple[str, Config]]) -> tuple[Difference, ...]:
    """Return the keys in which models differ, given by name and config.json.

    Keys that change the meaning of weights come first.

    A model without a config is passed over. If a config states no size, only the keys that it states count. A language
    model is compared with the text section of a model of texts and pictures.
    """
    told = {name: config for name, config in models if config}
    first = next(iter(told.values()), {})
    if all(config == first for config in told.values()):
        return ()
    meanings = {name: meaning(config) for name, config in told.items()}
    parts = _parts(meanings)
    for name in parts:
        section = next(one for other in meanings if (one := _place(meanings[name], meanings[other])))
        meanings[name] = {f"{section}.{key}": value for key, value in meanings[name].items()}
        told[name] = {section: told[name]}
    whole = {name for name, config in told.items() if name not in parts and not _is_stub(config)}

    def values_of(key: str) -> dict[str, Any]:
        says = (name for name in told if name in whole or key in meanings[name])
        return {name: meanings[name].get(key, ABSENT) for name in says}

    stated = {key for config in told.values() for key in _stated(config)}
    found = [
        Difference(key, values, kind)
        for key in dict.fromkeys(key for one in meanings.values() for key in one)
        if (kind := _kind(key, values := values_of(key))) is not None
        and (key in stated or key.rpartition(".")[2] in (THETA, SCALING, LOCAL, LOCAL_SCALING, PARTIAL))
    ]
    found = [one for one in found if not _inside(one, found)]
    return tuple(sorted(found, key=lambda one: ("positions", "function", "tokens").index(one.kind)))


def _parts(meanings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the models that match a section of another model."""
    return [name for name, one in meanings.items() if any(_place(one, other) for other in meanings.values())]


def _place(part: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Return the section of a model that corresponds to another model. "": there is none."""
    kind = part.get(TYPE)
    if kind is None or _are_alike(kind, whole.get(TYPE)):
        return ""
    types = (key for key in whole if key.endswith(f".{TYPE}") and key.count(".") == 1)
    return next((key.partition(".")[0] for key in types if _are_alike(kind, whole[key])), "")


def _are_alike(*kinds: Any) -> bool:
    """Tell whether model types are one, or of classes that compute the same."""
    return all(kind == kinds[0] for kind in kinds) or any(
        all(isinstance(kind, str) and kind in group for kind in kinds) for group in ALIKE
    )


def _is_section(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and (key.endswith("_config") or TYPE in value)


def _is_stub(config: Config) -> bool:
    """Tell whether a config of a known class states no size, so that the class's defaults say nothing about the
    weights."""
    return _class(config) is not None and not any(
        SIZE.fullmatch(key) or _is_section(key, value) for key, value in config.items()
    )


def same(a: Any, b: Any) -> bool:
    """Tell whether two values mean the same; none and false do, and numbers that are one float32."""
    if _is_none(a) or _is_none(b) or a is UNKNOWN or b is UNKNOWN:
        return (_is_none(a) and _is_none(b)) or a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(same(a.get(key), b.get(key)) for key in a.keys() | b.keys())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        try:
            return a == b or math.isclose(a, b, rel_tol=RELATIVE)
        except OverflowError:  # integers that are no floats
            return False
    return bool(a == b)


def in_words(value: Any) -> str:
    """Return a value in a message."""
    if value is UNKNOWN:
        return "its default"
    if value is ABSENT:
        return "absent"
    if value is None:
        return "none"
    return shown(value if isinstance(value, str) else json.dumps(value), LONGEST)


def meaning(config: Config) -> dict[str, Any]:
    """Return the config values that change a model's function, by dotted key, with defaults filled in."""
    return dict(_meaning(config, _class(config), ""))


def known_keys(config: Config) -> dict[str, Any]:
    """Return the keys that a config can state, by dotted key, with their meaning: compared keys and keys of tokens."""
    return {key: value for key, value in meaning(config).items() if key.rpartition(".")[2] != TYPE}


def _is_none(value: Any) -> bool:
    return value is None or value is False or value is ABSENT


def _kind(key: str, values: Mapping[str, Any]) -> Kind | None:
    """Return the kind of difference between a key's values. None: they are the same."""
    first, *others = values.values()
    if all(same(first, other) for other in others):
        return None
    name = key.rpartition(".")[2]
    if name == TYPE:
        return None if _are_alike(*values.values()) else "positions"
    if TOKENS.fullmatch(name):
        return "tokens"
    if any(_is_none(value) or value is UNKNOWN for value in values.values()):
        return "function"
    if ACTIVATION.fullmatch(name):
        known = {value for value in values.values() if isinstance(value, str)}
        return "function" if known <= NEAR and len(known) == len(set(map(str, values.values()))) else "positions"
    return "positions" if HEADS.fullmatch(name) else "function"


def _inside(one: Difference, found: Sequence[Difference]) -> bool:
    """Tell whether a difference lies in a section that differs as a whole: a model lacks it, or its type is another."""
    section = one.key.rpartition(".")[0]
    return any(
        other is not one and ((bool(section) and other.key == section) or other.key == f"{section}.{TYPE}".lstrip("."))
        for other in found
    )


def _class(config: Config) -> ConfigClass | None:
    kind = config.get(TYPE)
    table = config.get("auto_map")
    if isinstance(table, Mapping) and "AutoConfig" in table:
        return None  # the model brings a class of its own, which is not read
    if not isinstance(kind, str):
        return None
    near = (other for group in ALIKE if kind in group for other in sorted(group))
    return next((known for one in (kind, *near) if (known := class_of_type(one)) is not None), None)


def _stated(config: Config, at: str = "") -> Iterator[str]:
    """Yield the dotted keys that a config states, under their own names."""
    known = _class(config)
    for key, value in config.items():
        own = known.aliases.get(key, key) if known is not None else key
        yield f"{at}{own}"
        if _is_section(key, value):
            yield from _stated(value, f"{at}{key}.")
        elif at == "" and known is not None:  # an older form: the keys of the text's section stand at the top
            yield from (f"{section}.{key}" for section in known.sections)


def _meaning(config: Config, known: ConfigClass | None, at: str) -> Iterator[tuple[str, Any]]:
    values: Mapping[str, Any] = config if known is None else known.complete(config)
    if at == "" and _is_stub(config):
        values, known = {key: value for key, value in values.items() if key in config}, None
    kind = config.get(TYPE) or (known.kind if known is not None else None)
    if isinstance(kind, str):
        yield f"{at}{TYPE}", kind
    sections = {key for key, value in config.items() if _is_section(key, value)}
    sections |= set(known.sections) if known is not None else set()
    sections = {key for key in sections if not BOOKKEEPING.fullmatch(key)}
    for key, value in values.items():
        if key in sections or key in ROPE or key == TYPE or BOOKKEEPING.fullmatch(key):
            continue
        if known is not None and key in WINDOW[1:4] and "layer_types" in known.keys:
            continue  # stated by layer_types
        yield f"{at}{key}", _spelled(key, value, values)
    rope = _rope(config, values, known)
    yield from ((f"{at}{key}", value) for key, value in rope.items())
    for key in sorted(sections):
        yield from _section(config, known, key, at)


def _section(config: Config, known: ConfigClass | None, key: str, at: str) -> Iterator[tuple[str, Any]]:
    """Yield a nested config's meaning."""
    inner = config.get(key)
    default = None if known is None else _of_section(known.sections.get(key, ""), str(config.get(TYPE)))
    if not isinstance(inner, Mapping):
        inner = {k: v for k, v in config.items() if default is not None and known and _is_of(k, default, known)}
        if not inner:
            yield f"{at}{key}", None
            return
    said = class_of_type(inner["model_type"]) if isinstance(inner.get("model_type"), str) else None
    yield from _meaning(inner, said or default, f"{at}{key}.")


def _is_of(key: str, section: ConfigClass, whole: ConfigClass) -> bool:
    """Tell whether a key at the top of a config is its section's, as older configs have it."""
    return (key in section.keys or key in ROPE) and key not in whole.keys


def _of_section(named: str, near: str) -> ConfigClass | None:
    if not named:
        return None
    return class_of_type(named[1:]) if named.startswith(":") else class_named(named, near)


def _spelled(key: str, value: Any, values: Mapping[str, Any]) -> Any:
    """Return a value in its standard spelling."""
    if isinstance(value, str) and ACTIVATION.fullmatch(key):
        return SPELLED.get(value, value)
    if key == "sliding_window" and isinstance(value, int):
        longest, kinds = values.get("max_position_embeddings"), values.get("layer_types")
        slides = not isinstance(kinds, list) or any("sliding" in str(kind) for kind in kinds)
        is_idle = values.get("use_sliding_window") is False or not slides
        return None if is_idle or (isinstance(longest, int) and value >= longest) else value
    return value


def _rope(config: Config, values: Mapping[str, Any], known: ConfigClass | None) -> dict[str, Any]:
    """Rotary positions under one set of keys, however they are spelled; empty: there are none."""
    if not (ROPE & config.keys() or (known is not None and ROPE & known.keys.keys())):
        return {}
    theta = 10000.0 if known is None else known.theta
    parts = next((config[key] for key in PARTS if config.get(key) is not None), None)
    if parts is None:
        parts = next((values[key] for key in PARTS if values.get(key) not in (None, UNKNOWN)), None)
    stated = config.get(SCALING) or config.get(PARAMETERS) or {}
    stated = stated if isinstance(stated, Mapping) else {"rope_type": stated}
    of_full, of_window = (theta.get("global"), theta.get("local")) if isinstance(theta, Mapping) else (theta, theta)
    nested = {key: one for key, one in stated.items() if isinstance(one, Mapping)} if stated else {}
    by_layer = bool(nested) and len(nested) == sum(one is not None for one in stated.values())
    top = next((config[key] for key in THETAS if config.get(key) is not None), None)
    if top is None:
        top = next((values[key] for key in THETAS if values.get(key) not in (None, UNKNOWN)), None)
    local = next((config[key] for key in LOCALS if config.get(key) is not None), None)
    found: dict[str, Any] = {}
    full = nested.get(FULL, {}) if by_layer else stated
    found |= _one_rope(full, top or of_full, parts, values)
    if isinstance(theta, Mapping) or SLIDING in nested:
        slid = _one_rope(nested.get(SLIDING, {}) if by_layer else {}, local or of_window, parts, values)
        found |= {LOCAL: slid[THETA], LOCAL_SCALING: slid[SCALING]}
    if by_layer:
        more = {key: one for key, one in nested.items() if key not in (FULL, SLIDING)}
        found |= {f"{PARAMETERS}.{key}": _one_rope(one, top or of_full, parts, values) for key, one in more.items()}
        if FULL not in nested and more:
            del found[THETA], found[SCALING]
    return found


def _one_rope(stated: Config, theta: Any, part: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the angles of one kind of layer: base, scaling (None: no scaling), and the share of turned dimensions."""
    scaling = {key: value for key, value in stated.items() if key not in (THETA, "type", PARTIAL)}
    kind = scaling.get("rope_type", stated.get("type", "default"))
    scaling["rope_type"] = "longrope" if kind == "su" else kind
    if kind in BOUNDED and scaling.get("original_max_position_embeddings") is None:
        own = values.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = own or values.get("max_position_embeddings")
    if kind == "default":
        del scaling["rope_type"]
    share = stated.get(PARTIAL, part)
    base = stated.get(THETA)
    return {
        THETA: theta if base is None else base,
        SCALING: dict(sorted(scaling.items())) or None,
        PARTIAL: 1.0 if share is None else share,
    }
