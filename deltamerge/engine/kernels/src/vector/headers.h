// What the loops include, before any function is compiled for a processor level.
#pragma once

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../loops.h"
