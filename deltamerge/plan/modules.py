"""The modules of a recipe (`language_model`, `vision_tower`) in a model's file, whatever the file calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deltamerge.tensors.names import LM_HEAD, TOKEN_EMBEDDING

# Names that mergekit gives parts of a model, where they are not components of tensor names.
SPELLINGS = {"text_decoder": "language_model", "default": ""}
LAST_MODULES = ("decoder", "text_decoder", "language_model", "text_model", "default")

# Names of one part in different families; the first that the file has stands for another of its row.
LANGUAGE = ("language_model", "text_model", "llm", "language_backbone")
VISION = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "vision_backbone", "vit")
PROJECTOR = ("multi_modal_projector", "connector", "mm_projector", "aligner", "projector", "merger")
COMPONENT = re.compile(r"[./]")  # what stands between a name's components
ROWS = (LANGUAGE, VISION, PROJECTOR)
_OTHER = re.compile(r"vision|visual|image|audio|video|speech|projector|connector")


class Modules:
    """The module of every tensor of a model, by its name in the files.

    A tensor belongs to the module whose name is the first component of its own that is one, or another name of the same
    part, if the file has no such component. A language model without a module of its own (Qwen2-VL: `model.layers`
    beside `visual`) is what stands beside its token embedding. The head belongs to the decoder.
    """

    def __init__(self, wanted: Iterable[str | None], names: Iterable[str]) -> None:
        names = list(names)
        self.wanted = dict.fromkeys(wanted)
        self.components = {SPELLINGS.get(m, m): m for m in self.wanted if m is not None}
        self.stem: tuple[str, str] | None = None
        self.found: dict[str, str] = {}
        present = {part for name in names for part in COMPONENT.split(name)}
        for module in [m for m in self.components if m and m not in present]:
            row = next((row for row in ROWS if module in row), ())
            other = next((one for one in row if one in present and one not in self.components), None)
            if other is not None:
                self.components[other] = self.components.pop(module)
                self.found[module] = f"{other}.*"
            elif module in LANGUAGE and (stem := _beside_embedding(names)) is not None:
                self.stem = (stem, self.components.pop(module) or module)
                self.found[module] = f"{stem}*"

    def describe(self) -> list[str]:
        """What the modules that have other names in the file are called there."""
        return [f"module {module}: {names} in the file" for module, names in self.found.items()]

    def of(self, name: str) -> str | None:
        """The module of a tensor, by its name in the files."""
        if None in self.wanted or "default" in self.wanted:
            return None if None in self.wanted else "default"
        parts = COMPONENT.split(name)
        known = next((self.components[part] for part in parts if part in self.components), None)
        if known is not None:
            return known
        if name == LM_HEAD or name.endswith(f".{LM_HEAD}"):
            return next((module for module in LAST_MODULES if module in self.wanted), None)
        if self.stem is not None and name.startswith(self.stem[0]) and not any(map(_OTHER.search, parts)):
            return self.stem[1]
        return None


def _beside_embedding(names: Iterable[str]) -> str | None:
    """The prefix of the only token embedding, with its dot; None if there are several, or none."""
    stems = {name[: found.start(1)] + found[1] for name in names if (found := TOKEN_EMBEDDING.search(name))}
    return stems.pop() if len(stems) == 1 else None
