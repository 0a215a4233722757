"""The authors' search of one q for all layers: three whole models in memory, a forward pass for every q of a grid.

    python -m benchmarks.pruning.authors RECIPE     prints {"q", "forward_passes", "of_search"}

Base, fine-tune and pruned model are plain transformers models; masks and rows are those that deltamerge would take of
the recipe, so that both look for the same number. q is applied to linear layers, as deltamerge's calibrated q is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from deltamerge.calibrate.rows.splits import split
from deltamerge.recipe.file import read_recipe
from deltamerge.recipe.load import load
from deltamerge.run.options import Options
from deltamerge.run.runner import run

PATIENCE = 4


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    found = search(path)
    print(json.dumps(found))


@torch.inference_mode()
def search(path: Path) -> dict[str, float]:
    recipe = load(path)
    assert recipe.calibration is not None
    folder, tune_folder = path.parent, Path(recipe.models[0].model)
    density = float(yaml.safe_load(path.read_text(encoding="utf-8"))["models"][0]["prune"]["density"])
    config = AutoConfig.from_pretrained(tune_folder)
    rows, _ = split(recipe.calibration, folder, recipe.seed, config.to_dict(), labelled=False)
    tokenizer = AutoTokenizer.from_pretrained(tune_folder)
    texts = [row.content for row in rows]
    batch = tokenizer(texts, truncation=True, max_length=recipe.calibration.length, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()

    base, tune, pruned = _model(Path(str(recipe.base_model))), _model(tune_folder), dropped(path)
    linear = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    start = dict(base.named_parameters())
    kept = {n: p - start[n] for n, p in pruned.named_parameters() if n in linear}
    target = tune(**batch).last_hidden_state[real]
    values: dict[float, float] = {}

    def change(q: float) -> float:
        for name, parameter in pruned.named_parameters():
            if name in kept:
                parameter.copy_(start[name] + kept[name] / q)
        values[q] = float((pruned(**batch).last_hidden_state[real] - target).abs().mean())
        return values[q]

    best, worse, q, step = density, 0, density, min(density, 0.05)
    while q <= 1.0 and worse < PATIENCE:
        smallest = min(values.values(), default=float("inf"))
        best, worse = (q, 0) if change(q) < smallest else (best, worse + 1)
        q += step
    for k in range(-9, 10):
        if k and density <= best + k * step / 10 <= 1.0:
            change(best + k * step / 10)
    return {"q": min(values, key=values.__getitem__), "forward_passes": len(values) + 1, "of_search": len(values) + 1}


def _model(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModel.from_pretrained(folder).float().eval()
    return loaded


def dropped(path: Path) -> PreTrainedModel:
    """base + mask ∘ Δ, not rescaled, in float32: the recipe with q = 1."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["models"][0]["prune"]["q"] = 1.0
    content["dtype"] = "float32"
    with tempfile.TemporaryDirectory() as work:
        recipe = Path(work) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
        return _model(run(read_recipe(recipe), Path(work) / "out", Options(workers=1, device="cpu")).folder)


if __name__ == "__main__":
    main()
