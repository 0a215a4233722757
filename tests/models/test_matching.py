"""One model under several names: which tensor of one is which of another."""

from __future__ import annotations

import itertools
import time

import pytest

from deltamerge.errors import InputError
from deltamerge.models.matching import Names, match


def names_of(*models: list[str] | dict[str, tuple[int, ...]]) -> list[Names]:
    """The models matched; those that are lists have tensors of one shape."""
    shapes = [dict.fromkeys(model, (1,)) if isinstance(model, list) else model for model in models]
    return match(shapes, [f"m{i}" for i in range(len(models))])


def family(inner: list[str], block: str, parts: list[str], layers: int = 3) -> list[str]:
    return [*inner, *(f"{block}.{i}.{part}" for i in range(layers) for part in parts)]


BERT = family(["embeddings.word_embeddings.weight", "pooler.dense.bias"], "encoder.layer",
              ["attention.self.query.weight", "output.LayerNorm.bias"])  # fmt: skip
DISTILBERT = family(["embeddings.LayerNorm.bias"], "transformer.layer", ["attention.q_lin.weight", "ffn.lin1.bias"])
VIT = family(["embeddings.cls_token", "layernorm.weight"], "encoder.layer", ["attention.attention.query.weight"])
GPT2 = family(["wte.weight", "wpe.weight", "ln_f.bias"], "h", ["attn.c_attn.weight", "mlp.c_fc.bias"])
LLAMA = family(["embed_tokens.weight", "norm.weight"], "layers", ["self_attn.q_proj.weight", "mlp.up_proj.weight"])
BART = [*family(["shared.weight"], "encoder.layers", ["fc1.weight"]), *family([], "decoder.layers", ["fc1.weight"])]
T5 = [*family(["shared.weight"], "encoder.block", ["layer.0.SelfAttention.q.weight"]),
      *family(["encoder.final_layer_norm.weight"], "decoder.block", ["layer.1.EncDecAttention.q.weight"])]  # fmt: skip
FLAT = ["first.weight", "second.weight", "third.bias"]

HEADS = {
    "bert": (BERT, ["classifier.weight", "classifier.bias"]),
    "roberta": (BERT, ["classifier.dense.weight", "classifier.out_proj.weight"]),
    "distilbert": (DISTILBERT, ["pre_classifier.weight", "classifier.weight"]),
    "vit": (VIT, ["classifier.weight"]),
    "transformer": (GPT2, ["lm_head.weight"]),
    "model": (LLAMA, ["lm_head.weight"]),
    "deberta": (BERT, ["classifier.0.weight", "classifier.0.bias", "classifier.2.weight"]),
    "net": (FLAT, ["head.weight"]),
    "body": (["0.weight", "0.bias", "2.weight"], ["head.weight"]),
}


@pytest.mark.parametrize("prefix", HEADS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_headed_and_headless_models(prefix: str, order: tuple[int, ...]) -> None:
    base, head = HEADS[prefix]
    tuned = [f"{prefix}.{name}" for name in base] + head
    models = [base, tuned, [*tuned, "score.weight"]]
    found = dict(zip(order, names_of(*(models[i] for i in order)), strict=True))
    for name in base:
        assert (
            found[0].canonical[name] == found[1].canonical[f"{prefix}.{name}"] == found[2].canonical[f"{prefix}.{name}"]
        )
    assert all(found[1].canonical[name] == found[2].canonical[name] for name in tuned)
    assert all(len(set(names.canonical.values())) == len(names.canonical) for names in found.values())


def test_two_containers() -> None:
    conditional = [f"model.{name}" for name in BART] + ["final_logits_bias"]
    assert names_of(BART, conditional)[1].canonical == {n: n.removeprefix("model.") for n in conditional}
    sequence = [f"transformer.{name}" for name in T5] + ["classification_head.dense.weight"]
    encoder = [name for name in T5 if not name.startswith("decoder")]
    for model in names_of(T5, sequence, [*T5, "lm_head.weight"], encoder):
        assert model.canonical == {n: n.removeprefix("transformer.") for n in model.canonical}


def test_equal_or_unrelated_models_keep_their_names() -> None:
    headed = [f"model.{name}" for name in LLAMA] + ["lm_head.weight"]
    for models in (
        [headed] * 3,
        [headed, headed[:-1]],
        [GPT2, BERT],
        [["a"]],
        [["lm_head.dense.weight"], ["classifier.dense.weight"]],
    ):
        assert all(old == new for names in names_of(*models) for old, new in names.canonical.items())
        assert all(names.describe() == "" for names in names_of(*models))
    assert match([], []) == []


def test_different_depths_still_match() -> None:
    deep = [f"model.{name}" for name in family(["norm.weight"], "layers", ["up.weight"], layers=5)]
    shallow = family(["norm.weight"], "layers", ["up.weight"], layers=3)
    assert names_of(deep, shallow)[1].canonical == {name: f"model.{name}" for name in shallow}


def test_a_name_never_stands_for_two() -> None:
    for names in names_of(["a.x", "b.x", "c.x"], ["p.a.x", "a.x", "p.b.x", "p.c.x"]):
        assert len(set(names.canonical.values())) == len(names.canonical)


TEXT = {
    "model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,), "lm_head.weight": (9, 4),
    **{f"model.layers.{i}.{p}.weight": (6, 4) for i in range(3) for p in ("self_attn.q_proj", "mlp.up_proj")},
    **{f"model.layers.{i}.input_layernorm.weight": (4,) for i in range(3)},
}  # fmt: skip
TOWER = {
    "vision_tower.patch.weight": (8, 3, 2, 2), "vision_tower.norm.weight": (8,),
    "multi_modal_projector.linear.weight": (4, 8),
    **{f"vision_tower.layers.{i}.{p}.weight": (8, 8) for i in range(4) for p in ("self_attn.q_proj", "mlp.up_proj")},
}  # fmt: skip
VISUAL = {name.replace("vision_tower", "visual"): s for name, s in TOWER.items() if name.startswith("vision_tower")}
Shapes = dict[str, tuple[int, ...]]


def renamed(shapes: Shapes, *rules: tuple[str, str]) -> Shapes:
    """Every name by the first rule whose prefix it has."""
    result = {}
    for name, shape in shapes.items():
        old, new = next(((o, n) for o, n in rules if name.startswith(o)), ("", ""))
        result[new + name.removeprefix(old)] = shape
    return result


NOW = (("model.", "model.language_model."), ("vision_tower", "model.vision_tower"), ("visual", "model.visual"),
       ("multi", "model.multi"))  # fmt: skip
LLAVA_OLD = renamed(TEXT, ("", "language_model.")) | TOWER
LLAVA_NEW = renamed(TEXT | TOWER, *NOW)
QWEN_OLD = TEXT | VISUAL
QWEN_NEW = renamed(TEXT | VISUAL, *NOW)
HEADLESS = {name.removeprefix("model."): shape for name, shape in TEXT.items() if not name.startswith("lm_head")}
FORMS = {"text": TEXT, "headless": HEADLESS, "before 4.52": LLAVA_OLD, "after 4.52": LLAVA_NEW}
OTHERS = {"text": TEXT, "before 4.52": QWEN_OLD, "after 4.52": QWEN_NEW}


def plain(name: str) -> str:
    """What the tensor is, by hand: its name without the modules that only wrap."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


@pytest.mark.parametrize("forms", [FORMS, OTHERS], ids=["llava", "qwen"])
def test_models_before_and_after_renaming_and_the_text_model_alone(forms: dict[str, Shapes]) -> None:
    for order in itertools.permutations(forms.values()):
        found = names_of(*order)
        named: dict[str, str] = {}
        for names in found:
            for old, new in names.canonical.items():
                assert named.setdefault(plain(old), new) == new, old
        assert len(set(named.values())) == len(named)


def test_the_rules_are_named() -> None:
    assert names_of(QWEN_NEW, QWEN_OLD)[1].describe() == "model.* as model.language_model.*, visual.* as model.visual.*"
    assert names_of(TEXT, LLAVA_NEW)[1].describe() == "model.language_model.* as model.*"
    assert names_of(TEXT, QWEN_OLD)[1].describe() == ""


def test_two_places_that_fit_alike_are_refused_with_both() -> None:
    omni = {f"{part}.{name}": shape for part in ("talker", "thinker") for name, shape in TEXT.items()}
    with pytest.raises(InputError, match=r"two ways, \* as talker\.\* or \* as thinker\.\*"):
        names_of(omni, TEXT)
    wider = {n: (*s[:-1], 5) if n.startswith("talker") else s for n, s in omni.items()}
    assert names_of(wider, TEXT)[1].canonical == {name: f"thinker.{name}" for name in TEXT}


def test_shapes_decide_and_names_alone_do_where_no_shape_fits() -> None:
    """Towers of one kind are not taken for each other; a model of another size is matched, so that shapes are named."""
    audio = renamed(TOWER, ("vision_tower", "audio_tower"))
    assert all(old == new for old, new in names_of(TOWER | TEXT, audio | TEXT)[1].canonical.items() if "audio" in old)
    larger = {name: tuple(2 * n for n in shape) for name, shape in renamed(TEXT, ("", "language_model.")).items()}
    assert names_of(TEXT, larger)[1].canonical == {name: name.removeprefix("language_model.") for name in larger}


def test_extra_tensors_follow_their_module_and_the_head_has_one_name() -> None:
    more = TEXT | {"model.layers.3.eh_proj.weight": (4, 8)}
    assert names_of(LLAVA_NEW, more)[1].canonical["model.layers.3.eh_proj.weight"] == (
        "model.language_model.layers.3.eh_proj.weight"
    )
    assert names_of(LLAVA_OLD)[0].canonical["language_model.lm_head.weight"] == "lm_head.weight"


def test_a_module_inside_blocks_under_another_name() -> None:
    """Mixtral's `block_sparse_moe`, which transformers calls `mlp`: wholly, or not at all."""
    parts = {"gate.weight": (2, 4), "experts.gate_up_proj": (2, 12, 4), "experts.down_proj": (2, 4, 6)}
    old, new = (
        {f"layers.{i}.{m}.{p}": s for i in range(2) for p, s in parts.items()} for m in ("block_sparse_moe", "mlp")
    )
    assert names_of(new, old)[1].canonical == {name: name.replace("block_sparse_moe", "mlp") for name in old}
    part = {name: shape for name, shape in old.items() if "down" not in name}
    assert all(a == b for a, b in names_of(new, part)[1].canonical.items())


def test_mixtures_whose_names_have_no_common_end() -> None:
    """GraniteMoe and Aria, as saved and in memory: by shape, where nothing is left over and no two are alike."""
    saved = {"input_linear.weight": (3, 12, 4), "output_linear.weight": (3, 4, 6), "router.layer.weight": (3, 4)}
    memory = {"experts.gate_up_proj": (3, 12, 4), "experts.down_proj": (3, 4, 6), "router.weight": (3, 4)}
    old, new = (
        {f"model.layers.{i}.moe.{p}": s for i in range(2) for p, s in parts.items()} for parts in (saved, memory)
    )
    want = {
        f"model.layers.{i}.moe.{b}": f"model.layers.{i}.moe.{a}"
        for i in range(2)
        for a, b in zip(saved, memory, strict=True)
    }
    assert names_of(old | TEXT, new | TEXT)[1].canonical == {n: want.get(n, n) for n in (*new, *TEXT)}
    for extra in ({"model.layers.0.moe.x.weight": (7,)}, {f"model.layers.{i}.moe.x.weight": (3, 4) for i in range(2)}):
        assert all(a == b for a, b in names_of(old, new | extra)[1].canonical.items())
    flat = {"a.weight": (3, 4)}, {"b.weight": (3, 4)}
    one, other = ({f"layers.{i}.{p}": s for i in range(2) for p, s in parts.items()} for parts in flat)
    assert all(a == b for a, b in names_of(one, other)[1].canonical.items())


def test_many_and_hostile_names_take_linear_time() -> None:
    many = {f"model.layers.{i}.mlp.experts.{e}.{p}.weight": (2, 3) for i in range(4) for e in range(256) for p in "abc"}
    hostile = {f"{'a' * (i % 50)}{i}.{i}.x": (1,) for i in range(5_000)}
    alike = {f"a{i}.b.weight": (1,) for i in range(5_000)}
    start = time.process_time()
    names_of(many, {name.replace("model", "model.language_model"): shape for name, shape in many.items()})
    for names in (hostile, alike):
        names_of(names, dict(list(names.items())[1:]))
        names_of(names, {f"x.{name}": shape for name, shape in names.items()})
    assert time.process_time() - start < 10
