// XXH3-128 of pieces of 64 KiB, without a seed, of bytes that a core has in cache.
//
// Yann Collet's XXH3 for an input of that one length, after its specification:
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include "lanes.h"

namespace deltamerge {
namespace {

constexpr i64 kPieceBytes = 1 << 16, kBlockBytes = 1024, kStripeBytes = 64;
constexpr int kAccumulators = 8;
// Where in the secret the last stripe, the scrambling, and the two halves of the digest begin.
constexpr int kLastAt = 121, kScrambleAt = 128, kLowAt = 11, kHighAt = 117;

alignas(64) const u8 kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

constexpr u64 kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
              kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5, kAvalanche = 0x165667919E3779F9;
const u64 kStart[kAccumulators] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                   kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

constexpr int kVectors = kAccumulators / kLanes;

inline void mix_stripe(Words* total, const u8* data, const u8* secret) {
  for (int v = 0; v < kVectors; ++v) {
    Words words = load(data + 8 * kLanes * v), key = words ^ load(secret + 8 * kLanes * v);
    total[v] += swapped(words) + product_of_low(key, key >> 32);
  }
}

// Mix a block of 16 stripes into the accumulators; `last`: it is a piece's last.
void mix_block(u64* accumulators, const u8* data, bool last) {
  Words total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = load(accumulators + kLanes * v);
  for (int stripe = 0; stripe < 15; ++stripe) mix_stripe(total, data + kStripeBytes * stripe, kSecret + 8 * stripe);
  mix_stripe(total, data + kStripeBytes * 15, kSecret + (last ? kLastAt : 8 * 15));
  for (int v = 0; v < kVectors; ++v) {
    if (!last) {
      Words mixed = total[v] ^ (total[v] >> 47) ^ load(kSecret + kScrambleAt + 8 * kLanes * v);
      // times a prime of 32 bits
      total[v] = product_of_low(mixed, all(kPrime32_1)) + (product_of_low(mixed >> 32, all(kPrime32_1)) << 32);
    }
    store(accumulators + kLanes * v, total[v]);
  }
}

u64 digest_half(const u64* accumulators, const u8* secret, u64 seed) {
  u64 total = seed;
  for (int i = 0; i < kAccumulators; i += 2) {
    u64 keys[2], high, low;
    std::memcpy(keys, secret + 8 * i, sizeof keys);
    multiply(accumulators[i] ^ keys[0], accumulators[i + 1] ^ keys[1], high, low);
    total += high ^ low;
  }
  total = (total ^ (total >> 37)) * kAvalanche;
  return total ^ (total >> 32);
}

i64 hash(const u8* at, i64 begin, i64 end, i64 first, u64* accumulators, u64* digests) {
  for (; end - begin >= kBlockBytes; at += kBlockBytes) {
    i64 inside = begin % kPieceBytes;
    if (inside == 0) std::memcpy(accumulators, kStart, sizeof kStart);
    bool last = inside == kPieceBytes - kBlockBytes;
    mix_block(accumulators, at, last);
    begin += kBlockBytes;
    if (last) {
      u64* row = digests + 2 * (begin / kPieceBytes - 1 - first);
      row[0] = digest_half(accumulators, kSecret + kHighAt, ~(u64(kPieceBytes) * kPrime64_2));
      row[1] = digest_half(accumulators, kSecret + kLowAt, u64(kPieceBytes) * kPrime64_1);
    }
  }
  return begin;
}

}  // namespace
}  // namespace deltamerge
