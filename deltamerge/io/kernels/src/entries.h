// What entry points need: a call's arrays as buffers, and the list of entry points that stand in other files.
#pragma once

#include <Python.h>

#include "loops.h"

namespace deltamerge {

// The contiguous arrays of a call, released at its end.
template <int kCount>
class Buffers {
 public:
  Buffers() = default;
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  ~Buffers() {
    for (int i = 0; i < taken_; ++i) PyBuffer_Release(&views_[i]);
  }

  // The first kCount arguments of a call, of which the first `read` are only read. False: a Python error is set.
  bool take(PyObject* arguments, int read) {
    if (PyTuple_Size(arguments) < kCount) {
      PyErr_Format(PyExc_TypeError, "%d arrays are wanted", kCount);
      return false;
    }
    for (; taken_ < kCount; ++taken_) {
      int flags = taken_ < read ? PyBUF_SIMPLE : PyBUF_WRITABLE;
      if (PyObject_GetBuffer(PyTuple_GetItem(arguments, taken_), &views_[taken_], flags) != 0) return false;
    }
    return true;
  }

  template <class T>
  T* at(int i) const {
    return static_cast<T*>(views_[i].buf);
  }

  template <class T>
  i64 count(int i) const {
    return i64(views_[i].len) / i64(sizeof(T));
  }

 private:
  Py_buffer views_[kCount];
  int taken_ = 0;
};

// The numbers that follow the arrays of a call. False: a Python error is set.
bool take_numbers(PyObject* arguments, Py_ssize_t from, i64* numbers, int count);
// Raises ValueError: an array is shorter than what is listed of it.
PyObject* too_short();

// delta.cpp
PyObject* delta_put(PyObject*, PyObject* arguments);
PyObject* delta_add(PyObject*, PyObject* arguments);
PyObject* delta_ranked(PyObject*, PyObject* arguments);
PyObject* ordered_product(PyObject*, PyObject* arguments);
// quantised.cpp
PyObject* scaled(PyObject*, PyObject* arguments);
PyObject* tabled(PyObject*, PyObject* arguments);
PyObject* turned_pairs(PyObject*, PyObject* arguments);
PyObject* turned_words(PyObject*, PyObject* arguments);
PyObject* coded(PyObject*, PyObject* arguments);
// steps.cpp
PyObject* steps_pack(PyObject*, PyObject* arguments);
PyObject* steps_unpack(PyObject*, PyObject* arguments);
PyObject* steps_count(PyObject*, PyObject* arguments);
PyObject* steps_rank(PyObject*, PyObject* arguments);
PyObject* steps_place(PyObject*, PyObject* arguments);

}  // namespace deltamerge
