// Codes of four bits by a table of 16 numbers, times a scale, in the order in which they are stored.
#pragma once

#include "headers.h"

namespace deltamerge {
namespace {

// The numbers that the low four bits of the lanes of a vector stand for.
#if DELTAMERGE_LEVEL == 512
constexpr int kFloats = 16;
using Numbers = __m512;
using Places = __m512i;

struct Table {
  __m512 all;
  explicit Table(const float* numbers) : all(_mm512_loadu_ps(numbers)) {}
  Numbers operator[](Places k) const { return _mm512_permutexvar_ps(k, all); }
};

inline Numbers spread(float x) { return _mm512_set1_ps(x); }
inline Numbers product(Numbers a, Numbers b) { return _mm512_mul_ps(a, b); }
inline Numbers numbers_at(const float* at) { return _mm512_loadu_ps(at); }
inline void put_numbers(float* at, Numbers x) { _mm512_storeu_ps(at, x); }
// A byte a lane, the upper four bits of each where they are `upper`.
inline Places bytes_at(const u8* at, bool upper) {
  Places x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return upper ? _mm512_srli_epi32(x, 4) : x;
}
// The halves of bytes as two lanes, the lower half first or (`swapped`) the upper.
inline Places halves_at(const u8* at, bool swapped) {
  Places x = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return swapped ? _mm512_or_si512(_mm512_srli_epi64(x, 4), _mm512_slli_epi64(x, 32))
                 : _mm512_or_si512(x, _mm512_slli_epi64(x, 28));
}
#elif DELTAMERGE_LEVEL == 2
constexpr int kFloats = 8;
using Numbers = __m256;
using Places = __m256i;

struct Table {
  __m256 lower, upper;
  explicit Table(const float* numbers) : lower(_mm256_loadu_ps(numbers)), upper(_mm256_loadu_ps(numbers + 8)) {}
  Numbers operator[](Places k) const {
    __m256 below = _mm256_permutevar8x32_ps(lower, k), above = _mm256_permutevar8x32_ps(upper, k);
    return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(k, 28)));
  }
};

inline Numbers spread(float x) { return _mm256_set1_ps(x); }
inline Numbers product(Numbers a, Numbers b) { return _mm256_mul_ps(a, b); }
inline Numbers numbers_at(const float* at) { return _mm256_loadu_ps(at); }
inline void put_numbers(float* at, Numbers x) { _mm256_storeu_ps(at, x); }
inline Places bytes_at(const u8* at, bool upper) {
  Places x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return upper ? _mm256_srli_epi32(x, 4) : x;
}
inline Places halves_at(const u8* at, bool swapped) {
  std::int32_t four;
  std::memcpy(&four, at, sizeof four);
  Places x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return swapped ? _mm256_or_si256(_mm256_srli_epi64(x, 4), _mm256_slli_epi64(x, 32))
                 : _mm256_or_si256(x, _mm256_slli_epi64(x, 28));
}
#else
constexpr int kFloats = 2;

struct Numbers {
  float x[2];
};

struct Places {
  u8 k[2];
};

struct Table {
  const float* all;
  explicit Table(const float* numbers) : all(numbers) {}
  Numbers operator[](Places at) const { return {{all[at.k[0] & 15], all[at.k[1] & 15]}}; }
};

inline Numbers spread(float x) { return {{x, x}}; }
inline Numbers product(Numbers a, Numbers b) { return {{a.x[0] * b.x[0], a.x[1] * b.x[1]}}; }
inline Numbers numbers_at(const float* at) { return {{at[0], at[1]}}; }
inline void put_numbers(float* at, Numbers x) { std::memcpy(at, x.x, sizeof x.x); }
inline Places bytes_at(const u8* at, bool upper) {
  return {{u8(at[0] >> (upper ? 4 : 0)), u8(at[1] >> (upper ? 4 : 0))}};
}
inline Places halves_at(const u8* at, bool swapped) {
  return swapped ? Places{{u8(*at >> 4), *at}} : Places{{*at, u8(*at >> 4)}};
}
#endif

// out = table[code] * scale of `count` codes, the lower half of a byte first or (`swapped`) the upper.
void scale_halves(const u8* codes, bool swapped, const float* table, float scale, float* out, i64 count) {
  const Table numbers(table);
  const Numbers wide = spread(scale);
  i64 i = 0;
  for (; i + kFloats <= count; i += kFloats) {
    put_numbers(out + i, product(numbers[halves_at(codes + i / 2, swapped)], wide));
  }
  for (; i < count; ++i) out[i] = table[codes[i / 2] >> ((i % 2 != 0) != swapped ? 4 : 0) & 15] * scale;
}

}  // namespace
}  // namespace deltamerge
