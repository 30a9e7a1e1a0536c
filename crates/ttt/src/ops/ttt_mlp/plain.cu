// TTT-MLP for any head size and mini-batch up to 64, bf16 or f32: plain loops in the order of backward.md 4, tiles in scratch memory,
// with the rounding points of the fast kernels where elements are bf16. One block of 256 threads a (segment, head), no dynamic shared
// memory. What the fast kernels do not cover runs here.
#include "loops.cuh"
#include "mlp_params.cuh"

constexpr float GELU_C = 0.7978845608f, GELU_A = 0.044715f;

// gelu (tanh form), its first and second derivative.
DEVICE float gelu(float x) { return 0.5f * x * (1.0f + tanhf(GELU_C * x * (1.0f + GELU_A * x * x))); }
DEVICE void gelu(float x, float& y, float& d1, float& d2) {
    const float x2 = x * x, th = tanhf(GELU_C * x * (1.0f + GELU_A * x2));
    const float sech2 = 1.0f - th * th, kappa = GELU_C * (1.0f + 3.0f * GELU_A * x2);
    y = 0.5f * x * (1.0f + th);
    d1 = 0.5f * (1.0f + th) + 0.5f * x * sech2 * kappa;
    d2 = sech2 * (GELU_C * (1.0f + 6.0f * GELU_A * x2) - x * th * kappa * kappa);
}

// Mean and 1 / s of a row.
DEVICE void statistics(const float* z, u32 d, float& mean, float& rs) {
    const float mu = row_sum(d, [&](u32 c) { return z[c]; }) / d;
    mean = mu;
    rs = 1.0f / sqrtf(row_sum(d, [&](u32 c) { return (z[c] - mu) * (z[c] - mu); }) / d + EPS);
}

template <bool BF16> DEVICE void forward(const MlpForwardParams& p) {
    typedef Elements<BF16> El;
    const u32 d = p.head_dim, f = 4 * d, K = p.mini_batch, head = blockIdx.x % p.heads, R = 2 * d + 2 * f, S = 2 * d * f + f + d;
    const Segment s = p.segments[blockIdx.x / p.heads];
    float* kk = p.scratch + (u64)blockIdx.x * mlp_forward_scratch(d, K); // [K, d]
    float* gh2 = kk + K * d;                                             // [K, d], rounded
    float* z2 = gh2 + K * d;                                             // [K, d]
    float* gh1 = z2 + K * d;                                             // [K, f], rounded
    float* x2 = gh1 + K * f;                                             // [K, f], rounded
    float* z1 = x2 + K * f;                                              // [K, f]
    float* xbar2 = z1 + K * f;                                           // [K, f], rounded
    float* m1 = xbar2 + K * f;                                           // [K, K]
    float* m2 = m1 + K * K;                                              // [K, K]
    const u64 place = (u64)s.slot * p.heads + head;
    float *w1 = p.weights + place * S, *b1 = w1 + d * f, *w2 = b1 + f, *b2 = w2 + f * d;
    float* rows = p.rows ? p.rows + place * (K - 1) * R : 0;
    const float *gamma = p.gamma + head * d, *beta = p.beta + head * d;
    const u32 checkpoints = ((s.len + K - 1) / K + p.group - 1) / p.group;
    float* saved = p.ghat ? p.checkpoints + ((u64)s.first_checkpoint * p.heads + (u64)head * checkpoints) * S : 0;

    each(s.phase * d, [&](u32 x) {
        kk[x] = rows[x / d * R + x % d];
        gh2[x] = rows[x / d * R + d + 2 * f + x % d];
    });
    each(s.phase * f, [&](u32 x) {
        gh1[x] = rows[x / f * R + d + x % f];
        x2[x] = rows[x / f * R + d + f + x % f];
    });
    u32 first = s.phase;
    for (u32 done = 0, step = 0; done < s.len; step++) {
        const u32 n = min(K - first, s.len - done);
        const i64 row = (i64)s.first_row + done;
        auto q_at = [&](u32 i, u32 c) { return El::load(p.q, (row + i) * p.q_stride + head * d + c); };
        auto k_at = [&](u32 i, u32 c) { return El::load(p.k, (row + i) * p.k_stride + head * d + c); };
        auto ghat_at = [&](u32 i) { return ((row + i) * p.heads + head) * (f + d); };
        auto keep = [&](u32 i, u32 c, float sum) {
            if (p.ghat) p.sums[((row + i) * p.heads + head) * 2 * d + c] = sum;
        };
        each(n * d, [&](u32 x) { kk[first * d + x] = k_at(x / d, x % d); });
        each(n * f, [&](u32 x) {
            const u32 i = x / f, c = x % f;
            z1[x] = b1[c] + dot(d, [&](u32 a) { return k_at(i, a) * El::round(w1[a * f + c]); });
            x2[first * f + x] = El::round(gelu(z1[x]));
        });
        __syncthreads();
        each(n * d, [&](u32 x) {
            const u32 i = x / d, c = x % d;
            z2[x] = b2[c] + dot(f, [&](u32 a) { return x2[(first + i) * f + a] * El::round(w2[a * d + c]); });
            keep(i, c, z2[x]);
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            float *zi = z2 + i * d, mean, rs;
            const float lr = p.lr[(row + i) * p.lr_stride + head];
            statistics(zi, d, mean, rs);
            auto xhat = [&](u32 c) { return (zi[c] - mean) * rs; };
            auto g = [&](u32 c) {
                const float t = El::load(p.v, (row + i) * p.v_stride + head * d + c) - k_at(i, c);
                return gamma[c] * (gamma[c] * xhat(c) + beta[c] - t);
            };
            const float mean_g = row_sum(d, g) / d;
            const float mean_gx = row_sum(d, [&](u32 c) { return g(c) * xhat(c); }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                const float g2 = rs * (g(c) - mean_g - mean_gx * xhat(c));
                zi[c] = El::round(g2); // from here on the operand G2
                gh2[(first + i) * d + c] = El::round(lr * g2);
                if (p.ghat) El::store(p.ghat, ghat_at(i) + f + c, lr * g2);
            }
            for (u32 j = threadIdx.x & 31; j <= first + i; j += 32)
                m1[i * K + j] = El::round(dot(d, [&](u32 c) { return q_at(i, c) * kk[j * d + c]; }) + 1.0f);
        });
        __syncthreads();
        each(n * f, [&](u32 x) {
            const u32 i = x / f, c = x % f;
            float y, d1, d2;
            gelu(z1[x], y, d1, d2);
            const float u = dot(d, [&](u32 a) { return z2[i * d + a] * El::round(w2[c * d + a]); });
            const float g1 = p.lr[(row + i) * p.lr_stride + head] * (u * d1);
            gh1[first * f + x] = El::round(g1);
            if (p.ghat) El::store(p.ghat, ghat_at(i) + c, g1);
        });
        __syncthreads();
        each(n * f, [&](u32 x) {
            const u32 i = x / f, c = x % f;
            const float qw = dot(d, [&](u32 a) { return q_at(i, a) * El::round(w1[a * f + c]); });
            const float mg = dot(first + i + 1, [&](u32 j) { return m1[i * K + j] * gh1[j * f + c]; });
            xbar2[x] = El::round(gelu(b1[c] + qw - p.tok[first + i] * mg));
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            for (u32 j = threadIdx.x & 31; j <= first + i; j += 32)
                m2[i * K + j] = El::round(dot(f, [&](u32 c) { return xbar2[i * f + c] * x2[j * f + c]; }) + 1.0f);
        });
        __syncthreads();
        each(n * d, [&](u32 x) {
            const u32 i = x / d, c = x % d;
            const float xw = dot(f, [&](u32 a) { return xbar2[i * f + a] * El::round(w2[a * d + c]); });
            const float mg = dot(first + i + 1, [&](u32 j) { return m2[i * K + j] * gh2[j * d + c]; });
            z2[x] = b2[c] + xw - p.tok[first + i] * mg;
            keep(i, d + c, z2[x]);
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            float *zi = z2 + i * d, mean, rs;
            statistics(zi, d, mean, rs);
            for (u32 c = threadIdx.x & 31; c < d; c += 32)
                El::store(p.z, (row + i) * p.z_stride + head * d + c, q_at(i, c) + gamma[c] * ((zi[c] - mean) * rs) + beta[c]);
        });
        if (first + n == K) {
            const float tau = p.tok[K - 1];
            each(d * f + f, [&](u32 x) {
                const u32 a = x / f, c = x % f; // row d is b1
                w1[x] -= dot(K, [&](u32 j) { return (a < d ? kk[j * d + a] : 1.0f) * El::round(tau * gh1[j * f + c]); });
            });
            each(f * d + d, [&](u32 x) {
                const u32 a = x / d, c = x % d; // row f is b2
                w2[x] -= dot(K, [&](u32 j) { return (a < f ? x2[j * f + a] : 1.0f) * El::round(tau * gh2[j * d + c]); });
            });
            first = 0;
        } else {
            if (rows) {
                each(n * R, [&](u32 x) {
                    const u32 j = first + x / R, c = x % R;
                    rows[j * R + c] = c < d           ? kk[j * d + c]
                                      : c < d + f     ? gh1[j * f + c - d]
                                      : c < d + 2 * f ? x2[j * f + c - d - f]
                                                      : gh2[j * d + c - d - 2 * f];
                });
            }
            first += n;
        }
        done += n;
        __syncthreads();
        if (saved && (done == s.len || (step + 1) % p.group == 0)) {
            each(S, [&](u32 x) { saved[(u64)(step / p.group) * S + x] = w1[x]; });
        }
    }
}

template <bool BF16> DEVICE void backward(const MlpBackwardParams& p) {
    typedef Elements<BF16> El;
    const u32 d = p.head_dim, f = 4 * d, K = p.mini_batch, head = blockIdx.x % p.heads, S = 2 * d * f + f + d;
    const Segment s = p.segments[blockIdx.x / p.heads];
    float* w1 = p.scratch + (u64)blockIdx.x * mlp_backward_scratch(d, K); // [S]
    float *b1 = w1 + d * f, *w2 = b1 + f; // b2 is not needed: Z2 was kept
    float* x_hat = w1 + S; // [K, d]
    float* e = x_hat + K * d;
    float* g2 = e + K * d;
    float* xo = g2 + K * d;
    float* dzbar2 = xo + K * d; // rounded for the products
    float* dg2 = dzbar2 + K * d; // dĜ2, then dG2
    float* dz2 = dg2 + K * d;    // rounded
    float* u2 = dz2 + K * d;     // gradient of γe; before that P2 ⊙ Ĝ2
    float* x2 = u2 + K * d;      // [K, f], rounded
    float* d1 = x2 + K * f;
    float* d2 = d1 + K * f;
    float* u = d2 + K * f;
    float* xbar2 = u + K * f;      // rounded
    float* dzbar1 = xbar2 + K * f; // gelu' of Z̄1, then dZ̄1, rounded
    float* dx2 = dzbar1 + K * f;
    float* dg1 = dx2 + K * f; // dĜ1, then dG1
    float* du = dg1 + K * f;  // rounded
    float* dz1 = du + K * f;  // rounded; before that P1 ⊙ Ĝ1
    float* m1 = dz1 + K * f;  // [K, K]
    float* m2 = m1 + K * K;
    float* dm1 = m2 + K * K;
    float* dm2 = dm1 + K * K;
    float* rstd = dm2 + K * K; // [K]
    float* mean_gx = rstd + K;
    float* pdot = mean_gx + K;
    const float *gamma = p.gamma + head * d, *beta = p.beta + head * d;
    const u32 count = (s.len + K - 1) / K, checkpoints = (count + p.group - 1) / p.group;
    const float* saved = p.checkpoints + ((u64)s.first_checkpoint * p.heads + (u64)head * checkpoints) * S;
    float *dw1 = p.dstate + (u64)blockIdx.x * S, *db1 = dw1 + d * f, *dw2 = db1 + f, *db2 = dw2 + f * d;
    float* dtok = p.partials + (u64)blockIdx.x * (K + 2 * d);
    float *dgamma = dtok + K, *dbeta = dgamma + d;
    each(K + 2 * d, [&](u32 x) { dtok[x] = 0.0f; });
    __syncthreads();

    for (u32 mb = count; mb-- > 0;) {
        const u32 n = min(K, s.len - mb * K);
        const bool commits = n == K;
        const float tau = commits ? p.tok[K - 1] : 0.0f;
        const i64 row = (i64)s.first_row + mb * K;
        auto q_at = [&](u32 i, u32 c) { return El::load(p.q, (row + i) * p.q_stride + head * d + c); };
        auto k_at = [&](u32 i, u32 c) { return El::load(p.k, (row + i) * p.k_stride + head * d + c); };
        auto dz_at = [&](u32 i, u32 c) { return El::load(p.dz, (row + i) * p.dz_stride + head * d + c); };
        auto gh1_at = [&](u32 i, u32 c) { return El::load(p.ghat, ((row + i) * p.heads + head) * (f + d) + c); };
        auto gh2_at = [&](u32 i, u32 c) { return El::load(p.ghat, ((row + i) * p.heads + head) * (f + d) + f + c); };
        auto w1_at = [&](u32 a, u32 c) { return El::round(w1[a * f + c]); };
        auto w2_at = [&](u32 a, u32 c) { return El::round(w2[a * d + c]); };
        if (mb + 1 == count || (mb + 1) % p.group == 0) {
            each(S, [&](u32 x) { w1[x] = saved[(u64)(mb / p.group) * S + x]; });
            __syncthreads();
        }
        // Forward again; Z2 and Z̄2 were kept.
        if (commits) {
            each(d * f + f, [&](u32 x) {
                const u32 a = x / f, c = x % f;
                w1[x] += dot(K, [&](u32 j) { return (a < d ? k_at(j, a) : 1.0f) * El::round(tau * gh1_at(j, c)); });
            });
        }
        each(n * n, [&](u32 x) {
            const u32 i = x / n, j = x % n;
            m1[x] = j <= i ? dot(d, [&](u32 c) { return q_at(i, c) * k_at(j, c); }) + 1.0f : 0.0f;
        });
        __syncthreads();
        each(n * f, [&](u32 x) {
            const u32 i = x / f, c = x % f;
            float y, d3;
            gelu(b1[c] + dot(d, [&](u32 a) { return k_at(i, a) * w1_at(a, c); }), y, d1[x], d2[x]);
            x2[x] = El::round(y);
            const float qw = dot(d, [&](u32 a) { return q_at(i, a) * w1_at(a, c); });
            const float mg = dot(i + 1, [&](u32 j) { return El::round(m1[i * n + j]) * gh1_at(j, c); });
            gelu(b1[c] + qw - p.tok[i] * mg, y, dzbar1[x], d3);
            xbar2[x] = El::round(y);
        });
        __syncthreads();
        if (commits) {
            each(f * d, [&](u32 x) {
                const u32 a = x / d, c = x % d;
                w2[x] += dot(K, [&](u32 j) { return x2[j * f + a] * El::round(tau * gh2_at(j, c)); });
            });
        }
        each(n * n, [&](u32 x) {
            const u32 i = x / n, j = x % n;
            m2[x] = j <= i ? dot(f, [&](u32 c) { return xbar2[i * f + c] * x2[j * f + c]; }) + 1.0f : 0.0f;
        });
        __syncthreads();
        each_row(n, [&](u32 i) {
            const float *z2 = p.sums + ((row + i) * p.heads + head) * 2 * d, *zbar2 = z2 + d;
            float mean, rs, mean_o, rs_o;
            statistics(z2, d, mean, rs);
            statistics(zbar2, d, mean_o, rs_o);
            auto g = [&](u32 c) { return gamma[c] * e[i * d + c]; };
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                const float t = El::load(p.v, (row + i) * p.v_stride + head * d + c) - k_at(i, c);
                x_hat[i * d + c] = (z2[c] - mean) * rs;
                e[i * d + c] = gamma[c] * x_hat[i * d + c] + beta[c] - t;
                xo[i * d + c] = (zbar2[c] - mean_o) * rs_o;
            }
            const float mean_g = row_sum(d, g) / d;
            const float gx = row_sum(d, [&](u32 c) { return g(c) * x_hat[i * d + c]; }) / d;
            // (a) output LayerNorm
            const float p0 = row_sum(d, [&](u32 c) { return gamma[c] * dz_at(i, c); }) / d;
            const float p1 = row_sum(d, [&](u32 c) { return gamma[c] * dz_at(i, c) * xo[i * d + c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                g2[i * d + c] = rs * (g(c) - mean_g - gx * x_hat[i * d + c]);
                dzbar2[i * d + c] = El::round(rs_o * (gamma[c] * dz_at(i, c) - p0 - xo[i * d + c] * p1));
            }
            if ((threadIdx.x & 31) == 0) rstd[i] = rs, mean_gx[i] = gx;
        });
        __syncthreads();
        // (b) N2
        each_row(n, [&](u32 i) {
            float sum = 0.0f;
            for (u32 j = 0; j <= i; j++) {
                const float nij = row_sum(d, [&](u32 c) { return dzbar2[i * d + c] * gh2_at(j, c); });
                sum += m2[i * n + j] * nij;
                if ((threadIdx.x & 31) == 0) dm2[i * n + j] = El::round(-p.tok[i] * nij);
            }
            if ((threadIdx.x & 31) == 0) dtok[i] -= sum;
        });
        __syncthreads();
        each(n * f, [&](u32 x) {
            const u32 i = x / f, c = x % f;
            u[x] = dot(d, [&](u32 a) { return El::round(g2[i * d + a]) * w2_at(c, a); });
            float sum = dot(d, [&](u32 a) { return dzbar2[i * d + a] * w2_at(c, a); });
            sum += dot(i + 1, [&](u32 j) { return dm2[i * n + j] * x2[j * f + c]; });
            dzbar1[x] = El::round(sum * dzbar1[x]); // (c)
            sum = commits ? -tau * dot(d, [&](u32 a) { return gh2_at(i, a) * El::round(dw2[c * d + a]); }) : 0.0f; // (e)
            for (u32 j = i; j < n; j++) sum += dm2[j * n + i] * xbar2[j * f + c];
            dx2[x] = sum;
        });
        each(n * d, [&](u32 x) {
            const u32 j = x / d, c = x % d;
            float sum = 0.0f;
            for (u32 i = j; i < n; i++) sum -= p.tok[i] * m2[i * n + j] * dzbar2[i * d + c];
            const float p2 = db2[c] + dot(f, [&](u32 a) { return x2[j * f + a] * El::round(dw2[a * d + c]); });
            dg2[x] = sum - tau * p2;
            u2[x] = commits ? p2 * gh2_at(j, c) : 0.0f;
        });
        __syncthreads();
        // (d) N1
        each_row(n, [&](u32 i) {
            float sum = 0.0f;
            for (u32 j = 0; j <= i; j++) {
                const float nij = row_sum(f, [&](u32 c) { return dzbar1[i * f + c] * gh1_at(j, c); });
                sum += m1[i * n + j] * nij;
                if ((threadIdx.x & 31) == 0) dm1[i * n + j] = El::round(-p.tok[i] * nij);
            }
            if ((threadIdx.x & 31) == 0) dtok[i] -= sum;
        });
        each(n * f, [&](u32 x) {
            const u32 j = x / f, c = x % f;
            float sum = 0.0f;
            for (u32 i = j; i < n; i++) sum -= p.tok[i] * m1[i * n + j] * dzbar1[i * f + c];
            const float p1 = db1[c] + dot(d, [&](u32 a) { return k_at(j, a) * El::round(dw1[a * f + c]); });
            dg1[x] = sum - tau * p1;
            dz1[x] = commits ? p1 * gh1_at(j, c) : 0.0f;
        });
        __syncthreads();
        // (f) lr, (g) U
        each_row(n, [&](u32 i) {
            const float sum = row_sum(f, [&](u32 c) { return dz1[i * f + c]; }) + row_sum(d, [&](u32 c) { return u2[i * d + c]; });
            const float lr = p.lr[(row + i) * p.lr_stride + head];
            const float dr = row_sum(f, [&](u32 c) { return dg1[i * f + c] * (u[i * f + c] * d1[i * f + c]); })
                             + row_sum(d, [&](u32 c) { return dg2[i * d + c] * g2[i * d + c]; });
            if ((threadIdx.x & 31) == 0) pdot[i] = sum, p.dlr[(row + i) * p.dlr_stride + head] = dr;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) dg2[i * d + c] *= lr;
            for (u32 c = i * f + (threadIdx.x & 31); c < (i + 1) * f; c += 32) dg1[c] *= lr, du[c] = El::round(dg1[c] * d1[c]);
        });
        __syncthreads();
        if (commits && threadIdx.x == 0) dtok[K - 1] -= dot(n, [&](u32 i) { return pdot[i]; });
        each(n * d, [&](u32 x) {
            const u32 i = x / d, c = x % d;
            dg2[x] += dot(f, [&](u32 a) { return du[i * f + a] * w2_at(a, c); });
        });
        __syncthreads();
        // (h)
        each_row(n, [&](u32 i) {
            float *dg = dg2 + i * d, *xh = x_hat + i * d, *gr = g2 + i * d;
            const float rs = rstd[i];
            const float a1 = row_sum(d, [&](u32 c) { return dg[c]; }) / d;
            const float a2 = row_sum(d, [&](u32 c) { return dg[c] * xh[c]; }) / d;
            const float a3 = row_sum(d, [&](u32 c) { return dg[c] * gr[c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                const float un = rs * (dg[c] - a1 - a2 * xh[c]), de = gamma[c] * un;
                dg[c] = gamma[c] * de - rs * (mean_gx[i] * dg[c] + a2 * gamma[c] * e[i * d + c]);
                u2[i * d + c] = un;
            }
            const float a4 = row_sum(d, [&](u32 c) { return dg[c]; }) / d;
            const float a5 = row_sum(d, [&](u32 c) { return dg[c] * xh[c]; }) / d;
            for (u32 c = threadIdx.x & 31; c < d; c += 32) {
                dz2[i * d + c] = El::round(rs * (dg[c] - a4 - xh[c] * (a5 + a3)));
                El::store(p.dv, (row + i) * p.dv_stride + head * d + c, -gamma[c] * u2[i * d + c]);
            }
        });
        __syncthreads();
        each(d, [&](u32 c) {
            float sum_gamma = 0.0f, sum_beta = 0.0f;
            for (u32 i = 0; i < n; i++) {
                const float un = u2[i * d + c], de = gamma[c] * un, dz = dz_at(i, c);
                sum_gamma += dz * xo[i * d + c] + un * e[i * d + c] + de * x_hat[i * d + c];
                sum_beta += dz + de;
            }
            dgamma[c] += sum_gamma;
            dbeta[c] += sum_beta;
        });
        // (i), (j)
        each(n * f, [&](u32 x) {
            const u32 i = x / f, c = x % f;
            const float sum = dx2[x] + dot(d, [&](u32 a) { return dz2[i * d + a] * w2_at(c, a); });
            dz1[x] = El::round(sum * d1[x] + dg1[x] * u[x] * d2[x]);
        });
        __syncthreads();
        // (d), (e), (k) dq and dk
        each_row(n, [&](u32 i) {
            for (u32 a = threadIdx.x & 31; a < d; a += 32) {
                float sum = dz_at(i, a) + dot(f, [&](u32 c) { return dzbar1[i * f + c] * w1_at(a, c); });
                sum += dot(i + 1, [&](u32 j) { return dm1[i * n + j] * k_at(j, a); });
                El::store(p.dq, (row + i) * p.dq_stride + head * d + a, sum);
                sum = gamma[a] * u2[i * d + a] + dot(f, [&](u32 c) { return dz1[i * f + c] * w1_at(a, c); });
                if (commits) sum -= tau * dot(f, [&](u32 c) { return gh1_at(i, c) * El::round(dw1[a * f + c]); });
                for (u32 j = i; j < n; j++) sum += dm1[j * n + i] * q_at(j, a);
                El::store(p.dk, (row + i) * p.dk_stride + head * d + a, sum);
            }
        });
        __syncthreads();
        each(d * f + f, [&](u32 x) {
            const u32 a = x / f, c = x % f;
            dw1[x] += dot(n, [&](u32 i) {
                return (a < d ? q_at(i, a) : 1.0f) * dzbar1[i * f + c] + (a < d ? k_at(i, a) : 1.0f) * dz1[i * f + c];
            });
        });
        each(f * d + d, [&](u32 x) {
            const u32 a = x / d, c = x % d;
            dw2[x] += dot(n, [&](u32 i) {
                const float sum = (a < f ? xbar2[i * f + a] : 1.0f) * dzbar2[i * d + c] + (a < f ? x2[i * f + a] : 1.0f) * dz2[i * d + c];
                return sum + (a < f ? du[i * f + a] * El::round(g2[i * d + c]) : 0.0f);
            });
        });
        __syncthreads();
    }
}

KERNEL __launch_bounds__(THREADS, 1) ttt_mlp_forward_plain_bf16(const __grid_constant__ MlpForwardParams p) { forward<true>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_mlp_forward_plain_f32(const __grid_constant__ MlpForwardParams p) { forward<false>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_mlp_backward_plain_bf16(const __grid_constant__ MlpBackwardParams p) { backward<true>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_mlp_backward_plain_f32(const __grid_constant__ MlpBackwardParams p) { backward<false>(p); }
