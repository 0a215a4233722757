// Checks a job before it runs (check.h). Each rule stands beside what it guards: a register, a source, a range.
#include "check.h"

#include <climits>

#include "stream.h"

namespace deltamerge {

namespace {

constexpr i64 kHighBins = 1 << 15, kLowBins = 1 << 16;
constexpr i64 kTable = 16;  // numbers that codes of four bits stand for

bool within(i64 value, i64 least, i64 end) { return value >= least && value < end; }

// Whether [at, at + count) lies within `size`.
bool spans(i64 at, i64 count, i64 size) { return at >= 0 && count >= 0 && at <= size && count <= size - at; }

template <class T>
bool aligned(const void* at) {
  return reinterpret_cast<std::uintptr_t>(at) % alignof(T) == 0;
}

// Whether bands of weights stored transposed lie within so much memory.
bool fits(const TurnedPairs& band, i64 code_bytes, i64 scales, i64 table) {
  if (!within(band.columns, 1, kLongest) || !within(band.top, 0, kLargest) || !within(band.bottom, band.top, kLargest))
    return false;
  const i64 end = (band.bottom + 31) / 32;
  return band.pitch > 0 && band.pitch >= 16 * end && code_bytes / band.pitch >= band.columns &&
         scales / band.columns >= end - band.top / 32 && table >= kTable;
}

bool fits(const TurnedWords& band, i64 words, i64 scales, i64 zeros, i64 groups) {
  const i64 width = band.width, rows = band.bottom - band.top;
  if (width != 2 && width != 3 && width != 4 && width != 8) return false;
  if (!within(band.columns, 1, kLongest) || !within(band.top, 0, kLargest) || !within(band.bottom, band.top, kLargest))
    return false;
  if (band.across < 1 || band.pitch < (band.across_words ? (band.bottom + 7) / 8 : band.bottom) || band.pitch < 1)
    return false;
  if (band.across_words ? width != 4 : band.columns * width % (width == 3 ? 96 : 32) != 0) return false;
  const i64 stored = band.across_words ? band.columns : band.columns * width / 32;
  if (words / band.pitch < stored || scales / band.across < rows || zeros / band.across < rows || groups < band.columns)
    return false;
  for (i64 i = 0; i < band.columns; ++i) {
    if (!within(band.groups[i], 0, band.across)) return false;
  }
  return true;
}

class Checker {
 public:
  Checker(const Program& program, const Results& results, const Lengths& lengths, const Held* held, i64 held_count)
      : p_(program), r_(results), n_(lengths), held_(held), held_count_(held_count), job_(*program.job) {}

  const char* fault() {
    const char* found = of_job();
    if (found != nullptr || size() == 0) return found;  // of no element nothing is touched
    for (i64 s = 0; found == nullptr && s < p_.source_count; ++s) found = of_source(s);
    if (found == nullptr && !(known_.allocate(job_.registers) && lists_.allocate(job_.lists) && rows_.allocate(n_.used)))
      return "no memory";
    if (found == nullptr) {
      for (i64 i = 0; i < job_.registers; ++i) known_[i] = 0;
      for (i64 i = 0; i < job_.lists; ++i) lists_[i] = 0;
      for (i64 i = 0; i < n_.used; ++i) rows_[i] = 0;
    }
    for (i64 t = 0; found == nullptr && t < n_.bounds; ++t) found = of_table(p_.bounds[t]);
    for (i64 k = 0; found == nullptr && k < p_.count; ++k) found = of_operation(p_.operations[k]);
    return found;
  }

  const char* of_codes(const CodedSource& c) {
    const bool four = c.form == kLowerFirst || c.form == kUpperFirst;
    if (!within(c.form, 0, kUpperFirst + 1)) return "codes have no such form";
    if (c.form == kPackedBits ? !within(c.width, 1, 9) : c.width != (four ? 4 : 8)) return "codes have no such width";
    if (!within(c.columns, 1, kLongest) || !within(c.stride, (c.columns * c.width + 7) / 8, kLongest * 2))
      return "a row of codes has no such length";
    if (job_.elements / c.columns > kLargest / c.stride) return "codes have too many rows";
    if (!within(c.height, 1, kLargest) || !within(c.m, 1, kLargest) || !within(c.n, 1, kLargest) ||
        !within(c.down, 1, kLargest) || !within(c.across, 1, kLargest) || c.line < 0)
      return "scales have no such grid";
    if ((c.height - 1) / c.m >= c.down || (c.columns - 1) / c.n >= c.across) return "a block of codes has no scale";
    if (job_.elements / c.columns / c.height > kLargest / c.down) return "scales have too many rows";
    if (size() > 0) {
      const i64 first = line_of(c, job_.start / c.columns), last = line_of(c, (job_.stop - 1) / c.columns);
      if (first < 0 || last >= count_of<float>(c.scales) / c.across) return "scales are too short or not aligned";
    }
    if (c.zeros >= 0 && count_of<float>(c.zeros) < count_of<float>(c.scales)) return "zeros are too short";
    if (c.biases >= 0 && count_of<float>(c.biases) < count_of<float>(c.scales)) return "biases are too short";
    if (c.factor >= 0 && !lies<float>(c.factor, 1)) return "there is no such factor";
    if (four && !lies<float>(c.table, kTable)) return "codes have no table of 16 numbers";
    const i64 piece = kPiece > job_.chunk ? kPiece : job_.chunk;
    if (c.hashed != 0 && (c.stride * 8 != c.columns * c.width || job_.block * c.width % 8 != 0 || piece * c.width % 8 != 0))
      return "codes do not follow each other, so that they cannot be hashed";
    return nullptr;
  }

  static i64 line_of(const CodedSource& c, i64 row) { return row / c.height * c.down + row % c.height / c.m - c.line; }

  // Of codes in memory, from the job's first row on.
  const char* of_memory(const CodedSource& c) {
    if (is_turned(c)) return of_turned(c);
    if (const char* found = of_codes(c)) return found;
    const i64 first = job_.start / c.columns * c.stride;
    if (c.hashed != 0) return "codes in memory are not hashed";
    return size() == 0 || holds(c.stored, end_byte_of(c, job_.stop - 1) - first) ? nullptr : "codes are too short";
  }

  const char* of_turned(const CodedSource& c) {
    if (!within(c.columns, 1, kLongest) || !within(c.stride, 1, kLongest) || !within(c.line, 0, kLargest))
      return "a row of codes has no such length";
    const i64 rows = size() > 0 ? (job_.stop - 1) / c.columns + 1 - job_.start / c.columns : 0;
    if (c.form == kTurnedPairs) {
      const TurnedPairs band = {nullptr, c.stride, c.columns, c.line, c.line + rows, 0, c.columns, nullptr, nullptr};
      const bool there =
          fits(band, count_of<u8>(c.stored), count_of<float>(c.scales), count_of<float>(c.table));
      return there ? nullptr : "codes that are stored transposed, or their scales, are too short";
    }
    if (c.form != kTurnedAlong && c.form != kTurnedAcross) return "codes have no such form";
    const i64 groups = count_of<std::int32_t>(c.groups);
    const auto* of = groups > 0 ? static_cast<const std::int32_t*>(held_[c.groups].at) : nullptr;
    const TurnedWords band = {nullptr, c.stride, c.columns, c.line,  c.line + rows, 0,      c.columns,
                              nullptr, nullptr,  of,        c.across, c.width,       c.form == kTurnedAcross};
    const bool there = fits(band, count_of<u32>(c.stored), count_of<float>(c.scales), count_of<float>(c.zeros), groups);
    return there ? nullptr : "codes that are stored transposed, or their scales, are too short";
  }

 private:
  i64 size() const { return job_.stop - job_.start; }
  i64 blocks() const { return (size() + job_.block - 1) / job_.block; }
  i64 last_block() const { return job_.stop > 0 ? (job_.stop - 1) / job_.block : 0; }

  const char* of_job() {
    if (!within(job_.elements, 0, kLargest) || job_.start < 0 || job_.stop < job_.start || job_.stop > job_.elements)
      return "its range lies outside of the tensor";
    if (!within(job_.block, 1, kLargest) || job_.start % job_.block != 0) return "its range begins inside a block";
    if (!within(job_.chunk, 1, kLongest) || !within(job_.sampled, 0, kLongest)) return "a register has no such length";
    if (!within(job_.registers, 0, kMost) || !within(job_.lists, 0, kMost) || !within(job_.sums, 0, kMost) ||
        p_.source_count > kMost || p_.coded_count > kMost)
      return "it has too many registers, lists, sums or sources";
    if (job_.aligned != 0 && job_.chunk < kSparseBlock) return "a register is shorter than a block of the generator";
    if (!within(job_.dtype, 0, 3)) return "the output has no such dtype";
    if (blocks() > 0 && n_.sums / blocks() < job_.sums) return "sums are longer than their array";
    if (n_.first_pieces < p_.source_count || n_.hashed < p_.source_count)
      return "a source has no place for its hashes";
    if (r_.room > 0 && job_.sampled > 0) return "what is sampled cannot be hashed";
    return nullptr;
  }

  bool holds(i64 number, i64 bytes) const { return within(number, 0, held_count_) && held_[number].bytes >= bytes; }

  template <class T>
  bool lies(i64 number, i64 count) const {
    return count < kLargest && holds(number, count * i64(sizeof(T))) && aligned<T>(held_[number].at);
  }

  template <class T>
  i64 count_of(i64 number) const {
    return within(number, 0, held_count_) && aligned<T>(held_[number].at) ? held_[number].count<T>() : -1;
  }

  const char* of_source(i64 s) {
    const Source& source = p_.sources[s];
    if (!within(source.dtype, 0, 3)) return "a source has no such dtype";
    if (!within(source.coded, -1, p_.coded_count)) return "a source has no such codes";
    if (!within(source.fd, -1, INT_MAX) || !within(source.begin, 0, i64(1) << 62)) return "a source has no such file";
    i64 bytes = size_of(source.dtype);
    if (source.coded >= 0 && source.dtype != kFloat32) return "codes are no numbers of float32";
    if (source.coded >= 0 && p_.coded[source.coded].stored >= 0) return of_memory(p_.coded[source.coded]);
    if (source.fd < 0) {
      const bool there = bytes == 4 ? lies<u32>(source.memory, size()) : lies<u16>(source.memory, size());
      return there ? nullptr : "a source in memory is too short, not there or not aligned";
    }
    i64 begin = source.begin + job_.start * bytes, end = source.begin + job_.stop * bytes;
    if (source.coded >= 0) {
      const CodedSource& codes = p_.coded[source.coded];
      if (const char* found = of_codes(codes)) return found;
      begin = source.begin + byte_of(codes, job_.start);
      end = source.begin + end_byte_of(codes, job_.stop > job_.start ? job_.stop - 1 : job_.start);
    }
    return of_hashes(s, begin, end);
  }

  // Pieces of a file are hashed from the first that begins in the range, and their digests have places.
  const char* of_hashes(i64 s, i64 begin, i64 end) {
    if (r_.room == 0) return nullptr;
    const i64 at = r_.hashed[s], first = r_.first_pieces[s];
    const i64 codes = p_.sources[s].coded;
    if (codes >= 0 && p_.coded[codes].hashed == 0) return nullptr;
    if (first < 0 || at != first * kHashed || at < begin || at >= begin + kHashed)
      return "hashes do not begin with a piece of the file";
    return end / kHashed - first <= r_.room ? nullptr : "digests are longer than their array";
  }

  // Every draw of 63 bits finds a gap: the sentinel is above all, and a gap moves on.
  const char* of_table(const TableBounds& t) {
    const i64 size = t.table_end - t.table;
    if (!spans(t.table, size, n_.tables) || !spans(t.guide, t.guide_end - t.guide, n_.guides) || size < 2)
      return "a gap table lies outside of its array";
    if (!within(t.shift, 0, 63) || t.guide_end - t.guide <= i64(~u64(0) >> 1 >> t.shift)) return "a guide is too short";
    if (p_.tables[t.table_end - 1] != ~u64(0)) return "a gap table has no end";
    u32 most = 0;
    for (i64 i = t.guide; i < t.guide_end; ++i) most = p_.guides[i] > most ? p_.guides[i] : most;
    return i64(most) < size ? nullptr : "a guide leads out of its gap table";
  }

  bool source(i64 number) const { return within(number, 0, p_.source_count); }
  bool filled(i64 number) const { return within(number, 0, job_.registers) && known_[number] != 0; }
  bool listed(i64 number) const { return within(number, 0, job_.lists) && lists_[number] != 0; }

  // A register that was filled, or a source that is read in its place.
  bool operand(i64 number) const {
    if (number < kDirect) return filled(number);
    return source(number - kDirect) && p_.sources[number - kDirect].dtype != kFloat16;
  }

  bool into(i64 number) {
    if (!within(number, 0, job_.registers)) return false;
    known_[number] = 1;
    return true;
  }

  bool into_list(i64 number) {
    if (!within(number, 0, job_.lists)) return false;
    lists_[number] = 1;
    return true;
  }

  // A row of what is listed, which no other operation writes, and which has room for all of the range.
  bool into_row(i64 number) {
    if (!within(number, 0, n_.used) || rows_[number] != 0 || r_.used[number] != 0) return false;
    rows_[number] = 1;
    return r_.listed_row >= size() + 2 * blocks() + kSlack;
  }

  bool writes() const { return size() == 0 || (r_.out != nullptr && n_.out / size_of(job_.dtype) >= size()); }

  bool models(const Operation& op, bool direct) const {
    if (op.models < 1 || !spans(op.first, op.models, n_.operands) || !spans(op.first, op.models, n_.weights)) return false;
    for (i64 j = 0; j < op.models; ++j) {
      const i64 number = p_.operands[op.first + j];
      if (!(direct ? operand(number) : filled(number))) return false;
    }
    return true;
  }

  // Sums over blocks need pieces that lie in one block.
  bool by_blocks() const { return job_.aligned == 0 || job_.block % kSparseBlock == 0; }

  const char* of_operation(const Operation& op) {
    constexpr const char *kRegister = "an operation names a register that is not there or not filled",
                         *kSource = "an operation names a source that is not there",
                         *kPlaces = "an operation names a list that is not there or not filled",
                         *kOut = "the output is too short, or not there",
                         *kCounts = "counts lie outside of their array",
                         *kModels = "the models of an operation are not there",
                         *kNumbers = "an operation has numbers that it cannot have";
    const i64 listed_models = n_.operands > n_.lists ? n_.operands : n_.lists;
    if (!within(op.models, 0, listed_models + 1)) return kModels;  // also where an operation has no use for them
    switch (op.code) {
      case kLoad:
        return !source(op.a) ? kSource : into(op.to) ? nullptr : kRegister;
      case kSubtract:
        return operand(op.a) && operand(op.b) && into(op.to) ? nullptr : kRegister;
      case kDrop:
        if (!within(op.c, 0, 1 << 16) || !within(op.d, 0, 1 << 16)) return kNumbers;
        return operand(op.a) && operand(op.b) && into(op.to) ? nullptr : kRegister;
      case kDivide:
        if (op.b != -1 && !listed(op.b)) return kPlaces;
        return filled(op.a) && into(op.to) ? nullptr : kRegister;
      case kKeep: {
        const i64 values = op.models > 0 && spans(op.first, 1, n_.operands) ? p_.operands[op.first] : op.a;
        if (op.models < 0 || (op.models > 0 && !spans(op.first, 1, n_.operands))) return kModels;
        if (!within(op.b, 0, i64(1) << 32) || op.c < -1) return kNumbers;
        if (op.d < -1 || (op.d >= 0 && (!by_blocks() || job_.sampled > 0 || !spans(op.d, last_block() + 2, n_.ranks))))
          return "the ranks of equals lie outside of their array";
        return filled(op.a) && filled(values) && into(op.to) ? nullptr : kRegister;
      }
      case kAdd:
      case kAgree:
        if (op.b != -1 && !listed(op.b)) return kPlaces;
        if (!models(op, op.code == kAdd)) return kModels;
        return (op.a == -1 || operand(op.a)) && into(op.to) ? nullptr : kRegister;
      case kElect:
        if (!models(op, false)) return kModels;
        return (op.a == -1 || operand(op.a)) && into(op.to) ? nullptr : kRegister;
      case kVariance:
        if (!models(op, false)) return kModels;
        return into(op.to) ? nullptr : kRegister;
      case kStore:
        if (!writes()) return kOut;
        return filled(op.a) ? nullptr : kRegister;
      case kHigh:
        if (!spans(op.d, kHighBins, n_.counts)) return kCounts;
        return filled(op.a) ? nullptr : kRegister;
      case kLow:
        if (!spans(op.d, kLowBins, n_.counts)) return kCounts;
        return filled(op.a) ? nullptr : kRegister;
      case kEqual:
        if (!spans(op.d, blocks(), n_.counts)) return kCounts;
        return filled(op.a) ? nullptr : kRegister;
      case kNonzero:
        if (!spans(op.d, 1, n_.counts)) return kCounts;
        return filled(op.a) ? nullptr : kRegister;
      case kDots:
      case kNorm:
        if (!within(op.c, 0, job_.sums) || !by_blocks()) return "sums lie outside of their array";
        return filled(op.a) && (op.code == kNorm || filled(op.b)) ? nullptr : kRegister;
      case kDraw:
        if (!within(op.a, 0, n_.bounds)) return "an operation names a gap table that is not there";
        return into_list(op.to) ? nullptr : kPlaces;
      case kDifferAt:
        if (!source(op.a) || !source(op.b)) return kSource;
        if (!listed(op.c)) return kPlaces;
        return into(op.to) ? nullptr : kRegister;
      case kAlign: {
        if (!models(op, false) || !spans(op.first, op.models, n_.lists)) return kModels;
        for (i64 j = 0; j < op.models; ++j) {
          if (!listed(p_.lists[op.first + j])) return kPlaces;
          if (!within(op.a, 0, kMost) || !into(op.a + j)) return kRegister;
        }
        return into_list(op.to) ? nullptr : kPlaces;
      }
      case kBaseAt:
        if (!source(op.a)) return kSource;
        if (!listed(op.b)) return kPlaces;
        return into(op.to) ? nullptr : kRegister;
      case kPatch:
        if (!writes()) return kOut;
        if (!source(op.a)) return kSource;
        if (!listed(op.c)) return kPlaces;
        return filled(op.b) && into(op.to) ? nullptr : kRegister;
      case kList:
        if (!within(op.b, 0, i64(1) << 32) || !within(op.d, 0, i64(1) << 32) || job_.sampled > 0) return kNumbers;
        if (!into_row(op.c)) return "what is listed lies outside of its array";
        return filled(op.a) ? nullptr : kRegister;
      case kSample:
        if (!within(op.b, 0, kLargest)) return kNumbers;
        if (!into_row(op.c)) return "what is listed lies outside of its array";
        return filled(op.a) ? nullptr : kRegister;
      case kScatter:
        if (op.b != -1 && !listed(op.b)) return kPlaces;
        return (op.b == -1 || filled(op.a)) && into(op.to) ? nullptr : kRegister;
      case kRank:
        return !of_ranks(op) ? "the limits of ranks lie outside of their array"
               : filled(op.a) && into(op.to) ? nullptr : kRegister;
      case kRows:
        if (!within(op.d, 1, kLongest) || !within(op.c, 0, kLongest)) return kNumbers;
        return filled(op.a) && filled(op.b) && into(op.to) ? nullptr : kRegister;
      case kSpread: {
        if (!within(op.b, 1, kLargest) || !within(op.d, 0, 3)) return kNumbers;
        const i64 count = job_.stop <= 0 ? 0 : op.d != 0 ? op.b : (job_.stop - 1) / op.b + 1;
        if (!spans(op.c, count, n_.ratios)) return "a table lies outside of its array";
        if (op.models != 0 && (!spans(op.first, 1, n_.lists) || !listed(p_.lists[op.first]))) return kPlaces;
        return filled(op.a) && into(op.to) ? nullptr : kRegister;
      }
      case kColumns: {
        if (!within(op.c, 1, kLargest) || !spans(op.first, op.models, n_.lists)) return kNumbers;
        for (i64 j = 0; j < op.models; ++j) {
          if (!within(p_.lists[op.first + j], 0, op.c)) return kNumbers;
        }
        return filled(op.a) && (op.b == -1 || filled(op.b)) && into(op.to) ? nullptr : kRegister;
      }
      case kClear:
        return filled(op.a) && filled(op.b) && into(op.to) ? nullptr : kRegister;
    }
    return "an operation has a code that is none";
  }

  bool of_ranks(const Operation& op) const {
    if (!within(op.b, 0, kLongest) || !within(op.models, 0, kMost) || !spans(op.first, 3 * op.models, n_.lists)) return false;
    for (i64 j = 0; j < op.models; ++j) {
      const i64* row = p_.lists + op.first + 3 * j;
      if (!within(row[0], 1, kLongest) || !spans(row[1], 2 * row[0], n_.limits)) return false;
      if (op.c != 0 && !spans(row[2], row[0], n_.ratios)) return false;
    }
    return true;
  }

  static constexpr i64 kHashed = 1 << 16;

  const Program& p_;
  const Results& r_;
  const Lengths& n_;
  const Held* held_;
  const i64 held_count_;
  const Job& job_;
  Array<u8> known_, lists_, rows_;  // whether a register, a list is filled, a row of what is listed is used
};

}  // namespace

const char* fault_of(const Program& program, const Results& results, const Lengths& lengths, const Held* held,
                     i64 held_count) {
  return Checker(program, results, lengths, held, held_count).fault();
}

const char* fault_of(const CodedSource& codes, i64 start, i64 count, i64 bytes, const Held* held, i64 held_count) {
  Job job = {};
  job.start = start;
  job.stop = job.elements = start + count;
  job.block = job.chunk = 1;
  Program program = {};
  program.job = &job;
  Checker checker(program, {}, {}, held, held_count);
  if (codes.stored >= 0) return checker.of_memory(codes);
  if (const char* found = is_turned(codes) ? "codes are not there" : checker.of_codes(codes)) return found;
  const i64 first = start / codes.columns * codes.stride;
  return count == 0 || end_byte_of(codes, start + count - 1) - first <= bytes ? nullptr : "codes are too short";
}

}  // namespace deltamerge
