"""The layouts of mixtures made from dense models: names of their tensors, and their config.json.

A layout is a class of transformers (for DeepSeek's first, of vLLM and the hub) that computes like the dense model,
except for the MLPs. If the two classes have different defaults, config.json states the dense model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamerge.errors import InputError

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = tuple(f"self_attn.{x}_proj.weight" for x in "qkvo")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
QKV_BIAS = tuple(f"self_attn.{x}_proj.bias" for x in "qkv")
BIAS = (*QKV_BIAS, "self_attn.o_proj.bias")
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
OUTSIDE = re.compile(r"(^|\.)(embed_tokens|norm|lm_head)\.weight$")

_COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "attention_dropout": 0.0, "initializer_range": 0.02,
}  # fmt: skip
# What a config.json means that does not say so.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": _COMMON | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": _COMMON
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": _COMMON | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": _COMMON | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
WINDOW, FULL_LAYERS = 4096, 28  # the defaults of sliding_window and max_window_layers
PLACE = "deepseek-ai/deepseek-moe-16b-base--"  # where the hub has the class of DeepSeek's first
SLIDING = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True, slots=True)
class MixtureLayout:
    """The places of a mixture's tensors, and its limits.

    name, aliases   its names in recipes; the first is mergekit's
    families        model types of the dense models
    block           the MLP's place in a layer
    weights         an expert's names of gate, up and down projection
    shared          name of the shared expert; "" without
    shared_gate     name of its gate; "" without
    needs_shared    whether there always is a shared expert
    normed          whether queries and keys are normed
    optional        names of further tensors that a layer can hold, beside attention and norms
    correction      name of the bias on the router's scores for choosing; "" without
    untied          whether a tied head is written beside the embedding, as not all classes of the layout tie it
    sigmoid         whether the router's scores are sigmoids, which are all 1 where its vectors are long
    """

    name: str
    aliases: tuple[str, ...]
    model_type: str
    architecture: str
    families: tuple[str, ...]
    block: str = "mlp"
    weights: tuple[str, str, str] = MLP
    shared: str = ""
    shared_gate: str = ""
    needs_shared: bool = False
    normed: bool = False
    optional: tuple[str, ...] = ()
    correction: str = ""
    sigmoid: bool = False
    untied: bool = False

    def refusal(self, families: Sequence[str], shared: int, prompted: bool) -> str | None:
        """Return why the layout cannot hold experts of these model types. None: it can.

        `shared` is the number of shared experts. They are gated if `prompted`.
        """
        if len(set(families)) > 1:
            return f"all models must be of one kind, got {', '.join(sorted(set(families)))}"
        if families[0] not in self.families:
            return f"is made of {', '.join(self.families)}, not of {families[0]}"
        if shared and not self.shared:
            return "has no shared experts"
        if shared > 1:
            return "has one shared expert at most"
        if self.needs_shared and not shared:
            return "always has a shared expert: name one in shared_experts (residual_scale: 0 silences it)"
        if shared and prompted and not self.shared_gate:
            return "does not gate its shared expert: give it no prompts"
        if self.shared_gate and shared and not prompted:
            return "gates its shared expert: give it positive_prompts"
        return None

    @property
    def required(self) -> tuple[str, ...]:
        """Return the names of a layer's tensors that it always has beside its experts."""
        return (*ATTENTION, *NORMS, *(QK_NORMS if self.normed else ()))


MIXTRAL = MixtureLayout(
    "Mixtral", ("mixtral",), "mixtral", "MixtralForCausalLM", ("llama", "mistral"), "block_sparse_moe",
    ("w1", "w3", "w2"),
)  # fmt: skip
DEEPSEEK = MixtureLayout(
    "DeepSeek MoE", ("deepseek",), "deepseek", "DeepseekForCausalLM", ("llama", "mistral"), shared="shared_experts",
    optional=BIAS,
)  # fmt: skip
QWEN = MixtureLayout(
    "Qwen MoE", ("qwen2moe",), "qwen2_moe", "Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"),
    shared="shared_expert", shared_gate="shared_expert_gate", needs_shared=True, optional=QKV_BIAS,
)  # fmt: skip
QWEN3 = MixtureLayout(
    "Qwen3 MoE", ("qwen3moe",), "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), normed=True, optional=BIAS
)
# The mixture of DeepSeek-V3 on Llama's attention, in the class of GLM-4.5. V3 itself norms compressed values (MLA).
DEEPSEEK_V3 = MixtureLayout(
    "DeepSeek-V3 MoE", ("glm4moe",), "glm4_moe", "Glm4MoeForCausalLM", tuple(FAMILIES), shared="shared_experts",
    needs_shared=True, optional=(*QKV_BIAS, *QK_NORMS), correction="e_score_correction_bias", sigmoid=True,
    untied=True,
)  # fmt: skip
LAYOUTS = (MIXTRAL, DEEPSEEK, QWEN, QWEN3, DEEPSEEK_V3)
BY_DEFAULT = LAYOUTS[:4]  # mergekit's, in its order: the first that fits is taken


def choose(wanted: str | None, families: Sequence[str], shared: int, prompted: bool) -> MixtureLayout:
    """Return the first layout that fits. InputError: none fits, with the reasons.

    The candidates are mergekit's layouts, or the layouts whose name begins with `architecture`.
    """
    if wanted is None:
        named = list(BY_DEFAULT)
    else:
        named = [
            one for one in LAYOUTS if any(_plain(name).startswith(_plain(wanted)) for name in (one.name, *one.aliases))
        ]
    if not named:
        hint = f"architecture: {', '.join(one.model_type for one in LAYOUTS)}"
        raise InputError(f"architecture {wanted!r} is no layout of a mixture", hint=hint)
    refusals = [(one, one.refusal(families, shared, prompted)) for one in named]
    found = next((one for one, refusal in refusals if refusal is None), None)
    if found is not None:
        return found
    first, *also = (f"{one.name}: {refusal}" for one, refusal in refusals)
    raise InputError(first, also=also, hint="docs/howto/moe.md lists the models of each")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of a mixture: layers, experts, experts of a token, widths of experts and of the shared one (0: none).

    The last says whether queries, keys and values of the base have biases.
    """

    layers: int
    experts: int
    active: int
    width: int
    shared: int
    biased: bool


def config_of(layout: MixtureLayout, base: Mapping[str, Any], sizes: Sizes) -> tuple[dict[str, Any], list[str]]:
    """Return config.json of the mixture, and messages. InputError: the base has something that the layout lacks."""
    family, notes = str(base["model_type"]), list[str]()
    config = {**{k: v for k, v in FAMILIES[family].items() if k != "rope_theta"}, **base}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None:
        config["head_dim"] = hidden // heads
    config |= _rotary(base)
    window, sliding = _sliding(base, family, sizes.layers)
    for key in (*SLIDING, "pretraining_tp", "mlp_bias", "auto_map"):
        config.pop(key, None)
    config |= {"architectures": [layout.architecture], "model_type": layout.model_type}
    config |= {"num_experts_per_tok": sizes.active}
    if layout is MIXTRAL:
        config.pop("attention_bias", None)
        config |= {"num_local_experts": sizes.experts, "intermediate_size": sizes.width}
        config |= {"sliding_window": _same(layout, window, sliding), "output_router_logits": False}
    elif layout is DEEPSEEK:
        config |= _deepseek(config, sizes)
    elif layout is DEEPSEEK_V3:
        config |= _deepseek_v3(sizes, normed=family == "qwen3")
        config.setdefault("partial_rotary_factor", 1.0)
    else:
        config |= {"num_experts": sizes.experts, "moe_intermediate_size": sizes.width, "norm_topk_prob": True}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
        config["use_sliding_window"] = any(sliding)
        if layout is QWEN:
            config.pop("attention_bias", None)
            config |= {"shared_expert_intermediate_size": sizes.shared, "qkv_bias": sizes.biased}
            if any(sliding):
                kinds = ["sliding_attention" if one else "full_attention" for one in sliding]
                config |= {"sliding_window": window, "layer_types": kinds, "max_window_layers": sizes.layers}
        elif any(sliding):
            config["sliding_window"] = _same(layout, window, sliding)
    if any(sliding) and layout in (DEEPSEEK, DEEPSEEK_V3):
        notes.append(f"the base looks back {window} tokens; {layout.name} has no sliding window and looks back at all")
    if layout is DEEPSEEK:
        notes.append(f"{layout.architecture} is a class of vLLM and of {PLACE[:-2]}, not of transformers itself")
    return config, notes


def _rotary(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta where the config leaves it to its family's default."""
    said = base.get("rope_parameters")
    if isinstance(said, dict) and "rope_theta" not in said and base.get("rope_theta") is None:
        return {"rope_parameters": {**said, "rope_theta": 10000.0}}
    return {"rope_theta": 10000.0} if not isinstance(said, dict) and base.get("rope_theta") is None else {}


def _sliding(base: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, list[bool]]:
    """Return the window of the base's attention, and which layers have it."""
    window = base.get("sliding_window", WINDOW)
    if family == "llama" or window is None or (family != "mistral" and not base.get("use_sliding_window")):
        return None, [False] * layers
    kinds = base.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return window, [kind == "sliding_attention" for kind in kinds]
    first = 0 if family == "mistral" else base.get("max_window_layers", FULL_LAYERS)
    return window, [i >= first for i in range(layers)]


def _same(layout: MixtureLayout, window: int | None, sliding: Sequence[bool]) -> int | None:
    """Return the window of all layers. InputError: some have none."""
    if any(sliding) and not all(sliding):
        message = f"some layers of the base have a sliding window, and in {layout.name} all have it or none"
        raise InputError(message, hint="use_sliding_window: false in the base's config.json, if it is never needed")
    return window if any(sliding) else None


def _deepseek_v3(sizes: Sizes, *, normed: bool) -> dict[str, Any]:
    """Return the keys that GLM-4.5's class reads of a config."""
    return {
        "n_routed_experts": sizes.experts, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0,
        "moe_intermediate_size": sizes.width, "intermediate_size": sizes.width, "attention_bias": sizes.biased,
        "use_qk_norm": normed, "output_router_logits": False, "tie_word_embeddings": False,
    }  # fmt: skip


def _deepseek(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the keys that DeepSeek's own class reads of a config."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise InputError(
            "DeepSeek MoE: heads are hidden_size / num_attention_heads wide, the base has another head_dim"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "yarn"):
        raise InputError(f"DeepSeek MoE: has no rotary positions of type {kind!r}", hint="architecture: mixtral")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    scaling = None if kind == "default" else {**rope, "type": kind}
    return {
        "n_routed_experts": sizes.experts, "n_shared_experts": 1 if sizes.shared else None, "first_k_dense_replace": 0,
        "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True, "aux_loss_alpha": 0.0,
        "moe_intermediate_size": sizes.width, "intermediate_size": sizes.width, "rope_theta": theta,
        "rope_scaling": scaling, "attention_bias": bool(config.get("attention_bias")), "pretraining_tp": 1,
        "auto_map": {
            "AutoConfig": f"{PLACE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{PLACE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{PLACE}modeling_deepseek.DeepseekForCausalLM",
        },
    }  # fmt: skip
