// Floats<n>: n neighbours as one value. They are moved as words of up to 16 bytes and worked on in fp32, whatever type
// they have in memory. g++ makes vector registers of it where a build for speed includes dev/cpu/vector_floats.h; this
// form is the GPU's, where each lane has n registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

// Before a loop whose count is known and whose arrays are to be registers.
#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#elif defined(CPU_DEVICE_FAST)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__host__ __device__ inline T from_float(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return __float2bfloat16(x);
}

#ifdef CPU_DEVICE_FAST
#include "vector_floats.h"
#else

template <int n>
struct Floats {
    float v[n];

    Floats() = default;
    __device__ Floats(float x) {
#pragma unroll
        for (int i = 0; i < n; i++) v[i] = x;
    }
    __device__ float& operator[](int i) { return v[i]; }
    __device__ float operator[](int i) const { return v[i]; }

    // Element i is of(i).
    template <class Function>
    __device__ static Floats each(Function of) {
        Floats x;
#pragma unroll
        for (int i = 0; i < n; i++) x.v[i] = of(i);
        return x;
    }

    friend __device__ Floats operator+(Floats a, Floats b) {
        return each([&](int i) { return a[i] + b[i]; });
    }
    friend __device__ Floats operator-(Floats a, Floats b) {
        return each([&](int i) { return a[i] - b[i]; });
    }
    friend __device__ Floats operator*(Floats a, Floats b) {
        return each([&](int i) { return a[i] * b[i]; });
    }
    friend __device__ Floats operator/(Floats a, Floats b) {
        return each([&](int i) { return a[i] / b[i]; });
    }
    friend __device__ Floats operator-(Floats a) {
        return each([&](int i) { return -a[i]; });
    }
    friend __device__ Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
    friend __device__ Floats& operator-=(Floats& a, Floats b) { return a = a - b; }
    friend __device__ Floats& operator*=(Floats& a, Floats b) { return a = a * b; }

    // a * b + c, rounded once in every build.
    friend __device__ Floats fma(Floats a, Floats b, Floats c) {
        return each([&](int i) { return fmaf(a[i], b[i], c[i]); });
    }
    friend __device__ Floats exp(Floats a) {
        return each([&](int i) { return __expf(a[i]); });
    }
    friend __device__ Floats sqrt(Floats a) {
        return each([&](int i) { return sqrtf(a[i]); });
    }
    // Unlike fmaxf, one instruction everywhere; b where a is NaN.
    friend __device__ Floats larger(Floats a, Floats b) {
        return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
    }
    // Elements begin .. end - 1 of a, and `other` in place of the rest.
    friend __device__ Floats keep(Floats a, int begin, int end, float other) {
        return each([&](int i) { return i >= begin && i < end ? a[i] : other; });
    }
    friend __device__ float sum_of(const Floats& a) {
        if constexpr (n == 1) return a[0];
        else return sum_of(Floats<n / 2>::each([&](int i) { return a[i] + a[i + n / 2]; }));
    }
    friend __device__ float max_of(const Floats& a) {
        if constexpr (n == 1) return a[0];
        else return max_of(Floats<n / 2>::each([&](int i) { return a[i] > a[i + n / 2] ? a[i] : a[i + n / 2]; }));
    }
};

// The elements 0, 2, 4 ... and 1, 3, 5 ... of twice as many.
template <int n>
__device__ inline Floats<n / 2> evens(const Floats<n>& x) {
    return Floats<n / 2>::each([&](int i) { return x[2 * i]; });
}
template <int n>
__device__ inline Floats<n / 2> odds(const Floats<n>& x) {
    return Floats<n / 2>::each([&](int i) { return x[2 * i + 1]; });
}

// Row i of a square becomes its column i.
template <int n>
__device__ inline void transpose(Floats<n> (&square)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) {
#pragma unroll
        for (int k = 0; k < i; k++) {
            const float x = square[i][k];
            square[i][k] = square[k][i];
            square[k][i] = x;
        }
    }
}

// n values of T in memory, as words that one instruction moves.
template <class T, int n>
struct Words {
    static constexpr int bytes = n * sizeof(T) < 16 ? n * sizeof(T) : 16, count = n * sizeof(T) / bytes;
    using Word = std::conditional_t<bytes == 16, uint4, std::conditional_t<bytes == 8, uint2, unsigned> >;
    Word words[count];
};

// n neighbours, the address being a multiple of their size or of 16 bytes.
template <int n, class T>
__device__ inline Floats<n> load(const T* address) {
    Words<T, n> memory;
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < memory.count; i++)
        memory.words[i] = reinterpret_cast<const typename Words<T, n>::Word*>(address)[i];
#else
    memcpy(&memory, address, sizeof(memory));
#endif
    T values[n];
    memcpy(values, &memory, sizeof(memory));
    return Floats<n>::each([&](int i) { return to_float(values[i]); });
}

template <class T, int n>
__device__ inline Words<T, n> words_of(const Floats<n>& x) {
    T values[n];
#pragma unroll
    for (int i = 0; i < n; i++) values[i] = from_float<T>(x[i]);
    Words<T, n> memory;
    memcpy(&memory, values, sizeof(memory));
    return memory;
}

// To global memory. By an intrinsic, since nvcc may split the store of a word into those of its elements.
template <class T, int n>
__device__ inline void store(T* address, const Floats<n>& x) {
    const Words<T, n> memory = words_of<T>(x);
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < memory.count; i++)
        __stwb(reinterpret_cast<typename Words<T, n>::Word*>(address) + i, memory.words[i]);
#else
    memcpy(address, &memory, sizeof(memory));
#endif
}

// To shared memory.
template <int n>
__device__ inline void store_shared(float* address, const Floats<n>& x) {
    const Words<float, n> memory = words_of<float>(x);
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < memory.count; i++)
        reinterpret_cast<typename Words<float, n>::Word*>(address)[i] = memory.words[i];
#else
    memcpy(address, &memory, sizeof(memory));
#endif
}

// The first `count` of n neighbours, a multiple of 4, and zeros in place of the rest.
template <int n, class T>
__device__ inline Floats<n> load_first(const T* address, int count) {
    if (count >= n) return load<n>(address);
    Floats<n> x = 0.0f;
    if constexpr (n > 4) {
        for (int i = 0; i < count; i += 4) {
            const Floats<4> part = load<4>(address + i);
            for (int k = 0; k < 4; k++) x[i + k] = part[k];
        }
    }
    return x;
}
template <int n, class T>
__device__ inline void store_first(T* address, const Floats<n>& x, int count) {
    if (count >= n) return store(address, x);
    if constexpr (n > 4) {
        for (int i = 0; i < count; i += 4) store(address + i, Floats<4>::each([&](int k) { return x[i + k]; }));
    }
}

// A value that several instructions use: g++ would give each of them the address it was loaded from.
template <int n>
__device__ inline Floats<n> in_register(const Floats<n>& x) {
    return x;
}

#endif
