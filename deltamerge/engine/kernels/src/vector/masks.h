// Random masks: entries dropped by their words (dense), and positions drawn by gaps (sparse).
#pragma once

#include "floats.h"
#include "philox.h"

namespace deltamerge {
namespace {

// Positions whose words are made at once.
constexpr i64 kMasked = 1 << 12;

// The high halves of the words of positions [start, start + count) into `words` (room for count / 4 + 8), from half
// number `returned` on; of a half that ties with the bound a lesser one if the low half is below it.
i64 draw_halves(Key key, i64 start, i64 count, Bound bound, u64* words) {
  i64 skip = start % 16, blocks = (skip + count + 15) / 16;
  philox_blocks(words, u64(start / 16), blocks, key);
  if (bound.low == 0) return skip;
  u16* halves = reinterpret_cast<u16*>(words);
  u16 tied = 0;
  for (i64 i = 0; i < 16 * blocks; ++i) tied |= u16(halves[i] == bound.high);
  if (tied == 0) return skip;
  for (i64 i = skip; i < skip + count; ++i) {
    if (halves[i] == bound.high && low_half(start - skip + i, key) < bound.low) halves[i] = u16(bound.high - 1);
  }
  return skip;
}

template <bool kDivides, class T, class B>
void drop_some(const T* tune, const B* base, const u16* halves, u16 high, float q, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) {
    float delta = difference(tune[i], base[i]);
    if (kDivides) delta /= q;
    out[i] = halves[i] < high ? delta : 0.0f;
  }
}

void drop(Operand tune, Operand base, Key key, i64 start, Bound bound, float q, float* out, i64 n) {
  alignas(64) u64 words[kMasked / 4 + 8];
  for (i64 done = 0; done < n; done += kMasked - 16) {
    i64 count = n - done < kMasked - 16 ? n - done : kMasked - 16;
    const u16* halves = reinterpret_cast<u16*>(words) + draw_halves(key, start + done, count, bound, words);
    typed(tune, [=](auto* t) {
      typed(base, [=](auto* b) {
        if (q == 1.0f) {
          drop_some<false>(t + done, b + done, halves, bound.high, q, out + done, count);
        } else {
          drop_some<true>(t + done, b + done, halves, bound.high, q, out + done, count);
        }
      });
    });
  }
}

i64 draw(Gaps gaps, Key key, i64 start, i64 stop, i64* out) {
  i64 count = 0;
  for (i64 block = start / kSparseBlock; block * kSparseBlock < stop; ++block) {
    i64 origin = block * kSparseBlock - start;
    i64 until = stop - block * kSparseBlock < kSparseBlock ? stop - block * kSparseBlock : kSparseBlock;
    i64 since = origin < 0 ? -origin : 0;
    u64 index = 0;
    for (i64 place = 0; place < until; ++index) {
      Counter c = philox(index, u64(block), kGaps, key);
      const u64 draws[4] = {c.c0, c.c1, c.c2, c.c3};
      for (u64 word : draws) {
        u64 u = word >> 1;
        i64 gap = gaps.guide[u >> gaps.shift];
        while (gaps.table[gap] <= u) ++gap;
        i64 found = place + gap;
        bool kept = gap < gaps.size - 1;  // a gap off the table gives no place
        out[count] = origin + found;
        count += kept && since <= found && found < until;
        place = found + kept;
      }
    }
  }
  return count;
}

i64 align(const i64* const* lists, const float* const* values, const i64* sizes, i64 count, u64* marks, i64* before,
          i64 words, i64* positions, float* const* rows) {
  for (i64 k = 0; k < count; ++k) {
    for (i64 i = 0; i < sizes[k]; ++i) marks[lists[k][i] >> 6] |= u64(1) << (lists[k][i] & 63);
  }
  i64 total = 0;
  for (i64 word = 0; word < words; ++word) {
    before[word] = total;
    for (u64 rest = marks[word]; rest != 0; rest &= rest - 1) positions[total++] = 64 * word + __builtin_ctzll(rest);
  }
  for (i64 k = 0; k < count; ++k) {
    std::memset(rows[k], 0, std::size_t(4 * total));
    for (i64 i = 0; i < sizes[k]; ++i) {
      i64 p = lists[k][i];
      u64 lower = marks[p >> 6] & ((u64(1) << (p & 63)) - 1);
      rows[k][before[p >> 6] + __builtin_popcountll(lower)] = values[k][i];
    }
  }
  return total;
}

}  // namespace
}  // namespace deltamerge
