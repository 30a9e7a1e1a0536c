// What the kernels of linear attention and of batch descent share. Sequences are worked on in chunks of CHUNK tokens. Blocks are
// segments x chunks of the longest x heads x ...; those of chunks that a segment does not have return at once. Matrices of a chunk
// and head lie at index first / CHUNK + segment + chunk, which no other chunk has.
#pragma once
#include "element.cuh"

constexpr u32 CHUNK = 64, MAX_WIDTH = 128;

// Where segments lie: {first row, length, slot, phase}.
struct Layout {
    const u32* segments;
    u32 chunks, heads, width; // chunks of the longest segment, heads, columns of a head
};
struct ChunkPlace {
    u32 segment, chunk, head, rest; // rest: what else the block's index says
    u32 row, count, slot, first, phase;
    u64 index; // of the chunk
};
// False when there is no such chunk. `inner` blocks for each head.
DEVICE bool chunk_of(ChunkPlace& at, const Layout& layout, u32 inner) {
    u32 block = blockIdx.x;
    at.rest = block % inner, block /= inner;
    at.head = block % layout.heads, block /= layout.heads;
    at.chunk = block % layout.chunks, at.segment = block / layout.chunks;
    const u32* s = layout.segments + 4 * at.segment;
    const u32 len = s[1], done = at.chunk * CHUNK;
    if (done >= len) return false;
    at.first = s[0], at.slot = s[2], at.phase = s[3] + done;
    at.row = at.first + done, at.count = min(len - done, CHUNK);
    at.index = at.first / CHUNK + at.segment + at.chunk;
    return true;
}

// A matrix for each chunk and head.
constexpr u32 ROWS = 0;     // of activations [rows, heads x width], T
constexpr u32 ROWS_F32 = 1; // the same in f32
constexpr u32 CHUNKS = 2;   // f32, of each chunk and head, `size` numbers
constexpr u32 SLOTS = 3;    // f32, of each slot and head, `size` numbers
constexpr u32 SEGMENTS = 4; // f32, of each segment and head, `size` numbers
struct Operand {
    u64 base;
    u32 kind, stride, size, offset; // offset: of the matrix among those numbers
    u32 transposed, unused;         // as a factor
};
// The number of the matrix's first element, counted from `base`.
DEVICE u64 start_of(const Operand& x, const ChunkPlace& at, const Layout& layout) {
    if (x.kind <= ROWS_F32) return (u64)at.row * x.stride + at.head * layout.width;
    const u64 of = x.kind == CHUNKS ? at.index : x.kind == SLOTS ? at.slot : at.segment;
    return (of * layout.heads + at.head) * x.size + x.offset;
}
DEVICE float read(const Operand& x, u64 i) { return x.kind == ROWS ? number(((const T*)x.base)[i]) : ((const float*)x.base)[i]; }
DEVICE void write(const Operand& x, u64 i, float value) {
    if (x.kind == ROWS) put(((T*)x.base)[i], value);
    else ((float*)x.base)[i] = value;
}
