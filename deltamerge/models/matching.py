"""One model under several names: the tensors of checkpoints matched by the ends of their names and by their shapes.

A text model and the vision-language model built on it call one tensor `model.layers.0.…`,
`language_model.model.layers.0.…` or `model.language_model.layers.0.…`; a headless model lacks the `bert.` of the model
with a head; transformers 4.52 moved several prefixes at once (`visual.` to `model.visual.`, `model.` to
`model.language_model.`). A rule exchanges one prefix for another, so that whole modules agree in names and shapes.
There is no table of architectures. Where one model has its experts one by one and another has them fused, they are
brought into one form.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deltamerge.errors import InputError
from deltamerge.tensors import experts
from deltamerge.tensors.names import LM_HEAD, numbers_as_stars
from deltamerge.tensors.tensor import TensorInfo

Tensors = Mapping[str, TensorInfo]
Shape = tuple[int, ...] | None  # None: unknown, fits any other
Parts = tuple[str, ...]  # the components of a name, numbers as STAR

STAR = "*"
COVERED = 0.5  # least share of the smaller of two modules that a rule must find
FEW = 3  # modules that are named one by one
MOST_PAIRS = 1 << 14  # most names that end alike


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """A prefix of one model's names, and the prefix of the same tensors' canonical names."""

    old: Parts
    new: Parts

    @property
    def cost(self) -> int:
        """The number of exchanged components."""
        return len(self.old) + len(self.new)

    def exchanges(self, ours: Parts, theirs: Parts) -> bool:
        """Tell whether this rule gives one name the other."""
        return ours[: len(self.old)] == self.old and (*self.new, *ours[len(self.old) :]) == theirs

    def __str__(self) -> str:
        old, new = (".".join((*prefix, STAR)) for prefix in (self.old, self.new))
        return f"{old} as {new}"


@dataclass(frozen=True, slots=True)
class Names:
    """The canonical name of each of a model's tensors, and the rules behind them."""

    canonical: dict[str, str]
    rules: tuple[Rule, ...] = ()

    def describe(self) -> str:
        """Return the rules in words, the longest prefixes first; "" without any."""
        return ", ".join(map(str, sorted(self.rules, key=lambda rule: (-len(rule.old), rule))))

    def shortened(self, tail: str) -> Names:
        """These names, with `tail` in place of the canonical name that ends with it."""
        return replace(self, canonical={o: tail if n.endswith(f".{tail}") else n for o, n in self.canonical.items()})


def match(models: Sequence[Mapping[str, Shape]], labels: Sequence[str]) -> list[Names]:
    """Return the canonical names of every model's tensors, from the names and shapes of all.

    The first model's names are canonical, then each further model's names that fit no earlier name. InputError: two
    prefixes would fit one model equally well.

    A single head of the language model is `lm_head.weight`, whatever its module.
    """
    if not models:
        return []
    known: dict[str, Shape] = dict(models[0])
    done: dict[frozenset[str], Names] = {frozenset(models[0]): Names({name: name for name in models[0]})}
    owner = labels[0]
    for model, label in zip(models[1:], labels[1:], strict=True):
        if (key := frozenset(model)) not in done:
            done[key] = own = match_one(model, known, label, owner)
            known |= {new: model[old] for old, new in own.canonical.items() if new not in known}
    found = [done[frozenset(model)] for model in models]
    heads = {new for names in found for new in names.canonical.values() if f".{new}".endswith(f".{LM_HEAD}")}
    return found if heads == {LM_HEAD} or len(heads) != 1 else [names.shortened(LM_HEAD) for names in found]


def match_one(model: Mapping[str, Shape], frame: Mapping[str, Shape], label: str, owner: str) -> Names:
    """Return the canonical names of one model's tensors, given the canonical names in `frame`."""
    if model.keys() == frame.keys():
        return Names({name: name for name in model})
    search = _Search.of(_patterns(model), _patterns(frame), f"{label} and {owner}")
    search.claim_same(_fits)
    search.claim_rules(_fits)
    search.claim_mixtures()
    search.claim_same(_any)
    search.claim_rules(_any)
    return Names(search.canonical(model, frame), tuple(search.told()))


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The tensors whose names differ only in numbers: their shapes by these numbers."""

    parts: Parts
    members: dict[Parts, Shape] = field(compare=False)


def split(name: str) -> tuple[Parts, Parts]:
    """Return a name's components, with STAR for numbers, and the numbers."""
    parts = name.split(".")
    return tuple(STAR if part.isdigit() else part for part in parts), tuple(part for part in parts if part.isdigit())


def _patterns(shapes: Mapping[str, Shape]) -> dict[Parts, _Pattern]:
    found: dict[Parts, _Pattern] = {}
    for name, shape in shapes.items():
        parts, numbers = split(name)
        found.setdefault(parts, _Pattern(parts, {})).members[numbers] = shape
    return found


def _fits(ours: _Pattern, theirs: _Pattern) -> bool:
    """Tell whether the shapes of all tensors in both patterns agree.

    Outside numbered blocks rows may differ (tokens, labels); stacks of matrices may be stored transposed.
    """
    common = ours.members.keys() & theirs.members.keys()
    rows = STAR not in ours.parts
    return bool(common) and all(_fit(ours.members[key], theirs.members[key], rows) for key in common)


def _fit(ours: Shape, theirs: Shape, rows: bool) -> bool:
    if ours is None or theirs is None or ours == theirs:
        return True
    if len(ours) != len(theirs) or not ours:
        return False
    return (rows and ours[1:] == theirs[1:]) or (len(ours) == 3 and ours == (theirs[0], theirs[2], theirs[1]))


def _shape(pattern: _Pattern) -> Shape:
    """Return the shape that all tensors of a pattern have; None if they differ."""
    shapes = set(pattern.members.values())
    return shapes.pop() if len(shapes) == 1 else None


def _any(ours: _Pattern, theirs: _Pattern) -> bool:
    return not ours.members.keys().isdisjoint(theirs.members.keys())


_Pair = tuple[_Pattern, _Pattern]
_Test = Callable[[_Pattern, _Pattern], bool]


@dataclass(slots=True)
class _Search:
    """Pairs of patterns found so far, and the rules that found them."""

    ours: dict[Parts, _Pattern]
    theirs: dict[Parts, _Pattern]
    candidates: list[tuple[Rule, _Pair]]
    sizes: tuple[Counter[Parts], Counter[Parts]]
    where: str
    pairs: dict[Parts, Parts] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)

    @classmethod
    def of(cls, ours: dict[Parts, _Pattern], theirs: dict[Parts, _Pattern], where: str) -> _Search:
        candidates = list(_candidates(ours.values(), theirs.values()))
        return cls(ours, theirs, candidates, (_sizes(ours), _sizes(theirs)), where)

    def claim_same(self, test: _Test) -> None:
        """Pair the patterns that are equal."""
        taken = set(self.pairs.values())
        for parts, ours in self.ours.items():
            theirs = self.theirs.get(parts)
            if theirs is not None and parts not in self.pairs and parts not in taken and test(ours, theirs):
                self.pairs[parts] = parts

    def claim_rules(self, test: _Test) -> None:
        """Pair patterns by rules, first by the rule that finds the most tensors.

        InputError: two rules are equally good.
        """
        candidates = [(rule, pair) for rule, pair in self.candidates if test(*pair)]
        while candidates:
            taken = set(self.pairs.values())
            candidates = [(r, p) for r, p in candidates if p[0].parts not in self.pairs and p[1].parts not in taken]
            groups: dict[Rule, list[_Pair]] = defaultdict(list)
            for rule, pair in candidates:
                groups[rule].append(pair)
            found = {rule: kept for rule, pairs in groups.items() if (kept := self._sound(rule, pairs))}
            if not found:
                return
            worth = {rule: (_tensors(pairs), -rule.cost) for rule, pairs in found.items()}
            best = max(worth, key=lambda rule: (worth[rule], rule))
            rivals = [rule for rule in found if worth[rule] == worth[best] and _conflict(found[rule], found[best])]
            if len(rivals) > 1:
                first, second, *_ = sorted(rivals)
                message = f"{self.where}: names match in two ways, {first} or {second}"
                raise InputError(message, hint="merge models of one architecture, or save the part that is meant alone")
            self.pairs |= {ours.parts: theirs.parts for ours, theirs in found[best]}
            if best not in self.rules:
                self.rules.append(best)

    def claim_mixtures(self) -> None:
        """Pair the remaining patterns of numbered blocks by shape, if all find a partner.

        These are the router and the fused experts of a mixture, whose names have no common end in some families
        (`input_linear`, `experts.fc1`).
        """
        taken = set(self.pairs.values())
        left = _by_block((p for n, p in self.ours.items() if n not in self.pairs), self._longest_rules())
        theirs = _by_block((p for n, p in self.theirs.items() if n not in taken), [])
        for place, patterns in left.items():
            shapes = [Counter(map(_shape, side)) for side in (patterns, theirs.get(place, ()))]
            stacked = any(shape is not None and len(shape) == 3 for shape in shapes[0])
            if shapes[0] == shapes[1] and stacked and None not in shapes[0] and set(shapes[0].values()) == {1}:
                by_shape = {_shape(pattern): pattern.parts for pattern in theirs[place]}
                self.pairs |= {pattern.parts: by_shape[_shape(pattern)] for pattern in patterns}

    def _longest_rules(self) -> list[Rule]:
        """Return the rules for tensors that fit no pattern, the longest prefix first."""
        return sorted((r for r in self.rules if STAR not in r.new[:1]), key=lambda rule: -len(rule.old))

    def _sound(self, rule: Rule, pairs: Sequence[_Pair]) -> list[_Pair]:
        """Return the pairs of a rule that cover most of a module on either side."""
        if STAR in rule.old:
            small = max(self.sizes[0][rule.old], self.sizes[1][rule.new])
            return list(pairs) if len(pairs) == small > 1 else []
        if not _related(rule.old, rule.new):
            return []
        modules: dict[str, list[_Pair]] = defaultdict(list)
        for pair in pairs:
            modules[pair[0].parts[len(rule.old)]].append(pair)
        kept = []
        for head, inside in modules.items():
            whole = min(self.sizes[0][(*rule.old, head)], self.sizes[1][(*rule.new, head)])
            kept += inside if len(inside) >= COVERED * whole else []
        return kept

    def told(self) -> Iterator[Rule]:
        """Yield the rules, split into one for each module if they add or drop a prefix before only a few."""
        for rule in self.rules:
            own = [ours for ours, theirs in self.pairs.items() if rule.exchanges(ours, theirs)]
            heads = dict.fromkeys(ours[len(rule.old)] for ours in own)
            if (rule.old and rule.new) or len(heads) > FEW:
                yield rule
            else:
                yield from (Rule((*rule.old, h), (*rule.new, h)) for h in heads if h != LM_HEAD.partition(".")[0])

    def canonical(self, model: Mapping[str, Shape], frame: Mapping[str, Shape]) -> dict[str, str]:
        """Return the canonical name of every name.

        Names that fit no pattern follow the rule of their longest prefix, if they can.
        """
        found: dict[str, str] = {}
        rest = []
        for name in model:
            parts, numbers = split(name)
            twin = self.pairs.get(parts)
            if twin is None:
                rest.append((name, parts, numbers))
            else:
                found[name] = join(twin, numbers)
        taken = {*found.values(), *frame}
        rules = self._longest_rules()
        for name, parts, numbers in rest:
            new = join(_follow(parts, rules), numbers)
            found[name] = name if new in taken else new
            taken.add(found[name])
        return found


def _follow(parts: Parts, rules: Sequence[Rule]) -> Parts:
    """Return the name after the first rule with a matching prefix."""
    rule = next((r for r in rules if parts[: len(r.old)] == r.old), None)
    return parts if rule is None else (*rule.new, *parts[len(rule.old) :])


def _by_block(patterns: Iterable[_Pattern], rules: Sequence[Rule]) -> dict[Parts, list[_Pattern]]:
    """Return the patterns of every container of numbered blocks, by its canonical name."""
    found: dict[Parts, list[_Pattern]] = defaultdict(list)
    for pattern in patterns:
        if STAR in pattern.parts:
            parts = _follow(pattern.parts, rules)
            found[parts[: parts.index(STAR)]].append(pattern)
    return found


def join(parts: Parts, numbers: Parts) -> str:
    """Return the name of `parts` with `numbers` for its STARs."""
    rest = iter(numbers)
    return ".".join(next(rest) if part == STAR else part for part in parts)


def _candidates(ours: Iterable[_Pattern], theirs: Iterable[_Pattern]) -> Iterator[tuple[Rule, _Pair]]:
    """Yield every pair of patterns that end alike, by the rule that exchanges their beginnings.

    The common end is as long as possible. It is all of one name, or it has at least two components and begins no later
    than the name of the first container of numbered blocks. Both sides have equally many numbers before it.
    """
    for one, other in _alike(list(ours), list(theirs), 1):
        for pattern in one:
            for twin in other:
                count = _common(pattern.parts, twin.parts)
                old, new = pattern.parts[:-count], twin.parts[:-count]
                end = pattern.parts[len(old) :]
                if (old and new and (count < 2 or end[0] == STAR)) or not (old or new):
                    continue
                if old.count(STAR) == new.count(STAR):
                    yield Rule(old, new), (pattern, twin)


_Group = list[_Pattern]


def _alike(ours: _Group, theirs: _Group, depth: int) -> Iterator[tuple[_Group, _Group]]:
    """Groups of patterns whose last `depth` components are equal; more components if there are too many pairs."""
    groups: dict[Parts, tuple[_Group, _Group]] = defaultdict(lambda: ([], []))
    for side, patterns in enumerate((ours, theirs)):
        for pattern in patterns:
            groups[pattern.parts[-depth:]][side].append(pattern)
    for end, (one, other) in groups.items():
        if len(one) * len(other) <= MOST_PAIRS:
            yield one, other
        elif len(end) == depth:
            yield from _alike(one, other, depth + 1)


def _common(one: Parts, other: Parts) -> int:
    """Return the number of components that two names have in common at their ends."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _related(one: Parts, other: Parts) -> bool:
    """Tell whether one prefix has all components of the other, in any order."""
    a, b = Counter(one), Counter(other)
    return a <= b or b <= a


def _sizes(patterns: Iterable[Parts]) -> Counter[Parts]:
    """Return the number of patterns that begin with each prefix."""
    return Counter(parts[:i] for parts in patterns for i in range(len(parts) + 1))


def _tensors(pairs: Iterable[_Pair]) -> int:
    return sum(len(ours.members.keys() & theirs.members.keys()) for ours, theirs in pairs)


def _conflict(one: Sequence[_Pair], other: Sequence[_Pair]) -> bool:
    """Tell whether two rules would pair a pattern of either side."""
    ours, theirs = ({pair[side].parts for pair in one} & {pair[side].parts for pair in other} for side in (0, 1))
    return bool(ours or theirs)


# Experts, stored one by one or fused.


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """A model's storage of experts: shapes of fused tensors by container, tensors stored one by one, and their layout.

    Containers are canonical names with a star for every number, because all layers are alike.
    """

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    apart: frozenset[str]
    layout: experts.Layout | None


def shared_names(models: Sequence[Tensors], labels: Sequence[str]) -> tuple[list[dict[str, TensorInfo]], list[Names]]:
    """Return the tensors of every model, and their canonical names. Experts are fused if any model's are."""
    mixed = experts.differ(models)
    tensors = [experts.fold(model) if mixed else dict(model) for model in models]
    return tensors, match([{name: info.shape for name, info in model.items()} for model in tensors], labels)


def form_of(tensors: Tensors, stored: Tensors) -> ExpertForm:
    """Return the form of a model, from its tensors by canonical name and by name in its files."""
    apart: set[str] = set()
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for container, own in experts.by_container(tensors).items():
        place = numbers_as_stars(container)
        shapes.setdefault(place, {key: info.shape for key, info in own.items()})
        if any(experts.is_joined(info.tensor) for info in own.values()):
            apart.add(place)
    return ExpertForm(shapes, frozenset(apart), experts.layout_of(stored))


def regrouped(
    tensors: Tensors, stored: Mapping[str, str], form: ExpertForm
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return a model's tensors in another model's form, and their names in its files, both by canonical name."""
    result: dict[str, TensorInfo] = {}
    names: dict[str, str] = {}
    found = experts.by_container(tensors)
    swapped = {
        container
        for container, own in found.items()
        if experts.is_turned(
            {key: info.shape for key, info in own.items()}, form.shapes.get(numbers_as_stars(container), {})
        )
    }
    for name, info in tensors.items():
        container, _, key = name.rpartition(".")
        if container not in found or key not in found[container]:
            result[name], names[name] = info, stored[name]
            continue
        if container in swapped:
            info = experts.turned(info)
        own = (form.layout or {}).get(key) if numbers_as_stars(container) in form.apart else None
        if own is None or info.shape[1] % len(own):
            result[name], names[name] = info, stored[name]
            continue
        place = stored[name].rpartition(".")[0]
        for rest, part in experts.unfold(info, own).items():
            result[f"{container}.{rest}"] = replace(part, name=f"{place}.{rest}")
            names[f"{container}.{rest}"] = f"{place}.{rest}"
    return result, names


def in_order(names: Mapping[str, str], tensors: Tensors) -> dict[str, str]:
    """Return canonical names in the order of the model's files."""
    order = {name: i for i, name in enumerate(tensors)}
    return dict(sorted(names.items(), key=lambda item: order.get(item[1], len(order))))
