// Stored positions (formats/delta/positions.py) decoded and put to use, a block at a time: positions, values, and only then the
// memory of the tensor. Every position is asked for as soon as it is known, a block before its use.
#pragma once

#include "merge.h"

namespace deltamerge {
namespace {

// Positions between prefetch and use.
constexpr i64 kBlock = 128;
constexpr u64 kEscape = 255;

// What is left of the coding: the next byte, the bit of the word in work after its last, the rest of that word, and the
// least position that may come (for rice: what was passed).
struct Cursor {
  u64 at, bit, word, passed;
};

inline u64 word_at(const u8* stored, u64 at) {
  u64 word;
  std::memcpy(&word, stored + at, 8);
  return word;
}

// Rice's remainders [start, start + n), inverted or not as stored; start is a multiple of 8.
void remainders(const Coded& c, i64 start, i64 n, u64* out) {
  const u64 bits = c.k & 7, mask = (u64(1) << bits) - 1;
  for (i64 i = 0; i < n; i += 8) {
    u64 fields = word_at(c.stored, u64(c.first) + u64((start + i) >> 3) * bits);
    for (u64 j = 0; j < 8; ++j) out[u64(i) + j] = fields >> (j * bits) & mask;
  }
  if (c.k <= 7) return;
  for (i64 i = 0; i < n; ++i) out[i] = out[i] << 8 | c.stored[start + i];
}

// The next n set bits.
bool next_ones(const Coded& c, Cursor& cursor, i64 n, u64* out) {
  Cursor now = cursor;
  for (i64 i = 0; i < n; ++i) {
    while (now.word == 0) {
      if (now.at >= u64(c.size)) return false;
      now.word = word_at(c.stored, now.at);
      now.at += 8;
      now.bit += 64;
    }
    out[i] = now.bit + u64(__builtin_ctzll(now.word)) - 64;
    now.word &= now.word - 1;
  }
  cursor = now;
  return true;
}

// The next n positions of byte gaps; the padding ends what does not end.
bool next_gaps(const Coded& c, Cursor& cursor, i64 n, u64* out) {
  u64 at = cursor.at, position = cursor.passed;
  for (i64 i = 0; i < n; ++i) {
    u64 gap = c.stored[at];
    for (; gap == kEscape; gap = c.stored[++at]) position += gap;
    position += gap;
    out[i] = position++;
    if (++at > u64(c.size)) return false;
  }
  cursor.at = at;
  cursor.passed = position;
  return true;
}

// Indices [start, start + n) of `first` bytes each.
bool next_indices(const Coded& c, Cursor& cursor, i64 start, i64 n, u64* out) {
  const u64 mask = ~u64(0) >> (64 - 8 * c.first);
  u64 least = cursor.passed;
  bool ascending = true;
  for (i64 i = 0; i < n; ++i) {
    u64 position = word_at(c.stored, u64((start + i) * c.first)) & mask;
    ascending &= least <= position;
    least = position + 1;
    out[i] = position;
  }
  cursor.passed = least;
  return ascending;
}

// Asks for the cache line of an element: into the first level where about every line is touched (there the hardware has
// brought the second's), else the second.
template <bool kDense, class T>
inline void ask(const T* out, u64 position) {
  const char* line = reinterpret_cast<const char*>(out) + position * sizeof(T);
  __builtin_prefetch(line, 0, kDense ? 3 : 2);
}

template <bool kDense, class T>
void add_remainders(const Coded& c, Cursor& cursor, i64 n, const u64* rest, u64* positions, const T* out) {
  const u64 low = (u64(1) << c.k) - 1;
  u64 passed = cursor.passed;
  for (i64 i = 0; i < n; ++i) {  // one loop: what is asked for arrives while the next is reckoned
    passed += rest[i] - low;     // modulo 2**64
    positions[i] = (positions[i] << c.k) + passed + low;
    ask<kDense>(out, positions[i]);
  }
  cursor.passed = passed;
}

template <bool kDense, class T>
void ask_all(i64 n, const u64* positions, const T* out) {
  for (i64 i = 0; i < n; ++i) ask<kDense>(out, positions[i]);
}

// Positions [start, start + n), asked for. False: they are damaged or outside of `out`. They ascend, so the last bounds
// them all.
template <class T>
bool next_block(const Coded& c, Cursor& cursor, i64 start, i64 n, u64* positions, const T* out, i64 size) {
  bool whole = true;
  if (c.way == kOnes) {
    whole = next_ones(c, cursor, n, positions);
  } else if (c.way == kByteGaps) {
    whole = next_gaps(c, cursor, n, positions);
  } else if (c.way == kIndices) {
    whole = next_indices(c, cursor, start, n, positions);
  } else {
    for (i64 i = 0; i < n; ++i) positions[i] = u64(start + i);
  }
  if (!whole) return false;
  if (c.k > 0) {
    u64 rest[kBlock];
    remainders(c, start, n, rest);
    if (c.dense) {
      add_remainders<true>(c, cursor, n, rest, positions, out);
    } else {
      add_remainders<false>(c, cursor, n, rest, positions, out);
    }
  } else if (c.dense) {
    ask_all<true>(n, positions, out);
  } else {
    ask_all<false>(n, positions, out);
  }
  return positions[n - 1] < u64(size);
}

// Whether nothing is left.
bool is_read(const Coded& c, const Cursor& cursor) {
  if (c.way == kByteGaps) return cursor.at == u64(c.size);
  if (c.way != kOnes) return true;
  u8 rest = 0;
  for (u64 at = cursor.at; at < u64(c.size); ++at) rest |= c.stored[at];
  return cursor.word == 0 && rest == 0;
}

inline i64 block_of(i64 start, i64 count) { return count - start < kBlock ? count - start : kBlock; }

template <class T>
bool put_values(const Coded& c, const T* values, T* out, i64 size) {
  Cursor cursor = {u64(c.second), 0, 0, 0};
  u64 positions[kBlock];
  for (i64 start = 0; start < c.count; start += kBlock) {
    i64 n = block_of(start, c.count);
    if (!next_block(c, cursor, start, n, positions, out, size)) return false;
    for (i64 i = 0; i < n; ++i) out[positions[i]] = values[start + i];
  }
  return is_read(c, cursor);
}

bool put(const Coded& c, const void* values, i64 itemsize, void* out, i64 size) {
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    return put_values(c, static_cast<const T*>(values), static_cast<T*>(out), size);
  };
  return itemsize == 1 ? typed(u8()) : itemsize == 2 ? typed(u16()) : itemsize == 4 ? typed(u32()) : typed(u64());
}

// The scale of each position's group, and where the group ends that the last position is in.
struct Scales {
  const float* of_groups;
  u64 group, edge;
  float current;

  void fill(const u64* positions, float* out, i64 n) {
    for (i64 i = 0; i < n; ++i) {
      if (positions[i] >= edge) {
        u64 row = positions[i] / group;
        edge = (row + 1) * group;
        current = of_groups[row];
      }
      out[i] = current;
    }
  }
};

// Values [start, start + n) in float32: where they are, or in `room`, which of scaled ones has their scales.
const float* decode_values(const Added& added, i64 start, i64 n, float* room) {
  if (added.kind == kFloatValues) return static_cast<const float*>(added.values) + start;
  if (added.kind == kBfloatValues) {
    widen_all(static_cast<const u16*>(added.values) + start, room, n);
  } else if (added.kind == kInt8Values) {
    const signed char* codes = static_cast<const signed char*>(added.values) + start;
    for (i64 i = 0; i < n; ++i) room[i] *= float(codes[i]);
  } else {
    const u8* signs = static_cast<const u8*>(added.values) + (start >> 3);
    for (i64 i = 0; i < n; ++i) {
      u32 negative = u32(signs[i >> 3]) >> (i & 7);
      room[i] = as_float(as_bits(room[i]) ^ negative << 31);
    }
  }
  return room;
}

inline void add_block(const u64* positions, const float* values, float* out, i64 n) {
  for (i64 i = 0; i < n; ++i) out[positions[i]] += values[i];
}

// In three loops, of which the middle one is done by vectors.
inline void add_block(const u64* positions, const float* values, u16* out, i64 n) {
  float sums[kBlock];
  u16 results[kBlock];
  for (i64 i = 0; i < n; ++i) sums[i] = wide(out[positions[i]]);
  for (i64 i = 0; i < n; ++i) results[i] = narrow(as_bits(sums[i] + values[i]));
  for (i64 i = 0; i < n; ++i) out[positions[i]] = results[i];
}

template <class T>
bool add_values(const Coded& c, const Added& added, T* out, i64 size) {
  Cursor cursor = {u64(c.second), 0, 0, 0};
  Scales scales = {added.scales, u64(added.group), 0, 0.0f};
  u64 positions[kBlock];
  float room[kBlock];
  for (i64 start = 0; start < c.count; start += kBlock) {
    i64 n = block_of(start, c.count);
    if (!next_block(c, cursor, start, n, positions, out, size)) return false;
    if (added.kind >= kInt8Values) scales.fill(positions, room, n);
    add_block(positions, decode_values(added, start, n, room), out, n);
  }
  return is_read(c, cursor);
}

bool add_to(const Coded& c, const Added& added, bool is_bfloat, void* out, i64 size) {
  if (is_bfloat) return add_values(c, added, static_cast<u16*>(out), size);
  return add_values(c, added, static_cast<float*>(out), size);
}

// Scales whose ranks are stored as gaps between ones.
bool ranked(const Coded& c, const float* scales, i64 scale_count, float* out) {
  Cursor cursor = {0, 0, 0, 0};
  u64 places[kBlock];
  i64 last = -1;
  for (i64 start = 0; start < c.count; start += kBlock) {
    i64 n = block_of(start, c.count);
    if (!next_ones(c, cursor, n, places)) return false;
    for (i64 i = 0; i < n; ++i) {
      i64 rank = i64(places[i]) - last - 1;
      if (rank >= scale_count) return false;
      out[start + i] = scales[rank];
      last = i64(places[i]);
    }
  }
  return is_read(c, cursor);
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
