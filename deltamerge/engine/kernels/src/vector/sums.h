// Long sums in float64, in the order of ops.halved: halves are added to halves, so that every device adds alike.
#pragma once

#include "select.h"

namespace deltamerge {
namespace {

// Sum of the first `half` (a power of two) of `part`, which is changed.
double add_by_halving(double* part, i64 half) {
  while (half > 1) {
    half /= 2;
    for (i64 i = 0; i < half; ++i) part[i] += part[half + i];
  }
  return part[0];
}

// The sum of term(i), i < n <= kRun; the first halving is done as the terms are made.
template <class Term>
double sum_of_run(i64 n, bool padded, Term term) {
  alignas(64) double part[kRun / 2];
  i64 half = 1;
  while (2 * half < n) half *= 2;
  if (n == 1) {
    part[0] = term(0);
  } else {
    for (i64 i = 0; i < n - half; ++i) part[i] = term(i) + term(half + i);
    for (i64 i = n - half; i < half; ++i) part[i] = term(i) + 0.0;
  }
  double total = add_by_halving(part, half);
  return padded && 2 * half < kRun ? total + 0.0 : total;  // -0 and zeros are +0
}

double dot(const float* x, const float* y, i64 n, bool padded) {
  return sum_of_run(n, padded, [x, y](i64 i) { return double(x[i]) * double(y[i]); });
}

double sum_abs(const float* x, i64 n) {
  return sum_of_run(n, false, [x](i64 i) { return std::fabs(double(x[i])); });
}

double largest(const float* x, i64 n) {
  u32 most = 0;
  for (i64 i = 0; i < n; ++i) {
    u32 bits = as_bits(x[i]) & kMagnitude;
    most = bits > most ? bits : most;
  }
  return double(as_float(most));
}

}  // namespace
}  // namespace deltamerge
