// The module `_native`: the entry points that Python calls, with numpy's arrays as buffers. They release the GIL.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "entries.h"
#include "program.h"

namespace {

using namespace deltamerge;

// (job, operations, weights, operands, lists, tables, guides, bounds, ranks, limits, ratios, sources, coded,
//  first_pieces, out, counts, sums, listed, used, digests, hashed) -> whether everything could be read
PyObject* run_stream(PyObject*, PyObject* arguments) {
  Arguments<21> b;
  if (!b.take(arguments, 14)) return nullptr;
  const Program program = {b.at<Job>(0),         b.at<Operation>(1),  b.count<Operation>(1), b.at<float>(2),
                           b.at<i64>(3),         b.at<i64>(4),        b.at<u64>(5),          b.at<u32>(6),
                           b.at<TableBounds>(7), b.at<i64>(8),        b.at<u32>(9),          b.at<float>(10),
                           b.at<Source>(11),     b.count<Source>(11), b.at<CodedSource>(12), b.count<CodedSource>(12)};
  const i64 rows = b.count<i64>(18), sources = program.source_count;
  const Results results = {b.count<u8>(14) > 0 ? b.at<u8>(14) : nullptr,
                           b.at<i64>(15),
                           b.at<double>(16),
                           b.at<u32>(17),
                           rows > 0 ? b.count<u32>(17) / rows : 0,
                           b.at<i64>(18),
                           b.at<u64>(19),
                           sources > 0 ? b.count<u64>(19) / 2 / sources : 0,
                           b.at<i64>(20),
                           b.at<i64>(13)};
  const Outcome outcome = unlocked([&] { return run(program, results); });
  if (outcome == Outcome::kNoMemory) return PyErr_NoMemory();
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

PyObject* choose_level(PyObject*, PyObject* arguments) {
  const char* name;
  if (!PyArg_ParseTuple(arguments, "s", &name)) return nullptr;
  return PyBool_FromLong(choose(name));
}

PyObject* replace_read(PyObject*, PyObject* arguments) {
  unsigned long long address;
  if (!PyArg_ParseTuple(arguments, "K", &address)) return nullptr;
  read_at = reinterpret_cast<ReadAt>(address);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"run", run_stream, METH_VARARGS, "Run a pass of a tensor (fused/program.py); whether everything could be read."},
    {"digests", digests_of, METH_VARARGS, "Digests of pieces (io/pieces.py)."},
    {"levels", levels_of, METH_NOARGS, "The names of this processor's levels, the best first."},
    {"level", level_of, METH_NOARGS, "The level whose loops are used."},
    {"choose", choose_level, METH_VARARGS, "Use the loops of the level of this name; whether there is one."},
    {"replace_read", replace_read, METH_VARARGS, "Read files by the function at an address, which has pread's type."},
    {"put", delta_put, METH_VARARGS, "Put values at stored positions (delta/in_place.py)."},
    {"add", delta_add, METH_VARARGS, "Add values at stored positions."},
    {"ranked", delta_ranked, METH_VARARGS, "Scales of their stored ranks."},
    {"scaled", scaled, METH_VARARGS, "Codes times scales (io/quantised/scaled.py)."},
    {"tabled", tabled, METH_VARARGS, "Codes of four bits by a table, times scales (io/quantised/packing.py)."},
    {"turned_pairs", turned_pairs, METH_VARARGS, "The same of a matrix stored transposed (io/quantised/fp4.py)."},
    {"turned_words", turned_words, METH_VARARGS, "Words of codes stored transposed (io/quantised/columnwise.py)."},
    {"coded", coded, METH_VARARGS, "Blocks of values as codes (io/quantised/coder.py)."},
    {"steps_pack", steps_pack, METH_VARARGS, "Numbers as bits (delta/bit_lists.py)."},
    {"steps_unpack", steps_unpack, METH_VARARGS, "Numbers of their bits."},
    {"steps_count", steps_count, METH_VARARGS, "How many elements have each exponent (delta/steps.py)."},
    {"steps_rank", steps_rank, METH_VARARGS, "How many elements of its group stand before each position."},
    {"steps_place", steps_place, METH_VARARGS, "Positions of the elements that change."},
    {"ordered_product", ordered_product, METH_VARARGS, "A matrix product, summed in order (io/computed.py)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The compiled kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
