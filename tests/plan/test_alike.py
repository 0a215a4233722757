"""±inf and NaN that all models hold alike are copied by every method; what arithmetic makes of others is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint
from running import make_plan, run

from deltamerge.errors import OutputError
from deltamerge.methods.registry import MERGE
from deltamerge.plan import finite

INF = float("inf")
ODD = [(0, INF), (3, -INF), (7, float("nan"))]


def models(
    folder: Path, dtype: torch.dtype, *, odd: bool = True, name: str = "w", shape: tuple[int, int] = (6, 8)
) -> None:
    """`base`, `a` and `b`, related, that hold the same odd values at the same places; and limits of an activation."""
    torch.manual_seed(0)
    base = torch.randn(shape)
    for i, model in enumerate(("base", "a", "b")):
        value = base + 0.1 * i * torch.randn(shape)
        limits = {"min": torch.tensor(-1.0), "max": torch.tensor(1.0)}
        if odd:
            for place, what in ODD:
                value.view(-1)[place] = what
            limits = {"min": torch.tensor(-INF), "max": torch.tensor(INF)}
        tensors = {name: value, "plain": base + 0.1 * i, **limits}
        make_checkpoint(folder / model, {n: t.to(dtype) for n, t in tensors.items()})


def recipe(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


TWO = "models: [{model: ./a}, {model: ./b}]\n"
WEIGHTED = "models: [{{model: ./a, parameters: {{weight: {}}}}}, {{model: ./b, parameters: {{weight: {}}}}}]\n"
SUM = "parameters: {weight: 0.5}\n"
TEXTS = {
    "linear": f"merge_method: linear\n{TWO}{SUM}",
    "linear of weight 0": f"merge_method: linear\n{WEIGHTED.format(0, 1)}",
    "linear of negative weight": f"merge_method: linear\n{WEIGHTED.format(-1, 2)}",
    "slerp": "merge_method: slerp\nbase_model: ./base\nmodels: [{model: ./base}, {model: ./a}]\nparameters: {t: 0.3}\n",
    "multislerp": f"merge_method: multislerp\n{TWO}{SUM}",
    "karcher": f"merge_method: karcher\n{TWO}",
    "nuslerp": f"merge_method: nuslerp\n{TWO}{SUM}",
    "dare": "base_model: ./base\nmodels: [{model: ./a}]\nprune: {method: dare, density: 0.5}\n",
    "magnitude": "base_model: ./base\nmodels: [{model: ./a}]\nprune: {method: magnitude, density: 0.5}\n",
    "one": "base_model: ./base\nmodels: [{model: ./a}]\nparameters: {weight: 0.5}\n",
    **{
        name: f"merge_method: {name}\nbase_model: ./base\n{TWO}parameters: {{weight: 0.5, density: 0.5}}\n"
        for name in ("ties", "dare_ties", "dare_linear", "della", "breadcrumbs")
    },
    **{
        name: f"merge_method: {name}\nbase_model: ./base\n{TWO}{parameters}"
        for name, parameters in (
            ("task_arithmetic", SUM), ("model_stock", ""), ("sce", ""), ("ram", ""),
            ("nearswap", "parameters: {t: 0.01}\n"), ("arcee_fusion", ""),
        )
    },
}  # fmt: skip
for name in ("nearswap", "arcee_fusion"):
    TEXTS[name] = TEXTS[name].replace(", {model: ./b}", "")


def test_most_methods_are_tried():
    assert len(set(TEXTS) & set(MERGE)) >= 15


@pytest.mark.parametrize("case", TEXTS)
def test_what_all_hold_alike_is_copied(tmp_path, case):
    models(tmp_path, torch.float32)
    result = run(recipe(tmp_path, TEXTS[case]), tmp_path / "out")
    merged, base = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "base")
    assert float(merged["max"]) == INF
    assert float(merged["min"]) == -INF
    flat = merged["w"].view(-1)
    places = [place for place, _ in ODD]
    assert np.array_equal(flat[places].numpy(), base["w"].view(-1)[places].numpy(), equal_nan=True)
    rest = np.delete(flat.numpy(), places)
    assert np.isfinite(rest).all()
    assert result.nonfinite == {}
    assert "not finite in every model alike, copied: max, min, w" in result.plan.notes
    assert "not finite in every model alike" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["linear", "task_arithmetic", "slerp", "ties"])
def test_the_rest_is_as_if_they_were_zero(tmp_path, case, dtype):
    models(tmp_path, dtype)
    run(recipe(tmp_path, TEXTS[case]), tmp_path / "out")
    for model in ("base", "a", "b"):
        tensors = load_tensors(tmp_path / model)
        tensors = {n: t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for n, t in tensors.items()}
        make_checkpoint(tmp_path / model, tensors)
    run(tmp_path / "r.yaml", tmp_path / "zero")
    merged, zero = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "zero")
    assert torch.equal(merged["plain"], zero["plain"])
    places = [place for place, _ in ODD]
    got, wanted = (np.delete(t["w"].float().view(-1).numpy(), places) for t in (merged, zero))
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("case", ["linear", "ties", "slerp"])
def test_large_tensors_too(tmp_path, monkeypatch, case):
    monkeypatch.setattr(finite, "SMALL", 8)
    models(tmp_path, torch.float32)
    run(recipe(tmp_path, TEXTS[case]), tmp_path / "late")
    monkeypatch.undo()
    run(tmp_path / "r.yaml", tmp_path / "early")
    late, early = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("late", "early"))
    assert late == early


@pytest.mark.parametrize("weight", [0.5, 1])
@pytest.mark.parametrize("values", ["", ", semantics: add, values: float32"])
def test_deltas_leave_them_as_the_base_has_them(tmp_path, capsys, values, weight):
    models(tmp_path, torch.float32)
    models_are = (
        f"models: [{{model: ./a}}]\nparameters: {{weight: {weight}}}\n" if weight != 1 else "models: [{model: ./a}]\n"
    )
    text = f"base_model: ./base\n{models_are}output: {{kind: delta{values}}}\n"
    run(recipe(tmp_path, text), tmp_path / "delta")
    code, _, err = call(capsys, "apply", tmp_path / "delta", "--base", tmp_path / "base", "--out", tmp_path / "out")
    assert (code, "Traceback" in err) == (0, False)
    out, base = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "base")
    assert float(out["min"]) == -INF
    assert out["w"].view(-1)[0] == base["w"].view(-1)[0] == INF
    assert torch.isfinite(out["w"].view(-1)[8:]).all()


def test_parts_and_their_finish_say_the_same(tmp_path):
    from running import finish

    from deltamerge.run.partition import Part

    models(tmp_path, torch.float32)
    path = recipe(tmp_path, TEXTS["ties"] + "output: {shard_size: 200}\n")
    for i in (1, 2):
        run(path, tmp_path / "parts", part=Part(i, 2))
    finish(path, tmp_path / "parts")
    run(path, tmp_path / "whole")
    files = [p.name for p in (tmp_path / "whole").iterdir() if p.suffix in (".safetensors", ".md")]
    assert len(files) > 2
    for name in files:
        parts, whole = ((tmp_path / folder / name).read_bytes() for folder in ("parts", "whole"))
        assert parts.replace(b"# parts", b"# whole") == whole


def test_a_single_number_is_copied_by_a_stack(tmp_path):
    for odd in (False, True):
        models(tmp_path, torch.float32, odd=odd, name="layers.0.w")
        for name in ("a", "b"):
            made = load_tensors(tmp_path / name)
            more = {"layers.0.min": made.pop("min"), "layers.0.max": made.pop("max")}
            make_checkpoint(tmp_path / name, made | more, config={"num_layers": 1})
        text = "".join(f"- sources: [{{model: ./{name}, layer_range: [0, 1]}}]\n" for name in ("a", "b"))
        path = recipe(tmp_path, f"merge_method: passthrough\nslices:\n{text}")
        if not odd:
            run(path, tmp_path / "out", force=True)
            continue
        with pytest.raises(OutputError, match=r"in layers.0.w \(1 NaN, 2 inf\), layers.1.w \(1 NaN, 2 inf\)$"):
            run(path, tmp_path / "out", force=True)


def test_what_only_some_hold_is_refused_as_before(tmp_path, capsys):
    models(tmp_path, torch.float32)
    tensors = load_tensors(tmp_path / "a")
    tensors["w"].view(-1)[20] = INF
    make_checkpoint(tmp_path / "a", tensors)
    code, _, err = call(capsys, "run", recipe(tmp_path, TEXTS["one"]), "--out", tmp_path / "out")
    assert code == 1
    assert "values that are not finite in w (1 inf)\n" in err


def test_inspect_counts_them_as_zero(tmp_path, capsys):
    models(tmp_path, torch.float32)
    code, out, _ = call(capsys, "inspect", tmp_path / "a", "--base", tmp_path / "base", "--json")
    assert code == 0
    found = {tensor["name"]: tensor for tensor in json.loads(out)["tensors"]}
    assert found["max"]["unchanged"] == 1
    assert found["w"]["unchanged"] == pytest.approx(3 / 48)
    assert np.isfinite(found["w"]["norm"])


@pytest.mark.parametrize("odd", [None, "w", "v"])
def test_recommend_counts_them_as_zero_and_refuses_others(tmp_path, capsys, odd):
    models(tmp_path, torch.float32, odd=False)
    for name in ("base", "a", "b"):
        tensors = load_tensors(tmp_path / name)
        tensors |= {"v": tensors["w"][0] + 1, "max": torch.tensor(INF)}
        if odd and name == "a":
            tensors[odd].view(-1)[3] = float("nan")
        make_checkpoint(tmp_path / name, tensors)
    code, out, err = call(capsys, "recommend", *(tmp_path / n for n in "ab"), "--base", tmp_path / "base", "--json")
    if odd:
        assert (code, err.splitlines()[0]) == (1, f"error: tensor {odd}: a model's delta is not finite")
        return
    assert code == 0
    assert np.isfinite(json.loads(out)["evidence"]["relative_norm"]).all()


def test_masks_and_tables_of_layers_are_copied(tmp_path, monkeypatch):
    models(tmp_path, torch.float32)
    for model in ("base", "a", "b"):
        mask = torch.full((1, 1, 8, 8), -INF).triu(1)
        table = torch.ones(4) * (1 + (model == "a"))
        more = {"h.0.attn.bias": mask, "h.0.rotary_emb.inv_freq": table}
        make_checkpoint(tmp_path / model, load_tensors(tmp_path / model) | more)
    planned = make_plan(recipe(tmp_path, TEXTS["task_arithmetic"]))
    monkeypatch.setattr(finite, "SMALL", 8)
    run(tmp_path / "r.yaml", tmp_path / "out")
    assert torch.equal(load_tensors(tmp_path / "out")["h.0.attn.bias"], mask)
    methods = {output.name: output.pieces[0].built.method for output in planned.outputs}
    assert methods["h.0.attn.bias"] == methods["h.0.rotary_emb.inv_freq"] == "copy"


def test_rows_of_several_models_and_deltas_are_not_searched(tmp_path):
    """Rows that a union gathers, and what a delta makes of its base, are no stored values of one model: what is not
    finite there is met by arithmetic, and refused."""
    from conftest import write_tokenizer

    torch.manual_seed(0)
    for name, rows in (("base", 6), ("a", 7), ("b", 6)):
        table = torch.randn(rows, 4)
        table[5, 1] = INF
        config = {"model_type": "test", "vocab_size": rows}
        make_checkpoint(tmp_path / name, {"model.embed_tokens.weight": table, "w": torch.randn(4)}, config=config)
        write_tokenizer(tmp_path / name, rows)
    union = recipe(tmp_path, f"merge_method: linear\nbase_model: ./base\n{TWO}{SUM}tokenizer_source: union\n")
    (embedding,) = (o for o in make_plan(union).outputs if "embed" in o.name)
    assert finite._models(embedding.pieces[0].built.root) == ()
    with pytest.raises(OutputError, match=r"not finite in model\.embed_tokens\.weight"):
        run(union, tmp_path / "united")
    make_checkpoint(tmp_path / "a", {"w": torch.randn(4), "model.embed_tokens.weight": torch.randn(6, 4)})
    run(recipe(tmp_path, "base_model: ./base\nmodels: [{model: ./a}]\noutput: {kind: delta}\n"), tmp_path / "delta")
    over = recipe(tmp_path, f"merge_method: linear\nbase_model: ./base\n{TWO.replace('./a', './delta')}{SUM}")
    for output in make_plan(over).outputs:
        assert finite._models(output.pieces[0].built.root) == ()
