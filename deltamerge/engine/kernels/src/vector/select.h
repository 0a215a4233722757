// The largest entries by magnitude: kept, counted and listed. Bits of float32 without the sign order as magnitudes do;
// NaN is above every number, and its bits, which differ from processor to processor, count as one value.
#pragma once

#include "floats.h"

namespace deltamerge {
namespace {

constexpr u32 kMagnitude = 0x7FFFFFFF;
constexpr u32 kAnyNan = 0x7F800001;

inline u32 magnitude_of(u32 bits) {
  u32 x = bits & kMagnitude;
  return x < kAnyNan ? x : kAnyNan;
}

void keep_from(const u32* values, const u32* scores, u32 least, u32* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = magnitude_of(scores[i]) >= least ? values[i] : 0;
}

i64 keep_first_equals(const u32* values, const u32* scores, u32 threshold, i64 left, u32* out, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    u32 magnitude = magnitude_of(scores[i]);
    bool equal = magnitude == threshold && left > 0;
    left -= equal;
    out[i] = magnitude > threshold || equal ? values[i] : 0;
  }
  return left;
}

void clear_where(const u32* values, const u32* others, u32* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = others[i] != 0 ? 0 : values[i];
}

void count_high(const u32* bits, i64* counts, i64 n) {
  for (i64 i = 0; i < n; ++i) counts[magnitude_of(bits[i]) >> 16] += 1;
}

void count_low(const u32* bits, u32 high, i64* counts, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    u32 x = magnitude_of(bits[i]);
    if (x >> 16 == high) counts[x & 0xFFFF] += 1;
  }
}

i64 count_equal(const u32* bits, u32 threshold, i64 n) {
  i64 total = 0;
  for (i64 first = 0; first < n; first += kRun) {
    u32 equal = 0;
    i64 stop = n - first < kRun ? n : first + kRun;
    for (i64 i = first; i < stop; ++i) equal += magnitude_of(bits[i]) == threshold;
    total += equal;
  }
  return total;
}

i64 count_nonzero(const float* x, i64 n) {
  i64 total = 0;
  for (i64 first = 0; first < n; first += kRun) {
    u32 found = 0;
    i64 stop = n - first < kRun ? n : first + kRun;
    for (i64 i = first; i < stop; ++i) found += x[i] != 0.0f;
    total += found;
  }
  return total;
}

void magnitudes(const u32* bits, u32* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[i] = magnitude_of(bits[i]);
}

// The end of `list_between`: entry by entry.
void list_rest(const u32* bits, u32 low, u32 high, bool listed, u32* out, i64 n, Inside& found) {
  for (i64 i = 0; i < n; ++i) {
    u32 x = magnitude_of(bits[i]);
    if (listed) out[found.count] = x;
    found.count += x - low <= high - low;
    found.above += x > high;
  }
}

#if DELTAMERGE_LEVEL == 512

Inside list_between(const u32* bits, u32 low, u32 high, u32* out, i64 n) {
  Inside found = {0, 0};
  const __m512i lowest = _mm512_set1_epi32(int(low)), highest = _mm512_set1_epi32(int(high));
  const __m512i apart = _mm512_set1_epi32(int(high - low)), unsigned_part = _mm512_set1_epi32(int(kMagnitude));
  const __m512i any_nan = _mm512_set1_epi32(int(kAnyNan));
  const bool listed = high > low;
  i64 i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i x = _mm512_min_epu32(_mm512_and_si512(_mm512_loadu_si512(bits + i), unsigned_part), any_nan);
    __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(x, lowest), apart);
    found.above += __builtin_popcount(_mm512_cmpgt_epu32_mask(x, highest));
    if (listed) _mm512_storeu_si512(out + found.count, _mm512_maskz_compress_epi32(inside, x));
    found.count += __builtin_popcount(inside);
  }
  list_rest(bits + i, low, high, listed, out, n - i, found);
  return found;
}

#else

constexpr i64 kGroup = 32;

Inside list_between(const u32* bits, u32 low, u32 high, u32* out, i64 n) {
  Inside found = {0, 0};
  const bool listed = high > low;
  i64 first = 0;
  for (; first + kGroup <= n; first += kGroup) {
    const u32* group = bits + first;
    u32 inside = 0, above = 0;
    for (i64 i = 0; i < kGroup; ++i) {
      u32 x = magnitude_of(group[i]);
      inside += x - low <= high - low;
      above += x > high;
    }
    found.above += above;
    if (listed && inside != 0) {
      Inside part = {found.count, 0};
      list_rest(group, low, high, true, out, kGroup, part);
    }
    found.count += inside;
  }
  list_rest(bits + first, low, high, listed, out, n - first, found);
  return found;
}

#endif

}  // namespace
}  // namespace deltamerge
