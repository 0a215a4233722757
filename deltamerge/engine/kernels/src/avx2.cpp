// Compiles the loops for x86-64 with AVX2 (Haswell, Zen and later).
#if defined(__x86_64__)
#define DELTAMERGE_LEVEL 2
#define DELTAMERGE_TABLE kAvx2
#define DELTAMERGE_NAME "avx2"
#include "vector/headers.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt,f16c")
#endif
#include "vector/table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
