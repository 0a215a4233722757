// Entries of a row kept by their rank (DELLA, arXiv 2406.11617): a radix sort of each row.
#pragma once

namespace deltamerge {
namespace {

constexpr int kDigits = 3, kDigitBits = 11;
constexpr u64 kDigitValues = 1 << kDigitBits;

// One pass of the sort: `from` to `to` by a digit of the high words, whose values occur `places` times.
void scatter_by_digit(const u64* from, u64* to, u32* places, int shift, i64 n) {
  u32 before = 0;
  for (u64 value = 0; value < kDigitValues; ++value) {
    u32 count = places[value];
    places[value] = before;
    before += count;
  }
  for (i64 i = 0; i < n; ++i) to[places[(from[i] >> shift) & (kDigitValues - 1)]++] = from[i];
}

// The entries of a row in ascending order of magnitude, of equals the first first: index in the low word.
u64* ranked(const float* row, u64* here, u64* other, i64 n) {
  u32 counts[kDigits][kDigitValues];
  std::memset(counts, 0, sizeof counts);
  for (i64 i = 0; i < n; ++i) {
    u32 x = as_bits(row[i]) & kMagnitude;
    here[i] = u64(x) << 32 | u64(i);
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][(x >> (kDigitBits * digit)) & (kDigitValues - 1)];
  }
  for (int digit = 0; digit < kDigits; ++digit) {
    int shift = 32 + kDigitBits * digit;
    if (counts[digit][(here[0] >> shift) & (kDigitValues - 1)] == n) continue;
    scatter_by_digit(here, other, counts[digit], shift, n);
    u64* swap = here;
    here = other;
    other = swap;
  }
  return here;
}

void keep_by_rank(const float* x, i64 start, i64 columns, Key key, Ranks ranks, u64* scratch, float* out, i64 n) {
  u64 *words = scratch, *here = words + columns / 4 + 12, *other = here + columns;
  for (i64 first = 0; first < n; first += columns) {
    const i64 position = start + first;
    const float* row = x + first;
    const u16* halves = reinterpret_cast<u16*>(words) + draw_halves(key, position, columns, Bound{0, 0}, words);
    const u64* order = ranked(row, here, other, columns);
    for (i64 rank = 0; rank < columns; ++rank) {
      i64 place = i64(order[rank] & 0xFFFFFFFF), limit = ranks.limits[rank], upper = halves[place];
      bool stays = upper < limit >> 16;
      if (upper == limit >> 16) stays = low_half(position + place, key) < (limit & 0xFFFF);
      float entry = ranks.ratios != nullptr ? row[place] / ranks.ratios[rank] : row[place];
      out[first + place] = stays ? entry : 0.0f;
    }
  }
}

}  // namespace
}  // namespace deltamerge
