// What every kernel may use: integer names, bf16 as bits, and the matrix, copy and barrier instructions as inline PTX.
// No toolkit header is included, so that NVRTC needs none. `scripts/kernels/emulate` replaces this file to run kernels on a CPU:
// a function added here has a plain C++ twin there.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
// The block's dynamic shared memory, 16-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

constexpr u32 FULL_WARP = 0xffffffffu;

// ---- bf16 -------------------------------------------------------------------------------------------------------------------

// Two numbers rounded to nearest even; `lo` in the low half.
DEVICE u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
DEVICE float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE u16 bf16_bits(float x) { return (u16)pack_bf16(x, 0.0f); }
DEVICE float bf16_f32(u16 bits) { return __uint_as_float((u32)bits << 16); }
// x as bf16 holds it.
DEVICE float round_bf16(float x) { return low_f32(pack_bf16(x, 0.0f)); }

// 1 / sqrt(x) of a normal number, within 2 ulp; tanh within 2^-11.
DEVICE float fast_rsqrt(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

DEVICE float fast_tanh(float x) {
    float r;
    asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 2^x and log2 x, within 2 ulp or 2^-22; 2^x is 0 far below.
DEVICE float fast_exp2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float fast_log2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// ---- matrices ---------------------------------------------------------------------------------------------------------------
// Fragments of a warp, g = lane / 4, c = lane % 4 (PTX ISA, mma.m16n8k16):
//   A [16, 16]: a0 (g, 2c..), a1 (g + 8, 2c..), a2 (g, 2c + 8..), a3 (g + 8, 2c + 8..)
//   B [16, 8]:  b0 (2c.., g), b1 (2c + 8.., g)         C, D [16, 8] f32: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit numbers; lane 8 i + r gives the address of row r of matrix i. A lane gets (g, 2c..) of each.
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
// The same of the transposed matrices: a lane gets (2c.., g).
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
// The inverse of `ldmatrix_x4`. `base` is the 16 x 16 tile's first byte, `pitch` the bytes from row to row; matrices in the order
// of an A fragment.
DEVICE void store_a_fragment(u32 base, u32 pitch, const u32 (&r)[4]) {
    const u32 lane = threadIdx.x & 31;
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(base + (lane & 15) * pitch + (lane >> 4) * 16), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    const u32 at = base + (lane >> 2) * pitch + (lane & 3) * 4;
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at), "r"(r[0]) : "memory");
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + 8 * pitch), "r"(r[1]) : "memory");
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + 16), "r"(r[2]) : "memory");
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + 8 * pitch + 16), "r"(r[3]) : "memory");
#endif
}
// An 8x8 matrix of 16-bit numbers held as (g, 2c..), transposed.
DEVICE u32 movmatrix(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}
// d += A B, bf16 operands.
DEVICE void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d = A B + c
DEVICE void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1, float c2, float c3) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
DEVICE void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    mma_k16(d, a, b0, b1, c[0], c[1], c[2], c[3]);
}
// d = A B for the first eight columns of A and rows of B alone: a0, a1, b0.
DEVICE void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0), "f"(0.0f));
}

// ---- shared memory by address -----------------------------------------------------------------------------------------------

DEVICE void store_shared(u32 at, float x) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory"); }
DEVICE void store_shared2(u32 at, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(at), "f"(x), "f"(y) : "memory");
}
DEVICE void store_shared4(u32 at, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(at), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
DEVICE void store_shared4(u32 at, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
DEVICE void store_shared_u32(u32 at, u32 x) { asm volatile("st.shared.b32 [%0], %1;" :: "r"(at), "r"(x) : "memory"); }
DEVICE void store_shared2_u32(u32 at, u32 x, u32 y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(at), "r"(x), "r"(y) : "memory");
}
DEVICE float load_shared(u32 at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
DEVICE u32 load_shared_u32(u32 at) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
DEVICE void load_shared2(float (&x)[2], u32 at) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(at) : "memory");
}
DEVICE void load_shared2(u32 (&x)[2], u32 at) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at) : "memory");
}
DEVICE void load_shared4(float (&x)[4], u32 at) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(at)
                 : "memory");
}
DEVICE void load_shared4(u32 (&x)[4], u32 at) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

// ---- global memory ----------------------------------------------------------------------------------------------------------

// Column `column` (in bytes) of row `row` of a matrix with `stride` bytes from row to row: one wide multiply-add and an addition.
template <class T> DEVICE T* at_row(T* base, u32 row, u32 stride, u32 column) {
    return (T*)((u64)base + ((u64)row * stride + column));
}

DEVICE void load_global4(float (&x)[4], const float* at) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "l"(at) : "memory");
}
DEVICE void store_global4(float* at, const float (&x)[4]) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(at), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
DEVICE void store_global4(void* at, const u32 (&x)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" :: "l"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// Asks for a line of global memory to be brought into L2.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" :: "l"(at)); }
// 16 bytes that no kernel in flight writes, and that are read once.
DEVICE void load_constant4(u32 (&x)[4], const void* at) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(at));
}
DEVICE void load_global4(u32 (&x)[4], const void* at) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(at) : "memory");
}

// ---- launches that overlap ---------------------------------------------------------------------------------------------------
// A kernel that the host launches with overlap may start before the one ahead of it is done. Before `overlap_wait` it reads only
// what no kernel since the last launch without overlap has written, and writes nothing; every thread that does anything later
// calls it, so that the end of a kernel means the end of all before it.

// Lets the next kernel start once every block has come here or is done.
DEVICE void overlap_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel ahead is done and what it wrote can be read.
DEVICE void overlap_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- asynchronous copies ----------------------------------------------------------------------------------------------------

// 16 bytes into shared memory, or 16 zero bytes when `present` is false (`from` must be a valid address all the same).
DEVICE void copy_async_16(u32 to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
DEVICE void copy_async_4(u32 to, const void* from, bool present) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(present ? 4 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's latest groups are under way.
template <int N> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// ---- barriers ---------------------------------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" :: "r"(barrier) : "memory");
}
// Waits for the end of the barrier's phase of this parity.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}
#if __CUDA_ARCH__ >= 900
// Arrives and announces bytes that bulk copies will bring.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
// `bytes` (a multiple of 16) of global memory into shared memory, counted by `barrier`.
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Blocks of a cluster, N of them: consecutive ones. Shared memory of another block by `cluster_address`.
#define CLUSTER(N) __cluster_dims__(N, 1, 1)
DEVICE u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEVICE u32 cluster_address(u32 at, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
    return r;
}
DEVICE void store_cluster(u32 at, float x) { asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory"); }
DEVICE void store_cluster2(u32 at, float x, float y) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" :: "r"(at), "f"(x), "f"(y) : "memory");
}
DEVICE void store_cluster_u32(u32 at, u32 x) { asm volatile("st.shared::cluster.b32 [%0], %1;" :: "r"(at), "r"(x) : "memory"); }
// The same without waiting; the bytes count at `barrier`, which lies in the shared memory that is written (both by `cluster_address`).
DEVICE void store_async(u32 at, float x, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" :: "r"(at), "f"(x), "r"(barrier) : "memory");
}
DEVICE void store_async_u32(u32 at, u32 x, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" :: "r"(at), "r"(x), "r"(barrier) : "memory");
}
DEVICE void store_async2(u32 at, float x, float y, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 :: "r"(at), "f"(x), "f"(y), "r"(barrier)
                 : "memory");
}
// Makes barriers that were just made known to the cluster, before its first `cluster_sync`.
DEVICE void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// As `barrier_wait`, suspended instead of asking again and again.
DEVICE void barrier_sleep(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                 :: "r"(barrier), "r"(parity)
                 : "memory");
}
// A barrier of all threads of the cluster, after which they see each other's writes of shared memory.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Makes this thread's ordinary writes of shared memory visible to bulk copies and wgmma.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
