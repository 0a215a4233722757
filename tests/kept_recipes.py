"""A fixed table of recipes and inputs whose outputs never change: what `kept_hashes.json` has the hashes of.

The inputs are integer arithmetic on positions, not the numbers of a generator whose stream may change. Run this file
to write the hashes anew; a change of them is a change of every user's bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from made_up_stages import run_with_stages
from raw_tensors import Stored, read_checkpoint, stored, write_checkpoint
from running import run

from deltamerge.calibrate.spec import Calibrated
from deltamerge.methods.registry import MERGE

HASHES = Path(__file__).with_name("kept_hashes.json")
# of the base and of the fine-tunes
DTYPES = [("F64", "F64"), ("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("BF16", "F32"), ("F32", "BF16")]
SMALL = {"q.weight": (31, 40), "norm.weight": (37,), "experts.weight": (3, 5, 7), "conv.weight": (4, 3, 3, 3),
         "one": (1,), "scalar": (), "empty": (0, 4)}  # fmt: skip
FEW = {"q.weight": (17, 24), "norm.weight": (33,)}
# a vector and rows of more than one block, rows that no block is made of whole
LARGE = {"long.weight": (70_001,), "wide.weight": (131, 517), "flat.weight": (3, 22_001)}
MODELS = ("base", "a", "b", "c")
WEIGHTED = {name for name, method in MERGE.items() if "weight" in method.parameters}


def hashed(seed: int, size: int) -> np.ndarray:
    """uint64 of each position: splitmix64."""
    x = (np.arange(1, size + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bell(seed: int, size: int) -> np.ndarray:
    """Numbers around 0 of deviation 1, about: the sum of four uniform ones, exact in float64."""
    parts = hashed(seed, size)[:, None] >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF)
    return (parts.astype(np.int64).sum(1) - 2 * 0xFFFF) / 37838.0


def values(model: int, tensor: int, size: int) -> np.ndarray:
    """A base, or the same base and a delta: among the deltas many zeros, many equal ones, some tiny, some large."""
    base = 0.05 * bell(tensor, size)
    kind = hashed(1000 + tensor, size) % np.uint64(64)
    base[kind == 0], base[kind == 1], base[kind == 2] = 0.0, -0.0, 3e-6
    if not model:
        return base
    seed = 100 * model + tensor
    delta = 0.01 * bell(2000 + seed, size)
    kind = hashed(3000 + seed, size) % np.uint64(16)
    delta[kind < 2] = 0.0
    steps = kind >= 11
    delta[steps] = np.round(delta[steps] * 256) / 256
    delta[kind == 10] *= 2.0**-12
    delta[(kind == 9) & (hashed(4000 + seed, size) % np.uint64(8) == 0)] *= 32
    return base + delta


def inputs(shapes: dict[str, tuple[int, ...]], model: int) -> dict[str, Stored]:
    """Every shape in every pair of dtypes, as the layers of one model."""
    made = {}
    for layer, pair in enumerate(DTYPES):
        for number, (name, shape) in enumerate(shapes.items()):
            tensor = 10 * layer + number
            flat = values(model, tensor, int(np.prod(shape, dtype=np.int64)))
            made[f"layers.{layer}.{name}"] = stored(flat.reshape(shape), pair[model > 0])
    return made


def text(
    method: str, names: str = "ab", parameters: str = "", prune: str = "", more: str = "", based: bool = True
) -> str:
    """A recipe; of the models the first weighs 0.7, the second −0.4 or 0.4, the third a gradient over the layers."""
    second = "0.4" if "slerp" in method else "-0.4"
    weights = {"a": "0.7", "b": second, "c": "[0.1, 0.9]"} if method in WEIGHTED else {}
    lines = [f"merge_method: {method}", "seed: 11", *(["base_model: ./base"] if based else []), "models:"]
    for name in names:
        own = f", parameters: {{weight: {weights[name]}}}" if name in weights else ""
        lines.append(f"  - {{model: ./{name}{own}}}")
    if parameters:
        lines.append(f"parameters: {{{parameters}}}")
    if prune:
        lines.append(f"prune: {{{prune}}}")
    return "\n".join([*lines, more, ""])


PRUNES = {
    "dare-0.9": "method: dare, density: 0.9",
    "dare-0.3": "method: dare, density: 0.3, q: 0.45",
    "dare-0.0625": "method: dare, density: 0.0625",
    "dare-0.06": "method: dare, density: 0.06",
    "dare-0.001": "method: dare, density: 0.001, q: 0.1",
    "dare-l1": "method: dare, density: 0.2, rescale: l1",
    "dare-l2": "method: dare, density: 0.02, rescale: l2",
    "dare-linf": "method: dare, density: 0.5, rescale: linf",
    "dare-sampling": "method: dare, density: 0.1, sampling: magnitude",
    "dare-protect": "method: dare, density: 0.02, protect: {columns: {weight: [0, 3]}}",
    "magnitude": "method: magnitude, density: 0.1, q: 0.5",
    "magnitude-0.7": "method: magnitude, density: 0.7",
    "magnitude-row": "method: magnitude, density: 0.25, group: row",
    "magnitude-model": "method: magnitude, density: 0.2, group: model",
    "magnitude-protect": "method: magnitude, density: 0.1, rescale: l1, protect: {columns: {weight: [2]}}",
    "structured": "method: structured, a: 0.5, b: 0.4",
    "structured-sparse": "method: structured, a: 0.1, b: 0.1",
    "della": "method: della, density: 0.4, epsilon: 0.3",
    "della-l1": "method: della, density: 0.4, epsilon: 0.1, rescale: l1",
    "breadcrumbs": "method: breadcrumbs, density: 0.3, gamma: 0.05",
    "magnitude_outliers": "method: magnitude_outliers, density: 0.5, gamma: 0.2, q: 0.8",
}  # fmt: skip
MERGES = {
    "linear": text("linear", "abc", based=False),
    "linear-sum": text("linear", "ab", "normalize: false", based=False),
    "slerp": text("slerp", "a", "t: 0.3"),
    "nuslerp": text("nuslerp", "ab", based=False),
    "nuslerp-rows": text("nuslerp", "ab", "nuslerp_flatten: false"),
    "nuslerp-columns": text("nuslerp", "ab", "nuslerp_flatten: false, nuslerp_row_wise: true"),
    "multislerp": text("multislerp", "abc", based=False),
    "karcher": text("karcher", "abc", based=False),
    "task_arithmetic": text("task_arithmetic", "abc"),
    "task_arithmetic-normalized": text("task_arithmetic", "abc", "normalize: true, lambda: 0.7"),
    "ties": text("ties", "abc", "density: 0.2"),
    "ties-half": text("ties", "ab", "density: 0.5, normalize: false, lambda: 1.5"),
    "ties-whole": text("ties", "abc"),
    "ties-rescaled": text("ties", "ab", "density: 0.3, rescale: true"),
    "dare_linear": text("dare_linear", "abc", "density: 0.3"),
    "dare_linear-sparse": text("dare_linear", "abc", "density: 0.01"),
    "dare_linear-plain": text("dare_linear", "ab", "density: 0.4, rescale: false"),
    "dare_ties": text("dare_ties", "abc", "density: 0.5"),
    "dare_ties-sparse": text("dare_ties", "abc", "density: 0.02, normalize: true, lambda: 2"),
    "della": text("della", "abc", "density: 0.5"),
    "della_linear": text("della_linear", "ab", "density: 0.3, epsilon: 0.2"),
    "breadcrumbs": text("breadcrumbs", "abc", "density: 0.4, gamma: 0.1"),
    "breadcrumbs_ties": text("breadcrumbs_ties", "abc", "density: 0.9, gamma: 0.3, lambda: 1.5"),
    "model_stock": text("model_stock", "abc"),
    "model_stock-rows": text("model_stock", "ab", "filter_wise: true"),
    "nearswap": text("nearswap", "a", "t: 0.004"),
    "sce": text("sce", "abc"),
    "sce-some": text("sce", "abc", "select_topk: 0.3"),
    "ram": text("ram", "abc", "epsilon: 0.003"),
    "ramplus_tl": text("ramplus_tl", "abc", "epsilon: 0.003, r: 0.5, alpha: 1.5"),
    "arcee_fusion": text("arcee_fusion", "a"),
    "passthrough": text("passthrough", "a", "scale: 0.3", based=False),
    "consensus": text("consensus", "abc", "lambda: 0.7"),
    "tall_masks": text("tall_masks", "abc", "task: 2"),
    "emr": text("emr", "abc", "task: 3"),
}
PRUNED_MERGES = {
    "task_arithmetic": ("ab", ""), "ties": ("abc", ""), "nuslerp": ("ab", ""), "multislerp": ("ab", ""),
    "model_stock": ("ab", ""), "nearswap": ("a", "t: 0.004"), "sce": ("abc", ""), "ram": ("abc", ""),
    "ramplus_tl": ("abc", "r: 0.5"), "consensus": ("abc", ""), "tall_masks": ("abc", "task: 2"),
    "emr": ("abc", "task: 3"),
}  # fmt: skip
OUTPUTS = ["float64", "float32", "float16", "bfloat16"]


def merges() -> dict[str, str]:
    """Every merge method on small tensors, and some to every dtype."""
    made = dict(MERGES)
    for dtype in OUTPUTS:
        for method in ("linear", "task_arithmetic", "ties", "dare_linear-sparse"):
            made[f"{method} to {dtype}"] = MERGES[method] + f"dtype: {dtype}\n"
    return made


def pruned() -> dict[str, str]:
    """Every merge method of deltas after every pruning."""
    return {
        f"{method} {name}": text(method, names, parameters, prune)
        for method, (names, parameters) in PRUNED_MERGES.items()
        for name, prune in PRUNES.items()
    }


def large() -> dict[str, str]:
    """Recipes on tensors of more than one block: every merge method and every pruning, and what calibration gives."""
    made = dict(MERGES)
    made |= {name: text("task_arithmetic", "ab", prune=prune) for name, prune in PRUNES.items()}
    data = "calibration: {data: rows.txt, task: causal-lm}"
    made["wanda"] = text("task_arithmetic", "ab", prune="method: wanda, density: 0.2", more=data)
    for method in ("magnitude", "dare"):
        made[f"{method} q of rows"] = text(
            "task_arithmetic", "a", prune=f"method: {method}, density: 0.05, q: {{objective: layer_mse, scope: row}}",
            more=data,
        )  # fmt: skip
    return made


def stage_value(node) -> object:
    """What calibration found, made up: a norm of each input feature, a q of each output row."""
    if node.function.endswith(":activations"):
        return {
            info.name: SimpleNamespace(
                norm=(0.1 + np.abs(bell(7, info.shape[-1]))).astype(np.float32), transposed=False
            )
            for info in node.parameter("source").tensors
            if len(info.shape) == 2
        }
    spec = node.parameter("spec")
    q = {}
    for pruned in spec.pruned:
        shape = pruned.shape
        rows = (0.05 + np.abs(bell(8, shape[0] if shape else 1))).astype(np.float32)
        q[pruned.name] = rows[:, None] if len(shape) == 2 else 0.25
    return Calibrated(q, {})


RECIPES = {"merges": merges, "pruned": pruned, "large": large}
SHAPES = {"merges": SMALL, "pruned": FEW, "large": LARGE}


def make_inputs(folder: Path, kind: str) -> None:
    for model, name in enumerate(MODELS):
        write_checkpoint(folder / kind / name, inputs(SHAPES[kind], model))
    (folder / kind / "rows.txt").write_text("a row\n" * 50)


def output_hashes(folder: Path, kind: str, recipe: str) -> str:
    """For each layer (one pair of dtypes) ten hexadecimal digits of the BLAKE2b of its tensors in the output."""
    path, out = folder / kind / "recipe.yaml", folder / "out"
    path.write_text(recipe)
    if "calibration:" in recipe:
        run_with_stages(path, out, stage_value)
    else:
        run(path, out, workers=1)
    hashers = [hashlib.blake2b() for _ in DTYPES]
    for name, (code, array) in sorted(read_checkpoint(out).items()):
        hashers[int(name.split(".")[1])].update(f"{name} {code} {array.shape}".encode() + array.tobytes())
    shutil.rmtree(out)
    return " ".join(hasher.hexdigest()[:10] for hasher in hashers)


def kept() -> dict[str, dict[str, str]]:
    return json.loads(HASHES.read_text())


if __name__ == "__main__":
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for kind, recipes in RECIPES.items():
            make_inputs(Path(place), kind)
            found[kind] = {name: output_hashes(Path(place), kind, recipe) for name, recipe in recipes().items()}
    HASHES.write_text(json.dumps(found, indent=1) + "\n")
