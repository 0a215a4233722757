// Entry points of the delta codec and of low-rank products (models/delta_file.py, tensors/views.py).
#define PY_SSIZE_T_CLEAN
#include "check.h"
#include "entries.h"

namespace deltamerge {

namespace {

constexpr i64 kPadding = 16;  // zeros after the stored bytes (formats/delta/folder.py)

// (way, k, count, first, second, dense) of a coding in a buffer that ends in padding.
bool coded_of(const u8* stored, i64 size, const i64* n, Coded& coded) {
  coded = {stored, size - kPadding, n[0], u64(n[1]), n[2], n[3], n[4], n[5] != 0};
  if (coded.size < 0 || coded.count < 0 || coded.count >= kLargest || coded.k > 15 || coded.way < kPlain ||
      coded.way > kOnes || coded.second < 0 || coded.second > coded.size) {
    return false;
  }
  if (coded.way == kIndices) return coded.first >= 1 && coded.first <= 8 && coded.size / coded.first >= coded.count;
  if (coded.k == 0) return true;
  // rice's remainders: whole bytes of the low eight bits, where there are so many, then the rest in packed bits
  const i64 bits = i64(coded.k & 7), packed = (coded.count + 7) / 8 * bits;
  return coded.first >= 0 && coded.first <= coded.size && packed <= coded.size + kPadding - 8 - coded.first &&
         (coded.k <= 7 || coded.count <= coded.size);
}

i64 bytes_of(i64 kind, i64 count) {
  return kind == kFloatValues    ? 4 * count
         : kind == kBfloatValues ? 2 * count
         : kind == kInt8Values   ? count
                                 : (count + 7) / 8;
}

}  // namespace

// (stored, values, unused, out, way, k, count, first, second, dense, itemsize) -> whether positions are whole
PyObject* delta_put(PyObject*, PyObject* arguments) {
  Arguments<4, 7> b;
  Coded coded;
  if (!b.take(arguments, 3)) return nullptr;
  const i64 itemsize = b.n[6];
  if (itemsize != 1 && itemsize != 2 && itemsize != 4 && itemsize != 8) return refused("no such itemsize");
  if (!coded_of(b.at<u8>(0), b.count<u8>(0), b.n, coded) || b.count<u8>(1) < coded.count * itemsize) return too_short();
  return PyBool_FromLong(
      unlocked([&] { return loops().put(coded, b.at<u8>(1), itemsize, b.at<u8>(3), b.count<u8>(3) / itemsize); }));
}

// (stored, values, scales, out, way, k, count, first, second, dense, kind, group, is_bfloat) -> the same
PyObject* delta_add(PyObject*, PyObject* arguments) {
  Arguments<4, 9> b;
  Coded coded;
  if (!b.take(arguments, 3)) return nullptr;
  const Added added = {b.at<u8>(1), b.n[6], b.at<float>(2), b.n[7]};
  const bool is_bfloat = b.n[8] != 0;
  const i64 size = b.count<u8>(3) / (is_bfloat ? 2 : 4);
  bool scaled =
      added.kind < kInt8Values || (added.group > 0 && (size == 0 || b.count<float>(2) > (size - 1) / added.group));
  if (added.kind < kFloatValues || added.kind > kSignValues) return refused("no such values");
  if (!coded_of(b.at<u8>(0), b.count<u8>(0), b.n, coded) || !scaled ||
      b.count<u8>(1) < bytes_of(added.kind, coded.count))
    return too_short();
  return PyBool_FromLong(unlocked([&] { return loops().add_to(coded, added, is_bfloat, b.at<u8>(3), size); }));
}

// (stored, scales, unused, out) -> whether the ranks are whole
PyObject* delta_ranked(PyObject*, PyObject* arguments) {
  Arguments<4> b;
  if (!b.take(arguments, 3)) return nullptr;
  const Coded coded = {b.at<u8>(0), b.count<u8>(0) - kPadding, kOnes, 0, b.count<float>(3), 0, 0, false};
  if (coded.size < 0) return too_short();
  return PyBool_FromLong(
      unlocked([&] { return loops().ranked(coded, b.at<float>(1), b.count<float>(1), b.at<float>(3)); }));
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
