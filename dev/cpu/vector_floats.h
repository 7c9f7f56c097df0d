// Floats<n> of trainer/floats.cuh, which says what everything means, as one of g++'s vectors.
#pragma once
#if defined(__FMA__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstring>

#include "cuda_bf16.h"

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
        Vector x = low > a.v ? low : a.v;
        x = high < x ? high : x;
        const Vector shift = Floats(12582912.0f).v, shifted = x * 1.44269504f + shift, whole = shifted - shift;
        const Vector r = (x - whole * 0.69140625f) - whole * 1.74093056e-3f;
        Vector p = r * 1.39262508e-3f + 8.36323288e-3f;
        p = p * r + 4.16665542e-2f;
        p = p * r + 1.66665767e-1f;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
#ifdef __AVX512F__
        // Rounds as the two factors below do. Of a mask, since g++ 12 warns of what its own header does without one.
        if constexpr (n == 16) return Floats((Vector)_mm512_maskz_scalef_ps(0xffff, p, whole));
#endif
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
using Halves = typename VectorOf<unsigned short, n>::type;
template <int n>
__forceinline__ Floats<n> from_halves(Halves<n> halves) {
    using Bits = typename VectorOf<unsigned, n>::type;
    return Floats<n>((typename Floats<n>::Vector)(__builtin_convertvector(halves, Bits) << 16));
}
template <int n>
__forceinline__ Halves<n> to_halves(Floats<n> x) {
    using Bits = typename VectorOf<unsigned, n>::type;
    const Bits bits = (Bits)x.v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = Bits{} + 0x7fff;
    return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Halves<n>);
}
template <int n>
__forceinline__ Floats<n> load(const __nv_bfloat16* address) {
    Halves<n> halves;
    memcpy(&halves, address, sizeof(halves));
    return from_halves<n>(halves);
}
template <int n>
__forceinline__ void store(__nv_bfloat16* address, Floats<n> x) {
    const Halves<n> halves = to_halves(x);
    memcpy(address, &halves, sizeof(halves));
}

// The first `count` of 16, by mask. A count, since a mask's type is not everywhere.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 first_of_16(int count) { return __mmask16(_bzhi_u32(0xffff, count < 0 ? 0 : count)); }
__forceinline__ Floats<16> load_some(const float* address, int count) {
    return Floats<16>(_mm512_maskz_loadu_ps(first_of_16(count), address));
}
__forceinline__ Floats<16> load_some(const __nv_bfloat16* address, int count) {
    return from_halves<16>((Halves<16>)_mm256_maskz_loadu_epi16(first_of_16(count), address));
}
__forceinline__ void store_some(float* address, Floats<16> x, int count) {
    _mm512_mask_storeu_ps(address, first_of_16(count), x.v);
}
__forceinline__ void store_some(__nv_bfloat16* address, Floats<16> x, int count) {
    _mm256_mask_storeu_epi16(address, first_of_16(count), (__m256i)to_halves(x));
}
constexpr int masked_width = 16;
#else
constexpr int masked_width = 0;
#endif

template <int n, class T>
__forceinline__ Floats<n> load_first(const T* address, int count) {
    if constexpr (n == masked_width) {
        return load_some(address, count);
    } else {
        if (count >= n) return load<n>(address);
        T values[n] = {};
        for (int i = 0; i < count; i++) values[i] = address[i];
        return load<n>(values);
    }
}
template <int n, class T>
__forceinline__ void store_first(T* address, Floats<n> x, int count) {
    if constexpr (n == masked_width) {
        store_some(address, x, count);
    } else {
        if (count >= n) return store(address, x);
        T values[n];
        store(values, x);
        for (int i = 0; i < count; i++) address[i] = values[i];
    }
}

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#elif defined(__SSE__)
constexpr int register_bytes = 16;
#else
constexpr int register_bytes = 0;  // of a processor whose constraints are not known here
#endif
template <int n>
__forceinline__ Floats<n> in_register(Floats<n> x) {
    if constexpr (sizeof(x.v) <= register_bytes) asm("" : "+v"(x.v));
    return x;
}
