"""The fine-tune under calibration: its weights, deltas and masks, read through the merge's own nodes, and its rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deltamerge.calibrate.model.blocks import NO_CALLBACKS, BlockModel, Inputs
from deltamerge.calibrate.model.candidates import Cache, Masked, Q, ReadDelta, pruned
from deltamerge.calibrate.model.devices import Ahead, Resident, ShareStop, spread
from deltamerge.calibrate.model.layers import Linear
from deltamerge.calibrate.model.passes import Callbacks, Weights, entries, from_reader, sequences, stored
from deltamerge.calibrate.q import objectives as O
from deltamerge.calibrate.q.learned import Learner
from deltamerge.calibrate.q.statistics import LayerStatistics, collect
from deltamerge.calibrate.rows.batches import Batches, RowReader, check_new_tokens, config_of
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.calibrate.rows.heads import LANGUAGE, has_head, metric_of, task_of
from deltamerge.calibrate.rows.splits import select, split, without
from deltamerge.calibrate.spec import SPARSE_BELOW, STEP_ROWS, STOP_SHARE, CalibrationInput, ModelTensors
from deltamerge.engine.devices import KEPT_SHARE, current, free_bytes, torch_device, torch_devices
from deltamerge.engine.execute import computed
from deltamerge.files import progress
from deltamerge.methods.ops import dense, is_difference
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Tensor
from deltamerge.tensors.tiles import Kept


class Tensors:
    """Reads and caches a fine-tune's tensors for its model.

    start      reads the tensors that masked deltas are added to
    masks      read the masked deltas, one for each mask seed
    tune       reads the fine-tune's own weights
    resident   holds the stored tensors on a GPU; None on the CPU
    halved     whether dense masked deltas are kept in bfloat16
    anew       whether differences of files are read wherever they are used
    """

    def __init__(
        self,
        source: CalibrationInput,
        reader: Reader,
        tensors: ModelTensors,
        model: BlockModel,
        known: Mapping[Tensor, Any],
        *,
        halved: bool = False,
    ) -> None:
        self.source, self.reader, self.known, self.model, self.device = source, reader, known, model, model.device
        self.infos, self.pairs, self.halved = tensors.own, tensors.pairs, halved
        self.protected = {name: torch.from_numpy(known[node]) for name, node in tensors.protected.items()}
        self.resident = None if self.device.type == "cpu" else Resident(reader, self.device, source.share)
        self.ahead = Ahead(partial(stored, reader))
        self.tune = from_reader(lambda name: self._stored(self.infos[name]))
        # the variants of one walk share a part's weights and masks; earlier reads are in the page cache
        part, room = self._part_bytes(), source.cache
        if self.resident is not None:
            room = min(room, free_bytes(self.device) // (KEPT_SHARE * source.share))
        kept = part if self.resident is None else 0  # there it is by another name
        self.start = Cache(lambda names: {name: self._start(name) for name in names}, kept)
        anew = [halved and self.resident is None and all(map(is_difference, some.values())) for some in tensors.masks]
        pinned = max(0, room - part) // max(1, anew.count(False))
        self.anew = any(anew)
        self.masks = [
            Cache(partial(self._masked, nodes), *((0, 0) if one else (part, pinned)))
            for nodes, one in zip(tensors.masks, anew, strict=True)
        ]

    def forget(self) -> None:
        """Free all cached tensors."""
        self.ahead.close()
        caches: list[Cache[Any]] = [self.start, *self.masks]
        for cache in caches:
            cache.clear()
        if self.resident is not None:
            self.resident.clear()

    def relieve(self) -> bool:
        """Free the tensors that stay on a GPU, so that all stream by; tell whether there were any."""
        for mask in self.masks:
            mask.clear()
        return self.resident is not None and self.resident.shed()

    def delta(self, name: str) -> torch.Tensor | None:
        """Return the part of a tensor's delta that is pruned: 0 in protected columns."""
        if name not in self.pairs:
            return None
        tune, base = self.pairs[name]
        if tune.shape != self.infos[name].shape:
            return None
        delta = self._read(tune) - self._read(base)
        if name in self.protected:
            delta[:, self.protected[name]] = 0.0
        return delta

    def _part_bytes(self) -> int:
        """Return the bytes of the tensors outside the blocks and of the largest block."""
        outside, *blocks = (sum(self.infos[name].nbytes for name in part) for part in self.model.parts)
        return outside + max(blocks, default=0)

    def read_ahead(self, part: int, weights: Weights) -> None:
        """Read a part's weights while the part before it is computed. After the last block comes part 0, which is
        outside of blocks. Where a tensor's masks are kept, the fine-tune's own is not read for them."""
        names = self.model.parts[part % len(self.model.parts)]
        wanted = [self.infos[name] for name in names]
        if weights is not self.tune:
            wanted = [self.pairs.get(name, (info, info))[1] for name, info in zip(names, wanted, strict=True)]
            if self.resident is None:
                wanted = [start for name, start in zip(names, wanted, strict=True) if name not in self.start]
            for name in names:
                if name in self.pairs and (self.anew or not all(name in mask for mask in self.masks)):
                    self.reader.advise(self.pairs[name][0], 0, self.pairs[name][0].nbytes)
        (self.ahead if self.resident is None else self.resident).begin(wanted)

    def _stored(self, info: Tensor) -> torch.Tensor:
        """Return a tensor as it is stored, on the device, to be read only."""
        flat = self.ahead(info) if self.resident is None else self.resident.stored(info)
        return flat.view(info.shape)

    def _read(self, info: Tensor) -> torch.Tensor:
        """Return a stored tensor in float32; integers stay as they are."""
        tensor = self._stored(info)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def _start(self, name: str) -> torch.Tensor:
        """Return the tensor that the masked delta is added to: the base with protected columns' deltas, else the
        fine-tune's own."""
        if name not in self.pairs:
            return self._stored(self.infos[name])
        tune, base = self.pairs[name]
        if name in self.protected:
            start, columns = self._read(base).clone(), self.protected[name]
            start[:, columns] += self._read(tune)[:, columns] - start[:, columns]
            return start
        if tune.shape == self.infos[name].shape:
            return self._stored(base)
        start = self._read(self.infos[name]).clone()
        start[: base.shape[0]] = self._read(base)
        return start

    def _masked(self, nodes: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Masked | None]:
        """Return the masked deltas of tensors, None where a tensor is not pruned."""
        found: dict[str, Masked | None] = dict.fromkeys(names)
        pruned = {name: nodes[name] for name in names if name in nodes}
        read = [name for name, node in pruned.items() if is_difference(node)] if self.resident is None else []
        roots = {n: Graph().node(dense, [node], shape=node.shape) for n, node in pruned.items() if n not in read}
        made = computed(roots, self.reader, device=self.source.device, known=self.known) if roots else {}
        for name in read:
            node = pruned[name]
            if self.halved and len(node.shape) > 1 and node.shape == self.infos[name].shape:
                found[name] = ReadDelta(node.shape, partial(self._difference, name, node))
            else:
                values = self._difference(name, node, 0, math.prod(node.shape))
                whole = self._whole(name, values.to(torch.bfloat16)) if self.halved else None
                found[name] = self._kept(name, values.numpy()) if whole is None else whole
        return found | {name: self._kept(name, made.pop(name).view(np.float32)) for name in roots}

    def _difference(self, name: str, node: Tensor, start: int, stop: int) -> torch.Tensor:
        """Return flat entries of the difference of two stored tensors, in float32. The base's may be there already."""
        tune, base = node.inputs
        there = self.start(name) if name in self.start and self._starts_at(name, base) else None
        other = entries(self.reader, base, start, stop) if there is None else there.view(-1)[start:stop]
        return entries(self.reader, tune, start, stop).float().sub_(other.float())

    def _starts_at(self, name: str, base: Tensor) -> bool:
        """Tell whether `start` gives a stored base as it is."""
        mine = self.pairs[name][1]
        return mine is base and base.shape == self.infos[name].shape and name not in self.protected

    def _kept(self, name: str, values: NDArray[np.float32]) -> Masked:
        """Return a masked delta as positions and values, or dense, whichever is smaller."""
        positions = np.flatnonzero(values)
        if len(positions) < SPARSE_BELOW * len(values):
            small = positions.astype(np.int32) if len(values) <= np.iinfo(np.int32).max else positions
            return Kept(self._placed(small), self._placed(values[positions]))
        made = self._whole(name, self._placed(values))
        return made.to(torch.bfloat16) if self.halved else made

    def _whole(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        """Return a delta in its tensor's shape, with zeros for the rows that the base lacks."""
        whole = self.infos[name].shape
        lacking = math.prod(whole) - len(flat)
        return (torch.nn.functional.pad(flat, (0, lacking)) if lacking else flat).view(whole)

    def _placed(self, values: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


T = TypeVar("T")
Part = Literal["search", "held"]

BATCH = 32  # rows at most
BATCH_TOKENS = 4096
LOGITS_BYTES = 1 << 27  # of a batch's logits, where every token has its own
FEW = 4  # one of so many rows is in the first round of a search


@dataclass(frozen=True, slots=True)
class HeldOutMeasure:
    """A measure that compares candidates on held-out rows; smaller is better.

    measure   its name
    higher    whether it is shown as 1 − value
    trusted   whether it is another measure than the searched objective, and so can judge a minimum on a bound
    """

    objective: O.Objective | O.Generation
    measure: str
    rows: int
    trusted: bool
    higher: bool = False

    def eligible(self, found: Sequence[T]) -> list[T]:
        """Return the candidates that this judge can compare."""
        return [one for one in found if self.trusted or not getattr(one, "edge", False)]

    def shown(self, value: float) -> float:
        """Return a value as it is shown."""
        return 1.0 - value if self.higher else value


class Subject:
    """A fine-tune under calibration: its model, its weights and masked deltas, and its rows.

    masks       `masks[s]` reads the masked deltas of mask seed s, by the fine-tune's tensor names
    batches     of the rows that are searched on, "search", and held out, "held"
    few         the first batches of "search" that hold a quarter of its rows
    sequences   the number that has gone through the model so far; a backward pass counts as two
    stop        is set once a GPU's share of the work has failed; all GPUs' subjects have the same
    """

    def __init__(
        self,
        source: CalibrationInput,
        tensors: ModelTensors,
        reader: Reader,
        known: Mapping[Tensor, Any] | None = None,
        *,
        reports: bool = True,
        halved: bool = False,
        ahead: bool = True,
        stop: threading.Event | None = None,
    ) -> None:
        self._given, self._reports = (tensors, reader, known), reports
        self._stop = stop or threading.Event()
        self.source = source
        self.device = torch_device(source.device)
        self.infos = tensors.own
        self.config = config_of(source.checkpoint)
        self.settings = settings = self.config.to_dict() | {"num_labels": self.config.num_labels}
        self.task = task_of(source.calibration, settings)
        self.metric = metric_of(source.calibration, settings) if source.labelled else None
        search, held = split(source.calibration, source.folder, source.seed, settings, labelled=source.labelled)
        self.reads = RowReader(source.checkpoint, self.config, task=self.task, length=source.calibration.length)
        self.rows: dict[Part, list[DataRow]] = {"search": search, "held": held}
        self.counts = len(search), len(held)
        labelled = source.labelled and self.metric != "exact_match"
        self.size = self._batch_rows()
        some, rest = search[FEW - 1 :: FEW], [row for i, row in enumerate(search, 1) if i % FEW]
        some, rest = (some, rest) if some else (rest, [])
        quarter = self._batched(some, labelled=labelled)
        self.few = len(quarter.inputs)
        self.batches: dict[Part, Batches] = {
            "search": quarter.with_more(self._batched(rest, labelled=labelled)) if rest else quarter,
            "held": self._batched(held, labelled=labelled),
        }
        self.model = BlockModel(
            self.config,
            self.infos,
            device=self.device,
            pad_token_id=self.reads.pad_token_id,
            precision=source.precision,
            callbacks=Callbacks(self._ahead if ahead else NO_CALLBACKS.ahead, self._walked, self._relieve),
        )
        self.tensors = Tensors(source, reader, tensors, self.model, known or {}, halved=halved)
        self.pairs = self.tensors.pairs
        self.start, self.masks, self.tune = self.tensors.start, self.tensors.masks, self.tensors.tune
        self.sequences = 0
        self._counting = threading.Lock()

    def _batched(self, rows: Sequence[DataRow], *, labelled: bool = False) -> Batches:
        return self.reads.batches(rows, size=self.size, labelled=labelled)

    def _batch_rows(self) -> int:
        """Return rows of a batch: fewer where they are long, or where each token has logits over a large vocabulary."""
        if self.task == "image-classification":
            return BATCH
        length = self.source.calibration.length
        most = min(BATCH, BATCH_TOKENS // length)
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None) if self.task in LANGUAGE else None
        if isinstance(vocabulary, int) and vocabulary > 0 and self._has_head:
            most = min(most, LOGITS_BYTES // (4 * length * vocabulary))
        return max(1, most)

    def rounds(self, rows: int) -> list[list[dict[str, torch.Tensor]]]:
        """Return batches of the held-out rows, about `rows` of them in each round."""
        held = self.rows["held"]
        count = max(1, round(len(held) / rows))
        return [self._batched(held[i::count]).inputs for i in range(count)]

    def forget(self) -> None:
        """Free the cached weights and masks."""
        for other in self.__dict__.pop("others", ()):
            other.forget()
        self.tensors.forget()

    @property
    def layers(self) -> dict[str, Linear]:
        """Return the linear layers with a pruned weight, which a calibrated q divides. Stacked experts count once a
        pass has reached them."""
        model = self.model
        found = [layer for part in model.layers for layer in part]
        stacked = [layer for part in model.stacked for layer in part if layer.name in model.turned]
        found += [replace(layer, transposed=model.turned[layer.name]) for layer in stacked]
        return {layer.name: layer for layer in found if layer.name in self.pairs}

    @property
    def may_have_layers(self) -> bool:
        """Tell whether a pruned tensor may be a linear layer's."""
        some = (layer for part in (*self.model.layers, *self.model.stacked) for layer in part)
        return any(layer.name in self.pairs for layer in some)

    @property
    def reached(self) -> set[str]:
        """Return the linear layers of the fine-tune that have had an input."""
        if not self.model.reached:
            inputs = self.batches["search"].inputs
            self.model.run(inputs, [self.tune], lambda batch, output: None)
            self.count(inputs)
        return self.model.reached

    @property
    def passes(self) -> int:
        """Return the forward passes over the search rows so far, from the count of sequences."""
        return math.ceil(self.sequences / self.counts[0])

    def count(self, batches: Sequence[Inputs], models: int = 1) -> None:
        """Count `models` passes over `batches`."""
        count = models * sum(map(sequences, batches))
        with self._counting:
            self.sequences += count
        progress.here(progress.PASSES).step(count / self.counts[0])

    def _ahead(self, part: int, weights: Weights) -> None:
        self.tensors.read_ahead(part, weights)

    def _relieve(self) -> bool:
        return self.tensors.relieve()

    def _walked(self, batches: Sequence[Inputs], passes: float) -> None:
        """Show how many passes over batches a walk has made. ShareStop: another device's share has failed."""
        if self._stop.is_set():
            raise ShareStop
        if self._reports:
            progress.here(progress.PASSES).begin(passes * sum(map(sequences, batches)) / self.counts[0])

    def output_change(self, part: Part) -> O.OutputChange:
        """Return the objective of that name, on "search" or "held" rows."""
        return self._change(self.batches[part].inputs)

    def _change(self, inputs: Sequence[Inputs]) -> O.OutputChange:
        change = O.OutputChange.of(self.model, self.tune, inputs)
        self.count(inputs)
        return change

    def validation(self, part: Part) -> O.Validation | O.Generation:
        """Return the objective of that name, on "search" or "held" rows."""
        assert self.metric is not None
        if self.metric == "exact_match":
            made, settings = self.reads.prompts(self.rows[part], size=self.size), self.source.calibration
            check_new_tokens(settings.length, settings.new_tokens, self.config)
            assert made.texts is not None
            return O.Generation(made.inputs, made.texts, self.reads.decode, settings.answer, settings.new_tokens)
        labels = self.batches[part].labels
        assert labels is not None
        return O.Validation(self.batches[part].inputs, labels, self.metric)

    def distribution(self, inputs: Sequence[Inputs], *, states: O.States | None = None) -> O.Distribution:
        """Return the objective of learned scales on batches of the given rows; `states`: with the change of these."""
        found = O.Distribution.of(self.model, self.tune, inputs, regression=self.is_regression, states=states)
        self.count(inputs)
        return found

    def judge(self) -> HeldOutMeasure:
        """Return the judge: the metric where there are labels, else predictions; without a head the output change."""
        if self.metric is None:
            return self.agreement(self.batches["held"].inputs)
        objective = self.validation("held")
        return HeldOutMeasure(objective, self.metric, self.counts[1], trusted=True, higher=self.metric != "loss")

    def agreement(self, inputs: Sequence[Inputs]) -> HeldOutMeasure:
        """Return the distance of predictions from the fine-tune's, whatever the scale of a classifier's logits."""
        rows = sum(map(sequences, inputs))
        if self.task in LANGUAGE and self._has_head:
            return HeldOutMeasure(self.distribution(inputs), "divergence of the next token", rows, trusted=True)
        if self._has_head:
            objective = O.Agreement.of(self.model, self.tune, inputs, regression=self.is_regression)
            self.count(inputs)
            measure = "1 - correlation with the fine-tune's" if self.is_regression else "divergence of the classes"
            return HeldOutMeasure(objective, measure, rows, trusted=True)
        return HeldOutMeasure(self._change(inputs), "output change", rows, trusted=False)

    @property
    def is_regression(self) -> bool:
        """Tell whether the head's outputs are numbers."""
        return not self.model.headless and self.task == "text-classification" and O.is_regression(self.config)

    @property
    def _has_head(self) -> bool:
        return has_head(self.settings, self.task)

    def steps(
        self, step: int = STEP_ROWS, size: int = 16, share: float = STOP_SHARE
    ) -> tuple[list[dict[str, torch.Tensor]], list[list[int]], list[dict[str, torch.Tensor]]]:
        """Return (batches of `size` rows to learn on, the batch indices of each step of `step` rows, batches that
        decide when to stop: `share` of all)."""
        rows = self.rows["search"]
        stop = select(rows, max(1, round(share * len(rows))), self.source.seed + 1)
        batches, groups = self.reads.steps(without(rows, stop), step=step, size=size)
        return batches.inputs, groups, self.reads.batches(stop, size=self.size).inputs

    def values(
        self, objective: O.Objective | O.Generation, qs: Sequence[Mapping[str, Q]], seeds: int | None = None
    ) -> list[float]:
        """Return the objective of every choice of q's, its mean over the first `seeds` masks (default: all)."""
        return [O.over_seeds(some) for some in self.of_masks(objective, qs, range(len(self.masks[:seeds])))]

    def of_masks(
        self, objective: O.Objective | O.Generation, qs: Sequence[Mapping[str, Q]], masks: range
    ) -> list[list[float]]:
        """Return [choice of q's][mask] of the objective. All choices share a mask's walk, so that it is drawn once."""
        jobs = [(mask, q) for mask in masks for q in qs]
        found = self._spread(O.evaluate, objective, jobs, lambda at, job: pruned(at.start, at.masks[job[0]], job[1]))
        return [found[i :: len(qs)] for i in range(len(qs))]

    def parts(self, objective: O.Objective, qs: Sequence[Mapping[str, Q]]) -> list[list[Any]]:
        """Return the argument of `objective.value` for every choice of q's, for the first mask."""
        return self._spread(O.reduced, objective, qs, lambda at, q: pruned(at.start, at.masks[0], q))

    def _spread(
        self,
        value: Callable[..., list[Any]],
        objective: O.Objective | O.Generation,
        jobs: Sequence[T],
        weights: Callable[[Subject, T], Weights],
    ) -> list[Any]:
        """Return `value` of the models with the weights of each job. Several GPUs share the jobs."""

        def some(at: Subject, share: Sequence[T]) -> list[Any]:
            variants = [weights(at, job) for job in share]
            there, counted = O.placed(objective, at.device), partial(self.count, objective.batches)
            with current(at.device):
                return value(at.model, there, variants, counted=counted)

        return spread([self, *self.others] if len(jobs) > 1 else [self], jobs, some, self._stop)

    @cached_property
    def others(self) -> list[Subject]:
        """Return the same on the other GPUs that calibration may use."""
        devices = torch_devices(self.source.device)[1:]
        sources = [replace(self.source, device=str(one)) for one in devices]
        return [Subject(source, *self._given, reports=False, stop=self._stop) for source in sources]

    def learner(self, objective: O.Distribution) -> Learner:
        """Return the learner of the first mask's scales."""
        return Learner(self.model, O.placed(objective, self.device), self.start, self.masks[0])

    def learners(self, objective: O.Distribution) -> list[Learner]:
        """Return the learners on the other GPUs."""
        return [at.learner(objective) for at in self.others]

    def nothing(self, objective: O.Objective | O.Generation) -> float:
        """Return the objective of the base with the fine-tune's head, where nothing of the delta is kept."""
        return self.evaluate(objective, [pruned(self.start, lambda name: None, {})])[0]

    def evaluate(self, objective: O.Objective | O.Generation, variants: Sequence[Weights]) -> list[float]:
        """Return the objective of the model with other weights, and count their passes."""
        return O.evaluate(self.model, objective, variants, counted=partial(self.count, objective.batches))

    def statistics(self, *, drawn: bool) -> dict[str, LayerStatistics]:
        """Return the statistics of layers that had an input, over the search rows; `drawn`: also of the first mask."""
        inputs = self.batches["search"].inputs
        draw = self.masks[0] if drawn else None
        found = collect(self.model, self.tune, inputs, self.tensors.delta, draw=draw)
        self.count(inputs)
        return found
