// Compiles the loops for x86-64 with AVX-512 (Skylake-X, Zen 4 and later).
#if defined(__x86_64__)
#define DELTAMERGE_LEVEL 512
#define DELTAMERGE_TABLE kAvx512
#define DELTAMERGE_NAME "avx512"
#include "vector/headers.h"
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,lzcnt,popcnt,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,lzcnt,popcnt,f16c,prefer-vector-width=512")
#endif
#include "vector/table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
