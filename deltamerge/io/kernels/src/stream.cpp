// Runs a job piece by piece: reads every source, hashes what was read, and hands chunks to the operations.
#include "stream.h"

#include <unistd.h>
#include <cerrno>
#include <cstring>

namespace deltamerge {

ReadAt read_at = pread;

namespace {

i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
i64 larger(i64 a, i64 b) { return a > b ? a : b; }

}  // namespace

Outcome run(const Program& program, const Results& results) { return Stream(program, results).run(); }

bool Stream::allocate() {
  i64 widest = larger(1, p_.count), most = 1;
  for (i64 k = 0; k < p_.count; ++k) most = larger(most, p_.operations[k].models);
  i64 longest = larger(larger(kPiece, job_.chunk), job_.sampled);
  raw_row_ = (kMargin + 4 * longest + 63) / 64 * 64;
  places_row_ = longest + 8;
  part_row_ = 1;
  while (part_row_ * kRun < job_.block) part_row_ *= 2;
  marks_ = (longest + 63) / 64;
  bool there = raw_.allocate(p_.source_count * raw_row_) && registers_.allocate((job_.registers + 1) * job_.chunk) &&
               places_.allocate(job_.lists * places_row_) && sizes_.allocate(job_.lists) &&
               part_.allocate(job_.sums * part_row_) && left_.allocate(widest) && header_.allocate(widest) &&
               accumulators_.allocate(8 * p_.source_count) && operands_.allocate(most) && lists_.allocate(most) &&
               values_.allocate(most) && rows_.allocate(most) && lengths_.allocate(most);
  if (there && job_.lists > 0) there = marks_of_.allocate(marks_) && before_.allocate(marks_);
  bool ranked = false;
  for (i64 k = 0; k < p_.count; ++k) ranked |= p_.operations[k].code == kRank || p_.operations[k].code == kRows;
  if (there && ranked) there = scratch_.allocate(3 * job_.chunk + 64);
  return there;
}

Outcome Stream::run() {
  if (!allocate()) return Outcome::kNoMemory;
  for (i64 k = 0; k < p_.count; ++k) left_[k] = -1;
  for (i64 after = job_.start; after < job_.stop;) {
    after = next_piece(after);
    if (!read_piece()) return Outcome::kUnread;
    for (first_ = 0; first_ < piece_; first_ += job_.chunk) {
      n_ = smaller(job_.chunk, piece_ - first_);
      for (i64 k = 0; k < p_.count; ++k) operate(k);
    }
  }
  return Outcome::kDone;
}

// The piece that begins at element `at`, or the run of its block that is looked at; where the next begins.
i64 Stream::next_piece(i64 at) {
  i64 rest = job_.stop - at, after;
  at_ = at;
  if (job_.sampled > 0) {
    i64 here = smaller(rest, job_.block);
    piece_ = smaller(job_.sampled, here);
    after = at + here;
    at_ += run_start(at / job_.block, here, piece_);
  } else if (job_.aligned != 0) {
    piece_ = smaller(rest, kSparseBlock - at % kSparseBlock);
    after = at + piece_;
  } else {
    piece_ = smaller(smaller(rest, job_.block - at % job_.block), larger(kPiece, job_.chunk));
    after = at + piece_;
  }
  number_ = at_ / job_.block;
  inside_ = at_ % job_.block;
  return after;
}

bool Stream::read_piece() {
  for (i64 s = 0; s < p_.source_count; ++s) {
    const Source& source = p_.sources[s];
    i64 size = size_of(source.dtype);
    if (source.fd < 0) {
      const u8* from = reinterpret_cast<const u8*>(source.memory) + (at_ - job_.start) * size;
      std::memcpy(const_cast<u8*>(raw_of(s)), from, std::size_t(piece_ * size));
    } else {
      if (!read_file(s)) return false;
      if (r_.room > 0) hash_piece(s);
    }
  }
  return true;
}

bool Stream::read_file(i64 s) {
  const Source& source = p_.sources[s];
  i64 size = size_of(source.dtype), done = 0, wanted = piece_ * size, offset = source.begin + at_ * size;
  u8* to = const_cast<u8*>(raw_of(s));
  while (done < wanted) {
    errno = 0;
    ssize_t count = read_at(int(source.fd), to + done, std::size_t(wanted - done), off_t(offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    done += count;
  }
  return true;
}

// Hash whole blocks of what lies between `hashed` and the end of the piece; what is left waits before the next piece.
void Stream::hash_piece(i64 s) {
  const Source& source = p_.sources[s];
  i64 size = size_of(source.dtype), begin = source.begin + at_ * size, end = begin + piece_ * size;
  if (r_.hashed[s] >= end) return;
  u8* raw = const_cast<u8*>(raw_of(s));
  const u8* unhashed = raw + (r_.hashed[s] - begin);
  u64* digests = r_.digests + 2 * s * r_.room;
  r_.hashed[s] = loops_.hash(unhashed, r_.hashed[s], end, r_.first_pieces[s], accumulators_.get() + 8 * s, digests);
  i64 rest = end - r_.hashed[s];
  std::memcpy(raw - rest, raw + piece_ * size - rest, std::size_t(rest));
}

}  // namespace deltamerge
