// Entries of a row kept by their rank (DELLA, arXiv 2406.11617): a radix sort of each row by magnitude.
#pragma once

#include "masks.h"
#include "select.h"

namespace deltamerge {
namespace {

// A row is sorted as so many parts at one time: neighbours often have the same digit, and would wait for each other.
constexpr i64 kParts = 4;
constexpr int kLongDigit = 11, kShortDigit = 8;
// Entries from which a longer digit pays.
constexpr i64 kLongRow = 1 << 14;

// What a pass of the sort needs: the digit, and where the entries of each value of it go, part by part.
struct Digit {
  int shift;
  u32 mask;
  u32 places[kParts << kLongDigit];

  u32 of(u64 key, i64 part) const { return u32(key >> shift & mask) * u32(kParts) + u32(part); }
};

// Calls body(i, part) for all of a row of n, the parts side by side, each in order.
template <class Body>
void by_parts(i64 n, Body body) {
  const i64 quarter = n / kParts;
  for (i64 i = 0; i < quarter; ++i) {
    for (i64 part = 0; part < kParts; ++part) body(part * quarter + i, part);
  }
  for (i64 i = kParts * quarter; i < n; ++i) body(i, kParts - 1);
}

// Where the entries of each value begin.
void count_digits(const u64* keys, Digit& digit, i64 n) {
  const i64 size = i64(digit.mask + 1) * kParts;
  std::memset(digit.places, 0, std::size_t(4 * size));
  by_parts(n, [&](i64 i, i64 part) { ++digit.places[digit.of(keys[i], part)]; });
  u32 before = 0;
  for (i64 value = 0; value < size; ++value) {
    u32 count = digit.places[value];
    digit.places[value] = before;
    before += count;
  }
}

// The bits in which the magnitudes of a row differ.
u32 differing(const float* row, i64 n) {
  u32 first = magnitude_of(as_bits(row[0])), found = 0;
  for (i64 i = 0; i < n; ++i) found |= magnitude_of(as_bits(row[i])) ^ first;
  return found;
}

// The rank of each entry by magnitude (from the largest on if it descends), equals from the left. `here` and `other`
// have room for n keys.
template <bool kDescends>
void rank_row(const float* row, i64 n, u64* here, u64* other, u32* ranks) {
  const u32 bits = differing(row, n);
  if (bits == 0) {
    for (i64 i = 0; i < n; ++i) ranks[i] = u32(i);
    return;
  }
  const int low = __builtin_ctz(bits), width = 32 - __builtin_clz(bits) - low;
  const int longest = n < kLongRow ? kShortDigit : kLongDigit, passes = (width + longest - 1) / longest;
  const int digit_bits = (width + passes - 1) / passes;
  for (i64 i = 0; i < n; ++i) {
    const u32 size = magnitude_of(as_bits(row[i]));
    here[i] = u64((kDescends ? kMagnitude - size : size) >> low) << 32 | u64(i);
  }
  Digit digit;
  digit.mask = (u32(1) << digit_bits) - 1;
  for (int pass = 0; pass < passes; ++pass) {
    digit.shift = 32 + digit_bits * pass;
    count_digits(here, digit, n);
    if (pass == passes - 1) {
      by_parts(n, [&](i64 i, i64 part) { ranks[u32(here[i])] = digit.places[digit.of(here[i], part)]++; });
    } else {
      by_parts(n, [&](i64 i, i64 part) { other[digit.places[digit.of(here[i], part)]++] = here[i]; });
      u64* swap = here;
      here = other;
      other = swap;
    }
  }
}

// out = x / ratio (or x) where the high half of the word is below the limit of the rank; whether one ties.
template <bool kDivides>
bool keep_ranked(const float* __restrict x, const u16* __restrict halves, const u32* __restrict ranks, Ranks of,
                 float* __restrict out, i64 n) {
  const u32* __restrict upper = of.upper;
  const float* __restrict ratios = of.ratios;
  u32 tied = 0;
  for (i64 i = 0; i < n; ++i) {
    u32 limit = upper[ranks[i]], half = halves[i];
    float entry = kDivides ? x[i] / ratios[ranks[i]] : x[i];
    tied |= half == limit;
    out[i] = half < limit ? entry : 0.0f;
  }
  return tied != 0;
}

void keep_by_rank(const float* x, i64 start, i64 columns, Key key, Ranks of, u64* scratch, float* out, i64 n) {
  u64 *words = scratch, *here = words + columns / 4 + 16, *other = here + columns;
  u32* ranks = reinterpret_cast<u32*>(other + columns);
  for (i64 first = 0; first < n; first += columns) {
    const i64 position = start + first;
    const float* row = x + first;
    const u16* halves = reinterpret_cast<u16*>(words) + draw_halves(key, position, columns, Bound{0, 0}, words);
    rank_row<false>(row, columns, here, other, ranks);
    bool tied = of.ratios != nullptr ? keep_ranked<true>(row, halves, ranks, of, out + first, columns)
                                     : keep_ranked<false>(row, halves, ranks, of, out + first, columns);
    for (i64 i = 0; tied && i < columns; ++i) {
      u32 rank = ranks[i];
      if (halves[i] != of.upper[rank] || low_half(position + i, key) >= of.lower[rank]) continue;
      out[first + i] = of.ratios != nullptr ? row[i] / of.ratios[rank] : row[i];
    }
  }
}

void keep_largest_of_rows(const float* values, const float* scores, i64 columns, i64 k, u64* scratch, float* out,
                          i64 n) {
  u64 *here = scratch, *other = here + columns;
  u32* ranks = reinterpret_cast<u32*>(other + columns);
  for (i64 first = 0; first < n; first += columns) {
    rank_row<true>(scores + first, columns, here, other, ranks);
    for (i64 i = 0; i < columns; ++i) out[first + i] = ranks[i] < k ? values[first + i] : 0.0f;
  }
}

}  // namespace
}  // namespace deltamerge
