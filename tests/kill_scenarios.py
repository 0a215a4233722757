"""What is killed: a user's files, and the commands that work beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """Commands, one after the other ("cp A B" copies a file); the `killed`-th is killed. The first is killed before it
    changes a file whose path has `torn`. `targets` are what the commands make, below the user's folder."""

    name: str
    steps: tuple[str, ...]
    targets: tuple[str, ...]
    killed: int = -1
    torn: str = ""
    resumable: bool = True

    @property
    def index(self) -> int:
        return self.killed % len(self.steps)


RUN = "run merge.yaml -q --workers 1"
DELTA = "extract ../models/a --base ../models/base --out a-delta -q --workers 1"
APPLY = "apply a-delta --base ../models/base --out a-again -q --workers 1"
FIRST = "extract ../models/a --base ../models/base --out c/000001 -q --workers 1"
SECOND = "extract ../models/b --base ../models/base --out c/000002 --after c/000001 -q --workers 1"
THIRD = "extract ../models/a --base ../models/b --out c/000003 --after c/000002 -q --workers 1"
SQUASH = "squash c --keep 0 --base ../models/base -q --workers 1"
LINKED = "run chain.yaml -q --workers 1"
ROWS = "calibrate r.yaml --workers 1"
PARTS = tuple(f"run shards.yaml -q --workers 1 {part}" for part in ("--part 1/2", "--part 2/2", "--finish"))
SCENARIOS = (
    Scenario("run", (RUN,), ("merge-merged",)),
    Scenario("resume", (RUN, f"{RUN} --resume"), ("merge-merged",), torn="README.md"),
    Scenario("force", ("run older.yaml -q --workers 1 --out merge-merged", f"{RUN} --force"), ("merge-merged",)),
    Scenario("part 1", PARTS, ("shards-merged",), killed=0),
    Scenario("part 2", PARTS, ("shards-merged",), killed=1),
    Scenario("finish", PARTS, ("shards-merged",), killed=2),
    Scenario("chain", (LINKED,), ("half", "chain-merged")),
    Scenario("chain again", (LINKED, f"{LINKED} --force"), ("half", "chain-merged")),
    Scenario("chain anew", (LINKED, "cp chain2.yaml chain.yaml", f"{LINKED} --force"), ("half", "chain-merged")),
    Scenario("pipeline", ("run pipeline.yaml -q --workers 1",), ("pipeline-merged",)),
    Scenario("pipeline --force", ("run older-pipeline.yaml -q --workers 1 --out pipeline-merged",
             "run pipeline.yaml -q --workers 1 --force"), ("pipeline-merged",)),
    Scenario("delta", ("run delta.yaml -q --workers 1",), ("delta-merged",)),
    Scenario("peft", ("run peft.yaml -q --workers 1",), ("peft-merged",)),
    Scenario("extract", (DELTA,), ("a-delta",)),
    Scenario("extract --force", (f"{DELTA} --density 0.1", f"{DELTA} --force"), ("a-delta",)),
    Scenario("apply", (DELTA, APPLY), ("a-delta", "a-again"), resumable=False),
    Scenario("apply --force", (DELTA, RUN.replace("-q", "-q --out a-again"), f"{APPLY} --force"),
             ("a-delta", "a-again"), resumable=False),
    Scenario("version", (FIRST, SECOND), ("c/000001", "c/000002")),
    Scenario("squash", (FIRST, SECOND, THIRD, SQUASH), ("c/000001", "c/000002", "c/000003"), resumable=False),
    Scenario("calibrate", ("calibrate q.yaml --workers 1",), ("q.lock",), resumable=False),
    Scenario("calibrate rows", ("cp r1.yaml r.yaml", ROWS, "cp r2.yaml r.yaml", ROWS), ("r.lock", "r.rows"),
             resumable=False),
    Scenario("locked", ("calibrate q.yaml --workers 1", "run q.yaml --locked -q --workers 1"), ("q.lock", "q-merged")),
    Scenario("run calibrated", ("run q.yaml -q --workers 1",), ("q-merged",)),
    Scenario("report", ("inspect ../models/a --base ../models/base --report page.html --workers 1",), ("page.html",),
             resumable=False),
    Scenario("init", ("init ../models/a ../models/b --base ../models/base --workers 1",), ("recipe.yaml",),
             resumable=False),
    Scenario("recommend", ("recommend ../models/a --base ../models/base --density 0.1 --workers 1 --out advice.yaml",),
             ("advice.yaml",), resumable=False),
)  # fmt: skip
MERGE = """\
base_model: ../models/base
merge_method: {method}
models: [{{model: ../models/a, parameters: {{weight: 0.5}}}}, {{model: ../models/b, parameters: {{weight: 0.4}}}}]
{more}
"""
PRUNED = "base_model: ../models/base\nmodels: [{{model: ../models/a, prune: {prune}}}]\n{more}\n"
CHAIN = """\
base_model: ../models/base
merge_method: task_arithmetic
models: [{model: half, parameters: {weight: 0.5}}, {model: ../models/b, parameters: {weight: 0.5}}]
---
name: half
base_model: ../models/base
merge_method: linear
models: [{model: ../models/a}, {model: ../models/b}]
parameters: {weight: 1}
output: {path: ./half}
"""
ON_ROWS = "calibration: {data: rows.txt, sequences: 8, length: 8}"
BY_ROW = "{method: dare, density: 0.5, q: {objective: layer_mse, scope: row}}"
PIPELINE = '{"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "L"]}'
PIPELINES = MERGE.replace("/base", "/base-pipeline").replace("/a,", "/a-pipeline,").replace("/b,", "/b-pipeline,")
FILES = {
    "pipeline.yaml": PIPELINES.format(method="task_arithmetic", more="output: {shard_size: 30KB}"),
    "older-pipeline.yaml": PIPELINES.format(method="linear", more="output: {shard_size: 1MB}"),
    "merge.yaml": MERGE.format(method="task_arithmetic", more="output: {shard_size: 30KB}"),
    "older.yaml": MERGE.format(method="linear", more="output: {shard_size: 25KB}"),
    "shards.yaml": MERGE.format(method="dare_linear", more="parameters: {density: 0.5}\noutput: {shard_size: 25KB}"),
    "chain.yaml": CHAIN,
    "chain2.yaml": CHAIN.replace("weight: 1}", "weight: 0.5}").replace("linear", "task_arithmetic"),
    "delta.yaml": PRUNED.format(prune="{method: dare, density: 0.5}", more="output: {kind: delta}"),
    "peft.yaml": PRUNED.format(prune="{method: magnitude, density: 0.02, q: 0.5}", more="output: {kind: peft}"),
    "q.yaml": PRUNED.format(prune="{method: dare, density: 0.5, q: output_change}", more=ON_ROWS),
    "r1.yaml": PRUNED.format(prune=BY_ROW, more=f"{ON_ROWS}\nseed: 1"),
    "r2.yaml": PRUNED.format(prune=BY_ROW, more=f"{ON_ROWS}\nseed: 2"),
    "rows.txt": "\n".join(f"w{5 + i % 80} w{6 + i % 70} w{7 + i % 60}" for i in range(30)),
    # what is the user's and has nothing to do with it
    "thesis.txt": "ten years' work\n",
    "photos/one.jpg": "a picture\n",
    "merge/notes.txt": "beside merge-merged\n",
    ".other.partial/lock": "mine\n",
    ".other.partial/out/model.safetensors": "mine, too\n",
    ".merge-merged.partial.bak/old/novel.txt": "chapter one\n",
    "merge-merged.old/model.safetensors": "kept\n",
    ".thesis.txt.swp": "an editor's\n",
}
