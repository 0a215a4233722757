// The module `_native`: the entry points that Python calls, with numpy's arrays as buffers. They release the GIL.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <initializer_list>

#include "check.h"
#include "entries.h"
#include "stream.h"

namespace {

using namespace deltamerge;

// (job, operations, weights, operands, lists, tables, guides, bounds, ranks, limits, ratios, sources, coded,
//  first_pieces, out, counts, sums, listed, used, digests, hashed, arrays) -> whether everything could be read.
// ValueError: something of it does not fit the rest; nothing has been touched.
PyObject* run_stream(PyObject*, PyObject* all) {
  constexpr int kBuffers = 21;
  if (PyTuple_Size(all) != kBuffers + 1) {
    PyErr_Format(PyExc_TypeError, "%d arguments are wanted", kBuffers + 1);
    return nullptr;
  }
  Arrays arrays;
  if (!arrays.take(PyTuple_GetItem(all, kBuffers))) return nullptr;
  PyObject* arguments = PyTuple_GetSlice(all, 0, kBuffers);
  if (arguments == nullptr) return nullptr;
  Arguments<kBuffers> b;
  const bool taken = b.take(arguments, 14);
  Py_DECREF(arguments);  // `all` keeps them alive
  if (!taken) return nullptr;
  constexpr int kWide[] = {0, 1, 3, 4, 5, 7, 8, 11, 12, 13, 15, 16, 18, 19, 20}, kNarrow[] = {2, 6, 9, 10, 17};
  bool aligned = true;
  for (int i : kWide) aligned = aligned && b.is_aligned(i, 8);
  for (int i : kNarrow) aligned = aligned && b.is_aligned(i, 4);
  if (!aligned) return refused("an array is not aligned");
  if (b.count<Job>(0) < 1) return refused("an array is shorter than what is listed of it");
  const i64 source_count = b.count<Source>(11), coded_count = b.count<CodedSource>(12);
  Array<Source> sources;
  Array<CodedSource> coded;
  if (!sources.allocate(source_count) || !coded.allocate(coded_count)) return PyErr_NoMemory();
  for (i64 s = 0; s < source_count; ++s) sources[s] = b.at<Source>(11)[s];
  for (i64 k = 0; k < coded_count; ++k) coded[k] = b.at<CodedSource>(12)[k];
  const Program program = {b.at<Job>(0),         b.at<Operation>(1), b.count<Operation>(1), b.at<float>(2),
                           b.at<i64>(3),         b.at<i64>(4),       b.at<u64>(5),          b.at<u32>(6),
                           b.at<TableBounds>(7), b.at<i64>(8),       b.at<u32>(9),          b.at<float>(10),
                           sources.get(),        source_count,       coded.get(),           coded_count};
  const i64 rows = b.count<i64>(18);
  const Results results = {b.count<u8>(14) > 0 ? b.at<u8>(14) : nullptr,
                           b.at<i64>(15),
                           b.at<double>(16),
                           b.at<u32>(17),
                           rows > 0 ? b.count<u32>(17) / rows : 0,
                           b.at<i64>(18),
                           b.at<u64>(19),
                           source_count > 0 ? b.count<u64>(19) / 2 / source_count : 0,
                           b.at<i64>(20),
                           b.at<i64>(13)};
  const Lengths lengths = {b.count<float>(2),   b.count<i64>(3),  b.count<i64>(4),    b.count<u64>(5),  b.count<u32>(6),
                           b.count<TableBounds>(7), b.count<i64>(8), b.count<u32>(9), b.count<float>(10), b.count<i64>(13),
                           b.count<u8>(14),     b.count<i64>(15), b.count<double>(16), b.count<u32>(17), rows,
                           b.count<u64>(19),    b.count<i64>(20)};
  const char* fault = fault_of(program, results, lengths, arrays.get(), arrays.count());
  if (fault != nullptr) return refused(fault);
  for (i64 s = 0; s < source_count; ++s) sources[s].memory = sources[s].fd < 0 ? arrays.address(sources[s].memory) : 0;
  for (i64 k = 0; k < coded_count; ++k) {
    for (i64 CodedSource::*array : kArrays) coded[k].*array = arrays.address(coded[k].*array);
  }
  const Outcome outcome = unlocked([&] { return run(program, results); });
  if (outcome == Outcome::kNoMemory) return PyErr_NoMemory();
  if (outcome == Outcome::kMisfit) return refused("rows do not fill a register");
  return PyBool_FromLong(outcome == Outcome::kDone);
}

// (data, digests): of each whole piece of 64 KiB of the data its digest, high half first
PyObject* digests_of(PyObject*, PyObject* arguments) {
  constexpr i64 kBytes = 1 << 16;
  Arguments<2> b;
  if (!b.take(arguments, 1)) return nullptr;
  const i64 whole = b.count<u8>(0) / kBytes * kBytes;
  if (b.count<u64>(1) < 2 * (whole / kBytes)) return too_short();
  unlocked([&] {
    u64 accumulators[8];
    loops().hash(b.at<u8>(0), 0, whole, 0, accumulators, b.at<u64>(1));
  });
  Py_RETURN_NONE;
}

PyObject* levels_of(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Loops* const* level = levels(); names != nullptr && *level != nullptr; ++level) {
    PyObject* name = PyUnicode_FromString((*level)->name);
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* level_of(PyObject*, PyObject*) { return PyUnicode_FromString(loops().name); }

PyObject* sources_of(PyObject*, PyObject*) { return PyUnicode_FromString(DELTAMERGE_SOURCES); }

PyObject* choose_level(PyObject*, PyObject* arguments) {
  const char* name;
  if (!PyArg_ParseTuple(arguments, "s", &name)) return nullptr;
  return PyBool_FromLong(choose(name));
}

#ifdef DELTAMERGE_TEST_HOOKS
PyObject* replace_read(PyObject*, PyObject* arguments) {
  unsigned long long address;
  if (!PyArg_ParseTuple(arguments, "K", &address)) return nullptr;
  read_at = reinterpret_cast<ReadAt>(address);
  Py_RETURN_NONE;
}
#endif

PyMethodDef methods[] = {
    {"run", run_stream, METH_VARARGS, "Run a pass of a tensor (fused/program.py); whether everything could be read."},
    {"digests", digests_of, METH_VARARGS, "Digests of pieces (files/hashes.py)."},
    {"levels", levels_of, METH_NOARGS, "The names of this processor's levels, the best first."},
    {"level", level_of, METH_NOARGS, "The level whose loops are used."},
    {"sources", sources_of, METH_NOARGS, "A digest of the sources that this was compiled of (setup.py)."},
    {"choose", choose_level, METH_VARARGS, "Use the loops of the level of this name; whether there is one."},
#ifdef DELTAMERGE_TEST_HOOKS
    {"replace_read", replace_read, METH_VARARGS, "Read files by the function at an address, which has pread's type."},
#endif
    {"decode", decode, METH_VARARGS, "Values of codes (formats/quantised/codes.py)."},
    {"coded", coded, METH_VARARGS, "Blocks of values as codes (formats/quantised/coder.py)."},
    {"steps_pack", steps_pack, METH_VARARGS, "Numbers as bits (formats/delta/steps.py)."},
    {"steps_unpack", steps_unpack, METH_VARARGS, "Numbers of their bits."},
    {"steps_count", steps_count, METH_VARARGS, "How many elements have each exponent (formats/delta/steps.py)."},
    {"steps_rank", steps_rank, METH_VARARGS, "How many elements of its group stand before each position."},
    {"steps_place", steps_place, METH_VARARGS, "Positions of the elements that change."},
    {"trellis", trellis, METH_VARARGS, "Trellis codes of vectors (formats/delta/trellis.py)."},
    {"ordered_product", ordered_product, METH_VARARGS, "A matrix product, summed in order (tensors/views.py)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The compiled kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
