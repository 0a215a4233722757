"""AdamR: Adam whose decay pulls to the pretrained weights, so that the delta it leaves can be pruned."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from deltamerge.errors import InputError
from deltamerge.models import hub
from deltamerge.models.matching import match

Regularizer = Literal["l2", "l1"]
Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Pretrained = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
Readers = dict[str, Callable[[], Tensor]]

_WRAPPERS = re.compile(r"^module\.|(?:^|(?<=\.))_orig_mod\.")  # DistributedDataParallel, torch.compile
_SAMPLES = 256  # entries of a tensor that the fingerprint reads


class AdamR(torch.optim.Optimizer):
    """Adam with decoupled decay to pretrained weights θ_P (Algorithm 1 of arXiv 2410.09344).

        v̄_t = mean of the bias-corrected second moment v̂_t over all parameters: one scalar, 1 where it is 0
        θ_t = θ_{t−1} − R(θ_{t−1} − θ_P) − lr · m̂_t / (sqrt(v̂_t) + eps),     c = lr · decay / sqrt(v̄_t)
        l2: R(δ) = min(c, 1) · δ          l1: R(δ) = min(c, |δ|) · sign(δ)

    The minima are a safeguard that the paper lacks: at any `decay` no entry is carried past its pretrained
    value (without it l2 diverges from c = 2). `decay=0` is `AdamW(weight_decay=0)` of the same `foreach`, bit for bit.

    Args:
        params: `model.named_parameters()`, or groups of them with their own `lr`, `betas`, `eps`, `decay`,
            `regularizer`, `foreach`. Names are needed wherever `decay` is not 0.
        pretrained: θ_P as a module, a state dict, a checkpoint folder or hub id (`id@revision`),
            matched by name, the base-model prefix taken off either side. The model itself means its present
            weights. Other tensors of the right device and dtype are kept, not copied: leave them be.
        lr, betas, eps: as in AdamW, plain numbers.
        decay: λ ≥ 0.
        regularizer: "l2" before random drop, "l1" before magnitude or WANDA.
        foreach: one call per operation instead of one per tensor.
        pretrained_device, pretrained_dtype: how θ_P is kept ("cpu", `torch.bfloat16`), then streamed in
            pieces at each step; default: beside each parameter, in its dtype.

    Parameters have any floating dtype; v̄ is summed in float32 or wider; on CUDA nothing waits for the device.
    Without a pretrained value (see `fresh`) a parameter has no decay but counts in v̄; without a gradient it
    is left out of both. `state_dict` is AdamW's with `decay`, `regularizer` and a fingerprint of θ_P, not θ_P:
    build the optimizer on the same pretrained weights, then `load_state_dict`, which refuses others.

    Raises:
        ValueError: a hyper-parameter out of range.
        InputError: θ_P cannot be read, matches no parameter, has another shape, or is not the saved run's.
    """

    root_v: Tensor | None = None  # sqrt(v̄) of the last step, the scale of `decay`

    def __init__(
        self,
        params: Parameters,
        pretrained: Pretrained,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 1e-2,
        *,
        regularizer: Regularizer = "l2",
        foreach: bool = True,
        pretrained_device: torch.device | str | None = None,
        pretrained_dtype: torch.dtype | None = None,
    ) -> None:
        self._pretrained: dict[str, Tensor] = {}
        self._place = (pretrained_device, pretrained_dtype)
        options = {"lr": lr, "betas": betas, "eps": eps, "decay": decay}
        options |= {"regularizer": regularizer, "foreach": foreach, "pretrained": ""}
        super().__init__(cast(Any, params), options)
        if any(group["decay"] for group in self.param_groups):
            self.attach(pretrained)

    @classmethod
    def for_model(cls, model: nn.Module, pretrained: Pretrained, *, fresh: Sequence[str] = (), **options: Any) -> AdamR:
        """AdamR over the trainable parameters of `model`, with the class's own options.

        Names that match one of the patterns `fresh` (`re.search`) get no decay.
        """
        kept: list[tuple[str, Tensor]] = []
        heads: list[tuple[str, Tensor]] = []
        for name, p in model.named_parameters():
            if p.requires_grad:
                (heads if any(re.search(pattern, name) for pattern in fresh) else kept).append((name, p))
        groups: list[dict[str, Any]] = [{"params": kept}, {"params": heads, "decay": 0.0}]
        return cls([group for group in groups if group["params"]], pretrained, **options)

    @property
    def fresh(self) -> list[str]:
        """Return the names of parameters that have a `decay` but no pretrained value to be pulled to."""
        return [name for name in self._with_decay() if name not in self._pretrained]

    def attach(self, pretrained: Pretrained) -> None:
        """Give the parameters that are still `fresh` their pretrained values, after `add_param_group`."""
        params = self._with_decay()
        values = _readers(pretrained)
        pairs = _match(self.fresh, values)
        if not pairs and self.fresh:
            raise InputError(f"{self.fresh[0]!r} and all other parameters lack a pretrained value")
        trained = {p.untyped_storage().data_ptr() for group in self.param_groups for p in group["params"]}
        for name, stored in pairs.items():
            value = values[stored]().detach()
            if value.shape != params[name].shape:
                raise InputError(
                    f"{name} has shape {tuple(params[name].shape)}, pretrained {tuple(value.shape)}",
                    hint="put a new head or a resized embedding in a group with decay=0 (for_model: `fresh`)",
                )
            value = self._to_place(value, params[name])
            self._pretrained[name] = value.clone() if value.untyped_storage().data_ptr() in trained else value
        for group in self.param_groups:
            names = self._pretrained.keys() & set(group.get("param_names", ()))
            group["pretrained"] = _fingerprint({name: self._pretrained[name] for name in names})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does. `attach` then gives the new parameters their pretrained values."""
        params = param_group["params"]
        entries: Any = [params] if isinstance(params, Tensor) else params
        if not isinstance(entries, set):  # which torch refuses: it has no order
            entries = list(entries)
        group = self.defaults | param_group | {"params": entries}
        if entries and all(isinstance(entry, tuple) for entry in entries):
            group["params"] = [p for _, p in entries]
            group["param_names"] = [_clean(name) for name, _ in entries]
        _check(group)
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; `closure` computes the loss again and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = self._buckets()
        for bucket in buckets:
            bucket.update_moments()
        if any(bucket.group["decay"] for bucket in buckets):
            self.root_v = _root_mean(buckets)
            for bucket in buckets:
                self._decay(bucket, self.root_v)
        for bucket in buckets:
            bucket.descend()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run of AdamR on the same θ_P, or of AdamW (settings that it did not save stay)."""
        ours = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        for mine, saved in zip(ours, state_dict["param_groups"], strict=False):
            if saved.get("pretrained", mine["pretrained"]) != mine["pretrained"]:
                raise InputError(
                    "the optimizer was saved with other pretrained weights",
                    hint="build AdamR on the pretrained checkpoint, not on the weights of the resumed run",
                )
        super().load_state_dict(state_dict)
        for mine, group in zip(ours, self.param_groups, strict=True):
            group |= mine | group

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_pretrained": self._pretrained, "_place": self._place}

    def _with_decay(self) -> dict[str, Tensor]:
        """Return the parameters that have a `decay`, by name."""
        named: dict[str, Tensor] = {}
        for group in self.param_groups:
            if group["decay"]:
                if "param_names" not in group:
                    raise InputError(
                        "pretrained weights are matched by name, and the parameters have none",
                        hint="pass model.named_parameters(), or use AdamR.for_model",
                    )
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    if named.setdefault(name, p) is not p:
                        raise InputError(f"two parameters are named {name!r}")
        return named

    def _to_place(self, value: Tensor, param: Tensor) -> Tensor:
        """Return θ_P where it is to be kept. The model may have moved since the optimizer was built."""
        device, dtype = self._place
        value = value.to(device or param.device, dtype or param.dtype)
        pinned = not param.is_cuda or value.is_cuda or value.is_pinned()
        return value if pinned else value.pin_memory()

    def _buckets(self) -> list[_Bucket]:
        buckets: list[_Bucket] = []
        for group in self.param_groups:
            rows: dict[tuple[torch.device, torch.dtype], list[tuple[Any, ...]]] = {}
            names = group.get("param_names", [""] * len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("AdamR does not support sparse gradients")
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0, dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                row = (name, p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
                rows.setdefault((p.device, p.dtype), []).append(row)
            buckets += [_Bucket(group, *map(list, zip(*found, strict=True))) for found in rows.values()]
        return buckets

    def _decay(self, bucket: _Bucket, root_v: Tensor) -> None:
        group = bucket.group
        pairs = [pair for pair in zip(bucket.names, bucket.params, strict=True) if pair[0] in self._pretrained]
        if not group["decay"] or not pairs:
            return
        for name, p in pairs:
            self._pretrained[name] = self._to_place(self._pretrained[name], p)
        params = [p for _, p in pairs]
        c = (group["lr"] * group["decay"] / root_v).to(params[0], non_blocking=True)
        # On the CPU a number is at hand and has the faster kernels; elsewhere .item() would wait for the device.
        rate = c.item() if c.device.type == "cpu" else c
        anchors = [self._pretrained[name] for name, _ in pairs]
        pull(params, anchors, rate, regularizer=group["regularizer"], foreach=group["foreach"])


def pull(
    params: list[Tensor], anchors: list[Tensor], c: Tensor | float, *, regularizer: Regularizer, foreach: bool
) -> None:
    """Pull parameters in place.

    l2: θ ← θ − min(c, 1) (θ − θ_P). l1: θ ← θ − min(c, |θ − θ_P|) sign(θ − θ_P).

    `params` share a device and a dtype, as does `c` if it is a (0-dim) tensor; `anchors` (θ_P) have their shapes.
    Beside the parameters l2 makes no temporary; otherwise none is larger than a piece of a tensor.
    """
    rate: Any = c
    if regularizer == "l2":
        rate = c.clamp(max=1) if isinstance(c, Tensor) else min(c, 1.0)
    beside = all(a.device == params[0].device and a.dtype == params[0].dtype for a in anchors)
    if regularizer == "l2" and beside and foreach:
        torch._foreach_lerp_(params, anchors, [rate] * len(params) if isinstance(c, Tensor) else rate)
        return
    for param, anchor in zip(params, anchors, strict=True):
        for p, a in _pieces(param, anchor):
            a = a.to(p, non_blocking=True)
            if regularizer == "l2":
                p.lerp_(a, rate)
            else:
                p.sub_((p - a).clamp_(-rate, rate))


@dataclass(slots=True)
class _Bucket:
    """Parameters of one group with a gradient, one device and one dtype; AdamW's order of operations."""

    group: dict[str, Any]
    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    steps: list[Tensor]

    def corrections(self, beta: float) -> list[float]:
        return [1 - beta ** step.item() for step in self.steps]

    def update_moments(self) -> None:
        beta1, beta2 = self.group["betas"]
        torch._foreach_add_(self.steps, torch.tensor(1.0), alpha=1.0)
        if self.group["foreach"]:
            torch._foreach_lerp_(self.firsts, self.grads, 1 - beta1)
            torch._foreach_mul_(self.seconds, beta2)
            torch._foreach_addcmul_(self.seconds, self.grads, self.grads, 1 - beta2)
            return
        for g, m, v in zip(self.grads, self.firsts, self.seconds, strict=True):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)

    def descend(self) -> None:
        beta1, beta2 = self.group["betas"]
        eps = self.group["eps"]
        sizes = [-(self.group["lr"] / correction) for correction in self.corrections(beta1)]
        roots = [correction**0.5 for correction in self.corrections(beta2)]
        if self.group["foreach"]:
            denominators = torch._foreach_sqrt(self.seconds)
            torch._foreach_div_(denominators, roots)
            torch._foreach_add_(denominators, eps)
            torch._foreach_addcdiv_(self.params, self.firsts, denominators, sizes)
            return
        for p, m, v, root, size in zip(self.params, self.firsts, self.seconds, roots, sizes, strict=True):
            p.addcdiv_(m, (v.sqrt() / root).add_(eps), value=size)

    def sum_seconds(self) -> Tensor:
        """Σ v̂, 0-dim, on the bucket's device."""
        dtype = torch.float64 if self.params[0].dtype == torch.float64 else torch.float32
        if self.params[0].device.type == "cpu":  # where _foreach_norm is half the sum of 1e8 float32 entries
            sums = [v.sum(dtype=dtype) for v in self.seconds]
        else:
            sums = list(torch._foreach_norm(self.seconds, 1, dtype))  # v is never negative
        torch._foreach_div_(sums, self.corrections(self.group["betas"][1]))
        return torch.stack(sums).sum()


def _root_mean(buckets: list[_Bucket]) -> Tensor:
    """Return sqrt(v̄_t), 0-dim, on the first bucket's device."""
    first, *others = [bucket.sum_seconds() for bucket in buckets]
    total = first + sum(other.to(first.device, non_blocking=True) for other in others)
    mean = total / sum(p.numel() for bucket in buckets for p in bucket.params)
    return torch.where(mean == 0, 1, mean).sqrt()


def _pieces(param: Tensor, anchor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces small enough that a temporary stays in cache."""
    if not (param.is_contiguous() and anchor.is_contiguous()):
        yield param, anchor
        return
    size = 1 << 18 if param.device.type == "cpu" else 1 << 23
    yield from zip(torch.split(param.view(-1), size), torch.split(anchor.view(-1), size), strict=True)


def _check(group: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "decay"):
        if isinstance(group[name], Tensor) or not 0 <= group[name] < float("inf"):
            raise ValueError(f"{name} must be a number of at least 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    if group["regularizer"] not in ("l2", "l1"):
        raise ValueError(f"regularizer must be 'l2' or 'l1', got {group['regularizer']!r}")
    for p in group["params"]:
        if hasattr(p, "placements"):
            raise ValueError("a sharded parameter (DTensor): v̄ would be the mean of one shard only")
        if not p.is_floating_point():
            raise ValueError(f"a parameter must be floating-point, got {p.dtype}")


def _clean(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _readers(pretrained: Pretrained) -> Readers:
    """Name -> a function that returns the tensor. Of a checkpoint only the requested tensors are read."""
    if isinstance(pretrained, nn.Module):
        pretrained = dict(pretrained.named_parameters(remove_duplicate=False))
    if isinstance(pretrained, Mapping):
        return {_clean(name): tensor.detach for name, tensor in pretrained.items()}
    from safetensors import safe_open

    tensors = hub.open_model(os.fspath(pretrained), Path(), weights=True).tensors
    files: dict[Path, Any] = {}
    for info in tensors.values():
        if info.kind != "stored":
            raise ValueError(f"{pretrained}: a base with an adapter: give the merged model, or the adapted nn.Module")
        if info.path not in files:
            files[info.path] = safe_open(info.path, framework="pt")
    return {name: partial(files[info.path].get_tensor, name) for name, info in tensors.items()}


def _match(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Our name -> theirs, matched as the models of a recipe are."""
    our_names, their_names = match([dict.fromkeys(names) for names in (ours, theirs)], ["the model", "pretrained"])
    stored = {canonical: name for name, canonical in their_names.canonical.items()}
    found = {name: stored.get(canonical) for name, canonical in our_names.canonical.items()}
    return {name: their_name for name, their_name in found.items() if their_name is not None}


def _fingerprint(values: Mapping[str, Tensor]) -> str:
    """Return a fingerprint of names and evenly spaced entries in bfloat16, the same however θ_P is kept.

    It is empty without parameters.
    """
    digest = hashlib.sha256()
    for name in sorted(values):
        flat = values[name].reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16] if values else ""
