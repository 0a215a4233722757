// Chooses the loops of the best level that the processor has, or of a lesser one that is asked for.
#include <cstring>

#include "loops.h"

namespace deltamerge {

namespace {

struct Found {
  const Loops* levels[4] = {};

  Found() {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) {
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        levels[count++] = &kAvx512;
      }
      levels[count++] = &kAvx2;
    }
#endif
    levels[count] = &kBaseline;
  }
};

const Found& found() {
  static const Found once;
  return once;
}

const Loops*& chosen() {
  static const Loops* current = found().levels[0];
  return current;
}

}  // namespace

const Loops* const* levels() { return found().levels; }

const Loops& loops() { return *chosen(); }

bool choose(const char* name) {
  for (const Loops* const* level = levels(); *level != nullptr; ++level) {
    if (std::strcmp((*level)->name, name) == 0) {
      chosen() = *level;
      return true;
    }
  }
  return false;
}

}  // namespace deltamerge
