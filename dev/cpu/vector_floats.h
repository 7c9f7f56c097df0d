// Floats<n> of trainer/floats.cuh, which says what everything means, as one of g++'s vectors.
#pragma once
#if defined(__FMA__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>

#include "cuda_bf16.h"

// No function here is called: all are inlined, so that no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

template <class T, int n>
struct VectorOf {
    typedef T type __attribute__((vector_size(n * sizeof(T))));
};

template <int n>
struct Floats {
    using Vector = typename VectorOf<float, n>::type;
    using Integers = typename VectorOf<int, n>::type;
    Vector v;

    Floats() = default;
    __forceinline__ Floats(float x) : v(x - Vector{}) {}
    __forceinline__ explicit Floats(Vector v) : v(v) {}
    __forceinline__ float operator[](int i) const { return v[i]; }

    template <class Function>
    __forceinline__ static Floats each(Function of) {
        Floats x;
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) x.v[i] = of(i);
        return x;
    }

    __forceinline__ friend Floats operator+(Floats a, Floats b) { return Floats(a.v + b.v); }
    __forceinline__ friend Floats operator-(Floats a, Floats b) { return Floats(a.v - b.v); }
    __forceinline__ friend Floats operator*(Floats a, Floats b) { return Floats(a.v * b.v); }
    __forceinline__ friend Floats operator/(Floats a, Floats b) { return Floats(a.v / b.v); }
    __forceinline__ friend Floats operator-(Floats a) { return Floats(-a.v); }
    __forceinline__ friend Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
    __forceinline__ friend Floats& operator-=(Floats& a, Floats b) { return a = a - b; }
    __forceinline__ friend Floats& operator*=(Floats& a, Floats b) { return a = a * b; }

    // g++ does not always make one instruction of the loop.
    __forceinline__ friend Floats fma(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
        if constexpr (n == 16) return Floats((Vector)_mm512_fmadd_ps(a.v, b.v, c.v));
#endif
#ifdef __FMA__
        if constexpr (n == 8) return Floats((Vector)_mm256_fmadd_ps(a.v, b.v, c.v));
        if constexpr (n == 4) return Floats((Vector)_mm_fmadd_ps(a.v, b.v, c.v));
#endif
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
        return c;
    }
    __forceinline__ friend Floats sqrt(Floats a) {
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) a.v[i] = sqrtf(a.v[i]);  // one instruction, too
        return a;
    }
    // __expf of device_functions.h, which explains the numbers, to the bit.
    __forceinline__ friend Floats exp(Floats a) {
        const Vector low = Floats(-105.0f).v, high = Floats(89.0f).v;
        Vector x = a.v < low ? low : a.v;
        x = x > high ? high : x;
        const Vector shift = Floats(12582912.0f).v, shifted = x * 1.44269504f + shift, whole = shifted - shift;
        const Vector r = (x - whole * 0.69140625f) - whole * 1.74093056e-3f;
        Vector p = r * 1.39262508e-3f + 8.36323288e-3f;
        p = p * r + 4.16665542e-2f;
        p = p * r + 1.66665767e-1f;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        const Integers biased = (Integers)shifted - (Integers)shift + 2 * 127, half = biased >> 1;
        return Floats(p * (Vector)(half << 23) * (Vector)((biased - half) << 23));
    }
    __forceinline__ friend Floats larger(Floats a, Floats b) { return Floats(a.v > b.v ? a.v : b.v); }
    __forceinline__ friend Floats keep(Floats a, int begin, int end, float other) {
        Integers index = {};
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) index[i] = i;
        return Floats((index >= begin) & (index < end) ? a.v : Floats(other).v);
    }
    __forceinline__ friend float sum_of(Floats a) {
        if constexpr (n == 1) return a.v[0];
        else return sum_of(a.low() + a.high());
    }
    __forceinline__ friend float max_of(Floats a) {
        if constexpr (n == 1) return a.v[0];
        else return max_of(larger(a.low(), a.high()));
    }

    __forceinline__ Floats<n / 2> low() const { return part(0); }
    __forceinline__ Floats<n / 2> high() const { return part(1); }

  private:
    __forceinline__ Floats<n / 2> part(int which) const {
        Floats<n / 2> halves[2];
        memcpy(halves, &v, sizeof(v));
        return halves[which];
    }
};

template <int n>
__forceinline__ Floats<n / 2> evens(const Floats<n>& x) {
    Floats<n / 2> result;
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) result.v[i] = x.v[2 * i];
    return result;
}
template <int n>
__forceinline__ Floats<n / 2> odds(const Floats<n>& x) {
    Floats<n / 2> result;
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) result.v[i] = x.v[2 * i + 1];
    return result;
}

// Of each two rows that lie `half` apart, the upper right and the lower left squares change places; so with the halves
// of those squares, down to single elements.
template <int half, int n>
__forceinline__ void transpose_halves(Floats<n> (&square)[n]) {
    typename Floats<n>::Integers upper = {}, lower = {};
#pragma GCC unroll 16
    for (int k = 0; k < n; k++) {
        upper[k] = k & half ? n + k - half : k;
        lower[k] = k & half ? n + k : k + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) {
        if (i & half) continue;
        const auto a = square[i].v, b = square[i + half].v;
        square[i].v = __builtin_shuffle(a, b, upper);
        square[i + half].v = __builtin_shuffle(a, b, lower);
    }
    if constexpr (half > 1) transpose_halves<half / 2>(square);
}
template <int n>
__forceinline__ void transpose(Floats<n> (&square)[n]) {
    transpose_halves<n / 2>(square);
}

template <int n>
__forceinline__ Floats<n> load(const float* address) {
    Floats<n> x;
    memcpy(&x.v, address, sizeof(x.v));
    return x;
}
template <int n>
__forceinline__ void store(float* address, Floats<n> x) {
    memcpy(address, &x.v, sizeof(x.v));
}
template <int n>
__forceinline__ void store_shared(float* address, Floats<n> x) {
    store(address, x);
}

template <int n>
__forceinline__ Floats<n> load(const __nv_bfloat16* address) {
    using Halves = typename VectorOf<unsigned short, n>::type;
    using Bits = typename VectorOf<unsigned, n>::type;
    Halves halves;
    memcpy(&halves, address, sizeof(halves));
    return Floats<n>((typename Floats<n>::Vector)(__builtin_convertvector(halves, Bits) << 16));
}
template <int n>
__forceinline__ void store(__nv_bfloat16* address, Floats<n> x) {
    using Halves = typename VectorOf<unsigned short, n>::type;
    using Bits = typename VectorOf<unsigned, n>::type;
    const Bits bits = (Bits)x.v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = Bits{} + 0x7fff;
    const Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves);
    memcpy(address, &halves, sizeof(halves));
}
