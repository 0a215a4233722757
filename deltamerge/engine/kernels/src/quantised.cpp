// Entry points of quantised weights (formats/quantised/codes.py), and what entry points share.
#define PY_SSIZE_T_CLEAN
#include <cstring>

#include "check.h"
#include "entries.h"

namespace deltamerge {

PyObject* refused(const char* what) {
  PyErr_SetString(PyExc_ValueError, what);
  return nullptr;
}

PyObject* too_short() { return refused("an array is shorter than what is listed of it"); }

void decode_rows(const CodedSource& codes, const u8* raw, i64 first, i64 at, i64 count, float* out) {
  const auto floats = [](i64 address) { return reinterpret_cast<const float*>(address); };
  const ScaledRows rows = {codes.form,   codes.width, codes.columns,       codes.stride,         floats(codes.scales),
                           floats(codes.zeros), codes.across, codes.n, floats(codes.table), floats(codes.biases),
                           floats(codes.factor)};
  for (const i64 stop = at + count; at < stop;) {
    const i64 row = at / codes.columns, column = at % codes.columns;
    const i64 here = codes.columns - column < stop - at ? codes.columns - column : stop - at;
    const i64 line = row / codes.height * codes.down + row % codes.height / codes.m - codes.line;
    loops().scale_row(rows, raw + (row * codes.stride - first), line, column, here, out);
    at += here;
    out += here;
  }
}

namespace {

// Columns [left, right) of rows [top, bottom) of a job whose first row is `first`.
void turn(const CodedSource& codes, i64 first, i64 top, i64 bottom, i64 left, i64 right, float* out) {
  const i64 skip = top - first, line = codes.line + skip;
  const float* scales = reinterpret_cast<const float*>(codes.scales);
  if (codes.form == kTurnedPairs) {
    scales += (line / 32 - codes.line / 32) * codes.columns;
    const float* table = reinterpret_cast<const float*>(codes.table);
    const u8* stored = reinterpret_cast<const u8*>(codes.stored);
    loops().turn_pairs({stored, codes.stride, codes.columns, line, line + bottom - top, left, right, scales, table},
                       out);
    return;
  }
  const float* zeros = reinterpret_cast<const float*>(codes.zeros) + skip * codes.across;
  const auto* groups = reinterpret_cast<const std::int32_t*>(codes.groups);
  scales += skip * codes.across;
  loops().turn_words(
      {reinterpret_cast<const u32*>(codes.stored), codes.stride, codes.columns, line, line + bottom - top, left, right,
       scales, zeros, groups, codes.across, codes.width, codes.form == kTurnedAcross},
      out);
}

}  // namespace

// Whole rows at once, else what lies in each.
void decode_turned(const CodedSource& codes, i64 first, i64 at, i64 count, float* out) {
  const i64 columns = codes.columns, stop = at + count;
  if (at % columns == 0 && count % columns == 0) {
    turn(codes, first, at / columns, stop / columns, 0, columns, out);
    return;
  }
  while (at < stop) {
    const i64 row = at / columns, from = at % columns, here = columns - from < stop - at ? columns - from : stop - at;
    const i64 left = from / kAligned * kAligned, end = (from + here + kAligned - 1) / kAligned * kAligned;
    turn(codes, first, row, row + 1, left, end < columns ? end : columns, out);
    std::memmove(out, out + (from - left), std::size_t(4 * here));
    out += here;
    at += here;
  }
}

// (codes as CodedSource, their bytes from the first row on or nothing, out, first element, arrays): float32 values.
PyObject* decode(PyObject*, PyObject* all) {
  Arrays arrays;
  if (PyTuple_Size(all) != 5 || !arrays.take(PyTuple_GetItem(all, 4))) return refused("5 arguments are wanted");
  PyObject* arguments = PyTuple_GetSlice(all, 0, 4);
  if (arguments == nullptr) return nullptr;
  Arguments<3, 1> b;
  const bool taken = b.take(arguments, 2);
  Py_DECREF(arguments);  // `all` keeps them alive
  if (!taken) return nullptr;
  if (!b.is_aligned(0, 8) || !b.is_aligned(2, 4) || b.count<CodedSource>(0) < 1) return refused("an array is not aligned");
  CodedSource codes = *b.at<CodedSource>(0);
  const i64 start = b.n[0], count = b.count<float>(2);
  if (start < 0 || start >= kLargest || count >= kLargest) return refused("its range lies outside of the tensor");
  const char* fault = fault_of(codes, start, count, b.count<u8>(1), arrays.get(), arrays.count());
  if (fault != nullptr) return refused(fault);
  if (count == 0) Py_RETURN_NONE;
  for (i64 CodedSource::*array : kArrays) codes.*array = arrays.address(codes.*array);
  const bool whole = !is_turned(codes) || (start % codes.columns == 0 && count % codes.columns == 0);
  Array<float> wide;
  if (!whole && !wide.allocate(count + 2 * kAligned)) return PyErr_NoMemory();
  unlocked([&] {
    const i64 first = start / codes.columns;
    float* out = whole ? b.at<float>(2) : wide.get();
    if (is_turned(codes)) {
      decode_turned(codes, first, start, count, out);
    } else {
      const u8* raw = codes.stored != 0 ? reinterpret_cast<const u8*>(codes.stored) : b.at<u8>(1);
      decode_rows(codes, raw, first * codes.stride, start, count, out);
    }
    if (!whole) std::memcpy(b.at<float>(2), out, std::size_t(4 * count));
  });
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
