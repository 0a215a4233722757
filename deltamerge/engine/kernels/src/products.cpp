// Entry points of trellis codes and of low-rank products (formats/delta/trellis.py, tensors/views.py).
#define PY_SSIZE_T_CLEAN
#include "check.h"
#include "entries.h"

namespace deltamerge {

// (vectors, table, codes, columns, bits): the codes of each row of the vectors
PyObject* trellis(PyObject*, PyObject* arguments) {
  Arguments<3, 2> b;
  if (!b.take(arguments, 2)) return nullptr;
  const i64 columns = b.n[0], bits = b.n[1];
  if (bits != 1 && bits != 2) return refused("codes have 1 or 2 bits");
  if (!b.is_aligned(0, 4) || !b.is_aligned(1, 4)) return refused("an array is not aligned");
  if (columns < 1 || columns >= kLongest || b.count<float>(1) != kStates || b.count<u8>(2) % columns != 0 ||
      b.count<float>(0) < b.count<u8>(2)) {
    return too_short();
  }
  Array<u8> came;
  if (!came.allocate(columns * (kStates / 2))) return PyErr_NoMemory();
  unlocked([&] {
    for (i64 at = 0; at < b.count<u8>(2); at += columns) {
      loops().trellis(b.at<float>(0) + at, columns, bits, b.at<float>(1), came.get(), b.at<u8>(2) + at);
    }
  });
  Py_RETURN_NONE;
}

// (left, right, out, rows, rank, columns)
PyObject* ordered_product(PyObject*, PyObject* arguments) {
  Arguments<3, 3> b;
  if (!b.take(arguments, 2)) return nullptr;
  for (int i = 0; i < 3; ++i) {
    if (b.n[i] < 0 || b.n[i] >= kLongest) return too_short();
  }
  if (b.n[1] < 1 || b.count<float>(0) < b.n[0] * b.n[1] || b.count<float>(1) < b.n[1] * b.n[2] ||
      b.count<float>(2) < b.n[0] * b.n[2]) {
    return too_short();
  }
  unlocked([&] { loops().ordered_product(b.at<float>(0), b.at<float>(1), b.at<float>(2), b.n[0], b.n[1], b.n[2]); });
  Py_RETURN_NONE;
}

}  // namespace deltamerge
