// bfloat16 as CUDA defines it: the upper half of a float. Each operation is done in fp32 and rounded once. No
// conversion branches, so loops over them become vector code.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
    unsigned short x;
};

struct __nv_bfloat16 {
    unsigned short x;  // the bits

    __nv_bfloat16() = default;
    constexpr __nv_bfloat16(__nv_bfloat16_raw raw) : x(raw.x) {}
    // Rounds to nearest, ties to even. Every NaN becomes 0x7fff, as on the GPU.
    constexpr __nv_bfloat16(float value) {
        const unsigned bits = __float_as_uint(value);
        const unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        x = (unsigned short)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
    }
    constexpr __nv_bfloat16(double value) : __nv_bfloat16(round_to_odd(value)) {}
    constexpr __nv_bfloat16(int value) : __nv_bfloat16(double(value)) {}
    constexpr __nv_bfloat16(unsigned value) : __nv_bfloat16(double(value)) {}
    constexpr operator float() const { return __uint_as_float(unsigned(x) << 16); }
    constexpr operator __nv_bfloat16_raw() const { return {x}; }

    // A double as the float that rounds to the same bfloat16: towards zero, with the lowest bit set where inexact.
    static constexpr float round_to_odd(double value) {
        const float nearest = float(value);
        if (nearest == value || value != value || __builtin_isinf(nearest)) return nearest;
        const bool outward = (nearest < 0 ? -nearest : nearest) > (value < 0 ? -value : value);
        return __uint_as_float((__float_as_uint(nearest) - outward) | 1);
    }
};
typedef __nv_bfloat16 nv_bfloat16;

struct __align__(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    constexpr __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
typedef __nv_bfloat162 nv_bfloat162;

constexpr __nv_bfloat16 __float2bfloat16(float a) { return a; }
constexpr __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
constexpr __nv_bfloat16 __double2bfloat16(double a) { return a; }
constexpr __nv_bfloat16 __int2bfloat16_rn(int a) { return a; }
constexpr float __bfloat162float(__nv_bfloat16 a) { return a; }
constexpr __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16_raw{bits}; }
constexpr unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.x; }
constexpr __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
constexpr __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
constexpr __nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
constexpr __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
constexpr __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
constexpr float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
constexpr float __low2float(__nv_bfloat162 a) { return a.x; }
constexpr float __high2float(__nv_bfloat162 a) { return a.y; }
constexpr __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
constexpr __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }

constexpr __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) + float(b); }
constexpr __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) - float(b); }
constexpr __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) * float(b); }
constexpr __nv_bfloat16 operator/(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) / float(b); }
constexpr __nv_bfloat16 operator+(__nv_bfloat16 a) { return a; }
constexpr __nv_bfloat16 operator-(__nv_bfloat16 a) { return -float(a); }
constexpr __nv_bfloat16& operator+=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a + b; }
constexpr __nv_bfloat16& operator-=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a - b; }
constexpr __nv_bfloat16& operator*=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a * b; }
constexpr __nv_bfloat16& operator/=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a / b; }
constexpr bool operator==(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) == float(b); }
constexpr bool operator!=(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) != float(b); }
constexpr bool operator<(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) < float(b); }
constexpr bool operator>(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) > float(b); }
constexpr bool operator<=(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) <= float(b); }
constexpr bool operator>=(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) >= float(b); }
constexpr __nv_bfloat162 operator+(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
constexpr __nv_bfloat162 operator-(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x - b.x, a.y - b.y}; }
constexpr __nv_bfloat162 operator*(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }
constexpr __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }
constexpr __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) { return a - b; }
constexpr __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return a * b; }
constexpr __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return a + b; }
constexpr __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return a * b; }
constexpr bool __hisnan(__nv_bfloat16 a) { return a != a; }
