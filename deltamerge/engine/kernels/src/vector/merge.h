// Weighted sums of models, votes on signs, variances: chunk by chunk, models one after the other.
#pragma once

#include "floats.h"

namespace deltamerge {
namespace {

constexpr float kSmallestDivisor = 1e-8f;  // arithmetic.SMALLEST_DIVISOR
constexpr float kSmallestWeight = 1e-6f;   // sce.SMALLEST_WEIGHT
// Entries of a scratch array in a function's frame.
constexpr i64 kPart = 512;

inline const float* floats(Operand x) { return static_cast<const float*>(x.at); }

inline i64 part_of(i64 first, i64 n) { return n - first < kPart ? n - first : kPart; }

struct Nothing {};

inline float plus(const float* base, i64 i, float x) { return base[i] + x; }
inline float plus(const u16* base, i64 i, float x) { return wide(base[i]) + x; }
inline float plus(const Nothing*, i64, float x) { return x; }

// Calls `body` with the base's elements, or with those of nothing.
template <class Body>
void based(Operand base, Body body) {
  if (base.at == nullptr) {
    body(static_cast<const Nothing*>(nullptr));
  } else {
    typed(base, body);
  }
}

template <class B, class T>
void add_one(const B* base, const T* x, float w, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = plus(base, i, w * wide(x[i]));
}

template <class B, class T>
void add_two(const B* base, const T* x, float w, const T* y, float v, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = plus(base, i, w * wide(x[i]) + v * wide(y[i]));
}

template <class B, class T>
void add_three(const B* base, const T* x, float w, const T* y, float v, const T* z, float u, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = plus(base, i, (w * wide(x[i]) + v * wide(y[i])) + u * wide(z[i]));
}

template <class B, class T>
void add_few(const B* base, const T* x, Models models, float* out, i64 n) {
  const float* w = models.weights;
  auto other = [models](int k) { return static_cast<const T*>(models.operands[k].at); };
  if (models.count == 1) {
    add_one(base, x, w[0], out, n);
  } else if (models.count == 2) {
    add_two(base, x, w[0], other(1), w[1], out, n);
  } else {
    add_three(base, x, w[0], other(1), w[1], other(2), w[2], out, n);
  }
}

// total = weight * x of a first model, total += weight * x of the others.
template <class T>
void accumulate(const T* x, float w, bool first, float* total, i64 n) {
  if (first) {
    for (i64 i = 0; i < n; ++i) total[i] = w * wide(x[i]);
  } else {
    for (i64 i = 0; i < n; ++i) total[i] += w * wide(x[i]);
  }
}

void add_part(Operand base, Models models, i64 first, float divisor, float scale, float* total, i64 n) {
  for (i64 k = 0; k < models.count; ++k) {
    typed(models.operands[k], [=](auto* x) { accumulate(x + first, models.weights[k], k == 0, total, n); });
  }
  if (divisor != 1.0f) {
    for (i64 i = 0; i < n; ++i) total[i] /= divisor;
  }
  if (scale != 1.0f) {
    for (i64 i = 0; i < n; ++i) total[i] *= scale;
  }
  based(base, [=](auto* b) {
    for (i64 i = 0; i < n; ++i) total[i] = plus(b, first + i, total[i]);
  });
}

// Whether the operands are all of one type.
bool alike(Models models) {
  for (i64 k = 1; k < models.count; ++k) {
    if (models.operands[k].narrow != models.operands[0].narrow) return false;
  }
  return true;
}

void add(Operand base, Models models, float divisor, float scale, float* out, i64 n) {
  if (models.count <= 3 && divisor == 1.0f && scale == 1.0f && alike(models)) {
    based(base, [=](auto* b) { typed(models.operands[0], [=](auto* x) { add_few(b, x, models, out, n); }); });
    return;
  }
  for (i64 first = 0; first < n; first += kPart) {
    add_part(base, models, first, divisor, scale, out + first, part_of(first, n));
  }
}

// A value of an entry that has the sign of the total (0 counts as +), else 0.
inline float agreeing(float entry, float total, float value) {
  bool up = total >= 0.0f;
  return ((entry > 0.0f) & up) | ((entry < 0.0f) & !up) ? value : 0.0f;
}

template <bool kNormalize, class B>
void agree_two(const B* base, const float* x, float w, const float* y, float v, float scale, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    float a = w * x[i], b = v * y[i], total = a + b;
    float mixed = agreeing(a, total, a) + agreeing(b, total, b);
    if (kNormalize) {
      float divisor = agreeing(a, total, w) + agreeing(b, total, v);
      mixed /= std::fabs(divisor) < kSmallestDivisor ? 1.0f : divisor;
    }
    out[i] = plus(base, i, mixed * scale);
  }
}

// mixed = sum of the entries weight * x that agree with `totals`, divisors = sum of their weights; float32 of a part.
void vote(Models models, i64 first, const float* totals, bool weighted, float* mixed, float* divisors, i64 n) {
  for (i64 i = 0; i < n; ++i) mixed[i] = divisors[i] = 0.0f;
  for (i64 k = 0; k < models.count; ++k) {
    const float* x = floats(models.operands[k]) + first;
    float w = models.weights[k];
    for (i64 i = 0; i < n; ++i) {
      float entry = w * x[i], sign = weighted ? entry : x[i];
      mixed[i] += agreeing(sign, totals[i], entry);
      divisors[i] += agreeing(sign, totals[i], w);
    }
  }
}

void agree_part(Models models, i64 first, bool normalize, float scale, float* mixed, i64 n) {
  float totals[kPart], divisors[kPart];
  for (i64 k = 0; k < models.count; ++k) {
    accumulate(floats(models.operands[k]) + first, models.weights[k], k == 0, totals, n);
  }
  vote(models, first, totals, true, mixed, divisors, n);
  if (normalize) {
    for (i64 i = 0; i < n; ++i) mixed[i] /= std::fabs(divisors[i]) < kSmallestDivisor ? 1.0f : divisors[i];
  }
  if (scale != 1.0f) {
    for (i64 i = 0; i < n; ++i) mixed[i] *= scale;
  }
}

void add_base(Operand base, i64 first, float* total, i64 n) {
  typed(base, [=](auto* b) {
    for (i64 i = 0; i < n; ++i) total[i] = wide(b[first + i]) + total[i];
  });
}

void agree(Operand base, Models models, bool normalize, float scale, float* out, i64 n) {
  if (models.count == 2) {
    const float *x = floats(models.operands[0]), *y = floats(models.operands[1]), *w = models.weights;
    typed(base, [=](auto* b) {
      if (normalize) {
        agree_two<true>(b, x, w[0], y, w[1], scale, out, n);
      } else {
        agree_two<false>(b, x, w[0], y, w[1], scale, out, n);
      }
    });
    return;
  }
  for (i64 first = 0; first < n; first += kPart) {
    agree_part(models, first, normalize, scale, out + first, part_of(first, n));
    add_base(base, first, out + first, part_of(first, n));
  }
}

void elect(Operand base, Models models, float* out, i64 n) {
  for (i64 first = 0; first < n; first += kPart) {
    float totals[kPart], divisors[kPart], *mixed = out + first;
    i64 count = part_of(first, n);
    for (i64 k = 0; k < models.count; ++k) {
      accumulate(floats(models.operands[k]) + first, 1.0f, k == 0, totals, count);
    }
    vote(models, first, totals, false, mixed, divisors, count);
    for (i64 i = 0; i < count; ++i) mixed[i] /= divisors[i] < kSmallestWeight ? kSmallestWeight : divisors[i];
    add_base(base, first, mixed, count);
  }
}

void variance_part(Models models, i64 first, float* total, i64 n) {
  float mean[kPart];
  const float count = float(models.count), *origin = floats(models.operands[0]) + first;
  for (i64 i = 0; i < n; ++i) mean[i] = 0.0f;
  for (i64 k = 1; k < models.count; ++k) {
    const float* x = floats(models.operands[k]) + first;
    for (i64 i = 0; i < n; ++i) mean[i] += x[i] - origin[i];
  }
  for (i64 i = 0; i < n; ++i) {
    mean[i] /= count;
    float apart = 0.0f - mean[i];
    total[i] = apart * apart;
  }
  for (i64 k = 1; k < models.count; ++k) {
    const float* x = floats(models.operands[k]) + first;
    for (i64 i = 0; i < n; ++i) {
      float apart = (x[i] - origin[i]) - mean[i];
      total[i] += apart * apart;
    }
  }
  for (i64 i = 0; i < n; ++i) total[i] /= count;
}

void variance(Models models, float* out, i64 n) {
  for (i64 first = 0; first < n; first += kPart) variance_part(models, first, out + first, part_of(first, n));
}

// out (rows, columns) = sum over k of left (rows, rank) right (rank, columns), in the order of k.
void ordered_product(const float* left, const float* right, float* out, i64 rows, i64 rank, i64 columns) {
  for (i64 i = 0; i < rows; ++i) {
    float* __restrict row = out + i * columns;
    accumulate(right, left[i * rank], true, row, columns);
    for (i64 k = 1; k < rank; ++k) accumulate(right + k * columns, left[i * rank + k], false, row, columns);
  }
}

}  // namespace
}  // namespace deltamerge
