// The loops that exist once per processor level, as a table of functions, and what they are given.
//
// Every loop is written once (vector/*.h) and compiled for each level (baseline.cpp, avx2.cpp, avx512.cpp). All levels
// give the same bits: each product, sum and quotient is rounded to its type by itself, in the order written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codes.h"

namespace deltamerge {

using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

// How stored elements are read; `dtype` of a source. Half is IEEE binary16.
enum Dtype : i64 { kBfloat16 = 0, kFloat32 = 1, kFloat16 = 2 };

inline i64 size_of(i64 dtype) { return dtype == kFloat32 ? 4 : 2; }

// Entries of a run of a long sum (tensors.RUN), and of a chunk that a loop takes at once.
constexpr i64 kRun = 1 << 11;
// Positions whose gaps are one stream of the generator (bits.SPARSE_BLOCK).
constexpr i64 kSparseBlock = 1 << 16;
// Levels that a trellis code may have (formats/delta/trellis.py).
constexpr int kStates = 256;

// Values that a loop reads: float32, or (narrow) the bits of bfloat16.
struct Operand {
  const void* at;
  bool narrow;
};

// A generator's key (Philox4x64-10).
struct Key {
  u64 word0, word1;
};

// A mask: an entry is kept where its 32-bit word is below high * 2**16 + low.
struct Bound {
  u16 high, low;
};

// Gap table with a sentinel, the least gap of a draw's leading bits, and how far to shift for these.
struct Gaps {
  const u64* table;
  i64 size;
  const u32* guide;
  u64 shift;
};

// Models that are added up: `count` operands with a weight each.
struct Models {
  const Operand* operands;
  const float* weights;
  i64 count;
};

// Of each rank in a row: the bound of the words of the kept, upper * 2**16 + lower, and the divisor of its entry (null:
// none).
struct Ranks {
  const u32* upper;
  const u32* lower;
  const float* ratios;
};

// Rows of codes: float8, int8, or unsigned integers of `width` bits from the lowest on in 32-bit words, less half their
// range. A row has `columns`, in `stride` bytes; n columns share a scale, of which a row of the grid has `across`; `zeros`
// and `biases` (null: none) lie as the scales do; what comes out is multiplied by `factor` (null: 1). Or codes of four bits, two a byte, the lower half first or the upper, that `table` (16)
// has the numbers of.
enum Form : i64 { kE4m3 = 0, kE5m2 = 1, kInt8 = 2, kPackedBits = 3, kLowerFirst = 4, kUpperFirst = 5 };
// Codes in memory, of a weight that is stored transposed: TurnedPairs, TurnedWords, and these across words.
enum TurnedForm : i64 { kTurnedPairs = 6, kTurnedAlong = 7, kTurnedAcross = 8 };

struct ScaledRows {
  i64 form, width, columns, stride;
  const float* scales;
  const float* zeros;
  i64 across, n;
  const float* table;
  const float* biases;
  const float* factor;
};

// The numbers that codes stand for (formats/quantised/codes.py): small floats up to the code `last`, or, where `exponent` is
// 0, the integers from `least` to `largest`.
struct CodeForm {
  i64 exponent, mantissa, bias, last;
  float least, largest;
};

// Columns [left, right) of rows [top, bottom) of a weight stored transposed, `columns` rows of `pitch` bytes: two codes of `table` (16) a byte, which
// are neighbours in a column of the weight; 32 of them have a scale, (groups, columns) from the group of `top` on.
struct TurnedPairs {
  const u8* codes;
  i64 pitch, columns, top, bottom, left, right;
  const float* scales;
  const float* table;
};

// The same of 32-bit words, `pitch` of them a stored row: codes of `width` bits that are neighbours in a row of the weight,
// or (`across_words`) eight of AWQ's order in a column. The band's rows have `across` zeros and scales each, a column those
// of its group; `left` is a multiple of kAligned, and `right` one or the last column.
constexpr i64 kAligned = 32;

struct TurnedWords {
  const u32* words;
  i64 pitch, columns, top, bottom, left, right;
  const float* scales;
  const float* zeros;
  const std::int32_t* groups;
  i64 across, width;
  bool across_words;
};

struct Inside {
  i64 count, above;
};

struct Loops {
  const char* name;

  void (*widen)(const void* x, i64 dtype, float* out, i64 n);
  void (*narrow)(const float* x, i64 dtype, void* out, i64 n);
  void (*subtract)(Operand tune, Operand base, float* out, i64 n);
  void (*divide)(const float* x, float divisor, float* out, i64 n);
  // (tune - base) / q where the word of position start + i is below the bound, else 0; a q of 1 does not divide.
  void (*drop)(Operand tune, Operand base, Key key, i64 start, Bound bound, float q, float* out, i64 n);

  // out = base + scale * (sum of weight * model) / divisor; a null base adds nothing.
  void (*add)(Operand base, Models models, float divisor, float scale, float* out, i64 n);
  // The same of the entries that agree on the sign of their sum, divided by the sum of their weights if `normalize`.
  void (*agree)(Operand base, Models models, bool normalize, float scale, float* out, i64 n);
  // base + sum of w x / sum of w over the models with the sign of the sum of x; the divisor is at least 1e-6.
  void (*elect)(Operand base, Models models, float* out, i64 n);
  // Variance over models of each entry, of float32, relative to the first.
  void (*variance)(Models models, float* out, i64 n);

  // values where the magnitude of the score is at least `least`, else 0.
  void (*keep_from)(const u32* values, const u32* scores, u32 least, u32* out, i64 n);
  // values above `threshold` and the first `left` equal to it; how many more may be kept.
  i64 (*keep_first_equals)(const u32* values, const u32* scores, u32 threshold, i64 left, u32* out, i64 n);
  // values where `others` are 0 bits, else 0.
  void (*clear_where)(const u32* values, const u32* others, u32* out, i64 n);
  void (*count_high)(const u32* bits, i64* counts, i64 n);
  void (*count_low)(const u32* bits, u32 high, i64* counts, i64 n);
  i64 (*count_equal)(const u32* bits, u32 threshold, i64 n);
  i64 (*count_nonzero)(const float* x, i64 n);
  // Magnitudes from low to high to `out` (room for kSlack more), unless they are one value.
  Inside (*list_between)(const u32* bits, u32 low, u32 high, u32* out, i64 n);
  void (*magnitudes)(const u32* bits, u32* out, i64 n);
  // Rows of `columns`: the entry of rank r by magnitude, equals from the left, where its word is below the
  // bound of r. `scratch` has room for 3 * columns + 32 words.
  void (*keep_by_rank)(const float* x, i64 start, i64 columns, Key key, Ranks ranks, u64* scratch, float* out, i64 n);

  // Rows of `columns`: the values whose scores are among the k largest magnitudes of their row, equals from the left.
  void (*keep_largest_of_rows)(const float* values, const float* scores, i64 columns, i64 k, u64* scratch, float* out,
                               i64 n);
  // x / divisors, and |x| * norms, entry by entry.
  void (*divide_each)(const float* x, const float* divisors, float* out, i64 n);
  void (*score)(const float* x, const float* norms, float* out, i64 n);

  // Sum of x y (or of |x|, y null) of at most kRun entries in float64 by halving; `padded`: to a whole run.
  double (*dot)(const float* x, const float* y, i64 n, bool padded);
  double (*sum_abs)(const float* x, i64 n);
  // Largest |x|, NaN if one is.
  double (*largest)(const float* x, i64 n);

  // Kept of positions [start, stop) by gaps, relative to start, into `out` (one longer than the range); how many.
  i64 (*draw)(Gaps gaps, Key key, i64 start, i64 stop, i64* out);
  void (*differ_at)(const void* tune, i64 tune_dtype, const void* base, i64 base_dtype, const i64* places, float* out,
                    i64 n);
  void (*widen_at)(const void* x, i64 dtype, const i64* places, float* out, i64 n);
  void (*narrow_at)(const float* values, i64 dtype, const i64* places, void* out, i64 n);
  // Ascending union of `count` lists into `positions`, the values of each, 0 where absent, into its row; how many.
  // `marks` has a zero bit, `before` a number for each 64 elements of the tile (`words` of them).
  i64 (*align)(const i64* const* lists, const float* const* values, const i64* sizes, i64 count, u64* marks,
               i64* before, i64 words, i64* positions, float* const* rows);

  // Hash bytes [begin, end) of a file, whole blocks of 1024; `at` has byte `begin`. Up to where it came. Digests of
  // whole pieces of 64 KiB, high half first, go to `digests`, whose first row is piece number `first`.
  i64 (*hash)(const u8* at, i64 begin, i64 end, i64 first, u64* accumulators, u64* digests);

  // out = ((code - zero) * scale + bias) * factor of `count` columns of a row from `first` on; `row` is where its codes begin (of which only
  // those of these columns are read), `line` its row of the grid.
  void (*scale_row)(const ScaledRows& rows, const u8* row, i64 line, i64 first, i64 count, float* out);
  void (*turn_pairs)(const TurnedPairs& band, float* out);
  void (*turn_words)(const TurnedWords& band, float* out);
  // Codes of values that share a scale and a zero; the sum of squares of what is lost.
  double (*code_values)(const CodeForm& form, const float* x, float scale, float zero, u8* codes, i64 count);
  // Codes of `bits` each whose levels, of `table` (kStates), are nearest to n numbers; `came` has room for n << 7 bytes.
  void (*trellis)(const float* x, i64 n, i64 bits, const float* table, u8* came, u8* codes);
  // out_ij = sum of left_ik right_kj in the order of k; left (rows, rank), right (rank, columns).
  void (*ordered_product)(const float* left, const float* right, float* out, i64 rows, i64 rank, i64 columns);
};

extern const Loops kBaseline;
#if defined(__x86_64__)
extern const Loops kAvx2;
extern const Loops kAvx512;
#endif

// The levels of this processor, the best first, ended by null.
const Loops* const* levels();
const Loops& loops();
// Whether there is a level of this name, which is then used.
bool choose(const char* name);

}  // namespace deltamerge
