"""`output: {kind: peft, rank: …}`: the LoRA that is the best of its rank in float64, and that plain PEFT loads."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import LLAMA, adapt, load, peft
from conftest import load_tensors, tiny_llama
from quantised_models import fp8_checkpoint
from running import run
from safetensors.torch import load_file
from tiny_models import batches, make

from deltamerge.cli import main, result
from deltamerge.errors import DeltamergeError
from deltamerge.methods.low_rank import Wanted, factor, factor_product
from deltamerge.outputs.lora_file import LayerRank, LowRankSummary, RankSpectrum, greedy
from deltamerge.run.lock import verify

BASE = "base_model: base\nmodels: [{model: tuned}]\n"
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def tune(base: Path, folder: Path, architecture: str, *, rank: int = 0, only: str = "", seed: int = 3) -> None:
    """A fine-tune of every parameter whose name holds `only`; matrices by a delta of that rank, if it is given."""
    model = load(architecture, base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if rank and parameter.dim() == 2:
                noise = noise[:, :rank] @ torch.randn(rank, noise.shape[1], generator=generator)
            parameter.add_(0.05 * noise)
    model.save_pretrained(folder)


def lora(folder: Path, output: str, recipe: str = BASE, name: str = "out", **options: Any) -> Any:
    path = folder / f"{name}.yaml"
    path.write_text(f"{recipe}output: {{kind: peft, {output}}}\n")
    return run(path, folder / name, **options)


def adapted(architecture: str, base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(architecture, base), adapter).eval()


def outputs(model: Any, architecture: str) -> list[torch.Tensor]:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [model(**batch)[0] for batch in batches(architecture)]


def products(folder: Path) -> dict[str, np.ndarray]:
    """B A of every module in float64, as (out, in · …)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            a = tensors[name.replace("lora_B", "lora_A")].double().flatten(1).numpy()
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            found[module] = b.double().flatten(1).numpy() @ a
    return found


def truncated(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


CASES = [
    ("LlamaForCausalLM", WIDE | {"tie_word_embeddings": False}, False),
    ("GPT2LMHeadModel", {}, True),
    ("BertForSequenceClassification", {}, False),
    ("ViTForImageClassification", {}, False),
]


@pytest.mark.parametrize(("architecture", "settings", "turned"), CASES)
def test_the_best_of_its_rank_in_plain_peft(
    tmp_path: Path, architecture: str, settings: dict[str, Any], turned: bool
) -> None:
    make(architecture, tmp_path / "base", **settings)
    tune(tmp_path / "base", tmp_path / "tuned", architecture)
    made = lora(tmp_path, "rank: 4")
    assert verify(tmp_path / "out", 1)
    assert not lora(tmp_path, "rank: 4").made  # it is up to date
    base, model = load(architecture, tmp_path / "base").state_dict(), load(architecture, tmp_path / "tuned")
    found, layers = products(tmp_path / "out"), made.lock["lora"]["tensors"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert len(found) == len(layers) > 5
    assert not set(config["modules_to_save"]) & found.keys()
    for module, product in found.items():
        weight = model.get_submodule(module).weight
        start = base[f"{module}.weight"].double()
        delta = (weight.detach().double() - start).flatten(1).numpy()
        delta = delta.T if turned else delta
        np.testing.assert_allclose(product, truncated(delta, 4), atol=1e-5 * np.abs(delta).max())
        s = np.linalg.svd(delta, compute_uv=False) ** 2
        kept = float(f"{s[:4].sum() / s.sum():.4g}")
        assert any(layer["energy"] == pytest.approx(kept, abs=2e-4) for layer in layers.values())
        change = torch.from_numpy(np.ascontiguousarray(product.T if turned else product)).reshape(weight.shape)
        with torch.no_grad():
            weight.copy_((start + change).float())
    assert {layer["rank"] for layer in layers.values()} == {4}
    # PEFT computes what the base with these products does, whole tensors included
    got = outputs(adapted(architecture, tmp_path / "base", tmp_path / "out"), architecture)
    for one, two in zip(got, outputs(model, architecture), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "settings", "turned"), CASES[:2])
@pytest.mark.parametrize("more", ["energy: 1", "rank: 1000", "rank: 1000, dora: true"])
def test_all_ranks_are_the_fine_tune(
    tmp_path: Path, architecture: str, settings: dict[str, Any], turned: bool, more: str
) -> None:
    """A rank beyond the sides is all there are; a layer of a smaller rank is in rank_pattern."""
    make(architecture, tmp_path / "base", **settings)
    tune(tmp_path / "base", tmp_path / "tuned", architecture, rank=3)
    lora(tmp_path, more)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3  # what is below float32's rounding is no rank
    got = outputs(adapted(architecture, tmp_path / "base", tmp_path / "out"), architecture)
    for one, two in zip(got, outputs(load(architecture, tmp_path / "tuned"), architecture), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    (tmp_path / "m.yaml").write_text("merge_method: passthrough\nmodels: [{model: base+out}]\n")
    merged = load_tensors(run(tmp_path / "m.yaml", tmp_path / "merged").folder)
    for name, tensor in load_tensors(tmp_path / "tuned").items():
        if name in merged:
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_ranks_by_energy_and_by_budget(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", **WIDE, tie_word_embeddings=False)
    tune(tmp_path / "base", tmp_path / "tuned", "LlamaForCausalLM", only="proj")
    deltas = {n: t - load_tensors(tmp_path / "base")[n] for n, t in load_tensors(tmp_path / "tuned").items()}
    spectra = {n: np.linalg.svd(d.double().numpy(), compute_uv=False) ** 2 for n, d in deltas.items() if "proj" in n}
    layers = lora(tmp_path, "energy: 0.6", name="energy").lock["lora"]["tensors"]
    for name, s in spectra.items():
        assert layers[name]["rank"] == 1 + int(np.flatnonzero(np.cumsum(s) >= 0.6 * s.sum())[0]), name
    config = json.loads((tmp_path / "energy" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    size = 60_000
    made = lora(tmp_path, f"budget: {size}, values: float32", name="budget")
    file = tmp_path / "budget" / "adapter_model.safetensors"
    assert 0.95 * size < file.stat().st_size == made.nbytes <= size
    ranks = {name: layer["rank"] for name, layer in made.lock["lora"]["tensors"].items()}
    prices = {name: 4 * sum(deltas[name].shape) for name in spectra}
    header = size - sum(ranks[name] * price for name, price in prices.items())
    even = (size - header) // sum(prices.values())
    kept, evenly = (sum(s[: rank(n)].sum() for n, s in spectra.items()) for rank in (ranks.get, lambda _: even))
    assert kept > evenly
    assert len(set(ranks.values())) > 2
    for folder in ("energy", "budget"):
        got = outputs(adapted("LlamaForCausalLM", tmp_path / "base", tmp_path / folder), "LlamaForCausalLM")
        assert all(bool(torch.isfinite(one).all()) for one in got)


def test_same_bytes_whatever_the_workers_and_tiles(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", **WIDE)
    tune(tmp_path / "base", tmp_path / "tuned", "LlamaForCausalLM", only="proj")
    files = [
        (lora(tmp_path, "rank: 5", name=name, **more).folder / "adapter_model.safetensors").read_bytes()
        for name, more in (("one", {"workers": 1}), ("three", {"workers": 3}))
    ]
    assert files[0] == files[1]


BAD = [
    ("budget: 300", "", "a budget of 300 bytes holds no rank"),
    ("rank: 4, whole: refuse", "", "changed, and without factors: .*embed_tokens"),
    ("rank: 4, targets: [nowhere]", "", "'nowhere' finds no weight"),
    ("rank: 0", "", "output.rank"),
    ("energy: 1.5", "", "output.energy"),
    ("energy: 0.5, budget: 1MB", "", "cannot stand beside energy"),
    ("rank: 4, values: int8", "", "factors are float32 or bfloat16"),
    ("whole: drop", "", "needs a rank, an energy or a budget"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("LlamaForCausalLM", folder / "base", **WIDE)
    tune(folder / "base", folder / "tuned", "LlamaForCausalLM")
    return folder


@pytest.mark.parametrize(("output", "recipe", "message"), BAD)
def test_what_is_refused(llama: Path, output: str, recipe: str, message: str) -> None:
    with pytest.raises(DeltamergeError, match=message):
        lora(llama, output, recipe or BASE, name="bad")
    assert not (llama / "bad").exists()


def test_deltas_that_are_nothing_or_no_numbers(llama: Path) -> None:
    _save(llama, "copy", load_tensors(llama / "base"))
    with pytest.raises(DeltamergeError, match="nothing differs from the base"):
        lora(llama, "rank: 4", BASE.replace("tuned", "copy"), name="bad")
    tensors = load_tensors(llama / "tuned")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    _save(llama, "broken", tensors)
    with pytest.raises(DeltamergeError, match=r"^tensor \S+layers\.1\.mlp\.up_proj\.weight: its delta is not finite"):
        lora(llama, "rank: 4", BASE.replace("tuned", "broken"), name="bad")


def _save(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    (folder / name).mkdir(exist_ok=True)
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / name / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30), pytest.param(1100, 1030, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weighed", [False, True])
def test_factors_are_those_of_float64(m: int, n: int, weighed: bool) -> None:
    """A large matrix by iteration: what it misses is within what it says, and as good as nothing."""
    rng = np.random.default_rng(0)
    rank, scale = 6, 1 / (1 + np.arange(min(m, n)))
    left, right = rng.standard_normal((m, min(m, n))), rng.standard_normal((min(m, n), n))
    delta = ((left * scale) @ right).astype(np.float32)
    x = rng.standard_normal((3 * n, n)) * np.exp(rng.standard_normal(n)) if weighed else np.eye(n)
    c = x.T @ x / len(x) if weighed else None
    root = np.linalg.cholesky(c) if c is not None else np.eye(n)
    found = factor(delta, Wanted(rank), (1, 2), c)
    u, s, _ = np.linalg.svd(delta.astype(np.float64) @ root, full_matrices=False)
    best = u[:, :rank] @ (u[:, :rank].T @ delta.astype(np.float64))
    total, kept = (s**2).sum(), (s[:rank] ** 2).sum()

    def lost(product: np.ndarray) -> float:
        return float((((delta - product) @ root) ** 2).sum())

    product = found.b.astype(np.float64) @ found.a
    assert found.gain == pytest.approx(total, rel=1e-5)
    assert lost(best) - 1e-6 * total <= lost(product) <= lost(best) + found.missed * total + 1e-6 * total
    assert found.gains.sum() == pytest.approx(total - lost(product), rel=1e-4)
    assert found.missed <= 0.005
    assert found.energies.sum() == pytest.approx((product**2).sum(), rel=1e-4)
    if min(m, n) <= 1024:
        np.testing.assert_allclose(product, best, atol=1e-5 * np.abs(best).max())
        assert found.gains.sum() == pytest.approx(kept, rel=1e-9)
        assert not found.missed
        wide = factor_product(left * scale, right, Wanted(rank), c)
        np.testing.assert_allclose(wide.b.astype(np.float64) @ wide.a, best, atol=1e-4 * np.abs(best).max())


def test_a_budget_goes_where_it_keeps_most() -> None:
    spectra = {"a": RankSpectrum(np.array([9.0, 4.0, 1.0]), 10), "b": RankSpectrum(np.array([8.0, 0.5]), 20)}
    assert greedy(spectra, 40) == {"a": 2, "b": 1}
    assert greedy(spectra, 9) == {"a": 0, "b": 0}
    assert greedy(spectra, 1000) == {"a": 3, "b": 2}


CALIBRATED = """
base_model: base
models: [{model: tuned}]
calibration: {data: rows.jsonl, sequences: 8, length: 12}
"""


def test_weighed_by_the_inputs(tmp_path: Path) -> None:
    """The change of the layers' outputs on the rows is less than by plain SVD, and just what the lock says."""
    tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    tune(tmp_path / "base", tmp_path / "tuned", "LlamaForCausalLM", only="proj")
    (tmp_path / "tuned" / "tokenizer.json").write_bytes((tmp_path / "base" / "tokenizer.json").read_bytes())
    (tmp_path / "tuned" / "tokenizer_config.json").write_bytes((tmp_path / "base/tokenizer_config.json").read_bytes())
    texts = [" ".join(f"w{4 + 7 * j % 92}" for j in range(10))] * 30  # whichever of them are searched on
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    weighed = lora(tmp_path, "rank: 4", CALIBRATED, name="weighed")
    lora(tmp_path, "rank: 4", name="plain")
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "tuned"), load("LlamaForCausalLM", tmp_path / "tuned")
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0].double()))
    with torch.no_grad():
        for text in texts[:1]:
            model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=12))
    base, tuned = load_tensors(tmp_path / "base"), load_tensors(tmp_path / "tuned")
    better, plain = products(tmp_path / "weighed"), products(tmp_path / "plain")
    for name, inputs in seen.items():
        x = torch.cat(inputs).numpy()
        delta = (tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()).numpy()

        def lost(product: np.ndarray, delta: np.ndarray = delta, x: np.ndarray = x) -> float:
            return float(((x @ (delta - product).T) ** 2).sum() / ((x @ delta.T) ** 2).sum())

        layer = weighed.lock["lora"]["tensors"][f"{name}.weight"]
        assert 1 - layer["output"] == pytest.approx(lost(better[name]), rel=0.02, abs=2e-4)
        assert lost(better[name]) <= lost(plain[name]) + 1e-6
        assert layer["energy"] <= 1
    assert "of the outputs" in (tmp_path / "weighed" / "README.md").read_text()


def test_heads_alone_are_kept_whole(tmp_path: Path) -> None:
    make("BertModel", tmp_path / "base")
    tune(tmp_path / "base", tmp_path / "tuned", "BertForSequenceClassification")
    made = lora(tmp_path, "rank: 4, whole: heads", name="heads")
    config = json.loads((tmp_path / "heads" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert "left out, though it differs" in (made.folder / "README.md").read_text()
    lora(tmp_path, "rank: 4, whole: drop", name="dropped")
    assert not json.loads((tmp_path / "dropped" / "adapter_config.json").read_text())["modules_to_save"]
    for name in ("heads", "dropped"):
        architecture = "BertForSequenceClassification"
        outputs(adapted(architecture, tmp_path / "base", tmp_path / name), architecture)


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ([], ["classifier"]),
        (["--for", "vllm"], None),
        (["--for", "peft"], ["classifier", "LayerNorm"]),
        (["--whole", "heads"], ["classifier"]),
    ],
)
def test_what_is_stored_whole_is_what_the_reader_loads(
    tmp_path: Path, capsys: Any, flags: list[str], saved: list[str] | None
) -> None:
    """A task's head that the base lacks stays, but for vLLM; embeddings and norms are PEFT's alone."""
    make("BertModel", tmp_path / "base")
    tune(tmp_path / "base", tmp_path / "tuned", "BertForSequenceClassification")
    arguments = [str(tmp_path / "tuned"), str(tmp_path / "base"), "--lora", "4", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main(["extract", *arguments, *flags])
    err = capsys.readouterr().err
    assert (left.value.code, err if left.value.code else "") == (0, "")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    stored = config["modules_to_save"] or []
    assert all(any(wanted in module for module in stored) for wanted in saved or ())
    assert bool(stored) == (saved is not None)
    assert ("whole parts none\n" in err) == (saved is None)
    assert ("left out, though it differs" in err) == (flags != ["--for", "peft"])
    assert not re.search(r"^encoder|layer\.0:", err, re.MULTILINE)


def test_a_language_models_head_is_no_tasks_head(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", tie_word_embeddings=False)
    tune(tmp_path / "base", tmp_path / "tuned", "LlamaForCausalLM")
    for whole, kept in (("heads", ["lm_head"]), ("task_heads", None)):
        lora(tmp_path, f"rank: 4, whole: {whole}", name=whole)
        config = json.loads((tmp_path / whole / "adapter_config.json").read_text())
        assert (config["modules_to_save"] or None) == kept


ADAPTERS = """
base_model: base
merge_method: {method}
models:
  - {{model: base+a, parameters: {{weight: {weights[0]}}}{prune}}}
  - {{model: base+b, parameters: {{weight: {weights[1]}}}{prune}}}
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "method", "weights", "output", "prune"),
    [
        ("cat", "task_arithmetic", (0.7, -0.4), "energy: 1", ""),
        ("svd", "task_arithmetic", (0.7, 0.4), "rank: 3", ""),
        ("ties_svd", "ties", (1, 1), "rank: 3", ""),
        ("magnitude_prune_svd", "task_arithmetic", (0.7, 0.4), "rank: 3", ", prune: {method: magnitude, density: 0.5}"),
    ],
)
def test_adapters_into_one_as_peft_combines_them(
    tmp_path: Path, kind: str, method: str, weights: tuple[float, float], output: str, prune: str, dtype: torch.dtype
) -> None:
    """Equal to PEFT's add_weighted_adapter, also on a base of 16 bits, whose rounding the updates never see."""
    model, _ = make("LlamaForCausalLM", tmp_path / "base", **WIDE)
    model.to(dtype).save_pretrained(tmp_path / "base")
    settings = [{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}]
    settings.append({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": True})
    for seed, (name, own) in enumerate(zip("ab", settings, strict=True)):
        adapt(load("LlamaForCausalLM", tmp_path / "base").float(), tmp_path / name, seed, **own)
    recipe = ADAPTERS.format(method=method, weights=weights, prune=prune)
    if method == "ties":
        recipe += "parameters: {density: 0.5}\n"
    made = lora(tmp_path, f"{output}, values: float32", recipe)
    want = load("LlamaForCausalLM", tmp_path / "base").float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = peft.PeftModel.from_pretrained(want, tmp_path / "a", adapter_name="a")
        want.load_adapter(tmp_path / "b", adapter_name="b")
        density = {} if kind in ("cat", "svd") else {"density": 0.5}
        want.add_weighted_adapter(["a", "b"], list(weights), "merged", combination_type=kind, svd_rank=3, **density)
    found = products(tmp_path / "out")
    assert len(found) == 9 == len(made.lock["lora"]["tensors"])
    for module, product in found.items():
        expected = want.base_model.model.get_submodule(module).get_delta_weight("merged").detach().numpy()
        np.testing.assert_allclose(product, expected, atol=2e-6 * max(1, np.abs(expected).max()))


def test_an_adapter_of_a_smaller_rank(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path / "base", **WIDE)
    adapt(load("LlamaForCausalLM", tmp_path / "base"), tmp_path / "a", **LLAMA)
    old = load_file(tmp_path / "a" / "adapter_model.safetensors")
    lora(tmp_path, "rank: 2", "base_model: base\nmodels: [{model: base+a}]\n")
    for module, product in products(tmp_path / "out").items():
        stem = f"base_model.model.{module}.lora_"
        delta = old[f"{stem}B.weight"].double().numpy() @ old[f"{stem}A.weight"].double().numpy() * 7 / 4
        np.testing.assert_allclose(product, truncated(delta, 2), atol=1e-6)


def test_experts_in_other_tensors_are_refused_by_name(tmp_path: Path) -> None:
    """transformers fuses what the files store one by one, so that no module has them."""
    import transformers

    settings = {"vocab_size": 60, "num_key_value_heads": 2, "num_local_experts": 2, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**WIDE, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tensors = {name: tensor + 0.01 for name, tensor in load_tensors(tmp_path / "base").items()}
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert expert in tensors
    _save(tmp_path, "tuned", tensors)
    with pytest.raises(DeltamergeError, match=r"MixtralForCausalLM holds .*experts\.\d"):
        lora(tmp_path, "rank: 4", name="bad")
    made = lora(tmp_path, "rank: 4, whole: drop", name="good")
    assert "experts.0.w1" in (made.folder / "README.md").read_text()
    outputs(adapted("MixtralForCausalLM", tmp_path / "base", made.folder), "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract-lora", "--model", "x"], "deltamerge extract x --base BASE --lora 128"),
        (["mergekit-moe", "x"], "deltamerge run x --out OUT"),
        (["tokensurgeon"], "tokenizer: {transplant: DONOR, k: 64}"),
        (["evolve"], "deltamerge search RECIPE"),
        (["layershuffle"], "slices"),
        (["multi"], "deltamerge run CONFIG --out OUT"),
        (["extract", "a", "b", "--lora", "3x"], "a rank such as 32"),
        (["extract", "a", "--base", "b", "--lora", "--budget", "1MB,2MB"], "--lora takes one --budget"),
        (["extract", "a", "--base", "b", "--whole", "drop"], "--whole needs --lora"),
        (["extract", "a", "--base", "b", "--for", "vllm"], "--for needs --lora"),
        (["extract", "a", "b", "--lora", "4", "--for", "vllm", "--whole", "drop"], "--for and --whole both choose"),
        (["extract", "a", "b", "--lora", "4", "--for", "vllm", "--dora"], "vLLM loads no DoRA"),
        (["extract", "a", "--base", "b", "--lora"], "needs a rank, energy:0.95, or --budget"),
        (["extract", "a", "--base", "b", "--lora", "4", "--density", "0.1"], "prune by a recipe"),
        (["extract", "a", "--lora", "4"], "name the base once"),
        (["extract", "x/a", "y/a", "--base", "b", "--lora", "4"], "two of the models would be a-lora"),
    ],
)
def test_what_is_typed_wrongly(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_several_at_once_by_the_command(llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(llama)
    shutil.copytree("tuned", "other")
    models = ["tuned", "other", "--base", "base", "--lora=energy=0.5", "--whole", "drop", "--out", "several"]
    with pytest.raises(SystemExit) as left:
        main(["extract", *models[:1], *models[2:7], "--out", "one", "--target", "q_proj", "-v"])
    told = capsys.readouterr().err
    assert not left.value.code
    assert re.search(r"one: .*\nfactors [\d.]+ kB, \d weights, rank .*: keep 0\.\d+ of .*; whole parts none\n", told)
    assert "model.layers.0: rank" in told
    with pytest.raises(SystemExit) as left:
        main(["extract", *models, "--json", "--force"])
    assert not left.value.code
    assert {path.name for path in Path("several").iterdir()} == {"tuned-lora", "other-lora"}
    results = json.loads(capsys.readouterr().out)["results"]
    assert [set(one["lora"]) for one in results] == [{"energy", "tensors"}] * 2


def test_of_a_quantised_base(tmp_path: Path) -> None:
    """Deltas are taken from what the codes and scales stand for."""
    make("LlamaForCausalLM", tmp_path / "plain", **WIDE)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    values = fp8_checkpoint(tmp_path / "base", tmp_path / "plain", (16, 16), config)
    tune(tmp_path / "plain", tmp_path / "tuned", "LlamaForCausalLM", only="proj")
    lora(tmp_path, "rank: 5, values: float32, whole: refuse")
    tuned, found = load_tensors(tmp_path / "tuned"), products(tmp_path / "out")
    assert len(found) == 21
    for module, product in found.items():
        delta = (tuned[f"{module}.weight"].double() - values[f"{module}.weight"]).numpy()
        np.testing.assert_allclose(product, truncated(delta, 5), atol=1e-5 * np.abs(delta).max())


def test_layers_are_told_by_their_numbers() -> None:
    names = sorted(f"model.layers.{i}.mlp.up_proj.weight" for i in range(11))
    summary = LowRankSummary(0, {}, {name: LayerRank(4, 0.5, None, 0.0) for name in names}, 0.5)
    told = [line.partition(":")[0] for line in result.of_layers(summary)]
    assert told == [f"model.layers.{i}" for i in range(11)]
