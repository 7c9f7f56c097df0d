// CRC-32, which tells a damaged file from a whole one of the same size.
#pragma once

#include <zlib.h>

#include <algorithm>
#include <cstdint>

#include "trainer/files.h"

// Of the bytes that gave `before` (0 for none) and these.
inline uint32_t crc32_of(uint32_t before, const void* data, size_t bytes) {
    return static_cast<uint32_t>(crc32_z(before, static_cast<const Bytef*>(data), bytes));
}

// Likewise, of bytes begin .. end - 1 of a file, which need not fit into memory.
inline uint32_t crc32_of(uint32_t before, const File& file, int64_t begin, int64_t end) {
    char piece[1 << 16];
    for (int64_t bytes; begin < end; begin += bytes) {
        bytes = std::min<int64_t>(end - begin, sizeof piece);
        file.read(begin, bytes, piece);
        before = crc32_of(before, piece, bytes);
    }
    return before;
}
