// Stored numbers to float32 and back, and the elementwise steps that need no more.
#pragma once

#include "headers.h"

namespace deltamerge {
namespace {

inline float as_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline u32 as_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float wide(float x) { return x; }
inline float wide(u16 bits) { return as_float(u32(bits) << 16); }

// float32 bits, but of a NaN those of torch's, which do not depend on what made it.
inline u32 known_nan(u32 x) { return (x & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : x; }

// float32 bits rounded to bfloat16: nearest, ties to even, NaN to 0x7FC0.
inline u16 narrow(u32 x) {
  u32 rounded = (x + 0x7FFF + ((x >> 16) & 1)) >> 16;
  return (x & 0x7FFFFFFF) > 0x7F800000 ? u16(0x7FC0) : u16(rounded);
}

// The bits of binary16, a stored number of its own type so that loops can be written over types.
struct Half {
  u16 bits;
};

inline float wide(Half x) {
  u32 sign = u32(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  float small = as_float((rest << 13) + (u32(112) << 23));  // normal: exponent rebiased
  float tiny = float(rest) * as_float(u32(103) << 23);      // subnormal: times 2**-24
  u32 bits = rest >= 0x7C00 ? (rest << 13) | 0x7F800000 : rest < 0x400 ? as_bits(tiny) : as_bits(small);
  if (rest > 0x7C00) bits |= 0x400000;  // quiet
  return as_float(bits | sign);
}

// float32 rounded to binary16: nearest, ties to even; NaN to 0x7E00.
inline u16 halve(float value) {
  u32 x = as_bits(value), sign = (x >> 16) & 0x8000, rest = x & 0x7FFFFFFF;
  u32 normal = (rest - (u32(112) << 23) + 0xFFF + ((rest >> 13) & 1)) >> 13;
  // adding 1/2 leaves the bits of a subnormal at the end of the fraction, rounded
  u32 tiny = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);
  u32 bits = rest >= (u32(143) << 23) ? 0x7C00 : rest < (u32(113) << 23) ? tiny : normal;
  return rest > 0x7F800000 ? u16(0x7E00) : u16(bits | sign);
}

template <class T>
void widen_all(const T* x, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = wide(x[i]);
}

void widen(const void* x, i64 dtype, float* out, i64 n) {
  if (dtype == kBfloat16) {
    widen_all(static_cast<const u16*>(x), out, n);
  } else if (dtype == kFloat16) {
    widen_all(static_cast<const Half*>(x), out, n);
  } else {
    std::memcpy(out, x, std::size_t(4 * n));
  }
}

void narrow_all(const float* x, i64 dtype, void* out, i64 n) {
  u16* shorts = static_cast<u16*>(out);
  if (dtype == kBfloat16) {
    for (i64 i = 0; i < n; ++i) shorts[i] = narrow(as_bits(x[i]));
  } else if (dtype == kFloat16) {
    for (i64 i = 0; i < n; ++i) shorts[i] = halve(x[i]);
  } else {
    u32* words = static_cast<u32*>(out);
    for (i64 i = 0; i < n; ++i) words[i] = known_nan(as_bits(x[i]));
  }
}

// An entry of a delta: fine-tune - base in float32; the one place that says so.
template <class T, class B>
inline float difference(T tune, B base) {
  return wide(tune) - wide(base);
}

template <class T, class B>
void subtract_all(const T* tune, const B* base, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = difference(tune[i], base[i]);
}

// Calls `body` with the operand's elements as they are: u16 (bfloat16) or float.
template <class Body>
void typed(Operand x, Body body) {
  if (x.narrow) {
    body(static_cast<const u16*>(x.at));
  } else {
    body(static_cast<const float*>(x.at));
  }
}

void subtract(Operand tune, Operand base, float* out, i64 n) {
  typed(tune, [=](auto* t) { typed(base, [=](auto* b) { subtract_all(t, b, out, n); }); });
}

void divide(const float* x, float divisor, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = x[i] / divisor;
}

void divide_each(const float* x, const float* divisors, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = x[i] / divisors[i];
}

void score(const float* x, const float* norms, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = std::fabs(x[i]) * norms[i];
}

// Calls `body` with stored elements of a dtype: u16 (bfloat16), Half or float.
template <class Body>
void stored(const void* x, i64 dtype, Body body) {
  if (dtype == kBfloat16) {
    body(static_cast<const u16*>(x));
  } else if (dtype == kFloat16) {
    body(static_cast<const Half*>(x));
  } else {
    body(static_cast<const float*>(x));
  }
}

void differ_at(const void* tune, i64 tune_dtype, const void* base, i64 base_dtype, const i64* places, float* out,
               i64 n) {
  stored(tune, tune_dtype, [=](auto* t) {
    stored(base, base_dtype, [=](auto* b) {
      for (i64 i = 0; i < n; ++i) out[i] = difference(t[places[i]], b[places[i]]);
    });
  });
}

void widen_at(const void* x, i64 dtype, const i64* places, float* out, i64 n) {
  stored(x, dtype, [=](auto* values) {
    for (i64 i = 0; i < n; ++i) out[i] = wide(values[places[i]]);
  });
}

void narrow_at(const float* values, i64 dtype, const i64* places, void* out, i64 n) {
  u16* shorts = static_cast<u16*>(out);
  u32* words = static_cast<u32*>(out);
  for (i64 i = 0; i < n; ++i) {
    if (dtype == kFloat32) {
      words[places[i]] = known_nan(as_bits(values[i]));
    } else {
      shorts[places[i]] = dtype == kBfloat16 ? narrow(as_bits(values[i])) : halve(values[i]);
    }
  }
}

}  // namespace
}  // namespace deltamerge
