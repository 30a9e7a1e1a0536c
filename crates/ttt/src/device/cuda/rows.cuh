// What the kernels over rows share: types, wide loads and stores, sums. T is the type of activations: float, or bf16 with
// TTT_BF16. Matrices are row-major; a stride is the number of elements from one row to the next.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
    u16 bits;
};

#ifdef TTT_BF16
typedef bf16 T;
#else
typedef float T;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

__device__ __forceinline__ void set(float &y, float x) { y = x; }
__device__ __forceinline__ void set(bf16 &y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Two bf16 in a word, the first in the low half.
__device__ __forceinline__ u32 pack(float first, float second) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// V neighbouring elements; V is 1, or 8 with 16-byte alignment.
template <int V> __device__ __forceinline__ void load(float *x, const float *from) {
    if (V == 1) {
        x[0] = from[0];
    } else {
        float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
}
template <int V> __device__ __forceinline__ void load(float *x, const bf16 *from) {
    if (V == 1) {
        x[0] = to_float(from[0]);
    } else {
        uint4 a = *(const uint4 *)from;
        u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}
template <int V> __device__ __forceinline__ void store(float *to, const float *x) {
    if (V == 1) {
        to[0] = x[0];
    } else {
        ((float4 *)to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        ((float4 *)to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
}
template <int V> __device__ __forceinline__ void store(bf16 *to, const float *x) {
    if (V == 1) {
        set(to[0], x[0]);
    } else {
        *(uint4 *)to = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    }
}

// Sum over the 32 lanes of a warp, in every lane; always the same tree.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// Sum over a block of at most 1024 threads, in every thread. `shared` holds 32 numbers.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float all = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f;
    return warp_sum(all);
}
__device__ __forceinline__ float block_max(float x, float *shared) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float all = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : -__int_as_float(0x7f800000);
    return warp_max(all);
}

// The index of this thread among all of a one-dimensional grid.
__device__ __forceinline__ i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
