// TTT-Linear for any head size and mini-batch up to 64, bf16 or f32: plain loops in the order of backward.md 3, tiles in scratch
// memory, with the rounding points of the fast kernels where elements are bf16. One block of 256 threads a (segment, head), no
// dynamic shared memory. What the fast kernels do not cover runs here.
#include "loops.cuh"
#include "params.cuh"

template <bool BF16> DEVICE void forward(const ForwardParams& p) {
    typedef Elements<BF16> El;
    const u32 d = p.head_dim, K = p.mini_batch, head = blockIdx.x % p.heads, state_len = d * d + d;
    const Segment s = p.segments[blockIdx.x / p.heads];
    float* kk = p.scratch + (u64)blockIdx.x * forward_scratch(d, K); // [K, d]
    float* gh = kk + K * d;                                          // [K, d], rounded
    float* z = gh + K * d;                                           // [K, d]
    float* m = z + K * d;                                            // [K, K]
    const u64 place = (u64)s.slot * p.heads + head;
    float* w = p.weights + place * state_len;
    float* b = w + d * d;
    float* rows = p.rows ? p.rows + place * (K - 1) * 2 * d : 0;
    const float *gamma = p.gamma + head * d, *beta = p.beta + head * d;
    const u32 checkpoints = ((s.len + K - 1) / K + p.group - 1) / p.group;
    float* saved = p.checkpoints ? p.checkpoints + ((u64)s.first_checkpoint * p.heads + (u64)head * checkpoints) * state_len : 0;

    each(s.phase * d, [&](u32 x) {
        kk[x] = rows[x / d * 2 * d + x % d];
        gh[x] = rows[x / d * 2 * d + d + x % d];
    });
    u32 first = s.phase;
    for (u32 done = 0, step = 0; done < s.len; step++) {
        const u32 n = min(K - first, s.len - done);
        const i64 row = (i64)s.first_row + done;
        auto q_at = [&](u32 i, u32 c) { return El::load(p.q, (row + i) * p.q_stride + head * d + c); };
        auto k_at = [&](u32 i, u32 c) { return El::load(p.k, (row + i) * p.k_stride + head * d + c); };
        each(n * d, [&](u32 x) {
            const u32 i = x / d, c = x % d;
            kk[(first + i) * d + c] = k_at(i, c);
            z[x] = b[c] + dot(d, [&](u32 a) { return k_at(i, a) * El::round(w[a * d + c]); });
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            const float* zi = z + i * d;
            const float lr = p.lr[(row + i) * p.lr_stride + head];
            const float mean = row_sum(d, [&](u32 c) { return zi[c]; }) / d;
            const float var = row_sum(d, [&](u32 c) { return (zi[c] - mean) * (zi[c] - mean); }) / d;
            const float rs = 1.0f / sqrtf(var + EPS);
            auto xhat = [&](u32 c) { return (zi[c] - mean) * rs; };
            auto g = [&](u32 c) {
                const float t = El::load(p.v, (row + i) * p.v_stride + head * d + c) - k_at(i, c);
                return gamma[c] * (gamma[c] * xhat(c) + beta[c] - t);
            };
            const float mean_g = row_sum(d, g) / d;
            const float mean_gx = row_sum(d, [&](u32 c) { return g(c) * xhat(c); }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                const float ghat = lr * rs * (g(c) - mean_g - mean_gx * xhat(c));
                gh[(first + i) * d + c] = El::round(ghat);
                if (p.ghat) El::store(p.ghat, (row + i) * p.ghat_stride + head * d + c, ghat);
            }
            for (u32 j = threadIdx.x & 31; j <= first + i; j += 32)
                m[i * K + j] = El::round(dot(d, [&](u32 c) { return q_at(i, c) * kk[j * d + c]; }) + 1.0f);
        });
        __syncthreads();
        each(n * d, [&](u32 x) {
            const u32 i = x / d, c = x % d;
            const float qw = dot(d, [&](u32 a) { return q_at(i, a) * El::round(w[a * d + c]); });
            const float mg = dot(first + i + 1, [&](u32 j) { return m[i * K + j] * gh[j * d + c]; });
            z[x] = b[c] + qw - p.tok[first + i] * mg;
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            const float* zi = z + i * d;
            const float mean = row_sum(d, [&](u32 c) { return zi[c]; }) / d;
            const float var = row_sum(d, [&](u32 c) { return (zi[c] - mean) * (zi[c] - mean); }) / d;
            const float rs = 1.0f / sqrtf(var + EPS);
            for (u32 c = threadIdx.x & 31; c < d; c += 32)
                El::store(p.z, (row + i) * p.z_stride + head * d + c, q_at(i, c) + gamma[c] * ((zi[c] - mean) * rs) + beta[c]);
        });
        if (first + n == K) {
            const float tau = p.tok[K - 1];
            each(state_len, [&](u32 x) {
                const u32 a = x / d, c = x % d; // row d is b
                w[x] -= dot(K, [&](u32 j) { return (a < d ? kk[j * d + a] : 1.0f) * El::round(tau * gh[j * d + c]); });
            });
            first = 0;
        } else {
            if (rows) {
                each(n * d, [&](u32 x) {
                    const u32 j = first + x / d, c = x % d;
                    rows[j * 2 * d + c] = kk[j * d + c];
                    rows[j * 2 * d + d + c] = gh[j * d + c];
                });
            }
            first += n;
        }
        done += n;
        __syncthreads();
        if (saved && (done == s.len || (step + 1) % p.group == 0)) {
            each(state_len, [&](u32 x) { saved[step / p.group * state_len + x] = w[x]; });
        }
    }
}

template <bool BF16> DEVICE void backward(const BackwardParams& p) {
    typedef Elements<BF16> El;
    const u32 d = p.head_dim, K = p.mini_batch, head = blockIdx.x % p.heads, state_len = d * d + d;
    const Segment s = p.segments[blockIdx.x / p.heads];
    float* w = p.scratch + (u64)blockIdx.x * backward_scratch(d, K); // [S]
    float* b = w + d * d;
    float* x_hat = w + state_len; // all [K, d]
    float* e = x_hat + K * d;
    float* grad = e + K * d;
    float* xo = grad + K * d;
    float* dzbar = xo + K * d; // rounded for the products
    float* dgh = dzbar + K * d;
    float* dzi = dgh + K * d;
    float* z = dzi + K * d;
    float* dk = z + K * d;
    float* m = dk + K * d;         // [K, K], f32
    float* dm = m + K * K;         // [K, K], f32
    float* rstd = dm + K * K;      // [K]
    float* mean_gx = rstd + K;     // [K]
    float* rstd_out = mean_gx + K; // [K]
    float* pdot = rstd_out + K;    // [K]
    const float *gamma = p.gamma + head * d, *beta = p.beta + head * d;
    const u32 count = (s.len + K - 1) / K, checkpoints = (count + p.group - 1) / p.group;
    const float* saved = p.checkpoints + ((u64)s.first_checkpoint * p.heads + (u64)head * checkpoints) * state_len;
    float* dw = p.dstate + (u64)blockIdx.x * state_len;
    float* db = dw + d * d;
    float* dtok = p.partials + (u64)blockIdx.x * (K + 2 * d);
    float *dgamma = dtok + K, *dbeta = dgamma + d;
    each(K + 2 * d, [&](u32 x) { dtok[x] = 0.0f; });
    __syncthreads();

    for (u32 mb = count; mb-- > 0;) {
        const u32 n = min(K, s.len - mb * K);
        const bool commits = n == K;
        const float tau_last = commits ? p.tok[K - 1] : 0.0f;
        const i64 row = (i64)s.first_row + mb * K;
        auto q_at = [&](u32 i, u32 c) { return El::load(p.q, (row + i) * p.q_stride + head * d + c); };
        auto k_at = [&](u32 i, u32 c) { return El::load(p.k, (row + i) * p.k_stride + head * d + c); };
        auto dz_at = [&](u32 i, u32 c) { return El::load(p.dz, (row + i) * p.dz_stride + head * d + c); };
        auto gh_at = [&](u32 i, u32 c) { return El::load(p.ghat, (row + i) * p.ghat_stride + head * d + c); };
        if (mb + 1 == count || (mb + 1) % p.group == 0) {
            each(state_len, [&](u32 x) { w[x] = saved[mb / p.group * state_len + x]; });
            __syncthreads();
        }
        if (commits) {
            each(state_len, [&](u32 x) {
                const u32 a = x / d, c = x % d;
                w[x] += dot(K, [&](u32 j) { return (a < d ? k_at(j, a) : 1.0f) * El::round(tau_last * gh_at(j, c)); });
            });
            __syncthreads();
        }
        // Forward again.
        each(n * n, [&](u32 x) {
            const u32 i = x / n, j = x % n;
            m[x] = j <= i ? dot(d, [&](u32 c) { return q_at(i, c) * k_at(j, c); }) + 1.0f : 0.0f;
        });
        __syncthreads();
        each(n * d, [&](u32 x) {
            const u32 i = x / d, c = x % d;
            z[x] = b[c] + dot(d, [&](u32 a) { return k_at(i, a) * El::round(w[a * d + c]); });
            const float qw = dot(d, [&](u32 a) { return q_at(i, a) * El::round(w[a * d + c]); });
            xo[x] = b[c] + qw - p.tok[i] * dot(i + 1, [&](u32 j) { return El::round(m[i * n + j]) * gh_at(j, c); });
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            float* zi = z + i * d;
            const float mean = row_sum(d, [&](u32 c) { return zi[c]; }) / d;
            const float var = row_sum(d, [&](u32 c) { return (zi[c] - mean) * (zi[c] - mean); }) / d;
            const float rs = 1.0f / sqrtf(var + EPS);
            auto g = [&](u32 c) { return gamma[c] * e[i * d + c]; };
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                const float t = El::load(p.v, (row + i) * p.v_stride + head * d + c) - k_at(i, c);
                x_hat[i * d + c] = (zi[c] - mean) * rs;
                e[i * d + c] = gamma[c] * x_hat[i * d + c] + beta[c] - t;
            }
            const float mean_g = row_sum(d, g) / d;
            const float gx = row_sum(d, [&](u32 c) { return g(c) * x_hat[i * d + c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) grad[i * d + c] = rs * (g(c) - mean_g - gx * x_hat[i * d + c]);
            // (1) output LayerNorm
            float* o = xo + i * d;
            const float mean_o = row_sum(d, [&](u32 c) { return o[c]; }) / d;
            const float var_o = row_sum(d, [&](u32 c) { return (o[c] - mean_o) * (o[c] - mean_o); }) / d;
            const float rs_o = 1.0f / sqrtf(var_o + EPS);
            for (u32 c = threadIdx.x & 31; c < d; c += 32) o[c] = (o[c] - mean_o) * rs_o;
            const float p0 = row_sum(d, [&](u32 c) { return gamma[c] * dz_at(i, c); }) / d;
            const float p1 = row_sum(d, [&](u32 c) { return gamma[c] * dz_at(i, c) * o[c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32)
                dzbar[i * d + c] = El::round(rs_o * (gamma[c] * dz_at(i, c) - p0 - o[c] * p1));
            if ((threadIdx.x & 31) == 0) {
                rstd[i] = rs;
                mean_gx[i] = gx;
            }
        });
        __syncthreads();
        // (2) N and what hangs off it, (3) P
        each_row(n, [&](u32 i) {
            float sum = 0.0f;
            for (u32 j = 0; j <= i; j++) {
                const float nij = row_sum(d, [&](u32 c) { return dzbar[i * d + c] * gh_at(j, c); });
                sum += m[i * n + j] * nij;
                if ((threadIdx.x & 31) == 0) dm[i * n + j] = El::round(-p.tok[i] * nij);
            }
            if ((threadIdx.x & 31) == 0) dtok[i] -= sum;
        });
        each(n * d, [&](u32 x) {
            const u32 j = x / d, c = x % d;
            float sum = 0.0f;
            for (u32 i = j; i < n; i++) sum -= p.tok[i] * m[i * n + j] * dzbar[i * d + c];
            const float pj = db[c] + dot(d, [&](u32 a) { return k_at(j, a) * El::round(dw[a * d + c]); });
            dgh[x] = sum - tau_last * pj;
            z[x] = commits ? pj * gh_at(j, c) : 0.0f;
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            const float sum = row_sum(d, [&](u32 c) { return z[i * d + c]; });
            if ((threadIdx.x & 31) == 0) pdot[i] = sum;
            // (4) lr, (5) inner gradient
            const float lr = p.lr[(row + i) * p.lr_stride + head], rs = rstd[i];
            float *dg = dgh + i * d, *xh = x_hat + i * d, *gr = grad + i * d;
            const float dr = row_sum(d, [&](u32 c) { return dg[c] * gr[c]; });
            if ((threadIdx.x & 31) == 0) p.dlr[(row + i) * p.dlr_stride + head] = dr;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) dg[c] *= lr;
            const float a1 = row_sum(d, [&](u32 c) { return dg[c]; }) / d;
            const float a2 = row_sum(d, [&](u32 c) { return dg[c] * xh[c]; }) / d;
            const float a3 = row_sum(d, [&](u32 c) { return dg[c] * gr[c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                const float u = rs * (dg[c] - a1 - a2 * xh[c]), de = gamma[c] * u;
                dg[c] = gamma[c] * de - rs * (mean_gx[i] * dg[c] + a2 * gamma[c] * e[i * d + c]);
                dk[i * d + c] = u;
            }
            const float a4 = row_sum(d, [&](u32 c) { return dg[c]; }) / d;
            const float a5 = row_sum(d, [&](u32 c) { return dg[c] * xh[c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                dzi[i * d + c] = El::round(rs * (dg[c] - a4 - xh[c] * (a5 + a3)));
                El::store(p.dv, (row + i) * p.dv_stride + head * d + c, -gamma[c] * dk[i * d + c]);
            }
        });
        __syncthreads();
        each(d, [&](u32 c) {
            float sum_gamma = 0.0f, sum_beta = 0.0f;
            for (u32 i = 0; i < n; i++) {
                const float u = dk[i * d + c], de = gamma[c] * u, dz = dz_at(i, c);
                sum_gamma += dz * xo[i * d + c] + u * e[i * d + c] + de * x_hat[i * d + c];
                sum_beta += dz + de;
            }
            dgamma[c] += sum_gamma;
            dbeta[c] += sum_beta;
        });
        if (commits && threadIdx.x == 0) dtok[K - 1] -= dot(n, [&](u32 i) { return pdot[i]; });
        // (2), (6) dq and dk
        each_row(n, [&](u32 i) {
            for (u32 a = threadIdx.x & 31; a < d; a += 32) {
                float sum = dz_at(i, a) + dot(d, [&](u32 c) { return dzbar[i * d + c] * El::round(w[a * d + c]); });
                sum += dot(i + 1, [&](u32 j) { return dm[i * n + j] * k_at(j, a); });
                El::store(p.dq, (row + i) * p.dq_stride + head * d + a, sum);
                sum = gamma[a] * dk[i * d + a] + dot(d, [&](u32 c) { return dzi[i * d + c] * El::round(w[a * d + c]); });
                sum -= tau_last * dot(d, [&](u32 c) { return gh_at(i, c) * El::round(dw[a * d + c]); });
                for (u32 j = i; j < n; j++) sum += dm[j * n + i] * q_at(j, a);
                El::store(p.dk, (row + i) * p.dk_stride + head * d + a, sum);
            }
        });
        __syncthreads();
        each(state_len, [&](u32 x) {
            const u32 a = x / d, c = x % d;
            dw[x] += dot(n, [&](u32 i) {
                return (a < d ? q_at(i, a) : 1.0f) * dzbar[i * d + c] + (a < d ? k_at(i, a) : 1.0f) * dzi[i * d + c];
            });
        });
        __syncthreads();
    }
}

KERNEL __launch_bounds__(THREADS, 1) ttt_linear_forward_plain_bf16(const __grid_constant__ ForwardParams p) { forward<true>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_linear_forward_plain_f32(const __grid_constant__ ForwardParams p) { forward<false>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_linear_backward_plain_bf16(const __grid_constant__ BackwardParams p) { backward<true>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_linear_backward_plain_f32(const __grid_constant__ BackwardParams p) { backward<false>(p); }

// Adds the blocks' partial sums in a fixed order. One warp an output: H * 2 d + K warps, in blocks of 256 threads.
KERNEL __launch_bounds__(THREADS, 1) ttt_linear_reduce(const __grid_constant__ ReduceParams p) {
    const u32 out = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x & 31;
    const u32 d = p.head_dim, K = p.mini_batch, len = K + 2 * d;
    if (out >= p.heads * 2 * d + K) return;
    float sum = 0.0f;
    if (out < K) {
        for (u32 t = lane; t < p.segments * p.heads * p.parts; t += 32) sum += p.partials[(u64)t * len + out];
        sum = warp_sum(sum);
        if (lane == 0) p.dtok[out] += sum;
    } else {
        const u32 head = (out - K) / (2 * d), column = (out - K) % (2 * d);
        for (u32 s = lane; s < p.segments * p.parts; s += 32) {
            const u64 block = ((u64)(s / p.parts) * p.heads + head) * p.parts + s % p.parts;
            sum += p.partials[block * len + K + column];
        }
        sum = warp_sum(sum);
        if (lane == 0) (column < d ? p.dgamma + head * d + column : p.dbeta + head * d + column - d)[0] += sum;
    }
}
