// Weights that are stored transposed (formats/quantised/codes.py): some of their rows out of columns of codes.
//
// Codes are taken in squares: what lies in a cache line of some stored rows becomes whole cache lines of as many rows.
#pragma once

#include "tabled.h"

namespace deltamerge {
namespace {

constexpr i64 kSide = 16;     // floats of a cache line
constexpr i64 kAhead = 8;     // stored rows that are asked for before they are needed: they are far from each other
constexpr i64 kAcross = 128;  // rows of the weight that are written at once: their pages are known to the processor

// turned[b][r] = byte b of row r, of up to kSide rows.
inline void turn_bytes(const u8* rows, i64 pitch, i64 count, u8 (*turned)[kSide]) {
#if defined(__x86_64__)
  if (count == kSide) {
    __m128i x[kSide], y[kSide];
    for (i64 r = 0; r < kSide; ++r) x[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + r * pitch));
    for (int round = 0; round < 4; ++round) {
      for (i64 r = 0; r < kSide / 2; ++r) {
        y[2 * r] = _mm_unpacklo_epi8(x[r], x[r + kSide / 2]);
        y[2 * r + 1] = _mm_unpackhi_epi8(x[r], x[r + kSide / 2]);
      }
      for (i64 r = 0; r < kSide; ++r) x[r] = y[r];
    }
    for (i64 b = 0; b < kSide; ++b) _mm_store_si128(reinterpret_cast<__m128i*>(turned[b]), x[b]);
    return;
  }
#endif
  for (i64 r = 0; r < count; ++r) {
    for (i64 b = 0; b < kSide; ++b) turned[b][r] = rows[r * pitch + b];
  }
}

// kSide bytes of kSide stored rows, two codes a byte, which are neighbours in a column of the weight.
void turn_square(const TurnedPairs& band, const Table& numbers, i64 first, i64 byte, float* out) {
  alignas(64) u8 turned[kSide][kSide];
  alignas(64) float line[kSide];
  const i64 rows = band.right - first < kSide ? band.right - first : kSide;
  turn_bytes(band.codes + first * band.pitch + byte, band.pitch, rows, turned);
  const float* scales = band.scales + (byte / kSide - band.top / (2 * kSide)) * band.columns + first;
  if (rows < kSide) {
    for (i64 b = 0; b < kSide; ++b) std::memset(turned[b] + rows, 0, std::size_t(kSide - rows));
    std::memset(line, 0, sizeof line);
    std::memcpy(line, scales, sizeof(float) * std::size_t(rows));
    scales = line;
  }
  alignas(64) float whole[kSide];
  for (i64 b = 0; b < kSide; ++b) {
    for (i64 half = 0; half < 2; ++half) {
      const i64 row = 2 * (byte + b) + half;
      if (row < band.top || row >= band.bottom) continue;
      float* at = out + (row - band.top) * (band.right - band.left) + first - band.left;
      float* to = rows < kSide ? whole : at;
      for (i64 i = 0; i < kSide; i += kFloats) {
        put_numbers(to + i, product(numbers[bytes_at(turned[b] + i, half != 0)], numbers_at(scales + i)));
      }
      if (rows < kSide) std::memcpy(at, whole, sizeof(float) * std::size_t(rows));
    }
  }
}

void turn_pairs(const TurnedPairs& band, float* out) {
  const Table numbers(band.table);
  const i64 last = (band.bottom + 1) / 2;
  for (i64 begin = band.top / 2 / kSide * kSide; begin < last; begin += kAcross / 2) {
    const i64 end = begin + kAcross / 2 < last ? begin + kAcross / 2 : last;
    for (i64 first = band.left; first < band.right; first += kSide) {
      for (i64 r = first + kSide; r < first + 2 * kSide && r < band.right; ++r) {
        __builtin_prefetch(band.codes + r * band.pitch + begin);
      }
      for (i64 byte = begin; byte < end; byte += kSide) turn_square(band, numbers, first, byte, out);
    }
  }
}

// Whether `count` columns from `first` on have one scale.
inline bool share(const TurnedWords& band, i64 first, i64 count) {
  std::int32_t other = 0;
  for (i64 i = 1; i < count; ++i) other |= band.groups[first + i] ^ band.groups[first];
  return other == 0;
}

template <i64 kCount>
struct Lanes;

template <>
struct Lanes<4> {
  typedef u32 Words __attribute__((vector_size(16)));
  typedef std::int32_t Codes __attribute__((vector_size(16)));
  typedef float Values __attribute__((vector_size(16)));
};

template <>
struct Lanes<8> {
  typedef u32 Words __attribute__((vector_size(32)));
  typedef std::int32_t Codes __attribute__((vector_size(32)));
  typedef float Values __attribute__((vector_size(32)));
};

template <>
struct Lanes<16> {
  typedef u32 Words __attribute__((vector_size(64)));
  typedef std::int32_t Codes __attribute__((vector_size(64)));
  typedef float Values __attribute__((vector_size(64)));
};

template <>
struct Lanes<32> {
  typedef u32 Words __attribute__((vector_size(128)));
  typedef std::int32_t Codes __attribute__((vector_size(128)));
  typedef float Values __attribute__((vector_size(128)));
};

// (code - zero) * scale of kCount codes of row `row` from column `first` on; `same`: these have one scale.
template <i64 kCount>
inline void scale_turned(const TurnedWords& band, const typename Lanes<kCount>::Codes& codes, i64 row, i64 first,
                         bool same, float* out) {
  using Values = typename Lanes<kCount>::Values;
  const float* zeros = band.zeros + row * band.across;
  const float* scales = band.scales + row * band.across;
  const std::int32_t* groups = band.groups + first;
  if (same) {
    const Values values = (__builtin_convertvector(codes, Values) - zeros[groups[0]]) * scales[groups[0]];
    std::memcpy(out, &values, sizeof values);
  } else {
    const i64 count = band.right - first < kCount ? band.right - first : kCount;
    for (i64 j = 0; j < count; ++j) out[j] = (float(codes[j]) - zeros[groups[j]]) * scales[groups[j]];
  }
}

// The codes of kWidth bits of a word, or of three words whose codes lie across them.
template <int kWidth>
struct Unit {
  static constexpr i64 kWords = 1, kCodes = 32 / kWidth;
  using Codes = typename Lanes<kCodes>::Codes;
  using Words = typename Lanes<kCodes>::Words;

  static Codes codes(const u32* word, i64) {
    Words shifts;
    for (i64 j = 0; j < kCodes; ++j) shifts[j] = u32(j * kWidth);
    return Codes(((Words{} + *word) >> shifts) & ((u32(1) << kWidth) - 1));
  }
};

template <>
struct Unit<3> {
  static constexpr i64 kWords = 3, kCodes = 32;
  using Codes = Lanes<kCodes>::Codes;

  static Codes codes(const u32* words, i64 pitch) {
    const u32 held[4] = {words[0], words[pitch], words[2 * pitch], 0};
    Codes found;
    for (i64 j = 0; j < kCodes; ++j) {
      const u64 pair = held[3 * j / 32] | u64(held[3 * j / 32 + 1]) << 32;
      found[j] = std::int32_t(pair >> (3 * j % 32) & 7);
    }
    return found;
  }
};

// Words whose codes are neighbours in a row of the weight.
template <int kWidth>
void turn_along(const TurnedWords& band, float* out) {
  constexpr i64 kCodes = Unit<kWidth>::kCodes, kStep = Unit<kWidth>::kWords;
  const i64 count = band.bottom - band.top, wide = band.right - band.left;
  for (i64 begin = 0; begin < count; begin += kSide) {
    const i64 end = begin + kSide < count ? begin + kSide : count;
    const u32* words = band.words + band.left / kCodes * kStep * band.pitch + band.top + begin;
    for (i64 first = band.left; first < band.right; first += kCodes, words += kStep * band.pitch) {
      const bool same = share(band, first, kCodes);
      if (first + kAhead * kCodes < band.right) __builtin_prefetch(words + kAhead * kStep * band.pitch);
      for (i64 row = begin; row < end; ++row) {
        const auto codes = Unit<kWidth>::codes(words + (row - begin), band.pitch);
        scale_turned<kCodes>(band, codes, row, first, same, out + row * wide + first - band.left);
      }
    }
  }
}

// Words of four bits whose codes are neighbours in a column of the weight, in AWQ's order.
void turn_across(const TurnedWords& band, float* out) {
  constexpr int kShifts[8] = {0, 16, 4, 20, 8, 24, 12, 28};
  for (i64 top = band.top; top < band.bottom;) {
    const i64 next = (top / kAcross + 1) * kAcross, bottom = next < band.bottom ? next : band.bottom;
    for (i64 first = band.left; first < band.right; first += kSide) {
      const i64 columns = band.right - first < kSide ? band.right - first : kSide;
      const bool same = share(band, first, columns);
      for (i64 j = first + kSide; j < first + 2 * kSide && j < band.right; ++j) {
        __builtin_prefetch(band.words + j * band.pitch + top / 8);
      }
      for (i64 word = top / 8; word * 8 < bottom; ++word) {
        alignas(64) u32 held[kSide] = {};
        for (i64 j = 0; j < columns; ++j) held[j] = band.words[(first + j) * band.pitch + word];
        Lanes<kSide>::Words words;
        std::memcpy(&words, held, sizeof words);
        for (i64 k = 0; k < 8; ++k) {
          const i64 row = word * 8 + k;
          if (row < top || row >= bottom) continue;
          const auto codes = Lanes<kSide>::Codes(words >> u32(kShifts[k]) & 15u);
          float* to = out + (row - band.top) * (band.right - band.left) + first - band.left;
          if (columns == kSide) {
            scale_turned<kSide>(band, codes, row - band.top, first, same, to);
          } else {
            alignas(64) float whole[kSide];
            scale_turned<kSide>(band, codes, row - band.top, first, same, whole);
            std::memcpy(to, whole, sizeof(float) * std::size_t(columns));
          }
        }
      }
    }
    top = bottom;
  }
}

void turn_words(const TurnedWords& band, float* out) {
  if (band.across_words) return turn_across(band, out);
  if (band.width == 2) return turn_along<2>(band, out);
  if (band.width == 3) return turn_along<3>(band, out);
  if (band.width == 4) return turn_along<4>(band, out);
  turn_along<8>(band, out);
}

}  // namespace
}  // namespace deltamerge
