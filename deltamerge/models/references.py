"""Opens models by reference: local ones, the hub's, and deltas and versions of chains over their bases.

chain/000120          the version, a delta until it is put over a base
chain                 its newest version
base+chain/000120     the version over `base`, a local model or the hub's; `org/name@revision+chain/000120`
base+delta            any delta artifact over its base
base+dir/weight_v000003   a version that slime wrote, over its base; or SkyRL, base+dir/delta-00000003
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.components import CONFIG, RUNNING_SUM
from deltamerge.models.checkpoint import Checkpoint, decoded, open_checkpoint

if TYPE_CHECKING:
    from deltamerge.models.chain.folder import Opened
    from deltamerge.models.delta_file import DeltaFile
    from deltamerge.models.delta_over_base import Layers


@dataclass
class Models:
    """Opens models. The versions of one chain are opened once, and share their tensors over one base."""

    @cached_property
    def _versions(self) -> Opened:
        from deltamerge.models.chain.folder import Opened

        return Opened()

    @cached_property
    def _layers(self) -> Layers:
        from deltamerge.models.delta_over_base import Layers

        return Layers()

    def open(
        self, reference: str, folder: Path, *, weights: bool, pickles: bool = False, sums: bool = False
    ) -> Checkpoint:
        """Return the checkpoint that a recipe in `folder` calls `reference`.

        References without a delta go to `hub.open_model`. `sums`: a running sum is allowed.

        InputError: as for `hub.open_model`; a version is missing, damaged, or not made from its predecessor; the base
        lacks tensors that the delta was made from.
        """
        whole = Path(folder, os.path.expanduser(reference))
        if sums and os.path.isfile(whole / RUNNING_SUM):
            return open_checkpoint(whole, reference=reference, sums=True)
        if whole.exists():
            with errors.context(reference):
                path = _newest(whole)
            return open_checkpoint(path, reference=reference, pickles=pickles)
        from deltamerge.models import hub
        from deltamerge.models.chain.folder import resolve
        from deltamerge.models.chain.mirror import DIALECTS

        if "+" not in reference:
            with errors.context(reference):
                resolve(whole)  # says that a chain lacks it
        for name, place in _splits(reference):
            with errors.context(reference):
                there = Path(folder, os.path.expanduser(place))
                version = resolve(there)
                theirs = [] if version else [(d, at) for d in DIALECTS.values() if (at := d.resolve(there))]
            if version is not None:
                base = self.open(name, folder, weights=weights, pickles=pickles)
                with errors.context(reference):
                    return self.over(open_checkpoint(version, reference=reference), decoded(base))[0]
            for dialect, found in theirs:
                base = decoded(self.open(name, folder, weights=weights, pickles=pickles))
                with errors.context(reference):
                    return dialect.over(found, base, reference)
        return hub.open_model(reference, folder, weights=weights, pickles=pickles)

    def over(self, delta: Checkpoint, base: Checkpoint) -> tuple[Checkpoint, DeltaFile]:
        """Return the checkpoint of a delta, or a version with all earlier ones, over `base`; and an artifact that
        checks them.

        InputError: as for `open`.
        """
        if base.is_delta and base.base is None:
            raise InputError(f"its base {base.reference} is a delta too", hint=f"name it as BASE+{base.reference}")
        from deltamerge.models.chain.folder import line
        from deltamerge.models.delta_over_base import folded

        versions = line(delta.path, self._versions)
        whole, below = folded(versions, every=True), as_made_from(base, versions[0].delta)
        found = self._layers.over(delta, versions, replace(below, is_delta=False))
        return decoded(found) if below is not base else found, whole

    def artifact(self, path: Path) -> DeltaFile:
        """Return the artifact that equals a version with all earlier versions.

        Each version is checked when it is applied.
        """
        from deltamerge.models.chain.folder import line
        from deltamerge.models.delta_over_base import folded

        return folded(line(path, self._versions), every=True)


def open_model(reference: str, folder: Path, *, weights: bool, pickles: bool = False) -> Checkpoint:
    """One model, as `Models.open`."""
    return Models().open(reference, folder, weights=weights, pickles=pickles)


def open_origin(reference: str, delta: DeltaFile | None = None, *, pickles: bool = False) -> Checkpoint:
    """Return the base of a chain, with the tensors that its first version, `delta`, was made from. InputError: as
    `Models.open`."""
    with errors.context(reference):
        base = decoded(open_model(reference, Path.cwd(), weights=True, pickles=pickles))
        return base if delta is None else as_made_from(base, delta)


def as_made_from(base: Checkpoint, delta: DeltaFile) -> Checkpoint:
    """Return a decoded base with the tensors that a delta was made from: its codes, where the delta changes codes."""
    from deltamerge.models.chain.folder import base_contents

    scheme = base.quantised
    if scheme is None or not scheme.plain:
        return base
    wanted = base_contents(delta.manifest)
    if scheme.stored.keys().isdisjoint(wanted):
        return base
    stored = {name: info for name, info in base.tensors.items() if name not in scheme.plain} | dict(scheme.stored)
    kinds = {name: (info.dtype, tuple(info.shape)) for name, info in stored.items()}
    fits = all(kinds.get(name) == content[:2] for name, content in wanted.items())
    return replace(base, tensors=stored, quantised=None) if fits else base


def _newest(folder: Path) -> Path:
    """Return the folder of the newest version if `folder` is a chain; otherwise `folder`."""
    if not folder.is_dir() or os.path.exists(folder / CONFIG):
        return folder
    from deltamerge.models.chain.folder import resolve

    return resolve(folder) or folder


def _splits(reference: str) -> list[tuple[str, str]]:
    """Return the possible parts before and after the last "+", because a folder's name may contain "+" too."""
    pieces = reference.split("+")
    return [("+".join(pieces[:i]), "+".join(pieces[i:])) for i in range(len(pieces) - 1, 0, -1)]
