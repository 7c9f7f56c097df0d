// add_weighted_rows of trainer/device.cuh, which says what it computes, in g++'s vectors.
#pragma once
#include <algorithm>
#include <cstring>

#include "device_functions.h"

template <int count, int n>
__forceinline__ void add_weighted_rows(float (&sum)[n], const float* weights, const float* rows, int stride) {
#ifdef __AVX512F__
    constexpr int width = n % 16 == 0 ? 16 : 8;
#else
    constexpr int width = 8;
#endif
    typedef float Vector __attribute__((vector_size(width * sizeof(float))));
    typedef float Unaligned __attribute__((vector_size(width * sizeof(float)), aligned(sizeof(float))));
    constexpr int vectors = n / width, chains = std::max(1, 8 / vectors);  // independent sums, to hide FMA's latency
    static_assert(n % width == 0 && count % chains == 0);
    Vector total[chains][vectors] = {};
    memcpy(total[0], sum, sizeof(sum));
#pragma GCC unroll 1
    for (int k = 0; k < count; k += chains) {
#pragma GCC unroll 16
        for (int c = 0; c < chains; c++) {
#pragma GCC unroll 16
            for (int i = 0; i < vectors; i++) {
                total[c][i] += weights[k + c] * *(const Unaligned*)(rows + (k + c) * stride + i * width);
            }
        }
    }
#pragma GCC unroll 16
    for (int c = 1; c < chains; c++) {
#pragma GCC unroll 16
        for (int i = 0; i < vectors; i++) total[0][i] += total[c][i];
    }
    memcpy(sum, total[0], sizeof(sum));
}
