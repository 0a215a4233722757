"""What merges keep of a ViT's experts: at the λ of the rules, and at the λ that drawn pictures choose.

    python -m benchmarks.merging.pictures choose               four tasks of drawn pictures, on validation rows
    python -m benchmarks.merging.pictures report               four others, on test rows
    python -m benchmarks.merging.pictures report wudi          methods whose names begin so
    python -m benchmarks.merging.pictures --docs               only the tables of docs/measurements/merging.md

The experts are those of picture_tasks.py, each scored with its own head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from benchmarks import RESULTS
from benchmarks.merging import pages, picture_tasks, words
from benchmarks.merging.scores import Weights
from benchmarks.merging.words import ADVISED, BALANCED, CALIBRATED, HUNDRED, PACKAGE, Merge, fitted, of, rows_of
from benchmarks.tasks import Part

FILE = RESULTS / "merging_pictures.json"
FAMILIES = {
    "choose": ("hands", "charts", "counts", "textures"),
    "report": ("clothes", "animals", "tones", "digits"),
}
SEEN: dict[str, tuple[Part, int]] = {"choose": ("validation", 200), "report": ("test", 300)}
AROUND = dict.fromkeys(FAMILIES, (0.35, 0.5, 0.7, 1.0, 1.4))  # times the rule's λ
MERGES = (
    *PACKAGE,
    *(of(method, lambda models: 1.0) for method in ("emr", "tall_masks")),
    *(fitted(BALANCED, "row", rows) for rows in ((CALIBRATED,) * 2, (2 * CALIBRATED,) * 2, HUNDRED)),
    *ADVISED,
)


class Family(words.Family):
    """Experts of the ViT side by side."""

    merges = MERGES

    def models(self, seed: int) -> tuple[Path, dict[str, Path]]:
        base = picture_tasks.base()
        return base, {name: picture_tasks.expert(name, base, seed=seed) for name in self.names}

    def body(self, folder: Path) -> Weights:
        tensors = load_file(folder / "model.safetensors")
        return {name.removeprefix("dinov2."): t for name, t in tensors.items() if not name.startswith("classifier.")}

    def factors(self, merge: Merge, around: Sequence[float]) -> Sequence[float]:
        """Of tasks that are reported: the rule's λ, and the λ that the others chose."""
        found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"cells": {}}
        chosen = pages.chosen_of_pictures(found).get(merge.name)
        if self.names != FAMILIES["report"] or chosen is None:
            return super().factors(merge, around)
        rule = merge.rule(len(self.names))
        return [factor for factor in around if factor == 1.0 or f"{rule * factor:.3g}" == chosen[0]]

    def load(self) -> None:
        self.config, self.placed = Dinov2Config.from_pretrained(self.base), Weights()
        found = {name: load_file(path / "model.safetensors") for name, path in self.folders.items()}
        self.heads = {name: [t["classifier.weight"], t["classifier.bias"]] for name, t in found.items()}

    def outputs(self, weights: Weights, name: str, rows: Sequence[Any]) -> Tensor:
        if weights is not self.placed:  # files have other names than modules: transformers maps them
            self.model = Dinov2Model.from_pretrained(None, config=self.config, state_dict=dict(weights)).train(False)
            self.placed = weights
        weight, bias = self.heads[name]
        found = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(rows), 100):
                tokens = self.model(picture_tasks.pixels(rows[start : start + 100])).last_hidden_state.float()
                found.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
        return torch.cat(found) @ weight.T + bias

    def calibration(self, name: str, work: Path, merge: Merge) -> dict[str, Any]:
        folder = work / name
        folder.mkdir()
        for i, row in enumerate(rows_of(name, self.spare)[: merge.rows + merge.decide]):
            Image.fromarray(row.image).save(folder / f"{i:03}.png")
        return {"data": str(folder), "sequences": words.searched(merge)}


def main() -> None:
    words.run(__doc__, FAMILIES, FILE, dict.fromkeys(FAMILIES, Family), SEEN, "write_pictures", AROUND)


if __name__ == "__main__":
    main()
