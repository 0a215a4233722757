// The state of a job that runs: registers, lists of places, and where in the tensor it is.
#pragma once

#include <cstdlib>

#include "program.h"

namespace deltamerge {

// Memory of the job, uninitialized, on a cache line; null if there is none.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  bool allocate(i64 size) {
    void* memory = nullptr;
    if (size < 0 || size > (i64(1) << 62) / i64(sizeof(T))) return false;
    if (posix_memalign(&memory, 64, std::size_t(size > 0 ? size : 1) * sizeof(T)) != 0) return false;
    data_ = static_cast<T*>(memory);
    return true;
  }

  T* get() const { return data_; }
  T& operator[](i64 i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

// Where the run of block `number`, of `size` entries, begins in it (select.run_start).
inline i64 run_start(i64 number, i64 size, i64 run) {
  constexpr u64 kGolden = 0x9E3779B9;
  return i64(((u64(number) * kGolden) & 0xFFFFFFFF) * u64(size - run + 1) >> 32);
}

class Stream {
 public:
  Stream(const Program& program, const Results& results)
      : p_(program), r_(results), job_(*program.job), loops_(loops()) {}

  Outcome run();

 private:
  // stream.cpp: pieces
  bool allocate();
  i64 next_piece(i64 after);
  bool read_piece();
  bool read_file(i64 source);
  bool read_codes(i64 source);
  void decode_stored(i64 source);
  bool read_bytes(i64 source, i64 begin, i64 end, u8* to);
  void hash_piece(i64 source, i64 begin, i64 end, u8* raw);

  // operations.cpp: chunks
  void operate(i64 k);
  void load(const Operation& op);
  void drop(const Operation& op);
  void keep(const Operation& op, i64 k);
  void merge(const Operation& op);
  void store(const Operation& op);
  void dots(const Operation& op);
  void norms(const Operation& op);
  void draw(const Operation& op);
  void align(const Operation& op);
  void patch(const Operation& op);
  void list(const Operation& op, i64 k);
  void sample(const Operation& op);
  void scatter(const Operation& op);
  void rank(const Operation& op);
  void keep_rows(const Operation& op);
  void spread(const Operation& op);
  void spread_places(const Operation& op);
  void replace_columns(const Operation& op);
  void finish_sum(i64 row, bool largest);

  float* register_of(i64 number) const { return registers_.get() + number * job_.chunk; }
  u32* bits_of(i64 number) const { return reinterpret_cast<u32*>(register_of(number)); }
  i64* places_of(i64 number) const { return places_.get() + number * places_row_; }
  u8* row_of(i64 source) const { return raw_.get() + source * raw_row_ + kMargin; }
  const u8* raw_of(i64 source) const { return pieces_[source]; }
  // The chunk's first element of a source.
  const u8* stored_of(i64 source) const { return raw_of(source) + first_ * size_of(p_.sources[source].dtype); }
  Operand operand(i64 number) const;
  Models models(const Operation& op);
  i64 size_at(i64 list) const { return list < 0 ? n_ : sizes_[list]; }
  i64 block_in_job() const { return number_ - job_.start / job_.block; }
  i64 blocks() const { return (job_.stop - job_.start + job_.block - 1) / job_.block; }
  // Whether the chunk is made of rows of so many columns; the job fails if not.
  bool is_whole(i64 columns) {
    const bool whole = n_ % columns == 0;
    misfit_ = misfit_ || !whole;
    return whole;
  }
  bool opens_block() const { return inside_ == 0 && first_ == 0; }

  const Program& p_;
  const Results& r_;
  const Job& job_;
  const Loops& loops_;

  // where it is: a piece of `piece_` elements from `at_` on, `inside_` of block `number_`; a chunk of n_ from first_ on
  bool misfit_ = false;  // a chunk was not made of whole rows
  i64 at_ = 0, piece_ = 0, number_ = 0, inside_ = 0, first_ = 0, n_ = 0;

  i64 raw_row_ = 0, codes_row_ = 0, places_row_ = 0, part_row_ = 0, marks_ = 0;
  Array<u8> raw_;            // (sources, raw_row_)
  Array<const u8*> pieces_;  // of each source, the piece: its row of raw_, or where it lies in memory
  Array<u8> codes_;          // (coded sources, codes_row_)
  Array<float> registers_;   // (registers, chunk)
  Array<i64> places_;        // (lists, places_row_)
  Array<i64> sizes_;         // of each list of places
  Array<double> part_;       // (sums, part_row_) sums of runs of a block
  Array<i64> left_;          // of each operation, how many equals may still be kept (-1: all)
  Array<i64> header_;        // of each operation, where the list of a block begins
  Array<u64> accumulators_;  // (sources, 8)
  Array<u64> marks_of_;
  Array<i64> before_;
  Array<Operand> operands_;
  Array<const i64*> lists_;
  Array<const float*> values_;
  Array<float*> rows_;
  Array<i64> lengths_;
  Array<u64> scratch_;  // of a row's sort
};

}  // namespace deltamerge
