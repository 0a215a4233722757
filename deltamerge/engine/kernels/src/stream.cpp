// Runs a job piece by piece: reads every source, hashes what was read, and hands chunks to the operations.
#include "stream.h"

#include <unistd.h>
#include <cerrno>
#include <cstring>

namespace deltamerge {

#ifdef DELTAMERGE_TEST_HOOKS
ReadAt read_at = pread;
#else
static ssize_t read_at(int fd, void* to, std::size_t count, off_t at) { return pread(fd, to, count, at); }
#endif

namespace {

i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// The most bytes of codes that `elements` in a row may lie in, with those between rows.
i64 widest_codes(const Program& program, i64 elements) {
  i64 most = 0;
  for (i64 k = 0; k < program.coded_count; ++k) {
    const CodedSource& codes = program.coded[k];
    if (codes.stored != 0) continue;
    i64 between = codes.stride - codes.columns * codes.width / 8;
    most = larger(most, elements * codes.width / 8 + 2 + (elements / codes.columns + 2) * between);
  }
  return most;
}

}  // namespace

Outcome run(const Program& program, const Results& results) { return Stream(program, results).run(); }

bool Stream::allocate() {
  i64 widest = larger(1, p_.count), most = 1;
  for (i64 k = 0; k < p_.count; ++k) most = larger(most, p_.operations[k].models);
  i64 longest = larger(larger(kPiece, job_.chunk), job_.sampled);
  raw_row_ = (kMargin + 4 * (longest + 2 * kAligned) + 63) / 64 * 64;
  codes_row_ = (kMargin + widest_codes(p_, longest) + 63) / 64 * 64;
  places_row_ = longest + 8;
  part_row_ = 1;
  while (part_row_ * kRun < job_.block) part_row_ *= 2;
  marks_ = (longest + 63) / 64;
  bool there = raw_.allocate(p_.source_count * raw_row_) && pieces_.allocate(p_.source_count) &&
               codes_.allocate(p_.coded_count * codes_row_) &&
               registers_.allocate((job_.registers + 1) * job_.chunk) && places_.allocate(job_.lists * places_row_) && sizes_.allocate(job_.lists) &&
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
  for (i64 s = 0; s < p_.source_count; ++s) pieces_[s] = row_of(s);
  for (i64 k = 0; k < p_.count; ++k) left_[k] = -1;
  for (i64 after = job_.start; after < job_.stop;) {
    after = next_piece(after);
    if (!read_piece()) return Outcome::kUnread;
    for (first_ = 0; first_ < piece_; first_ += job_.chunk) {
      n_ = smaller(job_.chunk, piece_ - first_);
      for (i64 k = 0; k < p_.count; ++k) operate(k);
      if (misfit_) return Outcome::kMisfit;
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
    if (source.coded >= 0 && p_.coded[source.coded].stored != 0) {
      decode_stored(s);
    } else if (source.fd < 0) {
      const u8* from = reinterpret_cast<const u8*>(source.memory) + (at_ - job_.start) * size;
      pieces_[s] = from;
    } else if (!(source.coded < 0 ? read_file(s) : read_codes(s))) {
      return false;
    }
  }
  return true;
}

// Puts numbers of codes in memory where a float32 source has its elements.
void Stream::decode_stored(i64 s) {
  const CodedSource& codes = p_.coded[p_.sources[s].coded];
  const i64 first = job_.start / codes.columns;
  float* out = reinterpret_cast<float*>(row_of(s));
  pieces_[s] = row_of(s);
  if (is_turned(codes)) return decode_turned(codes, first, at_, piece_, out);
  decode_rows(codes, reinterpret_cast<const u8*>(codes.stored), first * codes.stride, at_, piece_, out);
}

bool Stream::read_file(i64 s) {
  const Source& source = p_.sources[s];
  i64 size = size_of(source.dtype);
  u8* raw = row_of(s);
  i64 begin = source.begin + at_ * size, end = begin + piece_ * size;
  if (!read_bytes(s, begin, end, raw)) return false;
  if (r_.room > 0) hash_piece(s, begin, end, raw);
  return true;
}

// Reads the piece's codes, and puts their numbers where a float32 source has its elements.
bool Stream::read_codes(i64 s) {
  const Source& source = p_.sources[s];
  const CodedSource& codes = p_.coded[source.coded];
  i64 first_byte = byte_of(codes, at_), end_byte = end_byte_of(codes, at_ + piece_ - 1);
  u8* raw = codes_.get() + source.coded * codes_row_ + kMargin;
  if (!read_bytes(s, source.begin + first_byte, source.begin + end_byte, raw)) return false;
  decode_rows(codes, raw, first_byte, at_, piece_, reinterpret_cast<float*>(row_of(s)));
  if (r_.room > 0 && codes.hashed != 0) {
    hash_piece(s, source.begin + first_byte, source.begin + end_byte, raw);
  }
  return true;
}

// Bytes [begin, end) of a source's file.
bool Stream::read_bytes(i64 s, i64 begin, i64 end, u8* to) {
  while (begin < end) {
    errno = 0;
    ssize_t count = read_at(int(p_.sources[s].fd), to, std::size_t(end - begin), off_t(begin));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    begin += count;
    to += count;
  }
  return true;
}

// Hash whole blocks of what lies between `hashed` and the end of the piece; what is left waits before the next piece.
void Stream::hash_piece(i64 s, i64 begin, i64 end, u8* raw) {
  if (r_.hashed[s] >= end) return;
  const u8* unhashed = raw + (r_.hashed[s] - begin);
  u64* digests = r_.digests + 2 * s * r_.room;
  r_.hashed[s] = loops_.hash(unhashed, r_.hashed[s], end, r_.first_pieces[s], accumulators_.get() + 8 * s, digests);
  i64 rest = end - r_.hashed[s];
  std::memcpy(raw - rest, raw + (end - begin) - rest, std::size_t(rest));
}

}  // namespace deltamerge
