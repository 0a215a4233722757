// Vectors of 64-bit words, as wide as the processor level has them.
#pragma once

#include "headers.h"

namespace deltamerge {
namespace {

#if DELTAMERGE_LEVEL == 512
constexpr int kLanes = 8;
#elif DELTAMERGE_LEVEL == 2
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif

typedef u64 Words __attribute__((vector_size(8 * kLanes)));

inline Words load(const void* at) {
  Words x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline void store(void* at, Words x) { std::memcpy(at, &x, sizeof x); }

inline Words all(u64 x) { return Words{} + x; }

// The products of the low 32 bits of the words.
inline Words product_of_low(Words a, Words b) {
#if DELTAMERGE_LEVEL == 512
  return Words(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif DELTAMERGE_LEVEL == 2
  return Words(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__x86_64__)
  return Words(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & all(0xFFFFFFFF)) * (b & all(0xFFFFFFFF));
#endif
}

// Each pair of words the other way round.
inline Words swapped(Words x) {
#if DELTAMERGE_LEVEL == 512
  return Words(_mm512_shuffle_epi32(__m512i(x), _MM_PERM_BADC));
#elif DELTAMERGE_LEVEL == 2
  return Words(_mm256_shuffle_epi32(__m256i(x), 0x4E));
#elif defined(__x86_64__)
  return Words(_mm_shuffle_epi32(__m128i(x), 0x4E));
#else
  return Words{x[1], x[0]};
#endif
}

inline void multiply(u64 a, u64 b, u64& high, u64& low) {
  unsigned __int128 whole = static_cast<unsigned __int128>(a) * b;
  high = u64(whole >> 64);
  low = u64(whole);
}

}  // namespace
}  // namespace deltamerge
