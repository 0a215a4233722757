// A pass of a tensor as the loop is given it: operations on registers, sources, and where results go.
//
// The arrays are numpy's, made in fused/program.py; the structures agree with the dtypes there.
#pragma once

#include <sys/types.h>

#include "loops.h"

namespace deltamerge {

// What an operation does (fused/codes.py); fields a, b, c, d are registers unless told otherwise.
enum Code : i64 {
  kLoad = 0,       // to = source a
  kSubtract = 1,   // to = a - b, each direct or not
  kDrop = 2,       // to = (a - b) / divisor where the word of the entry is below c * 2**16 + d, else 0
  kDivide = 3,     // to = a / divisor; of a list, as many as there are places b (-1: a whole chunk)
  kKeep = 4,       // to = value where score a is above the threshold b, and the first c of its equals; d: their ranks
  kAdd = 5,        // to = base a + scaled weighted sum of the models (a = -1: no base), each direct or not; b: places
  kAgree = 6,      // the same of the entries that agree on a sign, of registers; c: normalize
  kStore = 7,      // the output = a
  kHigh = 8,       // counts from d on: of a's high bits,
  kLow = 9,        // of low bits inside bin b,
  kEqual = 10,     // of equals of b per block
  kDots = 11,      // row c of sums: per block the dot product of a and b
  kDraw = 12,      // places to = kept by gaps, with table a
  kDifferAt = 13,  // to = source a - source b at places c
  kAlign = 14,     // places to = union of the lists of the models; a: register of the first of their rows
  kBaseAt = 15,    // to = source a at places b
  kPatch = 16,     // the output = source a, but register b at places c
  kList = 17,      // row c of listed: per block what a has from b to d, after how many are above and inside
  kSample = 18,    // row c of listed: the magnitudes of a
  kScatter = 19,   // to = a at places b, else 0
  kRank = 20,  // to = a kept by rank in rows of b (0: of a block); lists: (length, limits, ratios) of rows; c: ratios
  kVariance = 21,  // to = variance of the models
  kElect = 22,     // to = base a + mean of the models that have the elected sign
  kClear = 23,     // to = a where b is 0 bits, else 0
  kNonzero = 24,   // counts at d: of a's entries that are not 0
  kNorm = 25,      // row c of sums: per block the largest (b = 0), the sum of |a| (1)
  // to = a where register b is among the c largest of its row of d
  kRows = 26,
  // to = a by a table at c of ratios, rows of b; d: a / of its row (0), a / of its column (1), |a| * of its column (2);
  // lists: the places of a, if it has some
  kSpread = 27,
  // to = a, but in the columns of lists register b (-1: 0); rows of c
  kColumns = 28,
};

// Operands from this number on are bfloat16 or float32 as read from a source: operand - kDirect is which.
constexpr i64 kDirect = i64(1) << 32;
// Elements read at once, and bytes before those of a piece, where the end of the piece before waits to be hashed.
constexpr i64 kPiece = 1 << 16;
constexpr i64 kMargin = 1 << 10;

struct Operation {
  i64 code, to, a, b, c, d;
  Key key;
  float divisor, scale;
  i64 models;  // how many
  i64 first;   // their place in weights, operands and lists
};

// Where elements come from: an open file and the byte in it of the tensor's first, or (fd -1) the address of the job's
// first element. `coded`: the file holds codes, and these are their number in Program::coded; -1: elements of `dtype`.
struct Source {
  i64 fd, begin, dtype, memory, coded;
};

// Codes and the scales of a job (io/quantised/scaled.py): of matrices of `height` rows in blocks of m x n, with down x
// across blocks each; scales, zeros and table (0: none) are addresses, scales from row `line` of the grid on. `hashed`: its bytes are
// hashed, as rows fill them and pieces of the job begin with a byte. Of a TurnedForm `stored` and `groups` are addresses too,
// `line` is the number of the job's first row in `stored`, from which scales and zeros begin.
struct CodedSource {
  i64 form, width, columns, stride, scales, zeros, height, m, n, down, across, line, hashed, table, stored, groups;
};

// Gap table: [begin, end) in tables and in guides, and the shift of a draw.
struct TableBounds {
  i64 table, table_end, guide, guide_end, shift;
};

struct Job {
  i64 start, stop;      // elements of the tensor; start lies on a block
  i64 block, elements;  // elements of a block, and of the tensor
  i64 aligned;          // whether pieces end where the generator's blocks do, not the tensor's
  i64 sampled;          // only a run of so many entries of each block is looked at (0: all), as select.run_start says
  i64 dtype;            // of the output
  i64 chunk;            // elements of a register
  i64 registers, lists, sums;
};

struct Program {
  const Job* job;
  const Operation* operations;
  i64 count;
  const float* weights;
  const i64* operands;
  const i64* lists;
  const u64* tables;
  const u32* guides;
  const TableBounds* bounds;
  const i64* ranks;     // equals before each block
  const u32* limits;    // of ranks in rows: the upper halves of a length's, then the lower
  const float* ratios;  // of ranks in rows
  const Source* sources;
  i64 source_count;
  const CodedSource* coded;
  i64 coded_count;
};

struct Results {
  u8* out;  // null: nothing is stored
  i64* counts;
  double* sums;  // (sums, blocks of the job)
  u32* listed;   // (lists of magnitudes, listed_row)
  i64 listed_row;
  i64* used;     // of each row of listed
  u64* digests;  // (sources * room, 2) of the pieces of files that lie within what is read
  i64 room;
  i64* hashed;              // byte of each file up to which is hashed
  const i64* first_pieces;  // number of the first piece of each source
};

enum class Outcome { kDone, kUnread, kNoMemory };

Outcome run(const Program& program, const Results& results);

// Reads of the loop go through this; tests of bad disks put another function in its place.
using ReadAt = ssize_t (*)(int, void*, std::size_t, off_t);
extern ReadAt read_at;

}  // namespace deltamerge
