// A pass of a tensor as the loop is given it: operations on registers, sources, and where results go.
//
// The arrays are numpy's, made in fused/program.py; the structures agree with the dtypes there. What an operation does
// with its fields stands in engine/fused/codes.py, from which setup.py makes codes.h. The module checks all of it
// (check.h) before it runs.
#pragma once

#include <sys/types.h>

#include "codes.h"
#include "loops.h"

namespace deltamerge {

// Bytes before a piece, where the end of the piece before waits to be hashed.
constexpr i64 kMargin = 1 << 10;

struct Operation {
  i64 code, to, a, b, c, d;
  Key key;
  float divisor, scale;
  i64 models;  // how many
  i64 first;   // their place in weights, operands and lists
};

// Where elements come from: an open file and the byte in it of the tensor's first, or (fd -1) the number of the array
// that begins with the job's first, here its address. `coded`: the file holds codes, and these are their number in Program::coded; -1: elements of `dtype`.
struct Source {
  i64 fd, begin, dtype, memory, coded;
};

// Codes and the scales of a job (formats/quantised/codes.py): of matrices of `height` rows in blocks of m x n, with down x
// across blocks each; scales, zeros and table (-1: none) are numbers of arrays,
// here their addresses (0: none), scales from row `line` of the grid on. `biases` lie as the scales do and are added last,
// then all is multiplied by `factor`. `hashed`: its bytes are hashed, as rows fill them and pieces of the job begin with a
// byte. `stored` has the codes in memory, from the job's first row on, and no file. Of a TurnedForm `groups` is an array
// too, `line` is the number of the job's first row in `stored`, from which scales and zeros begin.
struct CodedSource {
  i64 form, width, columns, stride, scales, zeros, height, m, n, down, across, line, hashed, table, stored, groups,
      biases, factor;
};

// The arrays that a CodedSource names.
constexpr i64 CodedSource::*kArrays[] = {&CodedSource::scales, &CodedSource::zeros,  &CodedSource::table,
                                         &CodedSource::stored, &CodedSource::groups, &CodedSource::biases,
                                         &CodedSource::factor};

inline bool is_turned(const CodedSource& codes) { return codes.form >= kTurnedPairs; }

// The byte of a tensor's codes in which element `at` begins, and the one after those of element `last`.
inline i64 byte_of(const CodedSource& codes, i64 at) {
  return at / codes.columns * codes.stride + at % codes.columns * codes.width / 8;
}

inline i64 end_byte_of(const CodedSource& codes, i64 last) {
  return last / codes.columns * codes.stride + (last % codes.columns * codes.width + codes.width + 7) / 8;
}

// Numbers of `count` elements from `at` on, whose codes lie where `raw` has byte `first` of all (quantised.cpp).
void decode_rows(const CodedSource& codes, const u8* raw, i64 first, i64 at, i64 count, float* out);
// The same of a TurnedForm, in a job whose first row is `first`; `out` has room for 2 * kAligned more.
void decode_turned(const CodedSource& codes, i64 first, i64 at, i64 count, float* out);

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

enum class Outcome { kDone, kUnread, kNoMemory, kMisfit };

Outcome run(const Program& program, const Results& results);

// Reads of the loop go through this; tests of bad disks put another function in its place. No wheel has it.
#ifdef DELTAMERGE_TEST_HOOKS
using ReadAt = ssize_t (*)(int, void*, std::size_t, off_t);
extern ReadAt read_at;
#endif

}  // namespace deltamerge
