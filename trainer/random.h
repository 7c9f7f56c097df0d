// Random numbers from counters (SplitMix64): number i of a stream is the same wherever, and in whatever order, it is
// computed. constexpr makes the functions callable from kernels and from code that nvcc never sees.
#pragma once

#include <cstdint>

// Scatters the bits of x, one to one.
constexpr uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

constexpr uint64_t golden_gamma = 0x9e3779b97f4a7c15u;  // SplitMix64's increment, 2^64 / the golden ratio

constexpr uint64_t random_bits(uint64_t stream, uint64_t i) { return mix64(stream + (i + 1) * golden_gamma); }

// Uniform in (0, 1], 24 bits.
constexpr float random_uniform(uint64_t bits) { return ((bits >> 40) + 1) * 0x1p-24f; }

// Of both numbers and their order.
constexpr uint64_t hash64(uint64_t a, uint64_t b) { return mix64(random_bits(a, 0) + b); }
