// What a caller may ask of the loop: everything that leads to memory is checked against its arrays before it is touched.
#pragma once

#include "program.h"

namespace deltamerge {

// An array that a caller gave: its first byte, and how many there are. Null where there is none.
struct Held {
  const void* at = nullptr;
  i64 bytes = 0;

  template <class T>
  i64 count() const {
    return bytes / i64(sizeof(T));
  }
};

// How long the arrays of a program and its results are.
struct Lengths {
  i64 weights, operands, lists, tables, guides, bounds, ranks, limits, ratios, first_pieces;
  i64 out, counts, sums, listed, used, digests, hashed;
};

// Sizes from here on are not believed, so that no product of two of them leaves 64 bits.
constexpr i64 kLargest = i64(1) << 46;
constexpr i64 kMost = i64(1) << 16;         // registers, lists, sums, sources
constexpr i64 kLongest = i64(1) << 31;      // elements of a register

// What is wrong with a job, in words; null if nothing is. `held` are the arrays that sources and codes name by number.
const char* fault_of(const Program& program, const Results& results, const Lengths& lengths, const Held* held,
                     i64 held_count);

// The same of codes alone, for `count` elements from `start` on; `bytes` of them are there from the first row on.
const char* fault_of(const CodedSource& codes, i64 start, i64 count, i64 bytes, const Held* held, i64 held_count);

}  // namespace deltamerge
