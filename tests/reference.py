"""A one-page truth: every merge and pruning formula in float64 numpy, written from the papers, not from the package."""

from __future__ import annotations

import numpy as np


def linear(xs, weights, normalize=True):
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    return total / sum(weights) if normalize else total


def keep_probability(delta, density):
    """min(1, c |Δ|), c by bisection such that its mean is the density."""
    size, low, high = np.abs(delta.astype(np.float64)), 0.0, 1e60
    for _ in range(400):
        c = (max(low, 1e-60) * high) ** 0.5
        low, high = (c, high) if np.minimum(1, c * size).mean() < density else (low, c)
    return np.minimum(1, c * size)


def task_arithmetic(base, deltas, weights, normalize=False, lam=1.0):
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    if normalize:
        total = total / sum(weights)
    return base + lam * total


def ties(base, deltas, weights, normalize=True, lam=1.0):
    e = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = np.where(e.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(e) == sign
    total = (e * agree).sum(0)
    if normalize:
        w = np.asarray(weights, float).reshape(-1, *[1] * base.ndim)
        divisor = (w * agree).sum(0)
        total = total / np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    return base + lam * total


def keep_top(delta, k):
    """The k entries of largest magnitude, earlier ones first among equals."""
    flat = delta.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")[:k]
    kept = np.zeros_like(flat)
    kept[order] = flat[order]
    return kept.reshape(delta.shape)


def magnitude(delta, density):
    return keep_top(delta, round(density * delta.size))


def magnitude_rows(delta, density):
    if not delta.size:
        return delta
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta.reshape(1, -1)
    return np.stack([keep_top(row, round(density * row.size)) for row in rows]).reshape(delta.shape)


def match_norm(kept, delta, norm):
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    a, b = np.linalg.norm(kept.reshape(-1), order), np.linalg.norm(delta.reshape(-1), order)
    return kept * (b / a) if a and b else kept


def lerp_on_arc(a, b, t, straight):
    """Along the arc between two vectors, each scaled by its own length; linear where `straight(cos)`."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = np.clip((a * b).sum() / norms, -1, 1) if norms else 0.0
    if straight(cosine):
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def slerp(a, b, t):
    return lerp_on_arc(a, b, t, lambda cosine: abs(cosine) > 0.9995)


def nuslerp(a, b, weights, axis=None):
    """Of whole tensors, or of the vectors along one axis."""
    t = weights[1] / sum(weights) if abs(sum(weights)) > 1e-6 else 0.5
    if axis is None or a.ndim < 2 or not a.size:
        return lerp_on_arc(a, b, t, lambda cosine: 1 - cosine**2 <= 1e-16)
    first, second = (np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]) for x in (a, b))
    rows = [lerp_on_arc(x, y, t, lambda cosine: 1 - cosine**2 <= 1e-16) for x, y in zip(first, second, strict=True)]
    return np.moveaxis(np.reshape(rows, np.moveaxis(a, axis, -1).shape), -1, axis)


def multislerp(xs, weights, normalize=True, eps=1e-8):
    w = np.asarray(weights, float)
    w = w / w.sum() if normalize else w
    lengths = [np.linalg.norm(x) for x in xs]
    if not any(lengths):
        return sum(a * x for a, x in zip(w, xs, strict=True))
    units = [x / (length + eps) for x, length in zip(xs, lengths, strict=True)]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(a * (u - (u * mean).sum() * mean) for a, u in zip(w, units, strict=True))
    angle = np.linalg.norm(tangent) + eps
    return (mean * np.cos(angle) + tangent * np.sin(angle) / angle) * (w @ lengths)


def karcher(xs, steps=200):
    """Gradient descent to the end: the point where the logarithms of all directions add up to 0."""
    lengths = np.array([np.linalg.norm(x) for x in xs])
    units = [x / n for x, n in zip(xs, lengths, strict=True) if n > 1e-5]
    if not units:
        return np.zeros_like(xs[0])
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(steps):
        step = np.zeros_like(mean)
        for u in units:
            cosine = np.clip((u * mean).sum(), -1, 1)
            theta = np.arccos(cosine)
            step += (theta / np.sin(theta) if theta > 1e-12 else 0.0) * (u - cosine * mean) / len(units)
        mean = mean + step
        mean /= np.linalg.norm(mean)
    return lengths.mean() * mean


def model_stock(base, deltas, axis=None):
    n = len(deltas)
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    kept = {"axis": axis, "keepdims": True} if axis is not None and base.ndim > 1 else {}

    def length(x):
        return np.sqrt((x * x).sum(**kept))

    c = sum((a * b).sum(**kept) / np.maximum(length(a) * length(b), 1e-6) for a, b in pairs) / len(pairs)
    divisor = 1 + (n - 1) * c
    t = np.where(np.abs(divisor) < 1e-6, 0, n * c / np.where(np.abs(divisor) < 1e-6, 1, divisor))
    return t * sum(base + d for d in deltas) / n + (1 - t) * base


def model_stock_of_one(base, deltas):
    """model_stock of tensors of one element, counted out: cosines are signs, and their mean tells how many agree."""
    n, signs = len(deltas), sum(np.sign(d) for d in deltas)
    t = np.where(signs == 0, 0, n * (signs**2 - n) / ((n - 1) * np.where(signs == 0, 1, signs**2)))
    return base + t * sum(deltas) / n


def nearswap(base, x, t):
    w = np.clip(t / np.maximum(np.abs(base - x), 1e-6), 0, 1)
    return w * x + (1 - w) * base


def sce(base, deltas, topk=1.0):
    d = np.stack(deltas)
    if topk < 1:
        variance = d.var(0).reshape(-1)
        order = np.argsort(-variance, kind="stable")[: int(np.count_nonzero(variance) * topk)]
        mask = np.zeros(base.size, bool)
        mask[order] = True
        d = d * mask.reshape(base.shape)
    squares = (d**2).reshape(len(d), -1).mean(1) if base.size else np.zeros(len(d))
    w = np.full(len(d), 1 / len(d)) if squares.sum() < 1e-6 else squares / squares.sum()
    agree = np.sign(d) == np.where(d.sum(0) >= 0, 1.0, -1.0)
    w = w.reshape(-1, *[1] * base.ndim) * agree
    return base + (w * d).sum(0) / np.maximum(w.sum(0), 1e-6)


def ram(base, deltas, epsilon=1e-5, r=0.0, alpha=0.0):
    d = np.stack(deltas)
    changed = np.abs(d) > epsilon
    count = changed.sum(0)
    total = np.zeros_like(base)
    for delta, own in zip(d, changed, strict=True):
        alone, shared = (own & (count == 1)).sum(), (own & (count > 1)).sum()
        factor = 1 + r * min(shared / alone, alpha) if alone else 1.0
        total += np.where(own, delta * np.where(count == 1, factor, 1.0), 0)
    return base + total / np.maximum(count, 1)


def arcee_importance(base, delta):
    """abs(Δ) · KL(softmax(x) ‖ softmax(base)) of the last dimension."""
    x = base + delta

    def softmax(rows):
        raised = np.exp(rows - rows.max(-1, keepdims=True))
        return raised / raised.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(np.atleast_1d(x)), softmax(np.atleast_1d(base))
    return (np.abs(delta) * (p * np.log(p / q)).sum(-1, keepdims=True)).reshape(base.shape)


def arcee_fusion(base, delta):
    if not base.size:
        return base
    importance = arcee_importance(base, delta)
    ordered = np.sort(importance.reshape(-1))
    q1, median, q3 = (ordered[int(p * (ordered.size - 1))] for p in (0.25, 0.5, 0.75))
    return base + np.where(importance >= median + 1.5 * (q3 - q1), delta, 0)


def breadcrumbs(delta, density, gamma):
    flat = delta.reshape(-1)
    kept = int(density * flat.size)
    top = min(int(gamma * flat.size), flat.size - kept)
    chosen = np.argsort(-np.abs(flat), kind="stable")[top : top + kept]
    result = np.zeros_like(flat)
    result[chosen] = flat[chosen]
    return result.reshape(delta.shape)


def della_probability(delta, density, epsilon):
    """density ± epsilon by rank of abs(Δ) in its row, equals from the left."""
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta.reshape(1, -1)
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    n = max(rows.shape[1], 1)
    spread = density - epsilon + 2 * epsilon * ranks / (n - 1) if n > 1 else np.full(rows.shape, density)
    return spread.reshape(delta.shape)


def balanced(deltas):
    """Deltas of one tensor, of the mean length of those that are not 0."""
    lengths = [np.linalg.norm(d) for d in deltas]
    mean = sum(lengths) / max(1, np.count_nonzero(lengths))
    return [d * (mean / length) if length else d for d, length in zip(deltas, lengths, strict=True)]


def usual_lambda(method, models):
    """λ of a merge of whole matrices that gives none."""
    if method == "iso_c":
        return 2.25 if models > 1 else 1.0
    if method == "svc":
        return min(1, 1.2 / models**0.5)
    return min(1, 2 / models**0.5) if method in ("tsv_m", "wudi") else 1.0


def as_matrices(delta, stacked=False):
    """(matrices, rows, columns) of a weight: stacked experts are several, a convolution has the rows of its outputs."""
    return delta if stacked else delta.reshape(1, delta.shape[0], -1)


def by_matrix(deltas, merge, stacked=False):
    """`merge` of the deltas of each matrix."""
    batches = [as_matrices(d, stacked) for d in deltas]
    return np.stack([merge(list(one)) for one in zip(*batches, strict=True)]).reshape(deltas[0].shape)


def _svd(a, of=None):
    """The singular triplets, without directions of singular values that are nothing but rounding (of `of`)."""
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    kept = s > 2.0**-20 * (s.max() if of is None else np.linalg.norm(of))
    return u * kept, s, vt * kept[:, None]


def nearest_orthonormal(a):
    u, _, vt = _svd(a)
    return u @ vt


def iso_c(deltas):
    u, s, vt = _svd(sum(deltas))
    return s.mean() * (u @ vt)


def iso_cts(deltas, common=0.8):
    r, n = min(deltas[0].shape), len(deltas)
    own = min(round((r - int(r * common)) / n), r // n)
    k = r - n * own
    u, s, vt = (part[..., :k, :] if i == 2 else part[..., :k] for i, part in enumerate(_svd(sum(deltas))))
    parts = [(u, s, vt)]
    for delta in deltas:
        a, b, c = _svd(delta - u @ (u.T @ delta), delta)
        parts.append((a[:, :own], b[:own], c[:own]))
    left, values, right = (np.concatenate(x, axis) for x, axis in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
    return values.mean() * nearest_orthonormal(left) @ nearest_orthonormal(right)


def tsv_m(deltas):
    own = min(deltas[0].shape) // len(deltas)
    parts = [(u[:, :own], s[:own], vt[:own]) for u, s, vt in map(_svd, deltas)]
    left, values, right = (np.concatenate(x, axis) for x, axis in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
    return nearest_orthonormal(left) @ np.diag(values) @ nearest_orthonormal(right)


def svc(deltas):
    merged = tsv_m(deltas)
    left, values, _ = _svd(merged)
    found = np.zeros_like(merged)
    for u, sigma in zip(left.T, values, strict=True):
        if sigma > 1e-6 * values[0]:
            rows = [u @ delta for delta in deltas]
            shares = [(u @ merged) @ row / (row @ row) if row.any() else 0.0 for row in rows]
            found += np.outer(u, u @ merged) * len(deltas) / sum(max(0.1, share) for share in shares)
    return found


def wudi(deltas, rho):
    grams = [d.T @ d / (d * d).sum() if d.any() else 0 * (d.T @ d) for d in deltas]
    total = sum(grams)
    ridge = rho * np.trace(total) / len(total) * np.eye(len(total))
    return np.linalg.solve(total + ridge, sum(d @ g for d, g in zip(deltas, grams, strict=True)).T).T


def wudi_steps(deltas, steps, rate=1e-5):
    """Adam on Σ ‖(X − Δ_i) Δ_iᵀ‖² / ‖Δ_i‖² from Σ Δ_i, the gradient written out."""
    x = sum(deltas)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, steps + 1):
        slope = sum(2 * (x - d) @ d.T @ d / (d * d).sum() for d in deltas if d.any())
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        x = x - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return x


def tall_mask(deltas, task, threshold):
    return np.abs(deltas[task]) >= threshold * np.abs(sum(deltas) - deltas[task])


def consensus(deltas, threshold=0.4, agreement=2):
    votes = sum(tall_mask(deltas, t, threshold).astype(int) for t in range(len(deltas)))
    return np.where(votes >= agreement, sum(deltas), 0)


def emr_elected(deltas):
    sign = np.sign(sum(deltas))
    return sign * np.max([np.where(d * sign > 0, np.abs(d), 0) for d in deltas], axis=0)


def emr(by_name, task):
    """The deltas of one task, by tensor, of all tasks' deltas by tensor."""
    kept = {}
    for name, deltas in by_name.items():
        elected = emr_elected(deltas)
        kept[name] = np.where(deltas[task] * elected > 0, elected, 0)
    size = sum(np.abs(deltas[task]).sum() for deltas in by_name.values())
    rescale = size / sum(np.abs(x).sum() for x in kept.values())
    return {name: rescale * x for name, x in kept.items()}


def regmean(deltas, grams, weights, off_diagonal=0.9):
    """(Σ w Δ G)(Σ w G)⁻¹ with shrunk G; a feature that is 0 in all rows takes the weighted mean."""
    shrunk = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    idle = sum(np.diag(g) for g in shrunk) == 0
    shrunk = [g + np.diag(idle.astype(float)) for g in shrunk]
    pulled = sum(w * d @ g for w, d, g in zip(weights, deltas, shrunk, strict=True))
    return pulled @ np.linalg.inv(sum(w * g for w, g in zip(weights, shrunk, strict=True)))


def fisher(deltas, squares, weights, floor=1e-6):
    """Σ w F Δ / Σ w F of every tensor; each model's F has mean 1 over its tensors."""
    means = [sum(f[n].sum() for n in f) / sum(f[n].size for n in f) for f in squares]
    found = {}
    for name, ds in deltas.items():
        shares = [
            w * (f[name] / m + floor if name in f else floor) for f, m, w in zip(squares, means, weights, strict=True)
        ]
        found[name] = sum(s * d for s, d in zip(shares, ds, strict=True)) / sum(shares)
    return found


def token_divergence(logits: np.ndarray, own: np.ndarray) -> np.ndarray:
    """KL(own ‖ logits) of tokens (N, V): of the 64 likeliest of `own`, and of all others as one."""
    p, q = (np.exp(some - some.max(1, keepdims=True)) for some in (own, logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    likeliest = np.argsort(-p, 1)[:, :64]
    p, q = (np.take_along_axis(some, likeliest, 1) for some in (p, q))
    p, q = (np.concatenate([some, np.maximum(1 - some.sum(1, keepdims=True), 1e-12)], 1) for some in (p, q))
    return (p * np.log(p / q)).sum(1)
