// Entry points of the delta encoding `steps` (formats/delta/steps.py): lists of numbers as bits, and which
// elements of a tile are of which group. They are scalar loops, the same at every level.
#define PY_SSIZE_T_CLEAN
#include <cstring>

#include "entries.h"

namespace deltamerge {

namespace {

constexpr i64 kExponents = 256;
constexpr i64 kPadding = 8;  // zeros after stored bits, so that eight bytes can be read at each of them
constexpr u8 kNoGroup = 255;

// Whether an exponent can be read at a shift of `mantissa` bits by this mask.
bool is_form(i64 mantissa, i64 mask) { return mantissa >= 0 && mantissa < 16 && mask >= 0 && mask < kExponents; }

// Numbers as q zeros and a one each, then as fields: of k bits each, value = q * 2**k + field; or (`is_wide`) of k + q
// bits, value = 2**(k + q) + field - 2**k.
struct Lists {
  i64 k;
  bool is_wide;
};

inline u64 word_at(const u8* bits, i64 at) {
  u64 word;
  std::memcpy(&word, bits + (at >> 3), 8);
  return word >> (at & 7);
}

inline void or_at(u8* bits, i64 at, u64 field) {
  u64 word;
  std::memcpy(&word, bits + (at >> 3), 8);
  word |= field << (at & 7);
  std::memcpy(bits + (at >> 3), &word, 8);
}

inline i64 zeros_of(const Lists& form, u32 value) {
  if (!form.is_wide) return i64(value >> form.k);
  return 63 - __builtin_clzll(u64(value) + (u64(1) << form.k)) - form.k;
}

inline i64 width_of(const Lists& form, i64 zeros) { return form.is_wide ? form.k + zeros : form.k; }

// The bit after the list; -1: `out` is too short.
i64 pack(const u32* values, i64 n, const Lists& form, u8* out, i64 size, i64 at) {
  i64 unary = n, fields = 0;
  for (i64 i = 0; i < n; ++i) {
    const i64 q = zeros_of(form, values[i]);
    unary += q;
    fields += width_of(form, q);
  }
  if (at + unary + fields > 8 * (size - kPadding)) return -1;
  i64 field_at = at + unary;
  for (i64 i = 0; i < n; ++i) {
    const i64 q = zeros_of(form, values[i]);
    at += q;
    out[at >> 3] |= u8(1 << (at & 7));
    ++at;
    const i64 width = width_of(form, q);
    if (width == 0) continue;
    const u64 whole = form.is_wide ? u64(values[i]) + (u64(1) << form.k) : values[i];
    or_at(out, field_at, whole & ((u64(1) << width) - 1));
    field_at += width;
  }
  return field_at;
}

// The bit after the list of n numbers that begins at bit `at` of `end`; -1: it is damaged.
i64 unpack(const u8* bits, i64 end, const Lists& form, i64 at, u32* out, i64 n, u64 most) {
  for (i64 i = 0; i < n; ++i) {
    u64 zeros = 0;
    for (;;) {
      if (at >= end) return -1;
      const u64 word = word_at(bits, at);
      if (word != 0) {
        const i64 more = __builtin_ctzll(word);
        zeros += u64(more);
        at += more + 1;
        break;
      }
      const i64 passed = 64 - (at & 7);
      zeros += u64(passed);
      at += passed;
    }
    if (at > end || zeros > most) return -1;
    out[i] = u32(zeros);
  }
  for (i64 i = 0; i < n; ++i) {
    const i64 q = i64(out[i]), width = width_of(form, q);
    if (width > 32 || at + width > end) return -1;
    const u64 field = width > 0 ? word_at(bits, at) & ((u64(1) << width) - 1) : 0;
    at += width;
    const u64 value = form.is_wide ? (u64(1) << width) + field - (u64(1) << form.k) : (u64(q) << form.k) + field;
    if (value > most) return -1;
    out[i] = u32(value);
  }
  return at;
}

// How many of `bits` have each exponent: in four tables, so that an element does not wait for the one before it.
void count_exponents(const u16* bits, i64 n, i64 mantissa, u32 mask, i64* counts) {
  u32 tables[4][kExponents] = {};
  i64 i = 0;
  for (; i + 4 <= n; i += 4) {
    for (i64 j = 0; j < 4; ++j) ++tables[j][u32(bits[i + j]) >> mantissa & mask];
  }
  for (; i < n; ++i) ++tables[0][u32(bits[i]) >> mantissa & mask];
  for (i64 e = 0; e < kExponents; ++e) counts[e] = i64(tables[0][e]) + tables[1][e] + tables[2][e] + tables[3][e];
}

// Of each of `positions` how many elements before it are of its group. False: they are not ascending within n.
bool rank(const u16* bits, i64 n, const u8* groups, i64 mantissa, u32 mask, const i64* positions, i64 count,
          u32* ranks) {
  u32 tables[4][kExponents] = {};
  i64 at = 0;
  for (i64 i = 0; i < count; ++i) {
    const i64 stop = positions[i];
    if (stop < at || stop >= n) return false;
    for (; at + 4 <= stop; at += 4) {
      for (i64 j = 0; j < 4; ++j) ++tables[j][groups[u32(bits[at + j]) >> mantissa & mask]];
    }
    for (; at < stop; ++at) ++tables[0][groups[u32(bits[at]) >> mantissa & mask]];
    const u8 g = groups[u32(bits[stop]) >> mantissa & mask];
    ranks[i] = tables[0][g] + tables[1][g] + tables[2][g] + tables[3][g];
    ++tables[0][g];
    at = stop + 1;
  }
  return true;
}

struct Listed {
  const u32* ranks;    // of the listed elements in their group, group by group
  const i64* starts;   // of each group's ranks; one more for the end
  const u8* inverted;  // whether the listed are those that do not change
  i64 groups;
};

// Whether each group's ranks begin where those of the one before end.
bool ascends(const Listed& listed) {
  bool whole = listed.starts[0] == 0;
  for (i64 g = 0; g < listed.groups; ++g) whole = whole && listed.starts[g] <= listed.starts[g + 1];
  return whole;
}

// Positions of the elements that change, and which number each has among those of all groups in their order. The count;
// -1: ranks are damaged, or there are more than `most`.
i64 place(const u16* bits, i64 n, const u8* group_of, i64 mantissa, u32 mask, const Listed& listed, const i64* firsts,
          i64* positions, i64* sources, i64 most) {
  u32 left[kExponents];  // elements of the group before the next listed one
  i64 next[kExponents];  // the listed one after that
  i64 source[kExponents];
  u32 invert[kExponents];
  for (i64 g = 0; g < kExponents; ++g) left[g] = ~u32(0), next[g] = source[g] = 0, invert[g] = 0;
  for (i64 g = 0; g < listed.groups; ++g) {
    next[g] = listed.starts[g];
    source[g] = firsts[g];
    invert[g] = listed.inverted[g] != 0;
    if (next[g] < listed.starts[g + 1]) left[g] = listed.ranks[next[g]++];
  }
  i64 found = 0;
  for (i64 i = 0; i < n; ++i) {
    const u32 g = group_of[u32(bits[i]) >> mantissa & mask];
    const bool is_listed = left[g] == 0;
    if (is_listed) {
      const i64 at = next[g]++;
      left[g] = ~u32(0);
      if (at < listed.starts[g + 1]) {
        if (listed.ranks[at] <= listed.ranks[at - 1]) return -1;
        left[g] = listed.ranks[at] - listed.ranks[at - 1] - 1;
      }
    } else {
      --left[g];
    }
    if (u32(is_listed) == invert[g] || g == kNoGroup) continue;
    if (found == most) return -1;
    positions[found] = i;
    sources[found] = source[g]++;
    ++found;
  }
  for (i64 g = 0; g < listed.groups; ++g) {  // the last listed one has moved `next` past the end
    const i64 count = listed.starts[g + 1] - listed.starts[g];
    if (count > 0 && next[g] != listed.starts[g + 1] + 1) return -1;
  }
  return found;
}

}  // namespace

// (values, out, k, is_wide, at) -> the bit after them, -1 if out is too short
PyObject* steps_pack(PyObject*, PyObject* arguments) {
  Arguments<2, 3> b;
  if (!b.take(arguments, 1)) return nullptr;
  if (b.n[0] < 0 || b.n[0] > 31 || b.n[2] < 0 || b.n[2] > 8 * b.count<u8>(1)) return too_short();
  return PyLong_FromLongLong(
      pack(b.at<u32>(0), b.count<u32>(0), {b.n[0], b.n[1] != 0}, b.at<u8>(1), b.count<u8>(1), b.n[2]));
}

// (stored and padding, out, k, is_wide, at, most) -> the bit after them, -1 if they are damaged
PyObject* steps_unpack(PyObject*, PyObject* arguments) {
  Arguments<2, 4> b;
  if (!b.take(arguments, 1)) return nullptr;
  const i64 end = 8 * (b.count<u8>(0) - kPadding);
  if (end < 0 || b.n[0] < 0 || b.n[0] > 31 || b.n[2] < 0 || b.n[3] < 0 || b.n[3] >> 32 != 0) return too_short();
  return PyLong_FromLongLong(
      unpack(b.at<u8>(0), end, {b.n[0], b.n[1] != 0}, b.n[2], b.at<u32>(1), b.count<u32>(1), u64(b.n[3])));
}

// (bits, counts, mantissa, mask)
PyObject* steps_count(PyObject*, PyObject* arguments) {
  Arguments<2, 2> b;
  if (!b.take(arguments, 1)) return nullptr;
  if (b.count<i64>(1) < kExponents || !is_form(b.n[0], b.n[1])) return too_short();
  unlocked([&] { count_exponents(b.at<u16>(0), b.count<u16>(0), b.n[0], u32(b.n[1]), b.at<i64>(1)); });
  Py_RETURN_NONE;
}

// (bits, group of each exponent, positions, ranks, mantissa, mask) -> whether positions are ascending
PyObject* steps_rank(PyObject*, PyObject* arguments) {
  Arguments<4, 2> b;
  if (!b.take(arguments, 3)) return nullptr;
  const i64 count = b.count<i64>(2);
  if (b.count<u8>(1) < kExponents || !is_form(b.n[0], b.n[1]) || b.count<u32>(3) < count) return too_short();
  return PyBool_FromLong(unlocked([&] {
    return rank(b.at<u16>(0), b.count<u16>(0), b.at<u8>(1), b.n[0], u32(b.n[1]), b.at<i64>(2), count, b.at<u32>(3));
  }));
}

// (bits, group of each exponent, ranks, starts, inverted, firsts, positions, sources, mantissa, mask) -> the count, -1
// if ranks are damaged
PyObject* steps_place(PyObject*, PyObject* arguments) {
  Arguments<8, 2> b;
  if (!b.take(arguments, 6)) return nullptr;
  const Listed listed = {b.at<u32>(2), b.at<i64>(3), b.at<u8>(4), b.count<u8>(4)};
  const bool fits = listed.groups <= kNoGroup && b.count<i64>(3) == listed.groups + 1 &&
                    b.count<i64>(5) == listed.groups && b.count<u8>(1) >= kExponents && is_form(b.n[0], b.n[1]) &&
                    b.count<u16>(0) < i64(~u32(0)) && ascends(listed) && b.count<i64>(7) >= b.count<i64>(6) &&
                    listed.starts[listed.groups] == b.count<u32>(2);
  if (!fits) return too_short();
  return PyLong_FromLongLong(unlocked([&] {
    return place(b.at<u16>(0), b.count<u16>(0), b.at<u8>(1), b.n[0], u32(b.n[1]), listed, b.at<i64>(5), b.at<i64>(6),
                 b.at<i64>(7), b.count<i64>(6));
  }));
}

}  // namespace deltamerge
