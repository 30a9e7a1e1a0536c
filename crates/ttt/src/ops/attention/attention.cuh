// Tiles of the attention kernels for one head size, and how a warp's products are made.
#pragma once
#include "attention_params.cuh"
#ifndef HEAD_DIM
#error "HEAD_DIM must be defined (64, 96 or 128)"
#endif

constexpr u32 D = HEAD_DIM;
constexpr u32 THREADS = 128;
// 16-row tiles of a warp. With two, what is read from shared memory serves twice as many products; beyond 64 columns registers
// allow one.
constexpr u32 TILES = D <= 64 ? 2 : 1;
constexpr u32 ROWS = 4 * 16 * TILES; // queries of a block, or in the backward pass of keys and values its keys
constexpr u32 STEP = 64;             // rows of what a block walks over at a time
constexpr u32 STEPS = D / 16;

// Tiles [rows, D] of bf16 without padding; 16-byte chunks of a row are permuted by its number so that neither the 8 rows of an
// ldmatrix nor the chunks of a copy share a bank.
constexpr u32 PITCH = 2 * D;
constexpr u32 CHUNKS = D / 8;
DEVICE u32 permutation(u32 row) { return D % 64 == 0 ? row & 7 : row >> 1 & 3; }
DEVICE u32 chunk_at(u32 row, u32 chunk) { return row * PITCH + ((chunk ^ permutation(row)) << 4); }

struct Lane {
    u32 warp, lane, g, c;
    u32 row_a, half_a; // ldmatrix row and chunk of an A operand [row, column], or transposed of two B operands [row, column]
    u32 row_b, half_b; // of two B operands [column, row]
    DEVICE Lane() {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
        row_a = lane % 16, half_a = lane / 16;
        row_b = lane % 8 + lane / 16 * 8, half_b = lane / 8 % 2;
    }
};

// Rows [16 i, 16 i + 16), columns [16 s, 16 s + 16) of a tile.
DEVICE void load_a(u32 (&r)[4], u32 tile, u32 i, u32 s, const Lane& l) {
    ldmatrix_x4(r, tile + 16 * i * PITCH + l.row_a * PITCH + ((2 * s + l.half_a ^ permutation(l.row_a)) << 4));
}
// The tile's rows as columns of two B operands: r[0], r[1] of rows [16 i, 16 i + 8), r[2], r[3] of the next 8.
DEVICE void load_b(u32 (&r)[4], u32 tile, u32 i, u32 s, const Lane& l) {
    ldmatrix_x4(r, tile + 16 * i * PITCH + l.row_b * PITCH + ((2 * s + l.half_b ^ permutation(l.row_b)) << 4));
}
// The tile's rows as rows of two B operands: r[0], r[1] of columns [16 s, 16 s + 8), r[2], r[3] of the next 8.
DEVICE void load_b_rows(u32 (&r)[4], u32 tile, u32 i, u32 s, const Lane& l) {
    ldmatrix_x4_trans(r, tile + 16 * i * PITCH + l.row_a * PITCH + ((2 * s + l.half_a ^ permutation(l.row_a)) << 4));
}
// Two accumulators of neighbouring columns as an A operand.
DEVICE void pack_a(u32 (&a)[4], const float (&x)[4], const float (&y)[4]) {
    a[0] = pack_bf16(x[0], x[1]), a[1] = pack_bf16(x[2], x[3]);
    a[2] = pack_bf16(y[0], y[1]), a[3] = pack_bf16(y[2], y[3]);
}

// Copies rows [first, first + rows) of one head of keys and of values into a tile each; rows from `end` on become zero.
DEVICE void copy_keys(u32 keys, u32 values, u32 rows, const AttentionParams& p, const Segment& s, u32 kv_head, u32 first, u32 end) {
#pragma unroll
    for (u32 i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
        const u32 row = i / CHUNKS, chunk = i % CHUNKS, key = first + row, at = min(key, end - 1), to = chunk_at(row, chunk);
        const u32 column = kv_head * D + 8 * chunk;
        copy_async_16(keys + to, key_row<u16>(p.k, p.k_stride, p.keys, p, s, at) + column, key < end);
        copy_async_16(values + to, key_row<u16>(p.v, p.v_stride, p.values, p, s, at) + column, key < end);
    }
}
// Copies rows of one head of what has a row for each token of the batch.
DEVICE void copy_rows(u32 tile, u32 rows, const void* x, u32 stride, u32 head, u32 first, u32 end) {
    for (u32 i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
        const u32 row = i / CHUNKS, chunk = i % CHUNKS, at = first + row;
        const u16* from = (const u16*)x + (u64)(at < end ? at : end - 1) * stride + head * D + 8 * chunk;
        copy_async_16(tile + chunk_at(row, chunk), from, at < end);
    }
}

// Which block of which head of which segment this one is. The blocks of `together` heads lie side by side, their last blocks first:
// these are the longest, and keys and values are read again while they are in L2.
struct Task {
    u32 block, head, segment;
    DEVICE Task(const AttentionParams& p, u32 heads) {
        const u32 all = p.count * heads, group = blockIdx.x / (p.together * p.blocks), rest = blockIdx.x % (p.together * p.blocks);
        const u32 here = min(p.together, all - group * p.together);
        const u32 task = group * p.together + rest % here;
        block = rest / here, head = task % heads, segment = task / heads;
    }
};
