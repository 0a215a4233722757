"""The probe of a merged language model: figures against transformers, and faults that it names."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from calls import call
from conftest import load_tensors, tiny_bert_pair, tiny_llama
from safetensors.torch import load_file, save_file

from deltamerge.apps.probe import PROMPTS, Probe, ProbedModel, probe, repeats
from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.errors import InputError

WORDS = "w5 w9 w11 w7 w30 w41 w6 w8 w60 w22"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate(("a", "b"), 1):
        tiny_llama(folder / name, seed=seed, base=base, sigma=0.05, dtype=torch.float32, tokenizer=True)
    rows = [{"prompt": "w5 w9", "completion": "w11"}] * 2
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    return folder


def test_figures_are_those_of_transformers(folder: Path, monkeypatch) -> None:
    import transformers

    batches: list[int] = []
    generate = BlockModel.generate
    monkeypatch.setattr(BlockModel, "generate", lambda *a, **more: batches.append(len(a[1])) or generate(*a, **more))
    found = probe(str(folder / "a"), [str(folder / "base")], rows=folder / "rows.jsonl", device="cpu")
    assert batches == [1, 1]  # all prompts of a model at once
    assert (found.prompts, found.texts) == (PROMPTS, 1)
    for one, name in ((found.merge, "a"), (found.parents[0], "base")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        encoded = tokenizer(WORDS, return_tensors="pt")
        with torch.no_grad():
            loss = model(**encoded, labels=encoded["input_ids"]).loss
        assert one.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        for prompt, answer in list(zip(found.prompts, one.answers, strict=True))[::2]:
            asked = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=8)
            made = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :]
            assert answer == tokenizer.decode(made, skip_special_tokens=True)


def test_prompts_of_rows_are_asked(folder: Path) -> None:
    found = probe(str(folder / "a"), [], rows=folder / "prompts.jsonl", device="cpu")
    assert found.prompts == ("w5 w9", "w5 w9")
    assert found.texts == 8


def test_chats_are_asked_by_the_models_own_template(folder: Path, tmp_path: Path) -> None:
    """A chat is asked whether it is answered or not, as the text that the template writes."""
    shutil.copytree(folder / "a", tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text("{% for one in messages %}{{ one.content }} w8 {% endfor %}")
    asks, texts = [{"role": "user", "content": "w5 w9"}], {"text": "w5 w9 w8 "}
    answer = {"role": "assistant", "content": "w11"}
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": asks}) + "\n" + json.dumps({"messages": [*asks, answer]})
    )
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": texts["text"], "completion": "w11"}) + "\n")
    chats, plain = (
        probe(str(tmp_path / "a"), [], rows=tmp_path / name, device="cpu") for name in ("chats.jsonl", "texts.jsonl")
    )
    assert chats.prompts == ("w5 w9", "w5 w9")
    assert chats.texts == plain.texts == 8
    assert chats.merge.answers == plain.merge.answers * 2


def test_a_tokenizer_for_short_texts_is_probed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    config = tmp_path / "a/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 20}))
    found, wanted = (probe(str(where / "a"), [], device="cpu").merge for where in (tmp_path, folder))
    assert found.answers == wanted.answers


REPEATS = {
    "the cat sat on the mat and looked at the dog": False,
    "yes yes yes": False,
    "no " * 8: True,
    "The answer is 4. The answer is 4. The answer is 4.": True,
    "a, b, c, d, e, f, g, h, i, j": False,
    "": False,
}


@pytest.mark.parametrize("answer", REPEATS)
def test_repetition(answer: str) -> None:
    assert repeats(answer) == REPEATS[answer]


def test_what_is_wrong_is_named_beside_the_parents() -> None:
    def said(perplexity: float, *answers: str) -> ProbedModel:
        return ProbedModel("m", perplexity, answers)

    parents = (said(20.0, "fine", ""), said(30.0, "fine", "fine"))
    whole = Probe(("x", "y"), 8, said(44.0, "fine", ""), parents)
    assert whole.remarks == []
    broken = Probe(("x", "y"), 8, said(46.0, "", " \n"), parents)
    assert broken.remarks == [
        "perplexity 46, of its parents at most 30",
        "it answers 2 of 2 prompts with nothing, its parents at most 1",
    ]
    looping = Probe(("x", "y"), 8, said(math.nan, "la " * 20, "fine"), parents)
    assert looping.remarks == [
        "its perplexity is not finite",
        "it answers 1 of 2 prompts with a phrase again and again, its parents at most 0",
    ]
    assert json.dumps(looping.describe(), allow_nan=False)


def test_eval_and_run_probe(folder: Path, tmp_path: Path, capsys) -> None:
    recipe = {"base_model": str(folder / "base"), "merge_method": "task_arithmetic", "dtype": "float32"}
    recipe |= {"models": [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "ab"]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = call(capsys, "run", tmp_path / "r.yaml", "--probe", "--json", "--device", "cpu")
    assert code == 0, err
    merged = tmp_path / "r-merged"
    seen = json.loads(out)["probe"]
    assert [Path(one["model"]).name for one in seen["models"]] == ["r-merged", "base", "a", "b"]
    code, out, err = call(capsys, "eval", merged, folder / "a", "--probe", "--json", "--device", "cpu")
    assert code == 0, err
    assert json.loads(out)["models"][0] == seen["models"][0]
    tensors = load_file(merged / "model.safetensors")
    tensors["lm_head.weight"] = 40 * torch.nn.functional.normalize(torch.randn(tensors["lm_head.weight"].shape))
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    code, out, err = call(capsys, "eval", merged, folder / "a", folder / "b", "--probe", "--device", "cpu")
    assert code == 0, err
    assert f"wrong with {merged}: perplexity " in out
    assert PROMPTS[0] in out
    assert load_tensors(folder / "a")


def test_what_cannot_be_probed(folder: Path, tmp_path: Path, capsys) -> None:
    _, tune = tiny_bert_pair(tmp_path, tokenizer=True)
    with pytest.raises(InputError, match="is no language model"):
        probe(str(tune), [], device="cpu")
    (tmp_path / "r.yaml").write_text(f"base_model: {tmp_path}/base\nmodels: [{{model: {tune}}}]\n")
    code, _, err = call(capsys, "run", tmp_path / "r.yaml", "--probe", "--device", "cpu")
    assert code == 0
    assert "warning: --probe: " in err
    assert (tmp_path / "r-merged").is_dir()
    code, _, err = call(capsys, "eval", folder / "a", "--probe", "--sequences", "3")
    assert (code, "--probe takes" in err) == (2, True)
