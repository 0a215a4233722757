// Values as codes: divided by their scale, rounded to the nearest number, ties to even (formats/quantised/codes.py).
#pragma once

#include "floats.h"

namespace deltamerge {
namespace {

// Values that are coded at once, so that what is lost of them stays in a register or the cache.
constexpr i64 kCodedRun = 512;

// To the nearest integer, of magnitudes up to 2**22.
inline float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Codes of small floats (formats/quantised/codes.py), and stored value - value of each.
void code_floats(const CodeForm& form, const float* x, float scale, u8* codes, float* lost, i64 count) {
  const u32 cut = u32(23 - form.mantissa), offset = u32(127 - form.bias) << form.mantissa;
  const u32 half = (u32(1) << (cut - 1)) - 1, first = u32(1) << form.mantissa, last = u32(form.last);
  const u32 sign_at = u32(31 - form.exponent - form.mantissa), sign_bit = u32(1) << (form.exponent + form.mantissa);
  const float least = as_float(u32(128 - form.bias) << 23), step = as_float(u32(128 - form.bias - form.mantissa) << 23);
  const float high = as_float(u32(151 - form.bias - form.mantissa) << 23);
  for (i64 i = 0; i < count; ++i) {
    const u32 bits = as_bits(x[i] / scale), size = bits & 0x7FFFFFFF;
    const float magnitude = as_float(size);
    const u32 small = as_bits(magnitude + high) - as_bits(high);
    const u32 normal = ((size + (size >> cut & 1) + half) >> cut) - offset;
    u32 code = magnitude < least ? small : normal;
    code = code < last ? code : last;
    const float number = code < first ? float(std::int32_t(code)) * step : as_float((code + offset) << cut);
    codes[i] = u8(code | (bits >> sign_at & sign_bit));
    lost[i] = as_float(as_bits(number) | (bits & 0x80000000)) * scale - x[i];
  }
}

// Codes of integers from form.least to form.largest, shifted by `zero`.
void code_integers(const CodeForm& form, const float* x, float scale, float zero, u8* codes, float* lost, i64 count) {
  const float low = form.least - zero, high = form.largest - zero;
  for (i64 i = 0; i < count; ++i) {
    float q = x[i] / scale;
    q = q < low - 1 ? low - 1 : q > high + 1 ? high + 1 : q;
    q = whole(q);
    q = q < low ? low : q > high ? high : q;
    codes[i] = u8(std::int32_t(q + zero));
    lost[i] = q * scale - x[i];
  }
}

// The sum of squares in double, in an order of its own that all levels share.
double sum_squares(const float* x, i64 count) {
  double sums[8] = {};
  i64 i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += double(x[i + k]) * double(x[i + k]);
  }
  for (; i < count; ++i) sums[i % 8] += double(x[i]) * double(x[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

double code_values(const CodeForm& form, const float* x, float scale, float zero, u8* codes, i64 count) {
  float lost[kCodedRun];
  double sum = 0;
  for (i64 at = 0; at < count; at += kCodedRun) {
    const i64 n = count - at < kCodedRun ? count - at : kCodedRun;
    if (form.exponent > 0) {
      code_floats(form, x + at, scale, codes + at, lost, n);
    } else {
      code_integers(form, x + at, scale, zero, codes + at, lost, n);
    }
    sum += sum_squares(lost, n);
  }
  return sum;
}

}  // namespace
}  // namespace deltamerge
