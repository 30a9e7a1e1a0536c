// Chooses a token for each row of logits and hands it to the next step. `reference.rs` is the definition; every choice is a function
// of integers, so that the order of sums does not matter and both make the same.
//
// Launch: a block of 1024 threads a row.
#include "prelude.cuh"

// One sequence; `Sequence` of cuda.rs.
struct Draw {
    u32 key[8];  // of ChaCha8
    u64 stream;  // of ChaCha8
    u64 drawn;   // numbers taken from it, moved on
    double top_p;
    float scale; // log2(e) / temperature; 0: the likeliest token
    u32 top_k;   // 0: all
    u32 ends[2]; // tokens behind which the sequence ends; 0xffffffff: none
    u32 ended;   // 1: nothing more is chosen
    u32 first;   // `drawn` at the beginning
};
// A chosen token; `Chosen` of cuda.rs.
struct Chosen {
    u32 token;
    float logprob;
};
struct SampleParams {
    const float* logits; // [rows, vocab]
    Draw* draws;         // [rows]
    Chosen* chosen;      // [ring, rows], of the n-th choice since the beginning row n mod ring; may lie in the host's memory
    u32* tokens;         // [rows]: the chosen token, for the next step. Null: not wanted
    u32* segments;       // [rows][first row, length, slot, phase], and behind row indices [rows] the same with a fifth number:
                         // phases move on by the token that was read, lengths of sequences that end become 0. Null: there are none
    u32 vocab, ring, mini_batch;
    u32 read; // 1: a token of each row was read before
};

constexpr u32 THREADS = 1024, WARPS = 32;
// Bits of a key that sort it into bins, the first, then the next, then the last; bins of each.
constexpr u32 FIRST_BITS = 10, BITS = 11, FIRST_BINS = 1 << FIRST_BITS, BINS = 1 << BITS;

// Orders as f32::total_cmp does.
DEVICE u32 key_of(float x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float of_key(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// 2^40 · 2^((x - top) · scale), down to 0.
DEVICE u64 weight_of(float x, float top, float scale) {
    const float t = __fmul_rn(x - top, scale);
    if (!(t > -41.0f)) return 0;
    const float n = rintf(t), f = t - n;
    float p = 1.5403530e-4f;
    p = __fmaf_rn(p, f, 1.3333558e-3f);
    p = __fmaf_rn(p, f, 9.6181291e-3f);
    p = __fmaf_rn(p, f, 5.5504109e-2f);
    p = __fmaf_rn(p, f, 2.4022651e-1f);
    p = __fmaf_rn(p, f, 6.9314718e-1f);
    p = __fmaf_rn(p, f, 1.0f);
    const u64 m = (u64)(p * 16777216.0f);
    const i32 shift = 16 + (i32)n;
    return shift >= 0 ? m << shift : m >> -shift;
}

DEVICE u64 all_lanes(u64 x) {
    for (u32 lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
    return x;
}

// Of the keys that were sorted into a bin, the sum of weights and the number.
template <u32 N> struct Bins {
    u64 weights[N];
    u32 counts[N];
};
struct Shared {
    u64 of_warp[WARPS];
    float exponentials[WARPS];
    Bins<FIRST_BINS> first; // of all keys
    Bins<BINS> next;
    u64 found[3];
    u64 bits;
};

// The first index whose sum of `measure` up to and with it reaches `bound`, in order. `bound` is at least 1 and at most the sum.
template <class F> DEVICE u32 first_reaching(Shared& s, u32 n, u64 bound, const F& measure) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 per_lane = (n + THREADS - 1) / THREADS, per_warp = 32 * per_lane, first = warp * per_warp;
    const u32 last = min(n, first + per_warp);
    u64 sum = 0;
    for (u32 i = first + lane; i < last; i += 32) sum += measure(i);
    sum = all_lanes(sum);
    __syncthreads();
    if (lane == 0) s.of_warp[warp] = sum;
    __syncthreads();
    u64 before = 0;
    u32 owner = 0;
    for (; owner + 1 < WARPS && before + s.of_warp[owner] < bound; owner++) before += s.of_warp[owner];
    if (warp == owner) {
        const u32 start = first + lane * per_lane, end = min(n, start + per_lane);
        u64 own = 0;
        for (u32 i = start; i < end; i++) own += measure(i);
        u64 upto = own;
        for (u32 step = 1; step < 32; step *= 2) {
            const u64 other = __shfl_sync(FULL_WARP, upto, lane >= step ? lane - step : lane);
            if (lane >= step) upto += other;
        }
        upto += before;
        if (upto >= bound && upto - own < bound) {
            u64 left = bound - (upto - own);
            u32 i = start;
            for (; i + 1 < end; i++) {
                const u64 m = measure(i);
                if (m >= left) break;
                left -= m;
            }
            s.found[0] = i;
        }
    }
    __syncthreads();
    return (u32)s.found[0];
}

// The bin, counted from the last, whose sum from the last down to and with it reaches `bound`; leaves the sum of those above it, and
// the sum of their weights.
template <u32 N> DEVICE u32 last_reaching(Shared& s, const Bins<N>& of, u64 bound, bool by_weight, u64& above, u64& above_weight) {
    constexpr u32 per = N / THREADS;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 bins[per], sum = 0;
#pragma unroll
    for (u32 i = 0; i < per; i++) {
        const u32 bin = N - 1 - (per * threadIdx.x + i);
        bins[i] = by_weight ? of.weights[bin] : of.counts[bin];
        sum += bins[i];
    }
    u64 upto = sum;
    for (u32 step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_sync(FULL_WARP, upto, lane >= step ? lane - step : lane);
        if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) s.of_warp[warp] = upto;
    if (threadIdx.x == 0) s.found[1] = 0, s.found[2] = 0;
    __syncthreads();
    for (u32 w = 0; w < warp; w++) upto += s.of_warp[w];
    u64 before = upto - sum;
#pragma unroll
    for (u32 i = 0; i < per; i++) {
        if (before < bound && before + bins[i] >= bound) s.found[1] = N - 1 - (per * threadIdx.x + i), s.found[2] = before;
        before += bins[i];
    }
    __syncthreads();
    const u32 bin = (u32)s.found[1];
    above = above_weight = s.found[2];
    if (!by_weight) {
        sum = 0;
        for (u32 i = threadIdx.x; i < N; i += THREADS) sum += i > bin ? of.weights[i] : 0;
        sum = all_lanes(sum);
        __syncthreads();
        if (lane == 0) s.of_warp[warp] = sum;
        __syncthreads();
        above_weight = 0;
        for (u32 w = 0; w < WARPS; w++) above_weight += s.of_warp[w];
    }
    return bin;
}

// Keys whose first `known` bits are `prefix` into bins of the bits behind them.
template <u32 N> DEVICE void fill(Bins<N>& bins, const float* logits, u32 n, float top, float scale, u32 prefix, u32 known) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < N; i += THREADS) bins.weights[i] = 0, bins.counts[i] = 0;
    __syncthreads();
    const u32 shift = 32 - known - (known ? BITS : FIRST_BITS);
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        const float x = logits[i];
        const u32 key = key_of(x);
        if (known && key >> (32 - known) != prefix) continue;
        const u64 weight = weight_of(x, top, scale);
        atomicAdd(&bins.counts[key >> shift & (N - 1)], 1u);
        if (weight) atomicAdd(&bins.weights[key >> shift & (N - 1)], weight);
    }
    __syncthreads();
}

// A place in the order of descending logits, equal ones by ascending id: a logit and a number among its equals, from 1; and the
// weight of all up to and with it.
struct Place {
    u32 key;
    u64 rank, weight;
};
// Where the sum of weights (or the number of tokens) reaches `bound`. The first bins are filled.
DEVICE Place place_reaching(Shared& s, const float* logits, u32 n, float top, float scale, u64 bound, bool by_weight) {
    u64 above, weight, above_weight = 0;
    u32 prefix = last_reaching(s, s.first, bound, by_weight, above, above_weight);
    bound -= above;
    for (u32 known = FIRST_BITS; known < 32; known += BITS) {
        fill(s.next, logits, n, top, scale, prefix, known);
        prefix = prefix << BITS | last_reaching(s, s.next, bound, by_weight, above, weight);
        bound -= above, above_weight += weight;
    }
    const u64 each = weight_of(of_key(prefix), top, scale);
    const u64 rank = by_weight ? (each ? (bound + each - 1) / each : 1) : bound;
    return {prefix, rank, above_weight + rank * each};
}

// Number `index` of a ChaCha8 stream of 64-bit numbers (rand_chacha).
DEVICE u64 chacha8(const Draw& d, u64 index) {
    u32 start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}, x[16];
    const u64 block = index / 8;
#pragma unroll
    for (u32 i = 0; i < 8; i++) start[4 + i] = d.key[i];
    start[12] = (u32)block, start[13] = (u32)(block >> 32), start[14] = (u32)d.stream, start[15] = (u32)(d.stream >> 32);
#pragma unroll
    for (u32 i = 0; i < 16; i++) x[i] = start[i];
    auto turn = [](u32 a, u32 by) { return a << by | a >> (32 - by); };
    auto quarter = [&](u32& a, u32& b, u32& c, u32& e) {
        a += b, e = turn(e ^ a, 16), c += e, b = turn(b ^ c, 12), a += b, e = turn(e ^ a, 8), c += e, b = turn(b ^ c, 7);
    };
    for (u32 round = 0; round < 4; round++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) quarter(x[i], x[4 + i], x[8 + i], x[12 + i]);
#pragma unroll
        for (u32 i = 0; i < 4; i++) quarter(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
    }
    u64 out = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++)
        if (i == index % 8) out = (u64)(x[2 * i] + start[2 * i]) | (u64)(x[2 * i + 1] + start[2 * i + 1]) << 32;
    return out;
}

KERNEL __launch_bounds__(1024) sample(const __grid_constant__ SampleParams p) {
    __shared__ Shared s;
    const u32 row = blockIdx.x, tid = threadIdx.x, lane = tid % 32, n = p.vocab;
    overlap_next();
    overlap_wait();
    Draw& d = p.draws[row];
    if (d.ended) return;
    const float* logits = p.logits + (u64)row * n;
    const bool greedy = d.scale == 0.0f;
    const float scale = d.scale;
    const u64 drawn = d.drawn;
    if (tid == THREADS - 1 && !greedy) s.bits = chacha8(d, drawn) & ~2047ull;

    // The largest key, and of equal ones the first.
    u64 best = 0;
#pragma unroll 8
    for (u32 i = tid; i < n; i += THREADS) {
        const u64 own = (u64)key_of(logits[i]) << 32 | (0xffffffffu - i);
        best = own > best ? own : best;
    }
    for (u32 step = 16; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(FULL_WARP, best, step);
        best = other > best ? other : best;
    }
    if (lane == 0) s.of_warp[tid / 32] = best;
    __syncthreads();
    for (u32 w = 0; w < WARPS; w++) best = s.of_warp[w] > best ? s.of_warp[w] : best;
    const float top = of_key((u32)(best >> 32));
    u32 token = 0xffffffffu - (u32)best;

    // The sum of exponentials for the probability, in an order of its own; all weights, to choose by.
    float exponentials = 0.0f;
    u64 total = 0;
    if (greedy) {
#pragma unroll 8
        for (u32 i = tid; i < n; i += THREADS) exponentials += __expf(logits[i] - top);
    } else {
#pragma unroll 4
        for (u32 i = tid; i < n; i += THREADS) {
            const float x = logits[i];
            exponentials += __expf(x - top), total += weight_of(x, top, scale);
        }
    }
    for (u32 step = 16; step > 0; step /= 2) exponentials += __shfl_xor_sync(FULL_WARP, exponentials, step);
    total = all_lanes(total);
    __syncthreads();
    if (lane == 0) s.of_warp[tid / 32] = total, s.exponentials[tid / 32] = exponentials;
    __syncthreads();
    total = 0, exponentials = 0.0f;
    for (u32 w = 0; w < WARPS; w++) total += s.of_warp[w], exponentials += s.exponentials[w];

    if (!greedy && total > 0) {
        const u32 k = d.top_k > 0 && d.top_k < n ? d.top_k : 0;
        if (k || d.top_p < 1.0) fill(s.first, logits, n, top, scale, 0, 0);
        if (k) total = place_reaching(s, logits, n, top, scale, k, false).weight;
        if (d.top_p < 1.0) {
            const u64 bound = (u64)ceil((double)total * d.top_p);
            total = place_reaching(s, logits, n, top, scale, bound < 1 ? 1 : bound > total ? total : bound, true).weight;
        }
        const u64 bound = __umul64hi(s.bits, total) + 1;
        if (k || d.top_p < 1.0) {
            const Place at = place_reaching(s, logits, n, top, scale, bound, true);
            token = first_reaching(s, n, at.rank, [&](u32 i) { return (u64)(key_of(logits[i]) == at.key); });
        } else {
            token = first_reaching(s, n, bound, [&](u32 i) { return weight_of(logits[i], top, scale); });
        }
    }

    if (tid == 0) {
        const float logprob = (logits[token] - top) - logf(exponentials);
        p.chosen[((u32)drawn - d.first) % p.ring * gridDim.x + row] = {token, logprob};
        if (p.tokens) p.tokens[row] = token;
        d.drawn = drawn + 1;
        const bool ends = token == d.ends[0] || token == d.ends[1];
        if (ends) d.ended = 1;
        if (!p.segments) return;
        u32 *four = p.segments + 4 * row, *five = p.segments + 5 * gridDim.x + 5 * row;
        if (p.read) four[3] = five[3] = (four[3] + 1) % p.mini_batch;
        if (ends) four[1] = five[1] = 0;
    }
}
