// Entry points of quantised weights (io/quantised/scaled.py), and what entry points share.
#define PY_SSIZE_T_CLEAN
#include "entries.h"

namespace deltamerge {

PyObject* too_short() {
  PyErr_SetString(PyExc_ValueError, "an array is shorter than what is listed of it");
  return nullptr;
}

bool take_numbers(PyObject* arguments, Py_ssize_t from, i64* numbers, int count) {
  if (PyTuple_Size(arguments) != from + count) {
    PyErr_Format(PyExc_TypeError, "%d arguments are wanted", int(from) + count);
    return false;
  }
  for (int i = 0; i < count; ++i) {
    numbers[i] = PyLong_AsLongLong(PyTuple_GetItem(arguments, from + i));
    if (numbers[i] == -1 && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

namespace {

// Whether the arrays hold what `count` rows of this form need.
bool fits(const ScaledRows& rows, const Buffers<5>& b, i64 count) {
  if (rows.columns < 1 || rows.n < 1 || rows.form < kE4m3 || rows.form > kPackedBits) return false;
  const i64 bits = rows.form == kPackedBits ? rows.width : 8;
  if (bits < 1 || bits > 8 || rows.stride * 8 < rows.columns * bits) return false;
  const i64 lines = b.count<float>(1) / rows.across;
  for (i64 i = 0; i < count; ++i) {
    if (b.at<i64>(3)[i] < 0 || b.at<i64>(3)[i] >= lines) return false;
  }
  bool zeros = rows.zeros == nullptr || b.count<float>(2) >= b.count<float>(1);
  return zeros && b.count<u8>(0) >= count * rows.stride && b.count<float>(4) >= count * rows.columns;
}

}  // namespace

// (codes, scales, zeros or empty, rows of the grid, out, form, width, columns, stride, n)
PyObject* scaled(PyObject*, PyObject* arguments) {
  Buffers<5> b;
  i64 n[5];
  if (!b.take(arguments, 4) || !take_numbers(arguments, 5, n, 5)) return nullptr;
  const float* zeros = b.count<float>(2) > 0 ? b.at<float>(2) : nullptr;
  const i64 across = n[4] > 0 ? (n[2] + n[4] - 1) / n[4] : 1, count = b.count<i64>(3);
  const ScaledRows rows = {n[0], n[1], n[2], n[3], b.at<float>(1), zeros, across, n[4]};
  if (!fits(rows, b, count)) return too_short();
  Py_BEGIN_ALLOW_THREADS;
  for (i64 i = 0; i < count; ++i) {
    const u8* row = b.at<u8>(0) + i * rows.stride;
    loops().scale_row(rows, row, b.at<i64>(3)[i], 0, rows.columns, b.at<float>(4) + i * rows.columns);
  }
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// (values, scales, zeros or empty, codes, lost, blocks down, their rows, blocks across, their columns, exponent, mantissa,
// bias, last, least, largest): values (a, m, b, n), scales and zeros (a, b); `lost` (a, b) is added to.
PyObject* coded(PyObject*, PyObject* arguments) {
  Buffers<5> b;
  i64 n[10];
  if (!b.take(arguments, 3) || !take_numbers(arguments, 5, n, 10)) return nullptr;
  const CodeForm form = {n[4], n[5], n[6], n[7], float(n[8]), float(n[9])};
  const i64 down = n[0], rows = n[1], across = n[2], columns = n[3];
  const bool shifted = b.count<float>(2) > 0;
  for (int i = 0; i < 4; ++i) {
    if (n[i] < 1 || n[i] > (i64(1) << 31)) return too_short();
  }
  const bool small = form.exponent == 0 || (form.exponent + form.mantissa < 8 && form.exponent > 1 && form.mantissa > 0);
  const i64 blocks = down * across;
  if (!small || form.exponent < 0 || b.count<float>(0) / rows / columns < blocks || b.count<float>(1) < blocks ||
      (shifted && b.count<float>(2) < blocks) || b.count<u8>(3) / rows / columns < blocks || b.count<double>(4) < blocks) {
    return too_short();
  }
  Py_BEGIN_ALLOW_THREADS;
  for (i64 line = 0; line < down * rows; ++line) {
    for (i64 j = 0; j < across; ++j) {
      const i64 at = line * across + j, block = line / rows * across + j;
      b.at<double>(4)[block] += loops().code_values(form, b.at<float>(0) + at * columns, b.at<float>(1)[block],
                                                    shifted ? b.at<float>(2)[block] : 0.0f,
                                                    b.at<u8>(3) + at * columns, columns);
    }
  }
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

}  // namespace deltamerge
