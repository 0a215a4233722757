"""The field's ways to make a delta small, written from their papers, with the bytes that each takes.

    LoRA by SVD       factors in bfloat16, ranks shared over all layers by what a byte keeps of ‖Δ‖²
    LoRA by inputs    the same of E‖Δx‖², second moments of the inputs of the rows
    Delta-CoMe        arXiv 2406.08903: 2 components in 8 bits, 32 in 3, the rest in 2; one share of the full rank
    ImPart-Qt         arXiv 2504.13237: of component k a share p_k of both vectors is dropped at random and the rest
                      divided by 1 - p_k, p_k = (1 - σ_k / σ_1) γ; what is left has Delta-CoMe's bits
    BitDelta          arXiv 2402.10193: a bit for each entry, a scale for each weight; one size
    UltraDelta        arXiv 2505.13563: 4 bits from the least to the largest entry; a third of the entries each, by the
                      variance of their weights, is dropped at s + step, s and what makes the mean s; times γ / (1 - s)
    DARE, DAREx-q     arXiv 2311.03099, 2410.09344: random entries, divided by the density, or by a q of the rows
    magnitude q_e     arXiv 2410.09344: the largest entries of each weight, divided by a q of the rows

Decided where a paper is silent, or depends on more than one fine-tune:

- Bytes are codes, and 2 for each scale. What a seed draws (DARE's and ImPart's masks) takes none; other positions take
  their entropy. LoRAs are real files. Names and headers are counted of LoRAs alone. A head is exact, and counted.
- Linear weights alone have deltas; of DARE, DAREx-q and magnitude embeddings too. All else is the base's.
- Codes are the nearest on a symmetric grid whose scale has the least squared error, not GPTQ's.
- ImPart's β is one of two on the rows: a quarter, or as many components again as 2 bits of whole vectors would buy.
- UltraDelta's level that is nearest to zero is zero, and takes no bytes: its rate is met by what it holds first. It
  guides γ by the trace norms of several fine-tunes; of one γ is q's search on the rows. Its step is a third of 1 - s,
  as in its example. Entries are dropped independently of each other, so that groups of one value lose the same share.
- DARE's values have the fewest of 1, 2, 4 and 8 bits at which there is something to drop, magnitude's have one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltamerge.formats.delta.positions import expected_bits, uniform_density
from deltamerge.methods.low_rank import Factors, Wanted, factor
from deltamerge.models.delta_file import to_torch
from deltamerge.tensors.dtypes import LOW_BITS, code_of, narrow_randomly

State = dict[str, Tensor]
Distance = Callable[[State], float]
MOST = 192  # components of a LoRA by inputs
QS = 7  # q's that are tried, each half of that before


class Made(NamedTuple):
    """The bytes of a delta, and the weights that it makes."""

    nbytes: int
    state: State


@dataclass(eq=False)
class Deltas:
    """A fine-tune's deltas from its base, in the fine-tune's names; `distance` is that of weights on the rows."""

    base: Path
    tuned: Path
    moments: Callable[[], Mapping[str, Tensor]]
    distance: Distance

    @cached_property
    def origin(self) -> State:
        """The base's weights and the fine-tune's head."""
        base, tuned = load_file(self.base / "model.safetensors"), load_file(self.tuned / "model.safetensors")
        return {
            name: tensor if is_head(name) else base[name if name in base else name.removeprefix("bert.")]
            for name, tensor in tuned.items()
        }

    @cached_property
    def every(self) -> State:
        """The deltas of weights, float32."""
        tuned = load_file(self.tuned / "model.safetensors")
        matrices = [name for name, tensor in tuned.items() if tensor.ndim == 2 and not is_head(name)]
        return {name: tuned[name].float() - self.origin[name].float() for name in matrices}

    @cached_property
    def linear(self) -> State:
        return {name: delta for name, delta in self.every.items() if "embed" not in name}

    @cached_property
    def head(self) -> int:
        """The bytes of a task's head."""
        return sum(one.numel() * one.element_size() for name, one in self.origin.items() if is_head(name))

    @cached_property
    def factors(self) -> dict[str, Factors]:
        return {name: factor(delta.numpy(), Wanted(), (0, 0)) for name, delta in self.linear.items()}

    @cached_property
    def weighed(self) -> dict[str, Factors]:
        """The leading factors by what they keep of E‖Δx‖²."""
        squares = self.moments()
        return {
            name: factor(delta.numpy(), Wanted(MOST), (0, 0), squares[name].numpy())
            for name, delta in self.linear.items()
        }

    def added(self, deltas: Mapping[str, Tensor]) -> State:
        """The weights that deltas make of the base, rounded as ours are: stochastically."""
        return {
            name: _rounded(old.float() + deltas[name], old.dtype) if name in deltas else old
            for name, old in self.origin.items()
        }

    def rescaled(self, deltas: Mapping[str, Tensor], start: float) -> State:
        """The weights for the best of `start` and its halves as a factor of all deltas."""
        whole = self.distance(self.origin)
        best, kept = whole, self.origin
        for step in range(QS):
            state = self.added({name: delta * (start / 2**step) for name, delta in deltas.items()})
            if (found := self.distance(state)) < best:
                best, kept = found, state
            elif best < whole:
                break
        return kept


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    code = code_of(dtype)
    if code not in LOW_BITS:
        return values.to(dtype)
    return to_torch(narrow_randomly(values.float().numpy().reshape(-1), code, 0), code).view(values.shape)


def is_head(name: str) -> bool:
    return name.startswith(("classifier", "score"))


# ---- low rank


def lora(of: Deltas, budget: int, work: Path, *, weighed: bool) -> Made:
    """A file with factors in bfloat16, and a head."""
    factors = of.weighed if weighed else of.factors
    prices = {name: 2 * sum(delta.shape) for name, delta in of.linear.items()}
    steps = [(gain / prices[name], name) for name, one in factors.items() for gain in one.gains]
    steps.sort(key=lambda step: -step[0])
    room, path = float(budget), work / "adapter_model.safetensors"
    taken = np.cumsum([prices[name] for _, name in steps])
    while True:
        ranks = Counter(name for _, name in steps[: int((taken <= room).sum())])
        stored = {name: tensor for name, tensor in of.origin.items() if is_head(name)}
        for name, rank in ranks.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            sides = {"A": factors[name].a[:rank], "B": factors[name].b[:, :rank]}
            stored |= {f"{key}.lora_{side}.weight": _tensor(one).bfloat16() for side, one in sides.items()}
        save_file(stored, path)
        nbytes = path.stat().st_size
        if nbytes <= budget:
            break
        room -= nbytes - budget
    deltas = {
        name: _tensor(factors[name].b[:, :rank]) @ _tensor(factors[name].a[:rank]) for name, rank in ranks.items()
    }
    return Made(nbytes, of.added(deltas))


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def widths(rank: int) -> list[int]:
    """Delta-CoMe's bits of each component."""
    return [8 if i < 2 else 3 if i < 34 else 2 for i in range(rank)]


def rounded(columns: Tensor, bits: int) -> Tensor:
    """Each column to the nearest of 2^bits symmetric levels, zeros apart; scales by least squares, in turns."""
    top, there = 2.0 ** (bits - 1) - 0.5, columns != 0
    rms = (columns.square().sum(0) / there.sum(0).clamp(min=1)).sqrt()
    scale = columns.abs().amax(0) / top if bits > 4 else rms * {1: 1.6, 2: 1.0, 3: 0.586, 4: 0.335}[bits]
    for _ in range(3):
        codes = (columns / scale.clamp(min=1e-30) - 0.5).round().add_(0.5).clamp_(-top, top) * there
        scale = (codes * columns).sum(0) / codes.square().sum(0).clamp(min=1e-30)
    return codes * scale


def coded(columns: Tensor) -> Tensor:
    """Columns in Delta-CoMe's bits."""
    bits = widths(columns.shape[1])
    groups = [[i for i, one in enumerate(bits) if one == width] for width in (8, 3, 2)]
    return torch.cat([rounded(columns[:, g], w) for g, w in zip(groups, (8, 3, 2), strict=True) if g], 1)


def delta_come(of: Deltas, budget: int, work: Path) -> Made:
    def nbytes(share: float) -> int:
        total = 0
        for delta in of.linear.values():
            total += sum(sum(delta.shape) * b // 8 + 4 for b in widths(int(share * min(delta.shape))))
        return total + of.head

    low = largest(lambda share: nbytes(share) <= budget)
    deltas = {}
    for name, one in of.factors.items():
        rank = min(int(low * min(of.linear[name].shape)), one.rank)
        if rank:
            deltas[name] = coded(_tensor(one.b[:, :rank])) @ coded(_tensor(one.a[:rank].T)).T
    return Made(nbytes(low), of.added(deltas))


def largest(fits: Callable[[float], bool], high: float = 1.0) -> float:
    """The largest number from 0 to `high` that fits."""
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def impart(of: Deltas, budget: int, work: Path) -> Made:
    made, best = None, math.inf
    whole = largest(lambda share: _impart_bytes(_kept(of, share, share), of) <= budget)
    for more in (1.25, 2.0):
        rest = min(1.0, whole * more)  # 1 - β
        kept, deltas = _fitting(of, budget, rest), {}
        random = torch.Generator().manual_seed(0)
        for name, keep in kept.items():
            if not len(keep):
                continue
            b, a = _tensor(of.factors[name].b[:, : len(keep)]), _tensor(of.factors[name].a[: len(keep)].T)
            sides = [coded(_dropped(side, keep, random)) for side in (b, a)]
            deltas[name] = sides[0] @ sides[1].T
        state = of.added(deltas)
        if (found := of.distance(state)) < best:
            made, best = Made(_impart_bytes(kept, of), state), found
    assert made is not None
    return made


def _fitting(of: Deltas, budget: int, rest: float) -> dict[str, Tensor]:
    share = largest(lambda share: _impart_bytes(_kept(of, share, rest), of) <= budget, rest)  # 1 - α
    return _kept(of, share, rest)


def _kept(of: Deltas, share: float, rest: float) -> dict[str, Tensor]:
    """1 - p of each component of each weight: `share` is 1 - α, `rest` is 1 - β."""
    found = {}
    for name, one in of.factors.items():
        sigma = torch.from_numpy(one.gains).clamp(min=0).sqrt()[: int(rest * min(of.linear[name].shape))]
        if not len(sigma) or not rest:
            found[name] = torch.zeros(0)
            continue
        gamma = 1 - share / rest
        keep = 1 - (1 - sigma / sigma[0]) * gamma
        # The last components go until the mean is 1 - γ.
        found[name] = keep[: int((keep.cumsum(0) <= (1 - gamma) * len(sigma) + 1e-9).sum())]
    return found


def _impart_bytes(kept: Mapping[str, Tensor], of: Deltas) -> int:
    bits = sum(
        float((keep * torch.tensor(widths(len(keep)))).sum()) * sum(of.linear[name].shape) + 32 * len(keep)
        for name, keep in kept.items()
    )
    return math.ceil(bits / 8) + of.head


def _dropped(columns: Tensor, keep: Tensor, random: torch.Generator) -> Tensor:
    """Columns of which random entries are left, exactly a share of each, divided by that share."""
    places = torch.rand(columns.shape, generator=random).argsort(0).argsort(0)
    return columns * (places < (keep * len(columns)).round()) / keep


# ---- entries


def bitdelta(of: Deltas, budget: int, work: Path) -> Made:
    deltas = {name: delta.sign() * delta.abs().mean() for name, delta in of.linear.items()}
    return Made(sum(-(-delta.numel() // 8) + 2 for delta in deltas.values()) + of.head, of.added(deltas))


def dare(of: Deltas, budget: int, work: Path, *, q: bool) -> Made:
    size = sum(delta.numel() for delta in of.every.values())
    room = 8 * (budget - of.head - 2 * len(of.every))
    bits = next(bits for bits in (1, 2, 4, 8, 16) if room < bits * size)
    density, random, deltas, count = room / bits / size, torch.Generator().manual_seed(0), {}, 0
    for name, delta in of.every.items():
        kept = delta * (torch.rand(delta.shape, generator=random) < density)
        deltas[name], count = rounded(kept.reshape(-1, 1), bits).reshape(delta.shape), count + int(kept.count_nonzero())
    nbytes = of.head + 2 * len(deltas) + math.ceil(density * size * bits / 8)
    if q:
        return Made(nbytes, of.rescaled(deltas, 1 / density))
    return Made(nbytes, of.added({name: delta / density for name, delta in deltas.items()}))


def magnitude(of: Deltas, budget: int, work: Path) -> Made:
    size = sum(delta.numel() for delta in of.every.values())
    room = 8 * (budget - of.head - 2 * len(of.every)) / size
    bits = next(bits for bits in (1, 2, 4, 8, 16) if room < bits)
    density, deltas, used = uniform_density(room, bits), {}, 0.0
    for name, delta in of.every.items():
        flat, count = delta.reshape(-1), max(1, int(density * delta.numel()))
        top = flat.abs().topk(count, sorted=False).indices
        kept = torch.zeros_like(flat)
        kept[top] = rounded(flat[top][:, None], bits)[:, 0]
        deltas[name] = kept.reshape(delta.shape)
        used += delta.numel() * expected_bits(count / delta.numel(), bits)
    return Made(of.head + 2 * len(deltas) + math.ceil(used / 8), of.rescaled(deltas, 16.0))


def ultradelta(of: Deltas, budget: int, work: Path) -> Made:
    size = sum(delta.numel() for delta in of.linear.values())
    room = 8 * (budget - of.head - 4 * len(of.linear)) / size
    mean = uniform_density(room, 4)  # 1 - s
    order = sorted(of.linear, key=lambda name: float(of.linear[name].var(correction=0)))
    shares, done, left = {}, 0, mean * size
    for name in order:
        done += of.linear[name].numel()
        third = 0 if done <= size / 3 else 1 if done <= 2 * size / 3 else 2
        if third < 2:
            shares[name] = mean * (2 / 3 if third == 0 else 1.0)
            left -= shares[name] * of.linear[name].numel()
    rest = [name for name in order if name not in shares]
    shares |= dict.fromkeys(rest, min(1.0, left / sum(of.linear[name].numel() for name in rest)))
    deltas, random, used = {}, torch.Generator().manual_seed(0), 0.0
    for name, share in shares.items():
        delta = of.linear[name]
        least, step = delta.min(), (delta.max() - delta.min()) / 15
        values = ((delta - least) / step).round() * step + least
        values[values.abs() < step / 2] = 0.0
        filled = max(1, int(values.count_nonzero())) / delta.numel()
        kept = values * (torch.rand(delta.shape, generator=random) < min(1.0, share / filled))
        deltas[name] = kept
        used += delta.numel() * expected_bits(int(kept.count_nonzero()) / delta.numel(), 4)
    return Made(of.head + 4 * len(deltas) + math.ceil(used / 8), of.rescaled(deltas, 1 / mean))


Make = Callable[[Deltas, int, Path], Made]
METHODS: dict[str, Make] = {
    "LoRA by SVD": partial(lora, weighed=False),
    "LoRA by inputs": partial(lora, weighed=True),
    "Delta-CoMe": delta_come,
    "ImPart-Qt": impart,
    "BitDelta": bitdelta,
    "UltraDelta": ultradelta,
    "DARE": partial(dare, q=False),
    "DAREx-q": partial(dare, q=True),
    "magnitude q_e": magnitude,
}
