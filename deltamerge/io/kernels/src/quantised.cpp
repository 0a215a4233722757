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

}  // namespace deltamerge
