"""How a finished folder is used: what loads it, and what checks it."""

from __future__ import annotations

from pathlib import Path

from deltamerge.plan.planner import Plan
from deltamerge.run.heads import architecture_of, head_of


def next_steps(plan: Plan, folder: Path) -> tuple[str, str]:
    """The line that loads the result in `folder`, and the one that checks it."""
    return f"load    {_load(plan, folder)}", f"verify  deltamerge verify {folder}"


def _load(plan: Plan, folder: Path) -> str:
    base = None if plan.inputs.origin is None else plan.inputs.origin.checkpoint.base_reference
    if plan.recipe.output.kind == "delta":
        return f"deltamerge apply {folder} --base {base} --out DIR"
    if plan.recipe.output.kind == "sum":
        return f"models: [{folder}, CHECKPOINT] of merge_method: linear"
    if plan.recipe.output.kind == "peft":
        return f'PeftModel.from_pretrained(base, "{folder}")'
    if (folder / "model_index.json").exists():
        return f'DiffusionPipeline.from_pretrained("{folder}")'
    if (folder / "modules.json").exists():
        return f'SentenceTransformer("{folder}")'
    if not plan.inputs.template.checkpoint.config:
        return f'load_file("{folder / plan.layout.files[0].name}")'
    kind = plan.config.get("_class_name")  # of diffusers
    if isinstance(kind, str) and kind.isidentifier():
        return f'{kind}.from_pretrained("{folder}")'
    architecture, head = architecture_of(plan.config), head_of(plan.config)
    known = architecture if architecture.isidentifier() and "auto_map" not in plan.config else "AutoModel"
    loader = head.loader if head is not None else None
    return f'{loader or known}.from_pretrained("{folder}")'
