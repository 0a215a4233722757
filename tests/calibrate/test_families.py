"""Families that calibration runs, and those that `check` refuses with the reason, from config.json alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from calibration_rows import rows
from conftest import write_json, write_tokenizer
from running import calibrate, make_plan
from safetensors.torch import load_file
from tiny_models import image_processor

from deltamerge.calibrate.model.blocks import BlockModel, from_reader
from deltamerge.calibrate.model.transformers_code import check_family
from deltamerge.calibrate.rows.batches import RowReader
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.errors import DeltamergeError, InputError

REFUSED = {
    "WhisperForConditionalGeneration": ("whisper", "takes input_features"),
    "CLIPModel": ("clip", "has two towers"),
    "SiglipModel": ("siglip", "has two towers"),
    "ClapModel": ("clap", "has two towers"),
    "Wav2Vec2ForCTC": ("wav2vec2", "takes input_values"),
    "Wav2Vec2Model": ("wav2vec2", "takes input_values"),
    "WhisperForAudioClassification": ("whisper", "takes input_features"),
    "TimesFmModel": ("timesfm", "takes past_values"),
    "ResNetModel": ("resnet", "takes pixel_values"),
    "LaserModel": ("laser", "transformers has no model class 'LaserModel'"),
    "DiaDecoder": ("dia_decoder", "transformers has no model class 'DiaDecoder'"),  # a part, which is not exported
}
PASS = {
    "T5ForConditionalGeneration": "t5",
    "T5Model": "t5",
    "UMT5ForConditionalGeneration": "umt5",
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
    "M2M100ForConditionalGeneration": "m2m_100",
    "PegasusForConditionalGeneration": "pegasus",
    "BartForConditionalGeneration": "bart",
    "MarianMTModel": "marian",
    "T5EncoderModel": "t5",
    "T5ForSequenceClassification": "t5",
    "BartForSequenceClassification": "bart",
    "CLIPTextModel": "clip_text_model",
    "XLNetForSequenceClassification": "xlnet",
    "LlamaForCausalLM": "llama",
    "Gemma3TextModel": "gemma3_text",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "BertForMaskedLM": "bert",
}
DECODERS = ("ForConditionalGeneration", "Whisper", "T5", "Bart")


def config_of(architecture: str, model_type: str) -> dict[str, Any]:
    both = architecture.startswith(DECODERS[1:]) or architecture.endswith(DECODERS[0])
    both &= not architecture.endswith(("EncoderModel", "AudioClassification")) and not model_type.startswith("qwen")
    return {"architectures": [architecture], "model_type": model_type} | ({"is_encoder_decoder": True} if both else {})


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_config_says_what_cannot_be_run(architecture: str) -> None:
    model_type, reason = REFUSED[architecture]
    with pytest.raises(InputError, match=re.escape(reason)) as error:
        check_family(config_of(architecture, model_type), "text")
    assert error.value.hint
    assert architecture in str(error.value)


@pytest.mark.parametrize("architecture", PASS)
def test_a_config_says_what_can_be_run(architecture: str) -> None:
    check_family(config_of(architecture, PASS[architecture]), "text")


@pytest.mark.parametrize("architecture", ["ConvNextForImageClassification", "ResNetModel", "ViTModel", "SwinModel"])
def test_pictures_run_picture_models(architecture: str) -> None:
    check_family({"architectures": [architecture], "model_type": "x"}, "picture")


def test_neither_torch_nor_transformers_is_imported_for_it() -> None:
    code = (
        "import sys\nfrom deltamerge.calibrate.model.transformers_code import check_family\n"
        "check_family({'architectures': ['LlamaForCausalLM'], 'model_type': 'llama'}, 'text')\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXT = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = TEXT | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = TEXT | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
               "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2,
               "max_position_embeddings": 40}  # fmt: skip
CONVNEXT = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32, "num_labels": 3}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
XLNET = TEXT | {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
TOWER = TEXT | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
RUN: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5EncoderModel": ("T5Config", T5, ""),
    "XLNetForSequenceClassification": ("XLNetConfig", XLNET, ""),
    "ConvNextForImageClassification": ("ConvNextConfig", CONVNEXT, ""),
    "SwinForImageClassification": ("SwinConfig", SWIN | {"num_labels": 3}, ""),
    "T5ForConditionalGeneration": ("T5Config", T5, ""),
    "T5Model": ("T5Config", T5, ""),
    "BartForConditionalGeneration": ("BartConfig", BART, ""),
    "CLIPModel": ("CLIPConfig", {"text_config": TOWER, "vision_config": VISION}, "has two towers"),
}
RECIPE = """\
base_model: ./base
models: [{model: ./tuned, name: t, prune: {method: dare, density: 0.3, q: {objective: output_change, scope: %s}}}]
calibration: {data: %s, sequences: 4, length: 12, seeds: 1}
"""


def pair(folder: Path, architecture: str, config: Any) -> Path:
    """A base and a fine-tune with random weights, a tokenizer and an image processor, and data of both kinds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).eval()
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder / "tuned")
    write_tokenizer(folder / "tuned", 96)
    rows(folder / "calib.jsonl", 12)
    return folder


def pictures(folder: Path, side: int) -> None:
    image = pytest.importorskip("PIL.Image")
    image_processor(folder / "tuned", side)
    (folder / "pictures").mkdir()
    for i in range(12):
        values = np.random.Generator(np.random.PCG64(i)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        image.fromarray(values).save(folder / "pictures" / f"{i}.png")


@pytest.mark.parametrize("architecture", RUN)
def test_what_passes_check_is_calibrated(tmp_path: Path, architecture: str) -> None:
    name, settings, reason = RUN[architecture]
    pair(tmp_path, architecture, getattr(transformers, name)(**settings))
    image = "Image" in architecture
    if image:
        pictures(tmp_path, settings["image_size"])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % ("layer", "pictures" if image else "calib.jsonl"))
    if reason:
        with pytest.raises(InputError, match=reason):
            make_plan(path, device="cpu", workers=1)
    else:
        make_plan(path, device="cpu", workers=1)
        assert calibrate(path, device="cpu", workers=1)["t"]["q"]


SAYING = {"T5ForConditionalGeneration": ("T5Config", T5), "BartForConditionalGeneration": ("BartConfig", BART),
          "PegasusForConditionalGeneration": ("PegasusConfig", BART), "MarianMTModel": ("MarianConfig", BART),
          "M2M100ForConditionalGeneration": ("M2M100Config", BART)}  # fmt: skip


@pytest.mark.parametrize("architecture", SAYING)
def test_a_decoder_is_given_what_it_is_to_say(tmp_path: Path, architecture: str) -> None:
    """Logits, losses and labels are those of the model's own forward with `labels`."""
    name, settings = SAYING[architecture]
    config = getattr(transformers, name)(**settings)
    pair(tmp_path, architecture, config)
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "tuned").eval()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "tuned")
    reads = RowReader(tmp_path / "tuned", config, task="causal-lm", length=12)
    pairs = [DataRow(("w5 w6 w7", "w9 w8 w7 w6 w5"), None, 1), DataRow(("w8 w9", "w7"), None, 2)]
    for some in ([DataRow("w5 w6 w7 w8", None, 1), DataRow("w9 w8", None, 2)], pairs):
        batches = reads.batches(some, labelled=True)
        (batch,), (said,) = batches.inputs, batches.labels or []
        labels = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, -100)
        given = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = model(**given, labels=labels, decoder_attention_mask=batch["decoder_attention_mask"])
        tensors = load_file(tmp_path / "tuned" / "model.safetensors")
        block = BlockModel(config, tensors, pad_token_id=reads.pad_token_id)
        ((logits,),) = block.run([batch], [from_reader(tensors.__getitem__)], lambda b, out: out.logits)
        assert logits is not None
        real = batch["decoder_attention_mask"].bool()
        torch.testing.assert_close(logits[real], wanted.logits[real], rtol=1e-4, atol=1e-4)
        left = (said[:, 1:] != -100) & (labels[:, :-1] != -100)
        assert torch.equal(said[:, 1:][left], labels[:, :-1][left])
        assert (said[:, 0] == -100).all()


SIZES = {
    r"vocab_size$|^n_words$": 96,
    r"(^|_)(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|width|hidden_dim|projection_dim)$": 32,
    r"(layers|depth|num_blocks|n_layer)$": 2,
    r"(attention_heads|n_heads?|num_heads|key_value_heads)$": 2,
    r"head_dim$|^d_kv$|q_lora_rank|kv_lora_rank|qk_rope_head_dim|qk_nope_head_dim|v_head_dim": 16,
    r"(intermediate|ffn|mlp|feed_forward).*(size|dim)$|^d_ff$|d_inner$|inner_dim$": 32,
    r"num_(local_|routed_)?experts$|n_routed_experts": 4,
    r"experts_per_tok": 2,
    r"max_position_embeddings|n_positions|max_source_positions|max_target_positions": 64,
    r"^image_size$": 32,
    r"^patch_size$": 4,
    r"pad_token_id": 0,
    r"bos_token_id|start_token_id": 1,
    r"eos_token_id": 2,
}  # fmt: skip
LARGEST = 6_000_000
PARTS = 12
TASKS = ("", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "CTC",
         "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "MASKED_LM")  # fmt: skip


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config that make it tiny."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            made[key] = small(value)
        elif type(value) is int or (value is None and key in ("pad_token_id", "bos_token_id", "eos_token_id")):
            size = next((size for pattern, size in SIZES.items() if re.search(pattern, key)), None)
            made |= {} if size is None else {key: size}
    return made


def architectures() -> list[tuple[str, str]]:
    """(model type, class) of every family of this transformers, for the tasks above."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for task in TASKS:
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})
        for kind, classes in table.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, kind)
    return [(kind, name) for name, kind in found.items()]


def build(folder: Path, kind: str, architecture: str) -> bool:
    """Whether transformers makes a tiny model of a family."""
    try:
        config_class = transformers.AutoConfig.for_model(kind).__class__
        config = config_class(**small(config_class().to_dict()))
        with torch.device("meta"):
            size = sum(p.numel() for p in getattr(transformers, architecture)(config).parameters())
        if size > LARGEST:
            return False
        pair(folder, architecture, config)
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_family_is_calibrated_or_refused(tmp_path: Path, part: int) -> None:
    """Whatever passes `check` is calibrated or says in one line why not; what is refused never reaches a model."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    counts = {"calibrated": 0, "refused by check": 0, "refused later": 0, "not built": 0}
    crashes = []
    for kind, architecture in architectures()[part::PARTS]:
        folder = tmp_path / "family"
        shutil.rmtree(folder, ignore_errors=True)
        if not build(folder, kind, architecture):
            counts["not built"] += 1
            continue
        image = "ForImageClassification" in architecture or "image_size" in json.loads(
            (folder / "tuned" / "config.json").read_text()
        )
        if image:
            pictures(folder, 32)
        path = folder / "recipe.yaml"
        path.write_text(RECIPE % ("layer", "pictures" if image else "calib.jsonl"))
        where = "refused by check"
        try:
            make_plan(path, device="cpu", workers=1)
            where = "refused later"
            calibrate(path, device="cpu", workers=1)
            where = "calibrated"
        except DeltamergeError as error:
            if where == "refused later":
                print(f"{architecture}: {error}")
            crashes += [f"{architecture}: {error}"] if "\n" in str(error) else []
        except Exception as error:
            crashes.append(f"{architecture}: {error!r}")
        counts[where] += 1
    print(counts)
    assert crashes == []
    assert counts["calibrated"] > 100 // PARTS


WRONG = {
    "no architecture": ({}, "its config.json names no architecture"),
    "an empty list": ({"architectures": []}, "its config.json names no architecture"),
    "no name": ({"architectures": ["a\x1b[2J b"]}, "names no class: 'a\\x1b[2J b'"),
    "a long type": ({"architectures": ["Nothing"], "model_type": "_" * 10**6}, "has no model class 'Nothing'"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_config_without_architecture(fault: str) -> None:
    config, reason = WRONG[fault]
    with pytest.raises(InputError, match=re.escape(reason)):
        check_family(config, "text")


def test_what_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    """A config and a tokenizer that `check` has no say in, broken in ways that only their own libraries notice."""
    config = transformers.BertConfig(**TOWER, max_position_embeddings=32)
    pair(tmp_path, "BertModel", config)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % ("layer", "calib.jsonl"))
    stated = json.loads((tmp_path / "tuned" / "config.json").read_text())
    tokenizer = tmp_path / "tuned" / "tokenizer.json"
    whole = tokenizer.read_text()
    for changes, said in (
        ({"hidden_act": "no such function"}, "transformers cannot build BertModel"),
        ({"hidden_size": [16]}, "transformers cannot"),
        ({"num_attention_heads": 0}, "transformers cannot"),
        ({}, "no usable tokenizer"),
    ):
        for model in ("base", "tuned"):  # in both, as models whose configs differ so are refused before
            write_json(tmp_path / model / "config.json", stated | changes)
        tokenizer.write_text(whole if changes else json.dumps({"model": {"type": "none", "vocab": {}}}))
        with pytest.raises(InputError, match=said) as error:
            calibrate(path, device="cpu", workers=1)
        assert "\n" not in str(error.value)
