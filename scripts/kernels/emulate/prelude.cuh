// The CPU twin of crates/ttt/src/device/cuda/prelude.cuh: a block is a set of fibers, one a thread, that meet at warp and block
// operations. Order of blocks, warps and lanes is chosen by `emu::order`, asynchronous copies land when they are waited for, shared memory
// starts as NaN: a missing barrier or wait changes results. The blocks of a cluster are fibers side by side; address bits 24 and up are
// the rank of a block plus one, 0 the block's own.
#pragma once
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE inline
#define KERNEL extern "C" void
#define __launch_bounds__(...)
#define __grid_constant__
#define __device__
#define __CUDA_ARCH__ 900
#define DYNAMIC_SHARED(name) u8* const name = emu::own_shared()
#define CLUSTER(N)

constexpr u32 FULL_WARP = 0xffffffffu;
struct Index { u32 x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emu {
struct Copy { u32 to; const void* from; u32 bytes; bool present; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Meeting { u32 arrived = 0, generation = 0; };
static u8* shared;
static u32 shared_bytes, order, seed;
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static std::vector<Meeting> blocks;
static Meeting cluster;
static u32 current, progress, block_threads, first_block;
static const void* kernel_params;
static void (*body)(const void*);

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
    abort();
}
static void become(u32 fiber) {
    current = fiber;
    threadIdx.x = fiber % block_threads;
    blockIdx.x = first_block + fiber / block_threads;
}
static u32 rank() { return current / block_threads; }
static u8* own_shared() { return shared + rank() * shared_bytes; }
static void yield() {
    const u32 me = current;
    swapcontext(&fibers[me].context, &scheduler);
    become(me);
}
static void meet(Meeting& m, u32 count) {
    progress++;
    const u32 generation = m.generation;
    if (++m.arrived == count) {
        m.arrived = 0;
        m.generation++;
    } else {
        while (m.generation == generation) yield();
    }
}
static Meeting& warp() { return warps[current / 32]; }
// Gives one lane's arguments and returns all lanes'; double buffered, so that one meeting is enough.
template <class T> static const T* exchange(const T& mine) {
    static_assert(sizeof(T) <= 64, "arguments of a warp operation");
    typedef struct { T lane[32]; } All;
    static All all[2][32];
    const u32 w = current / 32, side = warp().generation & 1;
    all[side][w].lane[threadIdx.x & 31] = mine;
    meet(warp(), 32);
    return all[side][w].lane;
}
static u8* at(u32 address, u32 bytes) {
    const u32 block = address >> 24 ? (address >> 24) - 1 : rank();
    address &= 0xffffff;
    if (address + bytes > shared_bytes || block >= blocks.size()) fail("an address outside shared memory");
    if (address % (bytes > 16 ? 16 : bytes)) fail("a misaligned address");
    return shared + block * shared_bytes + address;
}
static void entry() {
    body(kernel_params);
    fibers[current].done = true;
    for (;;) yield();
}
static u32 random(u32 n) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % n;
}
static void run_blocks(u32 count) { // of a cluster
    const u32 threads = count * block_threads;
    fibers.resize(threads);
    warps.assign((threads + 31) / 32, Meeting());
    blocks.assign(count, Meeting());
    cluster = Meeting();
    for (u32 i = 0; i < count * shared_bytes / 4; i++) ((u32*)shared)[i] = 0x7fc17fc1u;
    for (u32 i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.done = false;
        f.groups.clear();
        f.open.clear();
        f.stack.resize(1 << 16);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, entry, 0);
    }
    std::vector<u32> warps_left;
    for (u32 w = 0; w < warps.size(); w++) warps_left.push_back(w);
    u32 idle = 0;
    while (!warps_left.empty()) {
        u32 pick = order == 0 ? 0 : order == 1 ? warps_left.size() - 1 : random(warps_left.size());
        const u32 w = warps_left[pick];
        const u32 before = progress;
        u32 left = 0;
        // One warp as far as it gets: until its lanes wait for another warp, or are done.
        for (;;) {
            const u32 start = progress;
            left = 0;
            for (u32 i = 0; i < 32; i++) {
                const u32 t = w * 32 + (order == 1 ? 31 - i : i);
                if (t >= threads || fibers[t].done) continue;
                become(t);
                swapcontext(&scheduler, &fibers[t].context);
                left += !fibers[t].done;
            }
            if (progress == start || !left) break;
        }
        if (!left) {
            warps_left.erase(warps_left.begin() + pick);
            idle = 0;
        } else if (warps_left.size() > 1) {
            // Stuck at a block barrier: move on to the others.
            warps_left.erase(warps_left.begin() + pick);
            warps_left.insert(order == 1 ? warps_left.begin() : warps_left.end(), w);
        }
        idle = progress == before && left ? idle + 1 : 0;
        if (idle > 64 * warps.size()) fail("threads wait for each other");
    }
}
template <class P>
static void launch(void (*kernel)(P), const P* params, u32 count, u32 threads, u32 bytes, u32 ord, u32 in_cluster = 1) {
    static void (*k)(P);
    k = kernel;
    body = [](const void* p) { k(*(const P*)p); };
    kernel_params = params;
    order = ord;
    seed = 12345 + ord;
    shared_bytes = (bytes + 15) / 16 * 16;
    shared = (u8*)aligned_alloc(128, (in_cluster * shared_bytes + 255) / 128 * 128);
    blockDim = {threads, 1, 1};
    gridDim = {count, 1, 1};
    block_threads = threads;
    std::vector<u32> left;
    const u32 clusters = count / in_cluster;
    for (u32 b = 0; b < clusters; b++) left.push_back(order == 1 ? clusters - 1 - b : b);
    while (!left.empty()) {
        const u32 pick = order == 2 ? random(left.size()) : 0;
        first_block = left[pick] * in_cluster;
        left.erase(left.begin() + pick);
        run_blocks(in_cluster);
    }
    free(shared);
}
}  // namespace emu

#define __shared__ static
struct uint4 { u32 x, y, z, w; };
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float emu_exp(float x) { return expf(x); }
#define __expf emu_exp
struct float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline u64 __umul64hi(u64 x, u64 y) { return (u64)((unsigned __int128)x * y >> 64); }
template <class T> static T atomicAdd(T* at, T x) {
    const T old = *at;
    *at += x;
    return old;
}

static inline void __syncthreads() { emu::meet(emu::blocks[emu::rank()], blockDim.x); }
DEVICE void cluster_sync() { emu::meet(emu::cluster, emu::fibers.size()); }
DEVICE u32 cluster_rank() { return emu::rank(); }
DEVICE u32 cluster_address(u32 at, u32 rank) { return at | (rank + 1) << 24; }
static inline void __syncwarp() { emu::meet(emu::warp(), 32); }
template <class T> static T __shfl_sync(u32, T x, u32 lane) { return emu::exchange(x)[lane & 31]; }
static inline int __any_sync(u32, int x) {
    const int* all = emu::exchange(x);
    int any = 0;
    for (u32 i = 0; i < 32; i++) any |= all[i];
    return any;
}
template <class T> static T __shfl_xor_sync(u32, T x, u32 mask) { return emu::exchange(x)[(threadIdx.x & 31) ^ mask]; }
template <class T> static T __shfl_up_sync(u32, T x, u32 d) {
    const u32 lane = threadIdx.x & 31;
    return emu::exchange(x)[lane < d ? lane : lane - d];
}
template <class T> static T __shfl_down_sync(u32, T x, u32 d) {
    const u32 lane = threadIdx.x & 31;
    return emu::exchange(x)[lane + d < 32 ? lane + d : lane];
}
static inline float __uint_as_float(u32 x) { float r; memcpy(&r, &x, 4); return r; }
static inline u32 __float_as_uint(float x) { u32 r; memcpy(&r, &x, 4); return r; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
static inline i32 min(i32 a, i32 b) { return a < b ? a : b; }
static inline i32 max(i32 a, i32 b) { return a > b ? a : b; }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline u32 max(u32 a, u32 b) { return a > b ? a : b; }

static inline u32 emu_bf16(float x) {
    const u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
DEVICE u32 pack_bf16(float lo, float hi) { return emu_bf16(lo) | emu_bf16(hi) << 16; }
DEVICE float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE u16 bf16_bits(float x) { return (u16)emu_bf16(x); }
DEVICE float bf16_f32(u16 bits) { return __uint_as_float((u32)bits << 16); }
DEVICE float round_bf16(float x) { return low_f32(pack_bf16(x, 0.0f)); }

DEVICE float fast_rsqrt(float x) { return 1.0f / sqrtf(x); }
DEVICE float fast_tanh(float x) { return tanhf(x); }
DEVICE float fast_exp2(float x) { return exp2f(x); }
DEVICE float fast_log2(float x) { return log2f(x); }
DEVICE u32 shared_address(const void* p) { return (u32)((const u8*)p - emu::own_shared()); }
DEVICE void emu_ldmatrix(u32 (&r)[4], u32 row, bool trans) {
    const u32 lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
    const u32* rows = emu::exchange(row);
    for (u32 i = 0; i < 4; i++) {
        u16 x[2];
        for (u32 e = 0; e < 2; e++) {
            const u32 y = trans ? 2 * c + e : g, column = trans ? g : 2 * c + e;
            x[e] = ((const u16*)emu::at(rows[8 * i + y], 16))[column];
        }
        r[i] = x[0] | (u32)x[1] << 16;
    }
    __syncwarp();
}
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 row) { emu_ldmatrix(r, row, false); }
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 row) { emu_ldmatrix(r, row, true); }
DEVICE void store_a_fragment(u32 base, u32 pitch, const u32 (&r)[4]) {
    const u32 lane = threadIdx.x & 31, at = base + (lane >> 2) * pitch + (lane & 3) * 4;
    if (base % 16 || pitch % 16) emu::fail("a misaligned tile");
    *(u32*)emu::at(at, 4) = r[0];
    *(u32*)emu::at(at + 8 * pitch, 4) = r[1];
    *(u32*)emu::at(at + 16, 4) = r[2];
    *(u32*)emu::at(at + 8 * pitch + 16, 4) = r[3];
}
DEVICE u32 movmatrix(u32 x) {
    const u32 lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
    const u32* all = emu::exchange(x);
    u32 r = 0;
    for (u32 e = 0; e < 2; e++) r |= (all[(2 * c + e) * 4 + g / 2] >> (g % 2 * 16) & 0xffff) << (16 * e);
    return r;
}
struct EmuOperands { u32 a[4], b[2]; };
DEVICE float emu_half(u32 pair, u32 i) { return i ? high_f32(pair) : low_f32(pair); }
DEVICE void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 lane = threadIdx.x & 31, g = lane / 4, c = lane % 4;
    const EmuOperands* all = emu::exchange(EmuOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    for (u32 row = 0; row < 2; row++)
        for (u32 column = 0; column < 2; column++) {
            float sum = d[2 * row + column];
            for (u32 k = 0; k < 16; k++)
                sum += emu_half(all[g * 4 + k % 8 / 2].a[k / 8 * 2 + row], k % 2) * emu_half(all[(2 * c + column) * 4 + k % 8 / 2].b[k / 8], k % 2);
            d[2 * row + column] = sum;
        }
    __syncwarp();
}
DEVICE void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1, float c2, float c3) {
    d[0] = c0, d[1] = c1, d[2] = c2, d[3] = c3;
    mma_k16(d, a, b0, b1);
}
DEVICE void mma_k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    mma_k16(d, a, b0, b1, c[0], c[1], c[2], c[3]);
}
DEVICE void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    const u32 a[4] = {a0, a1, 0, 0};
    mma_k16(d, a, b0, 0);
}

DEVICE void store_shared(u32 at, float x) { *(float*)emu::at(at, 4) = x; }
DEVICE void store_shared2(u32 at, float x, float y) {
    float* p = (float*)emu::at(at, 8);
    p[0] = x, p[1] = y;
}
DEVICE void store_shared4(u32 at, float x, float y, float z, float w) {
    float* p = (float*)emu::at(at, 16);
    p[0] = x, p[1] = y, p[2] = z, p[3] = w;
}
DEVICE void store_shared4(u32 at, const u32 (&x)[4]) { memcpy(emu::at(at, 16), x, 16); }
DEVICE void store_shared_u32(u32 at, u32 x) { *(u32*)emu::at(at, 4) = x; }
DEVICE void store_shared2_u32(u32 at, u32 x, u32 y) {
    u32* p = (u32*)emu::at(at, 8);
    p[0] = x, p[1] = y;
}
DEVICE void store_cluster(u32 at, float x) { *(float*)emu::at(at, 4) = x; }
DEVICE void store_cluster2(u32 at, float x, float y) {
    float* p = (float*)emu::at(at, 8);
    p[0] = x, p[1] = y;
}
DEVICE void store_cluster_u32(u32 at, u32 x) { *(u32*)emu::at(at, 4) = x; }
// Barriers: bytes to come, threads to come, threads of a phase, phases past.
struct EmuBarrier { i32 bytes; u8 pending, arrivals; u16 phase; };
DEVICE void emu_count(EmuBarrier& b) {
    if (b.bytes == 0 && b.pending == 0) b.phase++, b.pending = b.arrivals, emu::progress++;
}
DEVICE void barrier_init(u32 at, u32 arrivals) { *(EmuBarrier*)emu::at(at, 8) = {0, (u8)arrivals, (u8)arrivals, 0}; }
DEVICE void barrier_publish() {}
DEVICE void barrier_expect(u32 at, u32 bytes) {
    EmuBarrier& b = *(EmuBarrier*)emu::at(at, 8);
    if (b.pending == 0) emu::fail("a barrier that nobody waits at was armed");
    b.bytes += bytes, b.pending--;
    emu_count(b);
}
DEVICE void barrier_sleep(u32 at, u32 parity) {
    while (((const EmuBarrier*)emu::at(at, 8))->phase % 2 == parity) emu::yield();
}
DEVICE void emu_arrived(u32 at, u32 bytes) {
    EmuBarrier& b = *(EmuBarrier*)emu::at(at, 8);
    b.bytes -= bytes;
    emu_count(b);
}
DEVICE void store_async(u32 at, float x, u32 barrier) { store_cluster(at, x), emu_arrived(barrier, 4); }
DEVICE void store_async_u32(u32 at, u32 x, u32 barrier) { store_cluster_u32(at, x), emu_arrived(barrier, 4); }
DEVICE void store_async2(u32 at, float x, float y, u32 barrier) { store_cluster2(at, x, y), emu_arrived(barrier, 8); }
DEVICE float load_shared(u32 at) { return *(const float*)emu::at(at, 4); }
DEVICE u32 load_shared_u32(u32 at) { return *(const u32*)emu::at(at, 4); }
DEVICE void load_shared2(float (&x)[2], u32 at) { memcpy(x, emu::at(at, 8), 8); }
DEVICE void load_shared2(u32 (&x)[2], u32 at) { memcpy(x, emu::at(at, 8), 8); }
DEVICE void load_shared4(float (&x)[4], u32 at) { memcpy(x, emu::at(at, 16), 16); }
DEVICE void load_shared4(u32 (&x)[4], u32 at) { memcpy(x, emu::at(at, 16), 16); }
template <class T> inline T* at_row(T* base, u32 row, u32 stride, u32 column) {
    return (T*)((u64)base + ((u64)row * stride + column));
}
DEVICE void load_global4(float (&x)[4], const float* at) {
    if ((u64)at % 16) emu::fail("a misaligned address");
    memcpy(x, at, 16);
}
DEVICE void store_global4(float* at, const float (&x)[4]) {
    if ((u64)at % 16) emu::fail("a misaligned address");
    memcpy(at, x, 16);
}
DEVICE void store_global4(void* at, const u32 (&x)[4]) {
    if ((u64)at % 16) emu::fail("a misaligned address");
    memcpy(at, x, 16);
}

DEVICE void prefetch(const void*) {}
DEVICE void load_constant4(u32 (&x)[4], const void* at) {
    if ((u64)at % 16) emu::fail("a misaligned address");
    memcpy(x, at, 16);
}
DEVICE void load_global4(u32 (&x)[4], const void* at) { load_constant4(x, at); }
DEVICE void overlap_next() {}
DEVICE void overlap_wait() {}

DEVICE void emu_copy(u32 to, const void* from, u32 bytes, bool present) {
    if (present && (u64)from % bytes) emu::fail("a misaligned address");
    emu::fibers[emu::current].open.push_back({to, from, bytes, present});
}
DEVICE void copy_async_16(u32 to, const void* from, bool present) { emu_copy(to, from, 16, present); }
DEVICE void copy_async_4(u32 to, const void* from, bool present) { emu_copy(to, from, 4, present); }
DEVICE void copy_async_commit() {
    auto& f = emu::fibers[emu::current];
    f.groups.push_back(f.open);
    f.open.clear();
}
template <int N> inline void copy_async_wait() {
    auto& groups = emu::fibers[emu::current].groups;
    while (groups.size() > N) {
        for (const auto& c : groups.front()) {
            if (c.present) memcpy(emu::at(c.to, c.bytes), c.from, c.bytes);
            else memset(emu::at(c.to, c.bytes), 0, c.bytes);
        }
        groups.erase(groups.begin());
    }
}
