"""The contract's keys: what is accepted, every refusal with its place and words, defaults, and the schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamerge.errors import Problem, RecipeError
from deltamerge.methods.registry import MERGE, PRUNE
from deltamerge.recipe import checks, load, yaml_source
from deltamerge.recipe import schema as recipes
from deltamerge.recipe.prune import Pruning, effective_prune
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.values import parse_size, value_for
from deltamerge.tensors.names import TASK_HEAD
from deltamerge.tensors.traits import name_of

SCHEMA = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"

ONE = "base_model: b\nmodels:\n  - model: x\n"
TWO = """\
base_model: b
merge_method: task_arithmetic
models:
  - {model: x, parameters: {weight: 1.0}}
  - {model: y, parameters: {weight: 0.5}}
"""


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load.loads(text, "r.yaml")
    return [problem.render("r.yaml") for problem in caught.value.problems]


def prune_of(text: str, index: int = 0) -> Pruning:
    return effective_prune(load.loads(text), index)


# ---- what is read

CONTRACT = """\
# yaml-language-server: $schema=./recipe.schema.json
base_model: ./models/base
merge_method: task_arithmetic
models:
  - model: ./models/sentiment
    parameters: {weight: 1.0}
    prune: {method: dare, density: 0.01, q: output_change}
  - model: ./models/topic
    parameters: {weight: 0.8}
    prune: {method: wanda, density: 0.10}
parameters: {lambda: 1.0, normalize: false}
prune: {exclude: [classifier, lm_head]}
calibration:
  data: calib.jsonl
  text: text
  label: label
  task: text-classification
  metric: accuracy
  sequences: 50
  length: 128
  seeds: 4
dtype: bfloat16
out_dtype: null
tokenizer_source: base
seed: 0
output: {kind: model, path: merged, shard_size: 5GB}
"""


def parse(text: str) -> Recipe:
    """A recipe of the whole contract, whether or not this version can run it."""
    found: list[Problem] = []
    recipe = load.parse(yaml_source.loads(text, "r.yaml"), found)
    assert found == []
    assert [*checks.problems(recipe)] == []
    return recipe


def test_the_contract_s_example() -> None:
    recipe = parse(CONTRACT)
    assert recipe.names == ("./models/sentiment", "./models/topic")
    assert recipe.output.shard_size == 5 * 10**9
    assert recipe.calibration is not None
    assert recipe.calibration.per == "model"
    assert recipe.out_dtype is None
    assert recipe.dtype == "bfloat16"
    assert recipe.models[0].prune is not None
    assert recipe.models[0].prune.calibrated_q is not None
    assert recipe.models[0].prune.calibrated_q.scope == "global"
    assert load.loads(CONTRACT).models == recipe.models


# The shapes of mergekit's own examples.
MISTRAL_TIES = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters: {density: 0.5, weight: 0.5}
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters: {normalize: false, int8_mask: true}
dtype: float16
"""
LLAMA_TIES = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: garage-bAInd/Platypus2-13B
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters: {normalize: true, int8_mask: true}
dtype: fp16
"""
LINEAR = """\
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
"""
SLERP_AS_MODELS = """\
models: [{model: a}, {model: b}]
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
"""
SLERP_AS_SLICE = """\
slices:
  - sources:
      - {model: a, layer_range: [0, 40]}
      - {model: b, layer_range: [0, 40]}
merge_method: slerp
base_model: a
parameters: {t: 0.5}
"""
STACK = """\
slices:
  - sources: [{model: a, layer_range: [0, 24]}]
  - sources: [{model: b, layer_range: [20, 40]}]
merge_method: passthrough
dtype: float16
"""
FUSION = "merge_method: arcee_fusion\nbase_model: a\nmodels: [{model: a}, {model: b}]\ndtype: float16\n"
MODULES = """\
merge_method: linear
modules:
  text_decoder:
    models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
  vision:
    slices: [{sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}], residual_weight: 0.5}]
"""
TOKENS = (
    TWO
    + """\
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: x, force: true}
    <|renamed|>: {source: {kind: model_token, model: x, token: a}}
    <|by_id|>: {source: {kind: model_token, model: x, token_id: 3}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
chat_template: auto
"""
)


def test_parts_hold_the_models_of_slices_and_modules() -> None:
    recipe = load.loads(STACK)
    assert [model.model for model in recipe.models] == ["a", "b"]
    assert [part.ranges for part in recipe.parts] == [((0, 24),), ((20, 40),)]
    recipe = load.loads(MODULES)
    assert [(part.module, part.members) for part in recipe.parts] == [("text_decoder", (0, 1)), ("vision", (2,))]
    assert recipe.parts[1].places == (("modules", "vision", "slices", 0, "sources", 0),)


@pytest.mark.parametrize("text", [MISTRAL_TIES, LLAMA_TIES, LINEAR, SLERP_AS_MODELS, FUSION])
def test_mergekit_s_examples_run(text: str) -> None:
    recipe = load.loads(text)
    assert recipe.dtype == "float16"
    assert [recipe.models[i].model for i in recipe.fine_tunes] == [m["model"] for m in yaml.safe_load(text)["models"]][
        -len(recipe.fine_tunes) :
    ]


def test_every_key_of_a_tokenizer_is_read() -> None:
    recipe = load.loads(TOKENS)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.tokens["<|im_start|>"].force
    assert (recipe.tokenizer_of, recipe.tokenizer.pad_to_multiple_of, recipe.chat_template) == ("union", 64, "auto")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (ONE, "method_name", "task_arithmetic"),
        (ONE + "  - model: b\n", "method_name", "task_arithmetic"),
        (ONE + "dtype: bf16", "dtype", "bfloat16"),
        (ONE + "dtype: fp32", "dtype", "float32"),
        (ONE + "out_dtype: torch.float16", "out_dtype", "float16"),
        (ONE + "seed: 7", "seed", 7),
        (ONE + "name: no", "name", "no"),
        (ONE + "name: 010", "name", "010"),
        (ONE + "prune:", "prune", None),
        (ONE + "parameters:\n", "parameters", {}),
        (ONE + "template: x", "template", "x"),
        (ONE + "template: base", "template", "base"),
        (ONE + "template: b", "template", "b"),
        (ONE + "tokenizer: {source: base}", "tokenizer_of", "base"),
        (ONE + "tokenizer_source: x", "tokenizer_of", "x"),
        (ONE, "tokenizer_of", None),
        (ONE + "cuda: true\nlazy_unpickle: false", "seed", 0),
        (ONE + "parameters: {int8_mask: 1.0, normalize: yes, weight: 2}", "parameters",
         {"int8_mask": 1.0, "normalize": True, "weight": 2}),
        ("models: [{model: x}]\nmerge_method: passthrough", "fine_tunes", (0,)),
        ("models: [{model: {model: x, override_architecture: A}}]\nmerge_method: passthrough", "names", ("x",)),
        ("models: [{model: {model: {path: x, revision: v1}, lora: {path: y}}}]\nmerge_method: passthrough", "names",
         ("x@v1+y",)),
        ("models: [{model: x}]\nbase_model: {model: o/b, lora: l@2}", "base_model", "o/b+l@2"),
    ],
)  # fmt: skip
def test_accepted(text: str, key: str, value: object) -> None:
    assert getattr(load.loads(text), key) == value


def test_shorthand_and_full_name() -> None:
    recipe = load.loads("base_model: b\nmodels: [{model: ./x, name: sentiment}]\ntemplate: sentiment")
    assert recipes.model_name(recipe.models[0]) == "sentiment"
    assert recipe.method is MERGE["task_arithmetic"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5 kb", 1500), ("7", 7), (7, 7), ("200M", 2 * 10**8), ("1b", 1)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e9", 0, "0GB", True, "0.1B", None, "1" * 99])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_size(text)


# ---- what is refused: exactly these problems, in this order

REFUSED: dict[str, list[str]] = {
    "a: 1": [
        "r.yaml:1:1: a: unknown key\nhint: known here: architecture, balance, base_model, calibration, chat_template, "
        "config, dtype, experts, experts_per_token, gate_mode, merge_method, mergekit, models, modules, name, "
        "out_dtype, output, parameters, pickles, prune, seed, shared_experts, slices, study, template, tokenizer, "
        "tokenizer_source",
        "r.yaml:1:1: needs models\nhint: models: a list of {model: path or hub id}",
    ],
    # keys and types
    ONE + "    parmeters: {weight: 1}": [
        "r.yaml:4:5: models[0].parmeters: unknown key\nhint: did you mean 'parameters'?"
    ],
    ONE + "    prune: {method: dare, densty: 0.1, density: 1.5}": [
        "r.yaml:4:27: models[0].prune.densty: unknown key\nhint: did you mean 'density'?",
        "r.yaml:4:49: models[0].prune.density: must be in (0, 1], got 1.5",
    ],
    ONE + "    parameters: {densty: 0.1}": [
        "r.yaml:4:18: models[0].parameters.densty: unknown parameter of task_arithmetic\n"
        "hint: known here: int8_mask, lambda, normalize, weight"
    ],
    "base_model: b\nmodels: [{model: {path: x}}, {model: {model: {lora: x}}}]": [
        "r.yaml:2:18: models[0].model: must be text, or {model: …, lora: …}",
        "r.yaml:2:38: models[1].model: must be text, or {path: …, revision: …}",
    ],
    **{
        ONE + f"    parameters: {{weight: {text}}}": [
            f"r.yaml:4:26: models[0].parameters.weight: must be a number, got {text!r}"
        ]
        for text in ("010", "1:30", "0x1F", "1_000", "nan")
    },
    ONE + "    parameters: {weight: abc}": ["r.yaml:4:26: models[0].parameters.weight: must be a number, got 'abc'"],
    ONE + "    parameters: {weight: [1, x]}": [
        "r.yaml:4:30: models[0].parameters.weight[1]: must be a number, got 'x'"
    ],
    ONE + "    parameters: {weight: []}": [
        "r.yaml:4:26: models[0].parameters.weight: must be a number, got an empty list"
    ],
    ONE + "    parameters: {weight: .nan}": [
        "r.yaml:4:26: models[0].parameters.weight: must be a number, got '.nan'"
    ],
    ONE + "    parameters: {weight: 1e999}": [
        "r.yaml:4:26: models[0].parameters.weight: must be a finite number, got inf"
    ],
    ONE + "    parameters: {weight: }": ["r.yaml:4:26: models[0].parameters.weight: must be a number, got nothing"],
    ONE + "    parameters: {weight: [{filter: mlp, valu: 1}]}": [
        "r.yaml:4:27: models[0].parameters.weight[0]: needs value",
        "r.yaml:4:41: models[0].parameters.weight[0].valu: unknown key\nhint: did you mean 'value'?",
    ],
    ONE + "    parameters: {weight: [{filter: 3, value: q}]}": [
        "r.yaml:4:36: models[0].parameters.weight[0].filter: must be text, got 3\nhint: put it in quotes",
        "r.yaml:4:46: models[0].parameters.weight[0].value: must be a number, got 'q'",
    ],
    "base_model: 3\nmodels: [{model: x}]": [
        "r.yaml:1:13: base_model: must be text, got 3\nhint: put it in quotes"
    ],
    "base_model: b\nmodels: [{name: x}]": ["r.yaml:2:10: models[0]: needs model"],
    "base_model: b\nmodels: [{model: ''}]": ["r.yaml:2:18: models[0].model: must not be empty"],
    "base_model: b\nmodels: [7]": ["r.yaml:2:10: models[0]: must be a mapping of keys to values, got 7"],
    "base_model: b\nmodels:\n  model: x\n  weigth: 3": [
        "r.yaml:4:3: models[0].weigth: unknown key\n"
        "hint: known here: calibration, decay, model, name, parameters, prune, schedule, window",
    ],
    "base_model: b\nmodels: {model: x, decay: 0.5}": [
        "r.yaml:2:20: models[0].decay: is of schedule: ema\nhint: schedule: ema",
    ],
    "base_model: b\nmodels: 7": ["r.yaml:2:9: models: must be a list, got 7"],
    ONE + "prune: dare": ["r.yaml:4:8: prune: must be a mapping of keys to values, got 'dare'"],
    ONE + "seed: -1": ["r.yaml:4:7: seed: must be at least 0, got -1"],
    ONE + "seed: 1.5": ["r.yaml:4:7: seed: must be an integer, got 1.5"],
    ONE + "seed: 010": ["r.yaml:4:7: seed: must be an integer, got '010'"],
    ONE + "seed: 9223372036854775808": ["r.yaml:4:7: seed: must be less than 9223372036854775808, got "
                                        "9223372036854775808"],
    ONE + "dtype: bfloat8": [
        "r.yaml:4:8: dtype: must be one of bfloat16, float16, float32, float64, got 'bfloat8'\n"
        "hint: did you mean 'bfloat16'?"
    ],
    ONE + "output: {kind: moedl, shard_size: 5XB}": [
        "r.yaml:4:16: output.kind: must be one of model, delta, peft, sum, got 'moedl'\nhint: did you mean 'model'?",
        "r.yaml:4:35: output.shard_size: must be a size such as 5GB or 512MiB, got '5XB'",
    ],
    ONE + "calibration: {sequences: 0, text: [a, b, c], metric: acc}": [
        "r.yaml:4:14: calibration: needs data",
        "r.yaml:4:26: calibration.sequences: must be at least 1, got 0",
        "r.yaml:4:35: calibration.text: must be one field name, or two for sentence pairs, got a list",
        "r.yaml:4:54: calibration.metric: must be one of accuracy, matthews_correlation, f1, accuracy_f1, "
        "pearson_spearman, exact_match, loss, got 'acc'",
    ],
    ONE + "prune: {method: dare, density: 0.1, q: layer_mse}\ncalibration: {data: c.jsonl, per: merge, answer: x}": [
        "r.yaml:4:40: prune.q: with per: merge one lambda is searched, and no q\n"
        "hint: q: output_change or validation, without scope, search and bounds",
        "r.yaml:5:42: calibration.answer: has no effect without metric: exact_match",
    ],
    ONE + "    calibration: {data: c.jsonl, per: merge, answer: x}": [
        "r.yaml:4:34: models[0].calibration.per: is of the whole merge, and has no effect at a model\n"
        "hint: move it to the recipe's calibration",
        "r.yaml:4:46: models[0].calibration.answer: has no effect without metric: exact_match",
    ],
    "models: [{model: b, parameters: {weight: 1}}]\nmerge_method: linear\ncalibration: {data: c.jsonl, per: merge}": [
        "r.yaml:3:35: calibration.per: merge needs deltas, but linear has none\nhint: use task_arithmetic or ties",
    ],
    # which inputs
    "base_model: b": ["r.yaml:1:1: needs models\nhint: models: a list of {model: path or hub id}"],
    "base_model: b\nmodels: []": ["r.yaml:2:9: models: must not be empty\nhint: name at least one model"],
    "merge_method: linear\nmodules: {m: {models: []}}": [
        "r.yaml:2:23: modules.m.models: must not be empty\nhint: name at least one model"
    ],
    "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n- sources: []": [
        "r.yaml:4:12: slices[1].sources: must not be empty\nhint: name at least one model"
    ],
    ONE + "slices: [{sources: [{model: x, layer_range: [0, 2]}]}]": [
        "r.yaml:4:1: slices: cannot stand beside models\nhint: keep one of models, slices, modules",
    ],
    "slices: [{sources: [{model: x, layer_range: [0, 2]}, {model: y, layer_range: [0, 3]}]}]\nmerge_method: linear\n"
    "parameters: {weight: 1}": [
        "r.yaml:1:78: slices[0].sources[1].layer_range: has 3 layers, the first source of the slice has 2\n"
        "hint: layers are merged one to one",
    ],
    "base_model: b\nslices: [{sources: [{model: x, layer_range: [0, 2]}, {model: y, layer_range: [1, 3]}]}]\n"
    "merge_method: ties\nparameters: {weight: 1}": [
        "r.yaml:2:10: slices[0]: its sources lend different layers, so the layers of the base 'b' are not clear\n"
        "hint: list the base as a source, with its layer_range",
    ],
    "merge_method: passthrough\n"
    "slices: [{sources: [{model: x, layer_range: [0, 1]}, {model: y, layer_range: [0, 1]}]}]": [
        "r.yaml:2:20: slices[0].sources: passthrough takes 1 model, got 2",
    ],
    "merge_method: linear\nslices:\n- sources: [{model: x, layer_range: [0, 1], parameters: {weight: 1}}]\n"
    "- sources: [{model: y, layer_range: [0, 1], parameters: {wieght: 1}}]": [
        "r.yaml:4:58: slices[1].sources[0].parameters.wieght: unknown parameter of linear\n"
        "hint: did you mean 'weight'?",
    ],
    "base_model: b\nmerge_method: task_arithmetic\nmodules: {q: {models: [{model: x}]}, r: {models: [{model: y}]}}\n"
    "prune: {method: magnitude, density: 0.5, q: output_change}\ncalibration: {data: c.jsonl, per: merge}": [
        "r.yaml:5:35: calibration.per: merge needs one set of models: one lambda is searched\nhint: per: model",
    ],
    "slices: [{sources: [{model: x, layer_range: [2, 0]}, {model: y}]}]\nmerge_method: passthrough": [
        "r.yaml:1:45: slices[0].sources[0].layer_range: must be [first, end] with 0 <= first < end, got a list",
        "r.yaml:1:54: slices[0].sources[1]: needs layer_range",
    ],
    "merge_method: linear\nmodules: {text: {parameters: {weight: 1}}}": [
        "r.yaml:2:17: modules.text: needs either models or slices",
    ],
    "base_model: b\nmodels: [{model: x}, {model: x}]\nmerge_method: ties\nparameters: {weight: 1}": [
        "r.yaml:2:30: models[1].model: has the same name as models[0], 'x'\n"
        "hint: set a name of its own: masks are keyed by it"
    ],
    "base_model: b\nmodels: [{model: x, name: n}, {model: y, name: n}]\nmerge_method: ties\nparameters: {weight: 1}": [
        "r.yaml:2:48: models[1].name: has the same name as models[0], 'n'\n"
        "hint: set a name of its own: masks are keyed by it"
    ],
    ONE + "template: z": [
        "r.yaml:4:11: template: must be the name of a model, or base, got 'z'\nhint: known here: b, base, x"
    ],
    LINEAR + "base_model: z\ntemplate: base": [
        "r.yaml:8:11: template: must be the name of a model, or base, got 'base'\nhint: known here: a, b, c"
    ],
    LINEAR + "tokenizer_source: base": ["r.yaml:7:19: tokenizer_source: base needs base_model"],
    ONE + "tokenizer_source: base\ntokenizer: {source: x}": [
        "r.yaml:4:1: tokenizer_source: cannot stand beside tokenizer\nhint: keep one of the two"
    ],
    ONE + "tokenizer: {source: x, tokens: {a: {source: {kind: model_token, model: x}}}}": [
        "r.yaml:4:45: tokenizer.tokens.a.source: needs either token or token_id",
    ],
    # merge methods and their parameters
    TWO.replace("task_arithmetic", "task_aritmetic"): [
        "r.yaml:2:15: merge_method: unknown merge method 'task_aritmetic'\nhint: did you mean 'task_arithmetic'?"
    ],
    TWO.replace("merge_method: task_arithmetic", "parameters: {wieght: 2}"): [
        "r.yaml:1:1: needs merge_method\n"
        "hint: slerp, ties, dare_linear, … (the recipe schema lists them); only a single fine-tune has a default",
        "r.yaml:2:14: parameters.wieght: unknown parameter\nhint: did you mean 'weight'?",
    ],
    TWO.replace("base_model: b", "seed: 1"): [
        "r.yaml:2:15: merge_method: task_arithmetic needs base_model\nhint: name the model before fine-tuning"
    ],
    "models: [{model: x}]": [
        "r.yaml:1:1: task_arithmetic needs base_model\nhint: name the model before fine-tuning"
    ],
    "base_model: b\nmodels: [{model: b}]\nmerge_method: ties": [
        "r.yaml:2:9: models: ties needs at least 1 model besides the base"
    ],
    TWO.replace("task_arithmetic", "passthrough").replace("weight", "scale"): [
        "r.yaml:4:3: models: passthrough takes 1 model, got 2"
    ],
    TWO.replace(", parameters: {weight: 1.0}", ""): [
        "r.yaml:4:5: models[0]: needs a weight: task_arithmetic has no default\nhint: parameters: {weight: 1.0}"
    ],
    "base_model: b\nmerge_method: linear\nmodels: [{model: b}, {model: x}]": [
        "r.yaml:3:10: models[0]: needs a weight: linear has no default\nhint: parameters: {weight: 1.0}",
        "r.yaml:3:22: models[1]: needs a weight: linear has no default\nhint: parameters: {weight: 1.0}",
    ],
    TWO + "parameters: {lamda: 1, q: 0.5, density: 0.1, normalize: 2}": [
        "r.yaml:6:14: parameters.lamda: unknown parameter of task_arithmetic\nhint: did you mean 'lambda'?",
        "r.yaml:6:24: parameters.q: unknown parameter of task_arithmetic\nhint: it belongs under prune",
        "r.yaml:6:57: parameters.normalize: must be true or false, got 2",
    ],
    TWO.replace("{weight: 1.0}", "{weight: 1.0, normalize: true, lambda: 2}"): [
        "r.yaml:4:42: models[0].parameters.normalize: is for the whole merge\n"
        "hint: move it to the recipe's parameters",
        "r.yaml:4:59: models[0].parameters.lambda: is for the whole merge\n"
        "hint: move it to the recipe's parameters",
    ],
    TWO.replace("{weight: 1.0}", "{weight: true}"): [
        "r.yaml:4:37: models[0].parameters.weight: must be a number, got true"
    ],
    TWO.replace("task_arithmetic", "ties") + "parameters: {density: [1, 0.5, -1], normalize: [0, 1]}": [
        "r.yaml:6:32: parameters.density[2]: must be in [0, 1], got -1",
        "r.yaml:6:49: parameters.normalize[0]: must be true or false, got 0",
        "r.yaml:6:52: parameters.normalize[1]: must be true or false, got 1",
    ],
    TWO.replace("task_arithmetic", "dare_ties") + "parameters: {density: 0.1, rescale: [true, false]}": [
        "r.yaml:6:37: parameters.rescale: must be true or false, the same for every tensor, got a list"
    ],
    # pruning
    ONE + "prune: {method: dar, density: 0.1}": [
        "r.yaml:4:17: prune.method: unknown pruning method 'dar'\nhint: did you mean 'dare'?"
    ],
    ONE + "prune: {method: dare}": [
        "r.yaml:4:8: prune: dare needs a density\nhint: density: 0.1 keeps a tenth of the delta"
    ],
    ONE + "    prune: {method: magnitude}\nprune: {exclude: [x]}": [
        "r.yaml:4:12: models[0].prune: magnitude needs a density\nhint: density: 0.1 keeps a tenth of the delta"
    ],
    ONE + "prune: {density: 0.1}": [
        "r.yaml:4:9: prune.density: has no effect without a method\nhint: set method: dare, magnitude or structured"
    ],
    ONE + "    prune: {density: 0.1}": [
        "r.yaml:4:13: models[0].prune.density: has no effect without a method\n"
        "hint: set method: dare, magnitude or structured"
    ],
    ONE + "prune: {method: dare, density: 0, q: 1.5}": [
        "r.yaml:4:32: prune.density: must be in (0, 1], got 0",
        "r.yaml:4:38: prune.q: must be in (0, 1], got 1.5",
    ],
    ONE + "prune: {method: dare, density: [0.1, {value: 2}]}": [
        "r.yaml:4:33: prune.density[0]: must be a mapping of keys to values, got 0.1"
    ],
    ONE + "prune: {method: dare, density: [{filter: mlp, value: [0.1, 2]}]}": [
        "r.yaml:4:60: prune.density[0].value[1]: must be in (0, 1], got 2"
    ],
    ONE + "prune: {method: dare, density: 0.1, q: output}": [
        "r.yaml:4:40: prune.q: must be one of output_change, validation, layer_mse, got 'output'\n"
        "hint: did you mean 'output_change'?"
    ],
    ONE + "prune: {method: dare, density: 0.1, q: {objectiv: validation, bounds: [1, 0]}}": [
        "r.yaml:4:40: prune.q: needs objective",
        "r.yaml:4:41: prune.q.objectiv: unknown key\nhint: did you mean 'objective'?",
        "r.yaml:4:71: prune.q.bounds: must be [low, high] with 0 < low < high, got a list",
    ],
    ONE + "prune: {method: dare, density: 0.1, q: 0.5, rescale: l1}": [
        "r.yaml:4:45: prune.rescale: cannot stand beside q\nhint: keep one of the two"
    ],
    ONE + "prune: {method: dare, density: 0.1, q: output_change}": [
        "r.yaml:4:40: prune.q: a calibrated q needs calibration\nhint: calibration: {data: calib.jsonl}"
    ],
    ONE + "prune: {method: wanda, density: 0.1}": [
        "r.yaml:4:17: prune.method: wanda needs calibration\nhint: calibration: {data: calib.jsonl}"
    ],
    ONE + "calibration: {data: c}\nprune: {method: dare, density: 0.1, q: {objective: layer_mse, search: grid}}": [
        "r.yaml:5:71: prune.q.search: layer_mse is solved in closed form\nhint: leave search out"
    ],
    ONE + "calibration: {data: c}\nprune: {method: wanda, density: 1, q: {objective: output_change, "
    "search: gradient}}": [
        "r.yaml:5:74: prune.q.search: gradient needs scope layer or row\nhint: scope: layer"
    ],
    ONE + "calibration: {data: c}\nprune: {method: dare, density: 0.1, q: {objective: validation, search: gradient}}": [
        "r.yaml:5:72: prune.q.search: gradient needs objective output_change\nhint: or search: auto"
    ],
    ONE + "prune: {method: dare, density: 0.1, rescale: l3}": [
        "r.yaml:4:46: prune.rescale: must be one of l1, l2, linf, got 'l3'"
    ],
    ONE + "prune: {method: dare, density: 0.1, group: row, a: 0.1}": [
        "r.yaml:4:37: prune.group: has no effect with method dare\n"
        "hint: known here: budget, density, exclude, include, method, protect, q, rescale, sampling",
        "r.yaml:4:49: prune.a: has no effect with method dare\n"
        "hint: known here: budget, density, exclude, include, method, protect, q, rescale, sampling",
    ],
    ONE + "prune: {method: magnitude, density: 0.1, group: column}": [
        "r.yaml:4:49: prune.group: must be one of tensor, row, model, got 'column'"
    ],
    ONE + "prune: {method: dare, density: 0.1, include: ['('], exclude: lm_head}": [
        "r.yaml:4:47: prune.include[0]: not a regular expression (missing ), unterminated subpattern at position 0), "
        "got '('",
        "r.yaml:4:62: prune.exclude: must be a list, got 'lm_head'",
    ],
    ONE + "prune: {method: dare, density: 0.1, protect: {columns: {'[': [-1]}}}": [
        "r.yaml:4:57: prune.protect.columns.[: not a regular expression (unterminated character set at position 0), "
        "got '['",
        "r.yaml:4:63: prune.protect.columns.[[0]: must be at least 0, got -1",
    ],
    ONE + "prune: {method: dare, density: 0.1, protect: {massive_activations: 2}}": [
        "r.yaml:4:68: prune.protect.massive_activations: needs calibration\n"
        "hint: calibration: {data: calib.jsonl}, or name columns"
    ],
    ONE + "prune: {method: dare, density: 0.1, protect: {}}": [
        "r.yaml:4:46: prune.protect: needs massive_activations or columns\nhint: protect: {massive_activations: 3}"
    ],
    ONE + "calibration: {data: c}\nprune: {method: dare, density: 0.1, "
    "protect: {massive_activations: 2, columns: {a: [1]}}}": [
        "r.yaml:5:46: prune.protect: takes one of massive_activations, columns\n"
        "hint: protect: {massive_activations: 3}"
    ],
    ONE + "prune: {method: structured, density: 0.1}": [
        "r.yaml:4:8: prune: structured needs a\nhint: density = a · b: give a and b",
        "r.yaml:4:8: prune: structured needs b\nhint: density = a · b: give a and b",
    ],
    ONE + "prune: {method: structured, a: 0.1, b: 0.2, density: 0.1}": [
        "r.yaml:4:54: prune.density: must be a · b = 0.02, got 0.1\nhint: leave density out, or correct a or b"
    ],
    ONE + "prune: {method: structured, a: [0.1, 0.2], b: 0.2, density: 0.1}": [
        "r.yaml:4:61: prune.density: of structured is a · b\nhint: leave density out where a or b varies"
    ],
    LINEAR + "prune: {method: dare, density: 0.1}": [
        "r.yaml:7:17: prune.method: linear has no deltas to prune\nhint: use task_arithmetic"
    ],
    ONE + "  - {model: b, prune: {method: dare, density: 0.1}}": [
        "r.yaml:4:16: models[1].prune: the base has no delta to prune"
    ],
    # what is broken is not also missing
    ONE + "prune: {method: 3, density: 0.1}": [
        "r.yaml:4:17: prune.method: must be text, got 3\nhint: put it in quotes"
    ],
    ONE + "    prune: dare\nprune: {density: 0.1}": [
        "r.yaml:4:12: models[0].prune: must be a mapping of keys to values, got 'dare'"
    ],
    ONE + "prune: {method: dare, density: x}": ["r.yaml:4:32: prune.density: must be a number, got 'x'"],
    ONE + 'output: {path: "a\\0b"}': ["r.yaml:4:16: output.path: must not hold the character NUL, got 'a\\x00b'"],
    ONE + "merge_method: [ties]": ["r.yaml:4:15: merge_method: must be text, got a list"],
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    assert problems(text) == REFUSED[text]


def test_faults_of_every_kind_are_reported_together() -> None:
    found = problems(TWO.replace("weight: 0.5", "weight: x").replace("y,", "x,") + "sed: 1\nprune: {density: 2}\n")
    assert [line.split(": ")[1] for line in found] == [
        "models[1].model",
        "models[1].parameters.weight",
        "sed",
        "prune.density",
        "prune.density",
    ]


def test_a_hopeless_recipe_is_cut_short() -> None:
    assert len(problems("".join(f"k{i}: 1\n" for i in range(5000)))) == load.MAX_PROBLEMS


def test_later_problems_have_a_position() -> None:
    recipe = load.loads(TWO)
    problem = recipe.problem(("models", 1, "model"), "no such folder", "make it")
    assert problem.render("r.yaml") == "r.yaml:5:13: models[1].model: no such folder\nhint: make it"


def test_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TWO)
    assert load.load(tmp_path / "r.yaml").names == ("x", "y")
    with pytest.raises(RecipeError, match="no such file"):
        load.load(tmp_path / "none.yaml")


# ---- pruning, defaults and all


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("", Pruning("none")),
        ("prune: {exclude: [x]}", Pruning("none")),
        ("prune: {method: dare, density: 0.1}", Pruning("dare", density=0.1)),
        ("prune: {method: dare, density: 0.1, q: 1}", Pruning("dare", density=0.1, q=1)),
        ("prune: {method: dare, density: 0.1, rescale: l1}", Pruning("dare", density=0.1, rescale="l1")),
        ("prune: {method: magnitude, density: 0.1}", Pruning("magnitude", density=0.1, q=1.0, group="tensor")),
        (
            "prune: {method: magnitude, density: 0.1, q: 0.5, group: row}",
            Pruning("magnitude", density=0.1, q=0.5, group="row"),
        ),
        ("prune: {method: structured, a: 0.1, b: 0.1}", Pruning("structured", parameters={"a": 0.1, "b": 0.1})),
        (
            "prune: {method: structured, a: 0.1, b: 0.1, density: 0.01}",
            Pruning("structured", parameters={"a": 0.1, "b": 0.1}, density=0.01),
        ),
        ("prune: {method: dare, density: 0.1, exclude: []}", Pruning("dare", density=0.1, exclude=())),
        (
            "prune: {method: dare, density: 0.1, include: [attn], exclude: [a, b]}",
            Pruning("dare", density=0.1, include=("attn",), exclude=("a", "b")),
        ),
        ("parameters: {density: 0.2}\nprune: {method: dare}", Pruning("dare", density=0.2)),
        ("parameters: {density: 0.2}\nprune: {method: dare, density: 0.1}", Pruning("dare", density=0.1)),
        ("merge_method: dare_linear", Pruning("dare", density=1.0, exclude=())),
        ("merge_method: dare_linear\nparameters: {density: 0.2}", Pruning("dare", density=0.2, exclude=())),
        (
            "merge_method: dare_ties\nparameters: {density: 0.2, rescale: false}",
            Pruning("dare", density=0.2, q=1.0, exclude=()),
        ),
        (
            "merge_method: dare_ties\nparameters: {density: 0.2, rescale: false}\nprune: {q: 0.5}",
            Pruning("dare", density=0.2, q=0.5, exclude=()),
        ),
        (
            "merge_method: breadcrumbs\nparameters: {density: 0.4, gamma: 0.1, rescale: true}",
            Pruning("breadcrumbs", density=0.4, rescale="l1", parameters={"gamma": 0.1}, exclude=()),
        ),
        (
            "merge_method: della\nparameters: {density: 0.4, epsilon: 0.1}",
            Pruning("della", density=0.4, parameters={"epsilon": 0.1}, exclude=()),
        ),
        (
            "merge_method: breadcrumbs",
            Pruning("breadcrumbs", density=1.0, q=1.0, parameters={"gamma": 0.01}, exclude=()),
        ),
        (
            "merge_method: ram\nparameters: {epsilon: 1e-4}\nprune: {method: della, density: 0.5}",
            Pruning("della", density=0.5, parameters={"epsilon": 0.15}),
        ),
        ("merge_method: dare_ties\nparameters: {density: 0.2}\nprune: {method: none}", Pruning("none")),
        (
            "merge_method: dare_ties\nparameters: {density: 0.2}\nprune: {method: magnitude}",
            Pruning("magnitude", density=0.2, q=1.0, group="tensor"),
        ),
        ("merge_method: ties\nparameters: {density: 0.2}", Pruning("none")),
        ("merge_method: ties\nparameters: {density: 0.2}\nprune: {method: dare}", Pruning("dare", density=0.2)),
    ],
)
def test_effective_prune(keys: str, wanted: Pruning) -> None:
    assert prune_of(ONE + keys) == wanted


@pytest.mark.parametrize(
    ("own", "shared", "wanted"),
    [
        ("{density: 0.1}", "{method: dare, density: 0.5}", Pruning("dare", density=0.1)),
        ("{method: none}", "{method: dare, density: 0.5}", Pruning("none")),
        ("{q: 0.3}", "{method: dare, density: 0.5, rescale: l2}", Pruning("dare", density=0.5, q=0.3)),
        ("{rescale: l2}", "{method: dare, density: 0.5, q: 0.3}", Pruning("dare", density=0.5, rescale="l2")),
        ("{exclude: [z]}", "{method: dare, density: 0.5, exclude: [y]}", Pruning("dare", density=0.5, exclude=("z",))),
        (
            "{method: structured, a: 0.1, b: 0.1}",
            "{method: dare, density: 0.5}",
            Pruning("structured", parameters={"a": 0.1, "b": 0.1}),
        ),
    ],
)
def test_a_model_s_own_keys_win(own: str, shared: str, wanted: Pruning) -> None:
    text = f"{TWO}prune: {shared}\n".replace("{weight: 1.0}", f"{{weight: 1.0}}, prune: {own}")
    assert prune_of(text) == wanted
    assert prune_of(text, 1).method == "dare"


def test_a_listed_base_is_not_pruned() -> None:
    assert prune_of(ONE + "  - model: b\nprune: {method: dare, density: 0.1}", 1) == Pruning("none")


def test_filters_fall_through_to_the_next_level() -> None:
    text = TWO.replace(
        "{weight: 1.0}", "{weight: 1, density: {filter: attn, value: 0.3}}, prune: {density: {filter: mlp, value: 0.1}}"
    ).replace("{weight: 0.5}", "{weight: 0.5}, prune: {method: none}")
    prune = prune_of(text + "prune: {method: dare, q: [{filter: mlp, value: 0.5}]}")
    assert prune.density is not None
    assert [value_for(prune.density, name, 0.0) for name in ("mlp", "attn", "norm")] == [0.1, 0.3, 1.0]
    assert isinstance(prune.q, tuple)
    assert [value_for(prune.q, name, 0.0) for name in ("mlp", "norm")] == [0.5, None]
    magnitude = prune_of(text + "prune: {method: magnitude, q: [{filter: mlp, value: 0.5}]}")
    assert isinstance(magnitude.q, tuple)
    assert [value_for(magnitude.q, name, 0.0) for name in ("mlp", "norm")] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("classifier.weight", True), ("classifier.dense.weight", True), ("score.weight", True),
        ("lm_head.weight", True), ("cls.predictions.bias", True), ("model.lm_head.weight", True),
        ("bert.pooler.dense.weight", False), ("vit.embeddings.cls_token", False), ("my_score.weight", False),
    ],
)  # fmt: skip
def test_the_task_head(name: str, head: bool) -> None:
    assert bool(re.search(TASK_HEAD, name)) is head


# ---- tables, schema, imports


def test_tables_name_their_entries() -> None:
    assert all(key == method.name and ":" in name_of(method.function) for key, method in MERGE.items())
    assert all(key == method.name for key, method in PRUNE.items())
    assert all(method.implies_prune in {None, *PRUNE} for method in MERGE.values())


def test_the_committed_schema_is_current() -> None:
    wanted = json.dumps(recipes.schema(), indent=2, sort_keys=False) + "\n"
    assert SCHEMA.read_text(encoding="utf-8") == wanted, (
        "write it again: deltamerge schema > recipes/recipe.schema.json"
    )


def accepts(node: dict[str, Any], value: object) -> bool:
    """As much of JSON schema draft 7 as the recipe's uses."""
    if "$ref" in node:
        return accepts(recipes.schema()["$defs"][node["$ref"].rpartition("/")[2]], value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {
        "object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str),
        "number": number, "integer": number and isinstance(value, int), "boolean": isinstance(value, bool),
        "null": value is None,
    }  # fmt: skip
    kind = node.get("type", [])
    if kind and not any(kinds[one] for one in ([kind] if isinstance(kind, str) else kind)):
        return False
    if "enum" in node and value not in node["enum"]:
        return False
    if (
        isinstance(value, int | float)
        and number
        and not (
            node.get("minimum", value) <= value <= node.get("maximum", value) and value != node.get("exclusiveMinimum")
        )
    ):
        return False
    if isinstance(value, dict):
        known, others = node.get("properties", {}), node.get("additionalProperties", {})
        fine = set(node.get("required", [])) <= value.keys() and (others is not False or value.keys() <= known.keys())
        if not fine or not all(accepts(known.get(key, others or {}), item) for key, item in value.items()):
            return False
    if isinstance(value, list) and not all(accepts(node.get("items", {}), item) for item in value):
        return False
    return (
        all(accepts(part, value) for part in node.get("allOf", []))
        and ("anyOf" not in node or any(accepts(part, value) for part in node["anyOf"]))
        and ("oneOf" not in node or sum(accepts(part, value) for part in node["oneOf"]) == 1)
    )


@pytest.mark.parametrize("text", [MISTRAL_TIES, LLAMA_TIES, LINEAR, STACK, MODULES, TOKENS, ONE, TWO])
def test_the_schema_accepts_recipes(text: str) -> None:
    assert accepts(recipes.schema(), yaml_source.loads(text, "r.yaml").data)


@pytest.mark.parametrize(
    "keys",
    ["sed: 1", "seed: x", "dtype: bf17", "prune: {densty: 0.1}", "prune: {density: 1.5}", "prune: {method: dar}",
     "parameters: {wieght: 1}", "merge_method: tise", "output: {kind: x}", "prune: {q: x}"],
)  # fmt: skip
def test_the_schema_refuses_what_an_editor_should_underline(keys: str) -> None:
    assert not accepts(recipes.schema(), yaml_source.loads(ONE + keys, "r.yaml").data)


def test_every_key_is_described() -> None:
    schema = recipes.schema()
    for node in (schema, *schema["$defs"].values()):
        for name, key in node.get("properties", {}).items():
            assert "description" in key or "const" in key, name


def test_no_torch_is_imported() -> None:
    code = "import sys, deltamerge.recipe.schema; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- nothing but RecipeError, whatever the text

SAMPLES = (CONTRACT, MISTRAL_TIES, LLAMA_TIES, MODULES, TOKENS, STACK)
JUNK = st.sampled_from(
    ["", "-1", "x", "[]", "{}", "null", "{a: [1, x]}", "[{filter: 1}]", "1e400", "[0.5, {value: 2}]"]
)


def paths(value: object, loc: yaml_source.Loc = ()) -> list[yaml_source.Loc]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [loc, *(inner for key, item in items for inner in paths(item, (*loc, key)))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_recipe_is_read_or_refused(data: st.DataObject) -> None:
    tree = yaml_source.loads(data.draw(st.sampled_from(SAMPLES)), "r.yaml").data
    for _ in range(data.draw(st.integers(1, 3))):
        *holders, last = data.draw(st.sampled_from([loc for loc in paths(tree) if loc]))
        at = tree
        for part in holders:
            at = at[part]
        at[last] = yaml.safe_load(data.draw(JUNK))
    found: tuple[Problem, ...] = ()
    try:
        recipe = load.loads(yaml.safe_dump(tree))
    except RecipeError as error:
        found = error.problems
    else:
        assert all(effective_prune(recipe, i) for i in range(len(recipe.models)))
    assert all(problem.line and problem.column for problem in found)


@pytest.mark.parametrize(
    ("dtype", "hint"), [("float8_e4m3fn", "a quantization: fp8"), ("flot64", "did you mean 'float64'?")]
)
def test_a_dtype_of_8_bits_is_a_quantisation(dtype: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load.loads(f"merge_method: linear\nmodels: [{{model: ./a, parameters: {{weight: 1}}}}]\ndtype: {dtype}\n")
    assert hint in (caught.value.hint or "")
