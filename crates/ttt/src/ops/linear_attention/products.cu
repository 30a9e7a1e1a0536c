// Products of the matrices of each chunk and head, in f32; sums and running sums. See chunks.cuh.
#include "chunks.cuh"

struct Pair {
    Operand a, b;
};
// y = sum of up to three products a b (+ add) (+ columns for every row); masked: y[i][j] + one + rows[i] where j <= i, else 0.
// Extents are tokens of the chunk (0) or columns of a head (1).
struct ProductParams {
    Layout layout;
    Pair pairs[3];
    Operand y, add, columns;
    const float* rows; // [rows, heads], or null
    u32 count, m, n, k[3], masked;
    float one;
};

constexpr u32 TILE = 64, DEPTH = 16, PITCH = TILE + 4;

// Blocks: layout x tiles of y. 256 threads, 4 x 4 numbers each.
KERNEL __launch_bounds__(256, 2) chunk_product(const __grid_constant__ ProductParams p) {
    __shared__ __align__(16) float a_tile[DEPTH * PITCH], b_tile[DEPTH * PITCH];
    const u32 d = p.layout.width, across = (d + TILE - 1) / TILE, tiles_m = p.m ? across : 1, tiles_n = p.n ? across : 1;
    ChunkPlace at;
    if (!chunk_of(at, p.layout, tiles_m * tiles_n)) return;
    const u32 first_m = at.rest / tiles_n * TILE, first_n = at.rest % tiles_n * TILE;
    const u32 m = p.m ? d : at.count, n = p.n ? d : at.count, ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (u32 pair = 0; pair < p.count; pair++) {
        const Pair& q = p.pairs[pair];
        const u32 k = p.k[pair] ? d : at.count;
        const u64 a = start_of(q.a, at, p.layout), b = start_of(q.b, at, p.layout);
        for (u32 first_k = 0; first_k < k; first_k += DEPTH) {
            __syncthreads();
#pragma unroll
            for (u32 e = threadIdx.x; e < TILE * DEPTH; e += 256) {
                // The index that runs along memory runs along threads.
                const u32 row = q.a.transposed ? e % TILE : e / DEPTH, depth = q.a.transposed ? e / TILE : e % DEPTH;
                const u64 i = q.a.transposed ? (u64)(first_k + depth) * q.a.stride + first_m + row : (u64)(first_m + row) * q.a.stride + first_k + depth;
                a_tile[depth * PITCH + row] = first_m + row < m && first_k + depth < k ? read(q.a, a + i) : 0.0f;
            }
#pragma unroll
            for (u32 e = threadIdx.x; e < TILE * DEPTH; e += 256) {
                const u32 column = q.b.transposed ? e / DEPTH : e % TILE, depth = q.b.transposed ? e % DEPTH : e / TILE;
                const u64 i = q.b.transposed ? (u64)(first_n + column) * q.b.stride + first_k + depth : (u64)(first_k + depth) * q.b.stride + first_n + column;
                b_tile[depth * PITCH + column] = first_n + column < n && first_k + depth < k ? read(q.b, b + i) : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (u32 depth = 0; depth < DEPTH; depth++) {
                const float4 x = *(const float4*)(a_tile + depth * PITCH + ty), w = *(const float4*)(b_tile + depth * PITCH + tx);
                const float left[4] = {x.x, x.y, x.z, x.w}, right[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++)
#pragma unroll
                    for (u32 j = 0; j < 4; j++) sum[i][j] += left[i] * right[j];
            }
        }
    }
    const u64 y = start_of(p.y, at, p.layout), add = p.add.base ? start_of(p.add, at, p.layout) : 0;
    const u64 columns = p.columns.base ? start_of(p.columns, at, p.layout) : 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 row = first_m + ty + i;
        if (row >= m) continue;
        const float whole = p.one + (p.rows ? p.rows[(u64)(at.row + row) * p.layout.heads + at.head] : 0.0f);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 column = first_n + tx + j;
            if (column >= n) continue;
            float value = sum[i][j];
            if (p.masked) value = column <= row ? value + whole : 0.0f;
            if (p.add.base) value += read(p.add, add + (u64)row * p.add.stride + column);
            if (p.columns.base) value += read(p.columns, columns + column);
            write(p.y, y + (u64)row * p.y.stride + column, value);
        }
    }
}

// y = sums over a chunk's rows of one or two matrices of rows, each row times `weights` where there are any.
struct SumParams {
    Layout layout;
    Operand x[2], y;
    const float* weights; // [rows, heads], or null
    u32 count;
};
// Blocks: layout. 128 threads, one a column.
KERNEL __launch_bounds__(128) chunk_sum(const __grid_constant__ SumParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, 1) || threadIdx.x >= p.layout.width) return;
    float sum = 0.0f;
    for (u32 which = 0; which < p.count; which++) {
        const u64 x = start_of(p.x[which], at, p.layout) + threadIdx.x;
        for (u32 t = 0; t < at.count; t++) {
            const float weight = p.weights ? p.weights[(u64)(at.row + t) * p.layout.heads + at.head] : 1.0f;
            sum += weight * read(p.x[which], x + (u64)t * p.x[which].stride);
        }
    }
    write(p.y, start_of(p.y, at, p.layout) + threadIdx.x, sum);
}

// Running sums: what the chunks of a segment hold is replaced by the sum of what `state` holds and of all chunks before (behind, when
// `reverse`), and the state by the sum of all.
struct RunningParams {
    Layout layout;
    Operand chunks, state;
    u32 numbers, reverse;
};
// Blocks: segments x heads x 256 numbers.
KERNEL __launch_bounds__(256) running_sum(const __grid_constant__ RunningParams p) {
    const u32 parts = (p.numbers + 255) / 256, e = blockIdx.x % parts * 256 + threadIdx.x;
    ChunkPlace at;
    at.head = blockIdx.x / parts % p.layout.heads, at.segment = blockIdx.x / parts / p.layout.heads;
    const u32* s = p.layout.segments + 4 * at.segment;
    if (e >= p.numbers) return;
    at.slot = s[2];
    const u32 count = (s[1] + CHUNK - 1) / CHUNK;
    float* const state = (float*)p.state.base + start_of(p.state, at, p.layout) + e;
    float sum = *state;
    at.index = s[0] / CHUNK + at.segment;
    float* const chunks = (float*)p.chunks.base + start_of(p.chunks, at, p.layout) + e;
    const u64 step = (u64)p.layout.heads * p.chunks.size;
#pragma unroll 4
    for (u32 i = 0; i < count; i++) {
        float* const own = chunks + (p.reverse ? count - 1 - i : i) * step;
        const float value = *own;
        *own = sum;
        sum += value;
    }
    *state = sum;
}
