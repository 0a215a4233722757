"""Values that are left open, in the JSON schema of a recipe: wherever a number, a method or another single value may
stand, `{sweep: …}` and `{search: …}` may stand too."""

from __future__ import annotations

from typing import Any

SWEEP: dict[str, Any] = {
    "title": "Sweep",
    "description": "`deltamerge sweep` tries all of these values; a mapping names them.",
    "type": "object",
    "properties": {
        "sweep": {
            "description": "The values, or names of values.",
            "anyOf": [{"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}],
        }
    },
    "required": ["sweep"],
    "additionalProperties": False,
}
SEARCH: dict[str, Any] = {
    "title": "Search",
    "description": "`deltamerge search` looks for the best number between two bounds, or the best choice.",
    "type": "object",
    "properties": {
        "search": {
            "description": "[low, high], or choices.",
            "anyOf": [
                {"type": "array", "minItems": 2},
                {
                    "type": "object",
                    "properties": {"choices": {"type": "array", "minItems": 2}},
                    "required": ["choices"],
                    "additionalProperties": False,
                },
            ],
        },
        "log": {"type": "boolean", "description": "Of the logarithm."},
        "step": {"type": "number", "description": "In steps of this."},
        "start": {"description": "The first trial's; default: the middle, or the first choice."},
        "groups": {"type": "integer", "description": "So many groups of neighbouring layers have a number each."},
        "gradient": {"type": "integer", "description": "So many numbers are interpolated over the layers."},
    },
    "required": ["search"],
    "additionalProperties": False,
}
OPEN = {"anyOf": [{"$ref": "#/$defs/Sweep"}, {"$ref": "#/$defs/Search"}]}
HOLDERS = ("Prune", "CalibratedQ", "Protect")
KEYS = ("merge_method", "seed", "dtype", "base_model", "prune")


def allow(schema: dict[str, Any]) -> None:
    """Let open values stand where a value is written: in `parameters`, `prune` and some keys of the recipe itself."""
    definitions = schema["$defs"]
    definitions |= {"Sweep": SWEEP, "Search": SEARCH, "Open": OPEN}
    for holder in HOLDERS:
        for key, value in definitions[holder]["properties"].items():
            definitions[holder]["properties"][key] = _or_open(value)
    for key in KEYS:
        schema["properties"][key] = _or_open(schema["properties"][key])
    models = schema["properties"]["models"]
    models["items"] = _or_open(models["items"])
    for key in ("model", "prune"):
        definitions["Model"]["properties"][key] = _or_open(definitions["Model"]["properties"][key])
    for key, value in definitions["Parameters"]["properties"].items():
        definitions["Parameters"]["properties"][key] = _or_open(value)


def _or_open(value: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: value[key] for key in ("description", "default", "title") if key in value}
    return {"anyOf": [{k: v for k, v in value.items() if k not in about}, {"$ref": "#/$defs/Open"}], **about}
