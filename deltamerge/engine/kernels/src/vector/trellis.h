// Trellis codes (formats/delta/trellis.py): the path of codes whose levels are nearest, by Viterbi's algorithm.
#pragma once

#include "headers.h"

namespace deltamerge {
namespace {

// Codes of n numbers x in units of the levels; `came` has room for n * kStates >> kBits bytes: of each state after its
// oldest bits are dropped, which of its ways was the cheaper, the lowest of equals.
template <int kBits>
void trace(const float* x, i64 n, const float* table, u8* came, u8* codes) {
  constexpr int kWays = 1 << kBits, kRest = kStates >> kBits;
  float cost[kStates], best[kRest];
  std::int32_t way[kRest];
  for (float& one : cost) one = __builtin_inff();
  cost[0] = 0;
  for (i64 t = 0; t < n; ++t) {
    for (int r = 0; r < kRest; ++r) {
      best[r] = cost[r];
      way[r] = 0;
    }
    for (int w = 1; w < kWays; ++w) {
      for (int r = 0; r < kRest; ++r) {
        const float other = cost[w * kRest + r];
        const bool less = other < best[r];
        best[r] = less ? other : best[r];
        way[r] = less ? w : way[r];
      }
    }
    u8* row = came + t * kRest;
    for (int r = 0; r < kRest; ++r) row[r] = u8(way[r]);
    for (int r = 0; r < kRest; ++r) {
      for (int w = 0; w < kWays; ++w) {
        const float off = x[t] - table[r * kWays + w];
        cost[r * kWays + w] = best[r] + off * off;
      }
    }
  }
  int state = 0;
  for (int s = 1; s < kStates; ++s) state = cost[s] < cost[state] ? s : state;
  for (i64 t = n - 1; t >= 0; --t) {
    codes[t] = u8(state & (kWays - 1));
    state >>= kBits;
    state += came[t * kRest + state] * kRest;
  }
}

void trellis(const float* x, i64 n, i64 bits, const float* table, u8* came, u8* codes) {
  bits == 1 ? trace<1>(x, n, table, came, codes) : trace<2>(x, n, table, came, codes);
}

}  // namespace
}  // namespace deltamerge
