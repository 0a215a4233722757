// Quantised weights: codes less their zero, times their scale (formats/quantised/codes.py).
#pragma once

#include "floats.h"
#include "tabled.h"

namespace deltamerge {
namespace {

// The number of a float8 code: its bits where a float32 has them, times the power of two between the exponents' biases;
// exact, subnormals too.
struct E4m3 {
  float operator()(u8 code) const {
    float x = as_float(u32(code & 0x7F) << 20) * as_float(u32(247) << 23);
    u32 bits = (code & 0x7F) == 0x7F ? 0x7FC00000 : as_bits(x);
    return as_float(bits | u32(code & 0x80) << 24);
  }
};

// The same of codes none of which is NaN.
struct FiniteE4m3 {
  float operator()(u8 code) const {
    u32 bits = u32(std::int32_t(std::int8_t(code))) << 20 & 0x87F00000;
    return as_float(bits) * as_float(u32(247) << 23);
  }
};

bool has_nan(const u8* codes, i64 count) {
  u8 found = 0;
  for (i64 i = 0; i < count; ++i) found |= u8((codes[i] & 0x7F) + 1);
  return (found & 0x80) != 0;
}

struct E5m2 {
  float operator()(u8 code) const {
    float x = as_float(u32(code & 0x7F) << 21) * as_float(u32(239) << 23);
    u32 rest = code & 0x7F, bits = rest == 0x7C ? 0x7F800000 : rest > 0x7C ? 0x7FC00000 : as_bits(x);
    return as_float(bits | u32(code & 0x80) << 24);
  }
};

struct Int8 {
  float operator()(u8 code) const { return float(std::int8_t(code)); }
};

struct Uint8 {
  float operator()(u8 code) const { return float(code); }
};

// out = (number - zero) * scale of `count` codes that share both.
template <class Number>
void scale_codes(const u8* codes, Number number, float zero, float scale, bool shifted, float* out, i64 count) {
  if (shifted) {
    for (i64 i = 0; i < count; ++i) out[i] = (number(codes[i]) - zero) * scale;
  } else {
    for (i64 i = 0; i < count; ++i) out[i] = number(codes[i]) * scale;
  }
}

// Two codes a byte, the lower bits first.
void scale_nibbles(const u8* codes, float zero, float scale, float* out, i64 count) {
#if DELTAMERGE_LEVEL > 0
  float table[16];
  for (int k = 0; k < 16; ++k) table[k] = float(k) - zero;
  scale_halves(codes, false, table, scale, out, count);
#else
  for (i64 i = 0; i < count / 2; ++i) {
    out[2 * i] = (float(codes[i] & 15) - zero) * scale;
    out[2 * i + 1] = (float(codes[i] >> 4) - zero) * scale;
  }
  if (count % 2 != 0) out[count - 1] = (float(codes[count / 2] & 15) - zero) * scale;
#endif
}

// Codes from number `first` of a row on, each of `width` bits.
void scale_bits(const u8* row, i64 width, i64 first, float zero, float scale, float* out, i64 count) {
  const u32 mask = (u32(1) << width) - 1;
  for (i64 i = 0; i < count; ++i) {
    i64 bit = (first + i) * width, byte = bit / 8;
    u32 pair = row[byte] | (bit % 8 + width > 8 ? u32(row[byte + 1]) << 8 : 0);
    out[i] = (float(pair >> (bit % 8) & mask) - zero) * scale;
  }
}

// Codes of a table from number `first` of a row on.
void scale_table(const ScaledRows& rows, const u8* row, i64 first, float scale, float* out, i64 count) {
  const bool swapped = rows.form == kUpperFirst;
  if (first % 2 != 0 && count > 0) {
    *out++ = rows.table[row[first / 2] >> (swapped ? 0 : 4) & 15] * scale;
    ++first;
    --count;
  }
  scale_halves(row + first / 2, swapped, rows.table, scale, out, count);
}

// One block of a row, of `count` codes from column `first` on.
void scale_block(const ScaledRows& rows, const u8* row, i64 first, float zero, float scale, float* out, i64 count) {
  const bool shifted = rows.zeros != nullptr;
  if (rows.form == kE4m3 && !has_nan(row + first, count)) {
    scale_codes(row + first, FiniteE4m3(), zero, scale, shifted, out, count);
  } else if (rows.form == kE4m3) {
    scale_codes(row + first, E4m3(), zero, scale, shifted, out, count);
  } else if (rows.form == kE5m2) {
    scale_codes(row + first, E5m2(), zero, scale, shifted, out, count);
  } else if (rows.form == kInt8) {
    scale_codes(row + first, Int8(), zero, scale, shifted, out, count);
  } else if (rows.form == kLowerFirst || rows.form == kUpperFirst) {
    scale_table(rows, row, first, scale, out, count);
  } else {
    const float middle = zero + float(u32(1) << (rows.width - 1));
    if (rows.width == 8) {
      scale_codes(row + first, Uint8(), middle, scale, true, out, count);
    } else if (rows.width == 4 && first % 2 == 0) {
      scale_nibbles(row + first / 2, middle, scale, out, count);
    } else {
      scale_bits(row, rows.width, first, middle, scale, out, count);
    }
  }
}

void scale_row(const ScaledRows& rows, const u8* row, i64 line, i64 first, i64 count, float* out) {
  const float* scales = rows.scales + line * rows.across;
  const float* zeros = rows.zeros == nullptr ? nullptr : rows.zeros + line * rows.across;
  for (i64 at = first, stop = first + count; at < stop;) {
    const i64 j = at / rows.n, end = (j + 1) * rows.n < stop ? (j + 1) * rows.n : stop;
    scale_block(rows, row, at, zeros == nullptr ? 0.0f : zeros[j], scales[j], out + (at - first), end - at);
    if (rows.biases != nullptr) {
      const float bias = rows.biases[line * rows.across + j];
      for (i64 i = at - first; i < end - first; ++i) out[i] += bias;
    }
    at = end;
  }
  if (rows.factor != nullptr) {
    const float factor = *rows.factor;
    for (i64 i = 0; i < count; ++i) out[i] *= factor;
  }
}

}  // namespace
}  // namespace deltamerge
