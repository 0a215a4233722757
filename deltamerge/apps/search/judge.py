"""Judge candidates in memory on the rows of their fine-tunes, part by part of a model.

Tensors that candidates share are read and computed once. No candidate is written.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamerge import errors
from deltamerge.apps.search.candidates import OF_BASE, RecipeCandidate, RecipeCandidates
from deltamerge.apps.search.evaluate import (
    AGREEMENT,
    ALL_ROWS,
    DISTANCE,
    LOWER,
    UNLABELLED,
    ScoredTask,
    Sheet,
    measured,
    refuse_unknown,
)
from deltamerge.calibrate.merge import second_moments
from deltamerge.calibrate.model.blocks import Weights
from deltamerge.calibrate.model.passes import renamed
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.calibrate.rows.splits import rows_of, select, split
from deltamerge.calibrate.spec import Calibrated
from deltamerge.calibrate.values import Spooled
from deltamerge.engine import backends
from deltamerge.engine.execute import Task as Piece
from deltamerge.engine.execute import computed, default_workers, execute, shared_values
from deltamerge.errors import InputError
from deltamerge.methods.ops import dense
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.plan.vocabulary import Rows
from deltamerge.recipe.schema import Calibration, Goal, Recipe, Study
from deltamerge.tensors.dtypes import nbytes_of, torch_dtype
from deltamerge.tensors.names import resident_size
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.traits import name_of
from deltamerge.tensors.views import in_memory

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
PRUNING = "deltamerge.methods.prune."
THE_BASE = "the base"  # its name among the fine-tunes
GIVEN = "deltamerge.apps.search.judge:given"


class BoundedCache(Generic[K, T]):
    """A cache of the values that `make` gives for keys, several at once; the last `budget` bytes are kept."""

    def __init__(self, budget: int, size: Callable[[T], int]) -> None:
        self.budget, self.size, self.bytes = budget, size, 0
        self.kept: OrderedDict[K, T] = OrderedDict()

    def get(self, keys: Sequence[K], make: Callable[[list[K]], Mapping[K, T]]) -> dict[K, T]:
        """Return the values of `keys`, made if they are not there."""
        missing = [key for key in keys if key not in self.kept]
        new = make(missing) if missing else {}
        found = {key: new[key] if key in new else self.kept[key] for key in keys}
        for key, value in found.items():
            self.bytes += self.size(value) if key in new else 0
            self.kept[key] = value
            self.kept.move_to_end(key)
        while self.bytes > self.budget and len(self.kept) > len(keys):
            self.bytes -= self.size(self.kept.popitem(last=False)[1])
        return found


def given(*, value: Any) -> Any:
    """Return a value that is there already."""
    return value


class Walk:
    """The weights of `candidates` while models walk through their blocks; `known` are the values of their stages.

    A part of the model is resident. Its tensors that candidates share are in memory once: stored ones, pruned deltas,
    singular vectors and the like. A candidate's own tensors are made of these when its turn comes, rounded to the
    output's dtype. They are held in `dtype` (None: as they are) until the next turn, or for good up to `kept` bytes.
    """

    def __init__(
        self,
        candidates: Sequence[RecipeCandidate],
        reader: Reader,
        known: Mapping[Node, Any],
        device: str,
        budget: int,
        dtype: torch.dtype | None = None,
        kept: int = 0,
    ) -> None:
        self.candidates, self.reader, self.known, self.device = candidates, reader, known, device
        self.dtype = dtype
        self.graph = Graph()
        self.shared: BoundedCache[str, dict[Node, Node]] = BoundedCache(budget, _bytes_of_nodes)
        self.made: BoundedCache[tuple[int, str], Tensor] = BoundedCache(
            max(budget, kept), lambda tensor: tensor.numel() * tensor.element_size()
        )

    def weights(self, k: int, index: int, task: ScoredTask) -> Weights:
        """Candidate k's weights below the head of a task, which is the fine-tune `index`'s."""
        candidate = self.candidates[k]
        places = candidate.places[index]

        def of(names: Sequence[str]) -> dict[str, Tensor]:
            merged = self.tensors(k, [places[name] for name in names if name in places])
            others = task.own([name for name in names if name not in places])
            found = {name: merged[places[name]] for name in names if name in places}
            return {**in_own_rows(found, candidate.token_rows[index], task), **others}

        return of

    def tensors(self, k: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Candidate k's tensors by the output's names; before `dtype`, bit for bit as from a run."""
        made = self.made.get([(k, name) for name in names], lambda keys: self._make(k, [name for _, name in keys]))
        return {name: made[k, name] for name in names}

    def _make(self, k: int, names: Sequence[str]) -> dict[tuple[int, str], Tensor]:
        shared = self.shared.get(names, self._share)
        roots = {name: _over(self.candidates[k].roots[name], shared[name]) for name in names}
        return {(k, name): tensor for name, tensor in self._compute(roots).items()}

    def _share(self, names: Sequence[str]) -> dict[str, dict[Node, Node]]:
        """Return, by tensor, the nodes that candidates share, as nodes that read them from memory."""
        wanted: dict[str, Node] = {}
        of_name: dict[str, list[tuple[Node, str]]] = {name: [] for name in names}
        for name in names:
            for i, node in enumerate(_common([candidate.roots[name] for candidate in self.candidates])):
                key = f"{name}#{i}"
                plain = node.kind == "map" and node.dtype == "F32" and node.function.startswith(PRUNING)
                wanted[key] = self.graph.node(dense, [node], shape=node.shape) if plain else node
                of_name[name].append((node, key))
        whole = {key: node for key, node in wanted.items() if node.kind == "whole"}
        values = self._values(whole)
        buffers = self._run({key: node for key, node in wanted.items() if key not in whole})
        found: dict[str, dict[Node, Node]] = {}
        for name, nodes in of_name.items():
            found[name] = {}
            for node, key in nodes:
                if key in whole:
                    known = (("value", values[node]),)
                    found[name][node] = Node(GIVEN, (), known, node.shape, node.dtype, "small")
                    continue
                found[name][node] = in_memory(key, node.dtype, node.shape, memoryview(buffers[key].data)).tensor
        return found

    def _compute(self, roots: Mapping[str, Node]) -> dict[str, Tensor]:
        whole = {name: node for name, node in roots.items() if not node.is_source}
        buffers = self._run(whole)
        for name, node in roots.items():
            if node.is_source:  # shared as a whole, or a copy
                buffers[name] = np.empty(node.nbytes, np.uint8)
                self.reader.read_into(node, 0, buffers[name])
        made = {}
        for name, node in roots.items():
            tensor = torch.from_numpy(buffers.pop(name)).view(torch_dtype(node.dtype)).view(node.shape)
            to = self.dtype if tensor.is_floating_point() else None
            made[name] = tensor.to(self.device, to or tensor.dtype)
        return made

    def _values(self, whole: Mapping[str, Node]) -> dict[Node, Any]:
        """Return the values of nodes of whole tensors."""
        pieces = [Piece(name, node, backends.choose(node, self.device)) for name, node in whole.items()]
        if not pieces:
            return {}
        return execute(pieces, self.reader, None, device=self.device, workers=default_workers(), known=self.known)

    def _run(self, roots: Mapping[str, Node]) -> dict[str, NDArray[np.uint8]]:
        return computed(roots, self.reader, device=self.device, known=self.known)


def in_own_rows(tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], task: ScoredTask) -> dict[str, Tensor]:
    """Return tensors of a merge with rows in the order of the fine-tune's own vocabulary.

    `rows` has the merge's row of each of its ids. Padding, −1, keeps the fine-tune's own rows.
    """
    found = dict(tensors)
    for name in tensors.keys() & rows.keys():
        index = torch.from_numpy(rows[name]).to(tensors[name].device, torch.int64)
        found[name] = tensors[name][index.clamp_min(0)]
        if bool((index < 0).any()):
            found[name][index < 0] = task.own([name])[name][index < 0].to(found[name].dtype)
    return found


def _between(ours: Rows, theirs: Rows) -> Rows:
    """Return the row of another model of each of our ids, −1 where it lacks the token, from both models' rows in the
    output."""
    found = np.full(max(int(ours.max()), int(theirs.max())) + 1, -1, np.int32)
    (there,) = np.nonzero(theirs >= 0)
    found[theirs[there]] = there
    return np.where(ours >= 0, found[ours], -1).astype(np.int32)


def _common(roots: Sequence[Node]) -> list[Node]:
    """Return the nodes at which to cut the graphs of one tensor: common to several, and of its size.

    They are stored tensors, pruned deltas, and values of whole matrices.
    """
    distinct = list(dict.fromkeys(roots))
    if len(distinct) == 1:
        if len(roots) > 1 and not distinct[0].is_source:
            return distinct
        return [node for node in depth_first(distinct[0]) if node.is_source]
    count: dict[Node, int] = {}
    for root in distinct:
        for node in depth_first(root):
            count[node] = count.get(node, 0) + 1
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    pending = list(distinct)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if count[node] > 1 and (node.is_source or node.kind == "whole" or _is_delta(node, distinct[0])):
            found[node] = None
        else:
            pending += node.operands
    return list(found)


def _is_delta(node: Node, root: Node) -> bool:
    """Return whether a node is a pruned delta of the whole tensor, which is dear to make again."""
    return node.kind == "map" and node.function.startswith(PRUNING) and node.shape == root.shape


def _over(root: Node, cut: Mapping[Node, Node]) -> Node:
    """Return the graph of `root` with its cut nodes replaced."""
    made = dict(cut)
    for node in depth_first(root):
        if node in made:
            continue
        inputs = tuple(made[source] for source in node.operands)
        same = all(a is b for a, b in zip(inputs, node.operands, strict=True))
        made[node] = node if same else Node(node.function, inputs, node.parameters, node.shape, node.dtype, node.kind)
    return made[root]


def _bytes_of_nodes(nodes: Mapping[Node, Node]) -> int:
    return sum(nbytes_of(node.dtype, node.shape) for node in nodes.values())  # of a value of a matrix about


IN_MERGE = name_of(second_moments.merged)
Part = Literal["first", "search", "held"]
"""Parts of the rows: a quarter of the search rows, all search rows, the deciding rows."""
Scores = Mapping[str, Mapping[str, float]]
"""By fine-tune and measure."""
QUARTER = 4


class StudyJudge:
    """Judges the candidates of a recipe by the measures of its `study`.

    start       a candidate; all others have the same fine-tunes
    also        measures without labels beside the goals' measures
    bases       scores of the base, with each fine-tune's head, by part of the rows

    With rows of the base, `kept`, the base is one fine-tune more, THE_BASE, and its agreement a share of the
    fine-tunes' mean one.
    """

    def __init__(
        self,
        candidates: RecipeCandidates,
        recipe: Recipe,
        study: Study,
        goals: Sequence[Goal],
        also: Collection[str] = (),
        kept: Calibration | None = None,
    ) -> None:
        self.candidates, self.study, self.also = candidates, study, frozenset(also)
        self.device = candidates.options.device
        self._held = ExitStack()
        self.reader = self._held.enter_context(Reader())
        self.known: dict[Node, Any] = {}
        self.start = candidates.of(recipe)
        inputs = candidates.inputs(recipe)
        self.tasks: dict[int, ScoredTask] = {}

        def task_of(name: str, checkpoint: Checkpoint, calibration: Calibration) -> ScoredTask:
            return ScoredTask(name, checkpoint, calibration, candidates.folder, self.reader, self.device)

        for tune in inputs.tunes:
            if tune.index is None or tune.index not in recipe.fine_tunes:
                continue
            calibration = recipe.calibration_of(tune.index)
            if calibration is None:
                hint = "calibration: {data: rows.jsonl}, or beside the model"
                raise InputError(f"{tune.name}: has no rows to be judged on", hint=hint)
            self.tasks[tune.index] = task_of(tune.name, tune.checkpoint, calibration)
        if kept is not None and inputs.base is not None:
            self.tasks[OF_BASE] = task_of(THE_BASE, inputs.base.checkpoint, kept)
        self.seed = recipe.seed
        self.wanted = {index: self._measures(task, goals) for index, task in self.tasks.items()}
        self._rows: dict[int, dict[Part, list[DataRow]]] = {}
        self._sheets: dict[Part, dict[int, Sheet]] = {}
        self.bases: dict[Part, Scores] = {}
        self._own: dict[Part, Scores] = {}
        self.budget = self._resident()

    def close(self) -> None:
        """Close the files."""
        self._held.close()
        for value in self.known.values():
            if isinstance(value, Spooled):
                value.remove()

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of candidates' tensors: float32 where every product is in it, else as they are."""
        precise = all(task.model.precision == "float32" for task in self.tasks.values())
        return torch.float32 if precise else None

    def rows(self, part: Part) -> dict[str, int]:
        """Return the number of rows of each fine-tune. InputError: they are too few, or do not fit the model."""
        return {task.name: len(self._of(index)[part]) for index, task in self.tasks.items()}

    def scores(self, candidates: Sequence[RecipeCandidate], part: Part) -> list[Scores]:
        """Return the measures of every candidate on a part of the rows."""
        return [own[part] for own in self.scores_by_part(candidates, [part])]

    def scores_by_part(
        self, candidates: Sequence[RecipeCandidate], parts: Sequence[Part]
    ) -> list[Mapping[Part, Scores]]:
        """Return the measures of every candidate on each part of the rows. `study.together` of them share a walk."""
        found: list[Mapping[Part, Scores]] = []
        for at in range(0, len(candidates), self.study.together):
            found += self.judged(self.walk(candidates[at : at + self.study.together]), parts)
        return found

    def walk(self, some: Sequence[RecipeCandidate], kept: int = 0) -> Walk:
        """Return the weights of candidates. Up to `kept` bytes of them stay in memory."""
        self._forget_others(some)
        for candidate in some:
            self.prepare(candidate)
        return Walk(some, self.reader, self.known, self.device, self.budget, self.dtype, kept)

    def judged(self, walk: Walk, parts: Sequence[Part]) -> list[Mapping[Part, Scores]]:
        """Return the measures of a walk's candidates on each part. Every tensor is made once for all parts."""
        sheets = [(part, index, sheet) for part in parts for index, sheet in self.sheet(part).items()]
        count = len(walk.candidates)
        variants = [[walk.weights(k, index, self.tasks[index]) for k in range(count)] for _, index, _ in sheets]
        with backends.quiet_allocator(whole=True):
            by_sheet = measured([(self.tasks[index], sheet) for _, index, sheet in sheets], variants)
        found: list[dict[Part, dict[str, Mapping[str, float]]]] = [{part: {} for part in parts} for _ in range(count)]
        for (part, index, _), of_sheet in zip(sheets, by_sheet, strict=True):
            name = self.tasks[index].name
            for own, scores in zip(found, of_sheet, strict=True):
                own[part][name] = relative(scores, self.bases[part][name])
        return [dict(own) for own in found]

    def _forget_others(self, some: Sequence[RecipeCandidate]) -> None:
        """Remove moments that were measured in other candidates' merges: no other candidate can use them."""
        wanted = {stage for one in some for stage in one.stages}
        for node in [one for one in self.known if one.function == IN_MERGE and one not in wanted]:
            self.known.pop(node.inputs[0]).remove()
            del self.known[node]

    def prepare(self, candidate: RecipeCandidate) -> None:
        """Run the stages of a candidate that no other has run: activations, q's."""
        if any(node not in self.known for node in candidate.stages):
            found = shared_values(candidate.stages, self.known)
            spools = {node: value for node, value in found.items() if isinstance(value, Spooled)}
            self.known |= {node: found[node] for node in candidate.stages} | spools

    def calibrated(self, recipe: Recipe) -> dict[str, Calibrated]:
        """Return the q's and coefficients of a recipe, by the names of its stages. Known values are not made again."""
        candidate = self.candidates.of(recipe)
        self.prepare(candidate)
        known = {node: self.known[node] for node in candidate.stages}
        return {node.parameter("spec").name: value for node, value in known.items() if isinstance(value, Calibrated)}

    def sheet(self, part: Part) -> dict[int, Sheet]:
        """Return the rows of a part, and the fine-tunes' own outputs on them."""
        if part not in self._sheets:
            made = {}
            for index, task in self.tasks.items():
                metrics, compared = self.wanted[index]
                made[index] = task.sheet(self._of(index)[part], metrics, compared)
            self._sheets[part] = made
            self.bases[part] = self._reference(made)
        return self._sheets[part]

    def references(self, part: Part) -> dict[str, Scores]:
        """Return the scores of the base, with each fine-tune's head, and of the fine-tunes."""
        sheets = self.sheet(part)
        if part not in self._own:
            self._own[part] = self._scores_of(sheets, lambda index: self.tasks[index].own)
        return {"base": self.bases[part], "fine-tune": self._own[part]}

    def _scores_of(self, sheets: Mapping[int, Sheet], weights: Callable[[int], Weights]) -> Scores:
        """Return the scores of a model for each fine-tune."""
        found: dict[str, Mapping[str, float]] = {}
        for index, sheet in sheets.items():
            task = self.tasks[index]
            ((found[task.name],),) = measured([(task, sheet)], [[weights(index)]])
        return found

    def _reference(self, sheets: Mapping[int, Sheet]) -> Scores:
        """Return the scores that agreement is a share of: the base's, and on its rows the mean of the fine-tunes'."""
        found = self._scores_of({index: sheet for index, sheet in sheets.items() if index != OF_BASE}, self._base)
        if OF_BASE not in sheets:
            return found
        task = self.tasks[OF_BASE]
        tunes = [self._in_base(index) for index in self.tasks if index != OF_BASE]
        (scores,) = measured([(task, sheets[OF_BASE])], [tunes])
        return {**found, task.name: {DISTANCE: sum(one[DISTANCE] for one in scores) / len(scores)}}

    def _in_base(self, index: int) -> Weights:
        """Return a fine-tune's own weights by the base's names, with rows in the order of the base's tokens."""
        base, tune, places = self.tasks[OF_BASE], self.tasks[index], self.start.places
        stored = {out: name for name, out in places[index].items()}
        theirs = {name: stored[out] for name, out in places[OF_BASE].items()}
        of_base, of_tune = self.start.token_rows[OF_BASE], self.start.token_rows[index]
        weights = renamed(tune.own, theirs, base.own)

        def of(names: Sequence[str]) -> dict[str, Tensor]:
            found = weights(names)
            rows = {
                name: _between(
                    of_base.get(name, np.arange(base.checkpoint.tensors[name].shape[0], dtype=np.int32)),
                    of_tune.get(theirs[name], np.arange(found[name].shape[0], dtype=np.int32)),
                )
                for name in names
                if name in of_base or theirs.get(name) in of_tune
            }
            return in_own_rows(found, rows, base)

        return of

    def _base(self, index: int) -> Weights:
        task, places, rows = self.tasks[index], self.start.places[index], self.start.token_rows[index]

        def of(names: Sequence[str]) -> dict[str, Any]:
            bases = {name: self.start.merges[places[name]].base for name in names if name in places}
            infos = {name: bases.get(name) or task.checkpoint.tensors[name] for name in names}
            found = {name: task.stored(info) for name, info in infos.items()}
            return in_own_rows(found, {name: rows[name] for name in rows if bases.get(name)}, task)

        return of

    def _of(self, index: int) -> dict[Part, list[DataRow]]:
        """Return the rows of a fine-tune."""
        if index not in self._rows:
            task, test = self.tasks[index], self.study.test
            labelled = bool(self.wanted[index][0])
            with errors.context(task.name):
                search, held = split(task.calibration, task.folder, self.seed, task.settings, labelled=labelled)
                file = test if isinstance(test, str) or test is None else test.get(task.name)
                if file is not None:
                    calibration = task.calibration.model_copy(update={"data": file})
                    held = rows_of(calibration, task.folder, task.settings, labelled=labelled, limit=ALL_ROWS)
                task.reads.check([*search, *held])
            few = select(search, max(1, math.ceil(len(search) / QUARTER)), self.seed)
            self._rows[index] = {"first": few, "search": search, "held": held}
        return self._rows[index]

    def _measures(self, task: ScoredTask, goals: Sequence[Goal]) -> tuple[list[str], frozenset[str]]:
        """Return the metrics that a fine-tune is judged by, and the measures without labels."""
        if task is self.tasks.get(OF_BASE):
            return [], frozenset({AGREEMENT})
        asked = [goal.by for goal in goals if goal.of_folder is None and goal.of in (None, task.name)]
        named = (task.metric if by == "metric" else by for by in asked if by not in UNLABELLED)
        metrics = list(dict.fromkeys(named))
        refuse_unknown(metrics, task)
        return metrics, (UNLABELLED & set(asked)) | self.also

    def _resident(self) -> int:
        """Return the bytes of the stored tensors and deltas of one part, and of tensors outside blocks."""
        sizes: dict[str, int] = {}
        for name, merge in self.start.merges.items():
            infos = [info for info in (merge.base, *(tensor for _, tensor in merge.sources)) if info is not None]
            sizes[name] = sum(info.nbytes for info in infos) + 4 * len(merge.sources) * math.prod(merge.shape)
        shapes = {name: merge.shape for name, merge in self.start.merges.items()}
        return resident_size(shapes, sizes)


def relative(scores: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Return scores with the agreement as a share of the base's distance: 0 is the fine-tune, 1 is the base."""
    found = dict(scores)
    if DISTANCE in found:
        found[DISTANCE] = found[DISTANCE] / base[DISTANCE] if base[DISTANCE] > 0 else found[DISTANCE]
    return found


def worth(goal: Goal, scores: Scores, metrics: Mapping[str, str]) -> float:
    """Return the value of a goal: one fine-tune's, or the weighted mean or the worst of all.

    `metrics` are the fine-tunes' own.
    """
    of = {name: own[_key(goal, metrics[name])] for name, own in scores.items() if goal.of in (None, name)}
    if goal.over == "minimum":
        return max(of.values()) if is_lower(goal, metrics) else min(of.values())
    weights = {name: goal.weights.get(name, 1.0) for name in of}
    return sum(weights[name] * value for name, value in of.items()) / sum(weights.values())


def _key(goal: Goal, metric: str) -> str:
    """Return the name of a fine-tune's score in a goal. `metric` is the fine-tune's own."""
    return {"metric": metric, AGREEMENT: DISTANCE}.get(goal.by, goal.by)


def is_lower(goal: Goal, metrics: Mapping[str, str]) -> bool:
    """Return whether less of a goal is better. InputError: the fine-tunes' metrics point in different ways."""
    if goal.of_folder is not None:
        return goal.of_folder.direction == "minimize"
    if goal.by != "metric":
        return goal.by in LOWER
    ways = {metrics[name] in LOWER for name in metrics if goal.of in (None, name)}
    if len(ways) > 1:
        raise InputError(
            "study.objective: for some of the fine-tunes' metrics more is better, for others less",
            hint="give each `of:` it, or set calibration.metric",
        )
    return ways.pop()


def judged_by(judge: StudyJudge) -> dict[str, str]:
    """Return the fine-tunes' own metrics. "": none is needed."""
    return {task.name: (task.metric if judge.wanted[i][0] else "") for i, task in judge.tasks.items()}
