// What each operation does to a chunk: registers in, registers, counts, sums or the output out.
#include <cstring>

#include "stream.h"

namespace deltamerge {

Operand Stream::operand(i64 number) const {
  if (number < 0) return {nullptr, false};
  if (number >= kDirect) return {stored_of(number - kDirect), p_.sources[number - kDirect].dtype == kBfloat16};
  return {register_of(number), false};
}

Models Stream::models(const Operation& op) {
  for (i64 j = 0; j < op.models; ++j) operands_[j] = operand(p_.operands[op.first + j]);
  return {operands_.get(), p_.weights + op.first, op.models};
}

void Stream::operate(i64 k) {
  const Operation& op = p_.operations[k];
  switch (op.code) {
    case kLoad:
      loops_.widen(stored_of(op.a), p_.sources[op.a].dtype, register_of(op.to), n_);
      break;
    case kSubtract:
      loops_.subtract(operand(op.a), operand(op.b), register_of(op.to), n_);
      break;
    case kDrop:
      drop(op);
      break;
    case kDivide:
      loops_.divide(register_of(op.a), op.divisor, register_of(op.to), size_at(op.b));
      break;
    case kKeep:
      keep(op, k);
      break;
    case kAdd:
    case kAgree:
    case kElect:
    case kVariance:
      merge(op);
      break;
    case kStore:
      store(op);
      break;
    case kHigh:
      loops_.count_high(bits_of(op.a), r_.counts + op.d, n_);
      break;
    case kLow:
      loops_.count_low(bits_of(op.a), u32(op.b), r_.counts + op.d, n_);
      break;
    case kEqual:
      r_.counts[op.d + block_in_job()] += loops_.count_equal(bits_of(op.a), u32(op.b), n_);
      break;
    case kNonzero:
      r_.counts[op.d] += loops_.count_nonzero(register_of(op.a), n_);
      break;
    case kDots:
      dots(op);
      break;
    case kNorm:
      norms(op);
      break;
    case kDraw:
      draw(op);
      break;
    case kDifferAt:
      loops_.differ_at(stored_of(op.a), p_.sources[op.a].dtype, stored_of(op.b), p_.sources[op.b].dtype,
                       places_of(op.c), register_of(op.to), sizes_[op.c]);
      break;
    case kAlign:
      align(op);
      break;
    case kBaseAt:
      loops_.widen_at(stored_of(op.a), p_.sources[op.a].dtype, places_of(op.b), register_of(op.to), sizes_[op.b]);
      break;
    case kPatch:
      patch(op);
      break;
    case kList:
      list(op, k);
      break;
    case kSample:
      sample(op);
      break;
    case kScatter:
      scatter(op);
      break;
    case kRank:
      rank(op);
      break;
    case kRows:
      keep_rows(op);
      break;
    case kSpread:
      spread(op);
      break;
    case kColumns:
      replace_columns(op);
      break;
    case kClear:
      loops_.clear_where(bits_of(op.a), bits_of(op.b), bits_of(op.to), n_);
      break;
  }
}

void Stream::drop(const Operation& op) {
  Bound bound = {u16(op.c), u16(op.d)};
  loops_.drop(operand(op.a), operand(op.b), op.key, at_ + first_, bound, op.divisor, register_of(op.to), n_);
}

void Stream::keep(const Operation& op, i64 k) {
  if (op.d >= 0 && opens_block()) {
    i64 before = p_.ranks[op.d + number_], equal = p_.ranks[op.d + number_ + 1] - before, left = op.c - before;
    left_[k] = left >= equal ? -1 : left > 0 ? left : 0;
  }
  const u32* values = bits_of(op.models > 0 ? p_.operands[op.first] : op.a);
  u32 threshold = u32(op.b), *out = bits_of(op.to);
  if (left_[k] > 0) {
    left_[k] = loops_.keep_first_equals(values, bits_of(op.a), threshold, left_[k], out, n_);
  } else {
    loops_.keep_from(values, bits_of(op.a), left_[k] < 0 ? threshold : threshold + 1, out, n_);
  }
}

void Stream::merge(const Operation& op) {
  i64 size = size_at(op.code == kAdd || op.code == kAgree ? op.b : -1);
  Models added = models(op);
  Operand base = operand(op.code == kVariance ? -1 : op.a);
  float* out = register_of(op.to);
  if (op.code == kAdd) {
    loops_.add(base, added, op.divisor, op.scale, out, size);
  } else if (op.code == kAgree) {
    loops_.agree(base, added, op.c != 0, op.scale, out, size);
  } else if (op.code == kElect) {
    loops_.elect(base, added, out, size);
  } else {
    loops_.variance(added, out, size);
  }
}

void Stream::store(const Operation& op) {
  i64 done = at_ + first_ - job_.start;
  loops_.narrow(register_of(op.a), job_.dtype, r_.out + done * size_of(job_.dtype), n_);
}

// The sums of the runs of a block are added up where the block ends.
void Stream::finish_sum(i64 row, bool largest) {
  i64 rest = job_.stop - at_ < job_.block - inside_ ? job_.stop - at_ : job_.block - inside_;
  if (first_ + n_ != rest) return;
  i64 runs = (inside_ + rest + kRun - 1) / kRun, half = 1;
  double* part = part_.get() + row * part_row_;
  while (half < runs) half *= 2;
  for (i64 i = runs; i < half; ++i) part[i] = 0.0;
  while (half > 1) {
    half /= 2;
    for (i64 i = 0; i < half; ++i) {
      double other = part[half + i];
      part[i] = !largest ? part[i] + other : other > part[i] || other != other ? other : part[i];
    }
  }
  r_.sums[row * blocks() + block_in_job()] = part[0];
}

void Stream::dots(const Operation& op) {
  i64 whole = job_.stop - number_ * job_.block;
  bool padded = (whole < job_.block ? whole : job_.block) > kRun;
  for (i64 i = 0; i < n_; i += kRun) {
    i64 count = n_ - i < kRun ? n_ - i : kRun, this_run = (inside_ + first_ + i) / kRun;
    part_[op.c * part_row_ + this_run] = loops_.dot(register_of(op.a) + i, register_of(op.b) + i, count, padded);
  }
  finish_sum(op.c, false);
}

void Stream::norms(const Operation& op) {
  for (i64 i = 0; i < n_; i += kRun) {
    i64 count = n_ - i < kRun ? n_ - i : kRun, this_run = (inside_ + first_ + i) / kRun;
    const float* x = register_of(op.a) + i;
    part_[op.c * part_row_ + this_run] = op.b == 0 ? loops_.largest(x, count) : loops_.sum_abs(x, count);
  }
  finish_sum(op.c, op.b == 0);
}

void Stream::draw(const Operation& op) {
  const TableBounds& at = p_.bounds[op.a];
  Gaps gaps = {p_.tables + at.table, at.table_end - at.table, p_.guides + at.guide, u64(at.shift)};
  i64 start = at_ + first_;
  sizes_[op.to] = loops_.draw(gaps, op.key, start, start + n_, places_of(op.to));
}

void Stream::align(const Operation& op) {
  for (i64 j = 0; j < op.models; ++j) {
    i64 list = p_.lists[op.first + j];
    lists_[j] = places_of(list);
    lengths_[j] = sizes_[list];
    values_[j] = register_of(p_.operands[op.first + j]);
    rows_[j] = register_of(op.a + j);
  }
  std::memset(marks_of_.get(), 0, std::size_t(8 * marks_));
  sizes_[op.to] = loops_.align(lists_.get(), values_.get(), lengths_.get(), op.models, marks_of_.get(), before_.get(),
                               marks_, places_of(op.to), rows_.get());
}

void Stream::patch(const Operation& op) {
  i64 size = size_of(job_.dtype);
  u8* to = r_.out + (at_ + first_ - job_.start) * size;
  if (p_.sources[op.a].dtype == job_.dtype) {
    std::memcpy(to, stored_of(op.a), std::size_t(n_ * size));
  } else {
    loops_.widen(stored_of(op.a), p_.sources[op.a].dtype, register_of(op.to), n_);
    loops_.narrow(register_of(op.to), job_.dtype, to, n_);
  }
  loops_.narrow_at(register_of(op.b), job_.dtype, places_of(op.c), to, sizes_[op.c]);
}

void Stream::list(const Operation& op, i64 k) {
  u32* row = r_.listed + op.c * r_.listed_row;
  i64& used = r_.used[op.c];
  if (opens_block()) {
    header_[k] = used;
    row[used] = row[used + 1] = 0;
    used += 2;
  }
  Inside found = loops_.list_between(bits_of(op.a), u32(op.b), u32(op.d), row + used, n_);
  row[header_[k]] += u32(found.above);
  row[header_[k] + 1] += u32(found.count);
  if (op.d > op.b) used += found.count;
}

// What of the chunk lies in the run of b entries of its block that is looked at.
void Stream::sample(const Operation& op) {
  i64 begin = 0, end = n_;
  if (job_.sampled == 0) {
    i64 rest = job_.stop - number_ * job_.block, size = rest < job_.block ? rest : job_.block;
    i64 run = op.b < size ? op.b : size, first = run_start(number_, size, run), here = inside_ + first_;
    begin = first - here > 0 ? first - here : 0;
    end = first + run - here < n_ ? first + run - here : n_;
  }
  if (begin >= end) return;
  i64& used = r_.used[op.c];
  loops_.magnitudes(bits_of(op.a) + begin, r_.listed + op.c * r_.listed_row + used, end - begin);
  used += end - begin;
}

void Stream::scatter(const Operation& op) {
  float *out = register_of(op.to), *values = register_of(op.a);
  std::memset(out, 0, std::size_t(4 * n_));
  if (op.b < 0) return;
  const i64* places = places_of(op.b);
  for (i64 i = 0; i < sizes_[op.b]; ++i) out[places[i]] = values[i];
}

// Rows of b entries where the block is made of such, else the block is one row (ops.row_length_of).
void Stream::rank(const Operation& op) {
  i64 rest = job_.elements - number_ * job_.block, size = rest < job_.block ? rest : job_.block;
  i64 columns = op.b > 0 && op.b <= size && size % op.b == 0 ? op.b : size;
  for (i64 j = 0; j < op.models; ++j) {
    const i64* row = p_.lists + op.first + 3 * j;  // its length, where its limits and its ratios begin
    if (row[0] != columns || !is_whole(columns)) continue;
    const u32* upper = p_.limits + row[1];
    Ranks ranks = {upper, upper + columns, op.c != 0 ? p_.ratios + row[2] : nullptr};
    loops_.keep_by_rank(register_of(op.a), at_ + first_, columns, op.key, ranks, scratch_.get(), register_of(op.to),
                        n_);
  }
}

void Stream::keep_rows(const Operation& op) {
  if (!is_whole(op.d)) return;
  const float *values = register_of(op.a), *scores = register_of(op.b);
  loops_.keep_largest_of_rows(values, scores, op.d, op.c, scratch_.get(), register_of(op.to), n_);
}

// Row by row, of which the chunk may begin and end inside one.
void Stream::spread(const Operation& op) {
  if (op.models > 0) {
    spread_places(op);
    return;
  }
  const float *x = register_of(op.a), *table = p_.ratios + op.c;
  float* out = register_of(op.to);
  for (i64 i = 0; i < n_;) {
    i64 flat = at_ + first_ + i, column = flat % op.b;
    i64 count = op.b - column < n_ - i ? op.b - column : n_ - i;
    if (op.d == 0) {
      loops_.divide(x + i, table[flat / op.b], out + i, count);
    } else if (op.d == 1) {
      loops_.divide_each(x + i, table + column, out + i, count);
    } else {
      loops_.score(x + i, table + column, out + i, count);
    }
    i += count;
  }
}

void Stream::spread_places(const Operation& op) {
  const i64 list = p_.lists[op.first], *places = places_of(list);
  const float *x = register_of(op.a), *table = p_.ratios + op.c;
  float* out = register_of(op.to);
  for (i64 i = 0; i < sizes_[list]; ++i) {
    i64 flat = at_ + first_ + places[i];
    out[i] = x[i] / table[op.d == 0 ? flat / op.b : flat % op.b];
  }
}

void Stream::replace_columns(const Operation& op) {
  const float* others = op.b < 0 ? nullptr : register_of(op.b);
  float* out = register_of(op.to);
  std::memcpy(out, register_of(op.a), std::size_t(4 * n_));
  const i64 start = at_ + first_;
  for (i64 row = start / op.c; row * op.c < start + n_; ++row) {
    for (i64 j = 0; j < op.models; ++j) {
      i64 at = row * op.c + p_.lists[op.first + j] - start;
      if (at >= 0 && at < n_) out[at] = others == nullptr ? 0.0f : others[at];
    }
  }
}

}  // namespace deltamerge
