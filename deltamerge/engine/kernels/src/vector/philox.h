// Philox4x64-10 (Salmon et al., SC 2011) of counters (index, block, lane, 0), as in methods/prune/bits.py.
#pragma once

#include "lanes.h"

namespace deltamerge {
namespace {

constexpr u64 kMultiplier0 = 0xD2E7470EE14C6C93, kMultiplier1 = 0xCA5A826395121157;
constexpr u64 kWeyl0 = 0x9E3779B97F4A7C15, kWeyl1 = 0xBB67AE8584CAA73B;
constexpr int kRounds = 10;
// What a stream of the generator is for (bits.HIGH, LOW, GAPS).
constexpr u64 kHigh = 0, kLow = 1, kGaps = 2;

struct Counter {
  u64 c0, c1, c2, c3;
};

inline void round_of(Counter& c, u64 key0, u64 key1) {
  u64 high0, low0, high1, low1;
  multiply(kMultiplier0, c.c0, high0, low0);
  multiply(kMultiplier1, c.c2, high1, low1);
  c = {high1 ^ c.c1 ^ key0, low1, high0 ^ c.c3 ^ key1, low0};
}

inline Counter philox(u64 index, u64 block, u64 lane, Key key) {
  Counter c = {index, block, lane, 0};
  for (u64 r = 0; r < kRounds; ++r) round_of(c, key.word0 + r * kWeyl0, key.word1 + r * kWeyl1);
  return c;
}

#if DELTAMERGE_LEVEL == 512

// Counters of kLanes blocks at once.
struct Counters {
  Words c0, c1, c2, c3;
};

// High and low words of factor * c, by halves: there is no wider product of vectors.
inline void multiply(u64 factor, Words c, Words& high, Words& low) {
  Words above = all(factor >> 32), below = all(factor & 0xFFFFFFFF);
  Words c_above = Words(_mm512_shuffle_epi32(__m512i(c), _MM_PERM_DDBB));
  Words least = product_of_low(below, c), middle = product_of_low(below, c_above) + (least >> 32);
  Words other = product_of_low(above, c) + (middle & all(0xFFFFFFFF));
  high = product_of_low(above, c_above) + (middle >> 32) + (other >> 32);
  low = Words(_mm512_mask_shuffle_epi32(__m512i(least), 0xAAAA, __m512i(other), _MM_PERM_CCAA));
}

inline void round_of(Counters& c, u64 key0, u64 key1) {
  Words high0, low0, high1, low1;
  multiply(kMultiplier0, c.c0, high0, low0);
  multiply(kMultiplier1, c.c2, high1, low1);
  c = {high1 ^ c.c1 ^ all(key0), low1, high0 ^ c.c3 ^ all(key1), low0};
}

// The words of kLanes blocks, block by block.
inline void store_blocks(u64* out, const Counters& c) {
  __m512i even0 = _mm512_unpacklo_epi64(__m512i(c.c0), __m512i(c.c1)),  // c0 c1 of blocks 0 2 4 6
      odd0 = _mm512_unpackhi_epi64(__m512i(c.c0), __m512i(c.c1)),       // of blocks 1 3 5 7
      even1 = _mm512_unpacklo_epi64(__m512i(c.c2), __m512i(c.c3)),
          odd1 = _mm512_unpackhi_epi64(__m512i(c.c2), __m512i(c.c3));
  auto put = [out](int block, __m512i low, __m512i high) {  // 128-bit parts: words 0 1, then 2 3 of four blocks
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * block),
                        _mm256_inserti128_si256(_mm512_castsi512_si256(low), _mm512_castsi512_si128(high), 1));
  };
  put(0, even0, even1);
  put(1, odd0, odd1);
  put(2, _mm512_alignr_epi64(even0, even0, 2), _mm512_alignr_epi64(even1, even1, 2));
  put(3, _mm512_alignr_epi64(odd0, odd0, 2), _mm512_alignr_epi64(odd1, odd1, 2));
  put(4, _mm512_alignr_epi64(even0, even0, 4), _mm512_alignr_epi64(even1, even1, 4));
  put(5, _mm512_alignr_epi64(odd0, odd0, 4), _mm512_alignr_epi64(odd1, odd1, 4));
  put(6, _mm512_alignr_epi64(even0, even0, 6), _mm512_alignr_epi64(even1, even1, 6));
  put(7, _mm512_alignr_epi64(odd0, odd0, 6), _mm512_alignr_epi64(odd1, odd1, 6));
}

// Two blocks of words, a round of each at a time.
struct Pair {
  Counter even, odd;
  u64 index;

  void round_at(int r, Key key) {
    u64 key0 = key.word0 + u64(r) * kWeyl0, key1 = key.word1 + u64(r) * kWeyl1;
    if (r == 0) {
      even = {index, 0, kHigh, 0};
      odd = {index + 1, 0, kHigh, 0};
      index += 2;
    }
    round_of(even, key0, key1);
    round_of(odd, key0, key1);
  }
};

// kVectors vectors of blocks, and meanwhile kPairs pairs by words: such a processor multiplies both at one time.
template <int kVectors, int kPairs>
void philox_at_once(u64* out, u64 first, Key key) {
  const Words numbers = {0, 1, 2, 3, 4, 5, 6, 7};
  Counters c[kVectors];
  for (int v = 0; v < kVectors; ++v) c[v] = {all(first + u64(kLanes * v)) + numbers, all(0), all(kHigh), all(0)};
  u64* words = out + 4 * kLanes * kVectors;
  Pair pair = {{}, {}, first + kLanes * kVectors};
#pragma GCC unroll 10
  for (int r = 0; r < kRounds; ++r) {
    u64 key0 = key.word0 + u64(r) * kWeyl0, key1 = key.word1 + u64(r) * kWeyl1;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) round_of(c[v], key0, key1);
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      int s = (r * kPairs + p) % kRounds;
      pair.round_at(s, key);
      if (s == kRounds - 1) {
        std::memcpy(words, &pair.even, sizeof pair.even);
        std::memcpy(words + 4, &pair.odd, sizeof pair.odd);
        words += 8;
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) store_blocks(out + 4 * kLanes * v, c[v]);
}

// As many blocks as come at once; how many.
inline i64 philox_some(u64* out, u64 first, i64 count, Key key) {
  constexpr i64 kMost = 3 * kLanes + 4;
  i64 done = 0;
  for (; done + kMost <= count; done += kMost) philox_at_once<3, 2>(out + 4 * done, first + u64(done), key);
  for (; done + 2 * kLanes <= count; done += 2 * kLanes) philox_at_once<2, 0>(out + 4 * done, first + u64(done), key);
  return done;
}

#else

inline i64 philox_some(u64*, u64, i64, Key) { return 0; }

#endif

// The words of `count` blocks of the stream kHigh from block `first` on.
void philox_blocks(u64* out, u64 first, i64 count, Key key) {
  i64 done = philox_some(out, first, count, key);
  for (; done < count; ++done) {
    Counter c = philox(first + u64(done), 0, kHigh, key);
    std::memcpy(out + 4 * done, &c, sizeof c);
  }
}

// The low half-word of a position, looked at where the high one ties.
inline u16 low_half(i64 position, Key key) {
  Counter c = philox(u64(position / 16), 0, kLow, key);
  u64 words[4] = {c.c0, c.c1, c.c2, c.c3};
  return u16(words[position / 4 % 4] >> (16 * (position % 4)));
}

}  // namespace
}  // namespace deltamerge
