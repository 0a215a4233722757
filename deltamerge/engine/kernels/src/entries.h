// What entry points need: a call's arrays as buffers, and the list of entry points that stand in other files.
#pragma once

#include <Python.h>

#include "check.h"
#include "stream.h"

namespace deltamerge {

// The arguments of a call: contiguous arrays, released at its end, then numbers.
template <int kCount, int kNumbers = 0>
class Arguments {
 public:
  Arguments() = default;
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    for (int i = 0; i < taken_; ++i) PyBuffer_Release(&views_[i]);
  }

  i64 n[kNumbers + 1] = {};  // the numbers

  // Of the arrays the first `read` are only read. False: a Python error is set.
  bool take(PyObject* arguments, int read) {
    if (PyTuple_Size(arguments) != kCount + kNumbers) {
      PyErr_Format(PyExc_TypeError, "%d arguments are wanted", kCount + kNumbers);
      return false;
    }
    for (; taken_ < kCount; ++taken_) {
      int flags = taken_ < read ? PyBUF_SIMPLE : PyBUF_WRITABLE;
      if (PyObject_GetBuffer(PyTuple_GetItem(arguments, taken_), &views_[taken_], flags) != 0) return false;
    }
    for (int i = 0; i < kNumbers; ++i) {
      n[i] = PyLong_AsLongLong(PyTuple_GetItem(arguments, kCount + i));
      if (n[i] == -1 && PyErr_Occurred() != nullptr) return false;
    }
    return true;
  }

  bool is_aligned(int i, i64 size) const { return reinterpret_cast<std::uintptr_t>(views_[i].buf) % u64(size) == 0; }

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

// The arrays that sources and codes name by their numbers, released at the end of the call.
class Arrays {
 public:
  Arrays() = default;
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  ~Arrays() {
    for (i64 i = 0; i < taken_; ++i) PyBuffer_Release(&views_[i]);
  }

  // False: a Python error is set.
  bool take(PyObject* tuple) {
    const i64 count = PyTuple_Size(tuple);
    if (count < 0) return false;
    if (!views_.allocate(count) || !held_.allocate(count)) {
      PyErr_NoMemory();
      return false;
    }
    for (; taken_ < count; ++taken_) {
      if (PyObject_GetBuffer(PyTuple_GetItem(tuple, taken_), &views_[taken_], PyBUF_SIMPLE) != 0) return false;
      held_[taken_] = {views_[taken_].buf, views_[taken_].len};
    }
    return true;
  }

  const Held* get() const { return held_.get(); }
  i64 count() const { return taken_; }
  // 0 where there is none of this number.
  i64 address(i64 number) const {
    return number < 0 || number >= taken_ ? 0 : i64(reinterpret_cast<std::uintptr_t>(held_[number].at));
  }

 private:
  Array<Py_buffer> views_;
  Array<Held> held_;
  i64 taken_ = 0;
};

class Unlocked {
 public:
  Unlocked() = default;
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

// The result of `work`, while which the GIL is released.
template <class Work>
auto unlocked(Work work) {
  const Unlocked released;
  return work();
}

// Raises ValueError in these words.
PyObject* refused(const char* what);
// Raises ValueError: an array is shorter than what is listed of it.
PyObject* too_short();

// products.cpp
PyObject* ordered_product(PyObject*, PyObject* arguments);
PyObject* trellis(PyObject*, PyObject* arguments);
// quantised.cpp
PyObject* decode(PyObject*, PyObject* all);
PyObject* coded(PyObject*, PyObject* arguments);
// steps.cpp
PyObject* steps_pack(PyObject*, PyObject* arguments);
PyObject* steps_unpack(PyObject*, PyObject* arguments);
PyObject* steps_count(PyObject*, PyObject* arguments);
PyObject* steps_rank(PyObject*, PyObject* arguments);
PyObject* steps_place(PyObject*, PyObject* arguments);

}  // namespace deltamerge
