// Causal attention for any head size up to 256, in f32 and bf16: a warp for each query and head, or key and head. Correct, slow.
// And what brings keys and values into the cache.
#include "attention_params.cuh"

constexpr u32 WARPS = 4, MOST = 256;
constexpr u32 EACH = MOST / 32; // channels of a lane

struct Half {
    u16 bits;
};
DEVICE float value(float x) { return x; }
DEVICE float value(Half x) { return bf16_f32(x.bits); }
DEVICE void put(float& to, float x) { to = x; }
DEVICE void put(Half& to, float x) { to.bits = bf16_bits(x); }

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (u32 step = 16; step; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}
template <class E> DEVICE float dot(const float* x, const E* y, u32 n) {
    float sum = 0.0f;
    for (u32 i = 0; i < n; i++) sum += x[i] * value(y[i]);
    return sum;
}
template <class E> DEVICE void fetch(float* to, const E* x, u32 n) {
    for (u32 i = threadIdx.x % 32; i < n; i += 32) to[i] = value(x[i]);
}

template <class E> DEVICE void forward_plain(const AttentionParams& p) {
    DYNAMIC_SHARED(memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.head_dim;
    float* const query = (float*)memory + warp * MOST;
    const u32 task = blockIdx.x * WARPS + warp, row = task / p.heads, head = task % p.heads;
    if (row >= p.rows) return;
    const Segment s = p.segments[p.of_row[row]];
    if (row - s.first_row >= s.len) return;
    const u32 kv = head / (p.heads / p.kv_heads) * d, keys = s.phase + row - s.first_row + 1;
    fetch(query, (const E*)p.q + (u64)row * p.q_stride + head * d, d);
    __syncwarp();
    float o[EACH] = {}, top = HIDDEN, sum = 0.0f;
    for (u32 first = 0; first < keys; first += 32) {
        const u32 key = first + lane;
        float x = HIDDEN;
        if (key < keys) x = p.scale * dot(query, key_row<E>(p.k, p.k_stride, p.keys, p, s, key) + kv, d);
        float most = x;
#pragma unroll
        for (u32 step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(FULL_WARP, most, step));
        most = max(most, top);
        const float before = expf(top - most), w = key < keys ? expf(x - most) : 0.0f;
        top = most, sum = sum * before + w;
#pragma unroll
        for (u32 i = 0; i < EACH; i++) o[i] *= before;
        for (u32 j = 0; j < min(32u, keys - first); j++) {
            const float by = __shfl_sync(FULL_WARP, w, j);
            const E* v = key_row<E>(p.v, p.v_stride, p.values, p, s, first + j) + kv;
#pragma unroll
            for (u32 i = 0; i < EACH; i++)
                if (lane + 32 * i < d) o[i] += by * value(v[lane + 32 * i]);
        }
    }
    sum = sum_of_warp(sum);
    E* to = (E*)p.o + (u64)row * p.o_stride + head * d;
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
        if (lane + 32 * i < d) put(to[lane + 32 * i], o[i] / sum);
    if (lane == 0) p.log_sum[(u64)row * p.heads + head] = top + logf(sum);
}

template <class E> DEVICE void backward_queries_plain(const AttentionParams& p) {
    DYNAMIC_SHARED(memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.head_dim;
    float *const query = (float*)memory + 2 * warp * MOST, *const dout = query + MOST;
    const u32 task = blockIdx.x * WARPS + warp, row = task / p.heads, head = task % p.heads;
    if (row >= p.rows) return;
    const Segment s = p.segments[p.of_row[row]];
    if (row - s.first_row >= s.len) return;
    const u32 kv = head / (p.heads / p.kv_heads) * d, keys = s.phase + row - s.first_row + 1;
    fetch(query, (const E*)p.q + (u64)row * p.q_stride + head * d, d);
    fetch(dout, (const E*)p.dout + (u64)row * p.dout_stride + head * d, d);
    __syncwarp();
    const E* o = (const E*)p.o + (u64)row * p.o_stride + head * d;
    float delta = 0.0f;
    for (u32 c = lane; c < d; c += 32) delta += dout[c] * value(o[c]);
    delta = sum_of_warp(delta);
    const float log_sum = p.log_sum[(u64)row * p.heads + head];
    float dq[EACH] = {};
    for (u32 first = 0; first < keys; first += 32) {
        const u32 key = first + lane;
        float ds = 0.0f;
        if (key < keys) {
            const float x = p.scale * dot(query, key_row<E>(p.k, p.k_stride, p.keys, p, s, key) + kv, d);
            const float dw = dot(dout, key_row<E>(p.v, p.v_stride, p.values, p, s, key) + kv, d);
            ds = p.scale * expf(x - log_sum) * (dw - delta);
        }
        for (u32 j = 0; j < min(32u, keys - first); j++) {
            const float by = __shfl_sync(FULL_WARP, ds, j);
            const E* k = key_row<E>(p.k, p.k_stride, p.keys, p, s, first + j) + kv;
#pragma unroll
            for (u32 i = 0; i < EACH; i++)
                if (lane + 32 * i < d) dq[i] += by * value(k[lane + 32 * i]);
        }
    }
    E* to = (E*)p.dq + (u64)row * p.dq_stride + head * d;
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
        if (lane + 32 * i < d) put(to[lane + 32 * i], dq[i]);
    if (lane == 0) p.delta[(u64)row * p.heads + head] = delta;
}

// The gradient of a key or value: to its row of the batch, added to what later passes say of it, or to what came before.
template <class E>
DEVICE void leave(const float (&x)[EACH], void* to, u32 stride, void* before, const AttentionParams& p, const Segment& s, u32 key,
                  u32 kv_head) {
    const u32 d = p.head_dim;
    E* add = before ? (E*)before + ((u64)s.slot * p.dcapacity + key) * p.cache_stride + kv_head * d : nullptr;
    E* out = key < s.phase ? add : (E*)to + (u64)(s.first_row + key - s.phase) * stride + kv_head * d;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 c = threadIdx.x % 32 + 32 * i;
        if (c >= d) continue;
        const float y = add ? x[i] + value(add[c]) : x[i];
        // What is handed on is no gradient of what came before any more.
        if (add && key >= s.phase) put(add[c], 0.0f);
        put(out[c], y);
    }
}

template <class E> DEVICE void backward_keys_plain(const AttentionParams& p) {
    DYNAMIC_SHARED(memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = p.head_dim;
    float *const k = (float*)memory + 2 * warp * MOST, *const v = k + MOST;
    const u32 task = blockIdx.x / p.blocks, kv_head = task % p.kv_heads, group = p.heads / p.kv_heads;
    const Segment s = p.segments[task / p.kv_heads];
    const u32 key = (p.dkeys ? 0 : s.phase) + blockIdx.x % p.blocks * WARPS + warp;
    if (key >= s.phase + s.len) return;
    fetch(k, key_row<E>(p.k, p.k_stride, p.keys, p, s, key) + kv_head * d, d);
    fetch(v, key_row<E>(p.v, p.v_stride, p.values, p, s, key) + kv_head * d, d);
    __syncwarp();
    float dk[EACH] = {}, dv[EACH] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (u32 first = key > s.phase ? key - s.phase : 0; first < s.len; first += 32) {
            const u32 token = first + lane;
            float w = 0.0f, ds = 0.0f;
            if (token < s.len) {
                const u64 row = s.first_row + token;
                const float x = p.scale * dot(k, (const E*)p.q + row * p.q_stride + head * d, d);
                const float dw = dot(v, (const E*)p.dout + row * p.dout_stride + head * d, d);
                w = expf(x - p.log_sum[row * p.heads + head]);
                ds = p.scale * w * (dw - p.delta[row * p.heads + head]);
            }
            for (u32 j = 0; j < min(32u, s.len - first); j++) {
                const float by_w = __shfl_sync(FULL_WARP, w, j), by = __shfl_sync(FULL_WARP, ds, j);
                const u64 row = s.first_row + first + j;
                const E *q = (const E*)p.q + row * p.q_stride + head * d, *dout = (const E*)p.dout + row * p.dout_stride + head * d;
#pragma unroll
                for (u32 i = 0; i < EACH; i++)
                    if (lane + 32 * i < d) dk[i] += by * value(q[lane + 32 * i]), dv[i] += by_w * value(dout[lane + 32 * i]);
            }
        }
    leave<E>(dk, p.dk, p.dk_stride, p.dkeys, p, s, key, kv_head);
    leave<E>(dv, p.dv, p.dv_stride, p.dvalues, p, s, key, kv_head);
}

KERNEL __launch_bounds__(32 * WARPS, 6) attention_forward_plain_f32(const __grid_constant__ AttentionParams p) { forward_plain<float>(p); }
KERNEL __launch_bounds__(32 * WARPS, 6) attention_forward_plain_bf16(const __grid_constant__ AttentionParams p) { forward_plain<Half>(p); }
KERNEL __launch_bounds__(32 * WARPS, 6) attention_queries_plain_f32(const __grid_constant__ AttentionParams p) { backward_queries_plain<float>(p); }
KERNEL __launch_bounds__(32 * WARPS, 6) attention_queries_plain_bf16(const __grid_constant__ AttentionParams p) { backward_queries_plain<Half>(p); }
KERNEL __launch_bounds__(32 * WARPS, 6) attention_keys_plain_f32(const __grid_constant__ AttentionParams p) { backward_keys_plain<float>(p); }
KERNEL __launch_bounds__(32 * WARPS, 6) attention_keys_plain_bf16(const __grid_constant__ AttentionParams p) { backward_keys_plain<Half>(p); }

// Puts keys and values of the batch behind those of each segment's slot. A thread for `head_dim` columns: 1, or 16 bytes of them.
template <class E> DEVICE void append(const AttentionParams& p) {
    const u32 units = p.cache_stride / p.head_dim, i = blockIdx.x * blockDim.x + threadIdx.x, row = i / units;
    if (row >= p.rows) return;
    const Segment s = p.segments[p.of_row[row]];
    const u32 token = row - s.first_row, unit = i % units;
    if (token >= s.len) return;
    const u64 to = ((u64)s.slot * p.capacity + s.phase + token) * units + unit;
    ((E*)p.dkeys)[to] = *(const E*)((const u8*)p.k + ((u64)row * p.k_stride / p.head_dim + unit) * sizeof(E));
    ((E*)p.dvalues)[to] = *(const E*)((const u8*)p.v + ((u64)row * p.v_stride / p.head_dim + unit) * sizeof(E));
}
KERNEL __launch_bounds__(256) attention_append_2(const __grid_constant__ AttentionParams p) { append<u16>(p); }
KERNEL __launch_bounds__(256) attention_append_4(const __grid_constant__ AttentionParams p) { append<u32>(p); }
KERNEL __launch_bounds__(256) attention_append_16(const __grid_constant__ AttentionParams p) { append<uint4>(p); }
