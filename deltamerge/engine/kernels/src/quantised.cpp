// Entry points of quantised weights (formats/quantised/grid.py), and what entry points share.
#define PY_SSIZE_T_CLEAN
#include "check.h"
#include "entries.h"

namespace deltamerge {

PyObject* refused(const char* what) {
  PyErr_SetString(PyExc_ValueError, what);
  return nullptr;
}

PyObject* too_short() { return refused("an array is shorter than what is listed of it"); }

namespace {

// Whether the arrays hold what `count` rows of this form need.
bool fits(const ScaledRows& rows, const Arguments<5, 5>& b, i64 count) {
  if (rows.columns < 1 || rows.columns >= kLongest || rows.stride < 0 || rows.stride >= kLongest) return false;
  if (rows.n < 1 || rows.n >= kLongest || rows.form < kE4m3 || rows.form > kPackedBits) return false;
  const i64 bits = rows.form == kPackedBits ? rows.width : 8;
  if (bits < 1 || bits > 8 || rows.stride * 8 < rows.columns * bits) return false;
  const i64 lines = b.count<float>(1) / rows.across;
  for (i64 i = 0; i < count; ++i) {
    if (b.at<i64>(3)[i] < 0 || b.at<i64>(3)[i] >= lines) return false;
  }
  bool zeros = rows.zeros == nullptr || b.count<float>(2) >= b.count<float>(1);
  return zeros && (count == 0 || (b.count<u8>(0) / count >= rows.stride && b.count<float>(4) / count >= rows.columns));
}

}  // namespace

// (codes, scales, zeros or empty, rows of the grid, out, form, width, columns, stride, n)
PyObject* scaled(PyObject*, PyObject* arguments) {
  Arguments<5, 5> b;
  if (!b.take(arguments, 4)) return nullptr;
  const float* zeros = b.count<float>(2) > 0 ? b.at<float>(2) : nullptr;
  const i64 across = b.n[4] > 0 && b.n[2] > 0 ? (b.n[2] - 1) / b.n[4] + 1 : 1, count = b.count<i64>(3);
  const ScaledRows rows = {b.n[0], b.n[1], b.n[2], b.n[3], b.at<float>(1), zeros, across, b.n[4], nullptr};
  if (!fits(rows, b, count)) return too_short();
  unlocked([&] {
    for (i64 i = 0; i < count; ++i) {
      const u8* row = b.at<u8>(0) + i * rows.stride;
      loops().scale_row(rows, row, b.at<i64>(3)[i], 0, rows.columns, b.at<float>(4) + i * rows.columns);
    }
  });
  Py_RETURN_NONE;
}

// (codes, scales, table, out, group, swapped)
PyObject* tabled(PyObject*, PyObject* arguments) {
  Arguments<4, 2> b;
  if (!b.take(arguments, 3)) return nullptr;
  const i64 count = b.count<float>(3), group = b.n[0];
  if (group < 2 || group >= kLongest || group % 2 != 0 || b.count<u8>(0) < (count + 1) / 2 || b.count<float>(2) < 16 ||
      b.count<float>(1) < (count + group - 1) / group) {
    return too_short();
  }
  unlocked([&] {
    loops().scale_groups(b.at<u8>(0), b.n[1] != 0, b.at<float>(2), b.at<float>(1), group, b.at<float>(3), count);
  });
  Py_RETURN_NONE;
}

// (codes, scales, table, out, pitch, columns, top, bottom)
PyObject* turned_pairs(PyObject*, PyObject* arguments) {
  Arguments<4, 4> b;
  if (!b.take(arguments, 3)) return nullptr;
  const TurnedPairs band = {b.at<u8>(0), b.n[0], b.n[1], b.n[2], b.n[3], 0, b.n[1], b.at<float>(1), b.at<float>(2)};
  if (!fits(band, b.count<u8>(0), b.count<float>(1), b.count<float>(2)) ||
      b.count<float>(3) / band.columns < band.bottom - band.top) {
    return too_short();
  }
  unlocked([&] { loops().turn_pairs(band, b.at<float>(3)); });
  Py_RETURN_NONE;
}

// (words, scales, zeros, groups, out, pitch, columns, top, bottom, groups of a row, width, whether words are AWQ's)
PyObject* turned_words(PyObject*, PyObject* arguments) {
  Arguments<5, 7> b;
  if (!b.take(arguments, 4)) return nullptr;
  const bool across = b.n[6] != 0;
  const TurnedWords band = {
      b.at<u32>(0),          b.n[0], b.n[1], b.n[2], b.n[3], 0, b.n[1], b.at<float>(1), b.at<float>(2),
      b.at<std::int32_t>(3), b.n[4], b.n[5], across};
  if (!fits(band, b.count<u32>(0), b.count<float>(1), b.count<float>(2), b.count<std::int32_t>(3)) ||
      b.count<float>(4) / band.columns < band.bottom - band.top) {
    return too_short();
  }
  unlocked([&] { loops().turn_words(band, b.at<float>(4)); });
  Py_RETURN_NONE;
}

// (values, scales, zeros or empty, codes, lost, blocks down, their rows, blocks across, their columns, exponent,
// mantissa, bias, last, least, largest): values (a, m, b, n), scales and zeros (a, b); `lost` (a, b) is added to.
PyObject* coded(PyObject*, PyObject* arguments) {
  Arguments<5, 10> b;
  if (!b.take(arguments, 3)) return nullptr;
  const CodeForm form = {b.n[4], b.n[5], b.n[6], b.n[7], float(b.n[8]), float(b.n[9])};
  const i64 down = b.n[0], rows = b.n[1], across = b.n[2], columns = b.n[3];
  const bool shifted = b.count<float>(2) > 0;
  for (int i = 0; i < 4; ++i) {
    if (b.n[i] < 1 || b.n[i] > (i64(1) << 31)) return too_short();
  }
  const bool small =
      form.exponent == 0 || (form.exponent + form.mantissa < 8 && form.exponent > 1 && form.mantissa > 0);
  const i64 blocks = down * across;
  if (!small || form.exponent < 0 || b.count<float>(0) / rows / columns < blocks || b.count<float>(1) < blocks ||
      (shifted && b.count<float>(2) < blocks) || b.count<u8>(3) / rows / columns < blocks ||
      b.count<double>(4) < blocks) {
    return too_short();
  }
  unlocked([&] {
    for (i64 line = 0; line < down * rows; ++line) {
      for (i64 j = 0; j < across; ++j) {
        const i64 at = line * across + j, block = line / rows * across + j;
        b.at<double>(4)[block] +=
            loops().code_values(form, b.at<float>(0) + at * columns, b.at<float>(1)[block],
                                shifted ? b.at<float>(2)[block] : 0.0f, b.at<u8>(3) + at * columns, columns);
      }
    }
  });
  Py_RETURN_NONE;
}

}  // namespace deltamerge
