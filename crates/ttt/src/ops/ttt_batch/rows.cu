// Batch descent: LayerNorm and residual around the inner model, and their gradients, a warp a row and head. Blocks: segments x chunks
// of the longest x heads; a warp takes every eighth row. Symbols as in ops/inner/wrap.rs; see chunks.cuh.
#include "chunks.cuh"

struct DescentParams {
    Layout layout;
    const T *q, *k, *v, *dz;
    const float *lr, *gamma, *beta;     // [rows, heads], [heads, width]
    Operand bias;                       // b0 [width]
    const float *z_inner, *z_bar, *sums; // k W0, q W0 and O, [rows, columns]
    float *ghat, *dghat, *dz_bar, *d_sums, *dq, *dk, *dlr; // [rows, columns], [rows, heads]
    T *z, *dv;
    float* parameters;                  // [chunks and more, heads, 2 width]: parts of dgamma and dbeta
    u32 q_stride, k_stride, v_stride, dz_stride, lr_stride, dv_stride, dlr_stride;
    u32 layer_norm, residual, mean;     // mean: tau = 1 / (position + 1), otherwise 1
};

constexpr u32 PARTS = MAX_WIDTH / 32;
constexpr float EPS = 1e-6f;
typedef float Row[PARTS];

struct Lane {
    u32 lane, d;
};
#define EACH(c, i) \
    _Pragma("unroll") for (u32 i = 0, c = l.lane; i < PARTS; i++, c += 32) if (c < l.d)
DEVICE float mean_of(const Row& x, const Lane& l) {
    float sum = 0.0f;
    EACH(c, i) sum += x[i];
    return sum_lanes(sum) / l.d;
}
DEVICE float mean_of(const Row& x, const Row& y, const Lane& l) {
    float sum = 0.0f;
    EACH(c, i) sum += x[i] * y[i];
    return sum_lanes(sum) / l.d;
}
// xhat = (z - mean z) / s; returns 1 / s.
DEVICE float normalize(const Row& z, Row& xhat, const Lane& l) {
    const float mu = mean_of(z, l);
    EACH(c, i) xhat[i] = z[i] - mu;
    const float rs = rsqrtf(mean_of(xhat, xhat, l) + EPS);
    EACH(c, i) xhat[i] *= rs;
    return rs;
}
DEVICE float tau(const DescentParams& p, u32 position) { return p.mean ? 1.0f / (position + 1) : 1.0f; }

// Z = k W0 + b0 of a row, its normed copy, the error e, and G. Returns 1 / s and mean(gamma e xhat).
DEVICE void inner_gradient(const DescentParams& p, const ChunkPlace& at, u64 row, const Lane& l, Row& xhat, Row& e, Row& g, float& rs, float& m) {
    const u64 own = (row * p.layout.heads + at.head) * l.d, bias = start_of(p.bias, at, p.layout);
    Row z;
    EACH(c, i) z[i] = p.z_inner[own + c] + read(p.bias, bias + c);
    rs = 1.0f, m = 0.0f;
    if (p.layer_norm) rs = normalize(z, xhat, l);
    EACH(c, i) {
        const float k = p.residual ? number(p.k[row * p.k_stride + at.head * l.d + c]) : 0.0f;
        const float y = p.layer_norm ? p.gamma[at.head * l.d + c] * xhat[i] + p.beta[at.head * l.d + c] : z[i];
        e[i] = y - (number(p.v[row * p.v_stride + at.head * l.d + c]) - k);
        g[i] = p.layer_norm ? p.gamma[at.head * l.d + c] * e[i] : e[i];
    }
    if (!p.layer_norm) return;
    const float g0 = mean_of(g, l);
    m = mean_of(g, xhat, l);
    EACH(c, i) g[i] = rs * (g[i] - g0 - m * xhat[i]);
}

// Writes the scaled inner gradients, ghat.
KERNEL __launch_bounds__(256, 2) descent_gradients(const __grid_constant__ DescentParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, 1)) return;
    const Lane l = {threadIdx.x % 32, p.layout.width};
    for (u32 t = threadIdx.x / 32; t < at.count; t += 8) {
        const u64 row = at.row + t, own = (row * p.layout.heads + at.head) * l.d;
        Row xhat, e, g;
        float rs, m;
        inner_gradient(p, at, row, l, xhat, e, g, rs, m);
        const float lr = p.lr[row * p.lr_stride + at.head];
        EACH(c, i) p.ghat[own + c] = lr * g[i];
    }
}

// zbar = q W0 + b0 - tau O of a row.
DEVICE void read_output(const DescentParams& p, const ChunkPlace& at, u32 t, const Lane& l, Row& zbar) {
    const u64 own = ((u64)(at.row + t) * p.layout.heads + at.head) * l.d, bias = start_of(p.bias, at, p.layout);
    const float scale = tau(p, at.phase + t);
    EACH(c, i) zbar[i] = p.z_bar[own + c] + read(p.bias, bias + c) - scale * p.sums[own + c];
}

// Writes z.
KERNEL __launch_bounds__(256, 2) descent_output(const __grid_constant__ DescentParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, 1)) return;
    const Lane l = {threadIdx.x % 32, p.layout.width};
    for (u32 t = threadIdx.x / 32; t < at.count; t += 8) {
        const u64 row = at.row + t, own = (row * p.layout.heads + at.head) * l.d;
        Row zbar, xhat;
        read_output(p, at, t, l, zbar);
        if (p.layer_norm) normalize(zbar, xhat, l);
        EACH(c, i) {
            float y = p.layer_norm ? p.gamma[at.head * l.d + c] * xhat[i] + p.beta[at.head * l.d + c] : zbar[i];
            if (p.residual) y += number(p.q[row * p.q_stride + at.head * l.d + c]);
            put(p.z[own + c], y);
        }
    }
}

// Adds up a block's parts of dgamma and dbeta and writes, or adds to, those of its chunk.
DEVICE void put_parameters(const DescentParams& p, const ChunkPlace& at, const Lane& l, const Row& dgamma, const Row& dbeta, bool add) {
    __shared__ float parts[8][2 * MAX_WIDTH];
    const u32 warp = threadIdx.x / 32;
    EACH(c, i) parts[warp][c] = dgamma[i], parts[warp][l.d + c] = dbeta[i];
    __syncthreads();
    if (threadIdx.x >= 2 * l.d) return;
    float* const to = p.parameters + (at.index * p.layout.heads + at.head) * 2 * l.d + threadIdx.x;
    float sum = add ? *to : 0.0f;
#pragma unroll
    for (u32 w = 0; w < 8; w++) sum += parts[w][threadIdx.x];
    *to = sum;
}

// From dz: dzbar, dO = -tau dzbar, and the part of dq that does not go through zbar.
KERNEL __launch_bounds__(256, 2) descent_output_backward(const __grid_constant__ DescentParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, 1)) return;
    const Lane l = {threadIdx.x % 32, p.layout.width};
    Row dgamma = {}, dbeta = {};
    for (u32 t = threadIdx.x / 32; t < at.count; t += 8) {
        const u64 row = at.row + t, own = (row * p.layout.heads + at.head) * l.d;
        const float scale = tau(p, at.phase + t);
        Row zbar, xhat, d;
        read_output(p, at, t, l, zbar);
        float rs = 1.0f;
        if (p.layer_norm) rs = normalize(zbar, xhat, l);
        EACH(c, i) {
            d[i] = number(p.dz[row * p.dz_stride + at.head * l.d + c]);
            p.dq[own + c] = p.residual ? d[i] : 0.0f;
            if (!p.layer_norm) continue;
            dgamma[i] += d[i] * xhat[i], dbeta[i] += d[i];
            d[i] *= p.gamma[at.head * l.d + c];
        }
        if (p.layer_norm) {
            const float p0 = mean_of(d, l), p1 = mean_of(d, xhat, l);
            EACH(c, i) d[i] = rs * (d[i] - p0 - xhat[i] * p1);
        }
        EACH(c, i) p.dz_bar[own + c] = d[i], p.d_sums[own + c] = -scale * d[i];
    }
    if (p.layer_norm) put_parameters(p, at, l, dgamma, dbeta, false);
}

// From dghat, in its place, dZ; also dlr, dv, and the part of dk that goes through the target.
KERNEL __launch_bounds__(256, 2) descent_gradients_backward(const __grid_constant__ DescentParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, 1)) return;
    const Lane l = {threadIdx.x % 32, p.layout.width};
    Row dgamma = {}, dbeta = {};
    for (u32 t = threadIdx.x / 32; t < at.count; t += 8) {
        const u64 row = at.row + t, own = (row * p.layout.heads + at.head) * l.d;
        Row xhat, e, g, dg;
        float rs, m, product = 0.0f;
        inner_gradient(p, at, row, l, xhat, e, g, rs, m);
        const float lr = p.lr[row * p.lr_stride + at.head];
        EACH(c, i) dg[i] = p.dghat[own + c], product += dg[i] * g[i], dg[i] *= lr;
        product = sum_lanes(product);
        if (l.lane == 0) p.dlr[row * p.dlr_stride + at.head] = product;
        Row de;
        if (p.layer_norm) {
            const float a1 = mean_of(dg, l), a2 = mean_of(dg, xhat, l), a3 = mean_of(dg, g, l);
            EACH(c, i) {
                const float gamma = p.gamma[at.head * l.d + c], u = rs * (dg[i] - a1 - a2 * xhat[i]);
                de[i] = gamma * u;
                dg[i] = gamma * de[i] - rs * (m * dg[i] + a2 * gamma * e[i]);
                dgamma[i] += u * e[i] + de[i] * xhat[i], dbeta[i] += de[i];
            }
            const float a4 = mean_of(dg, l), a5 = mean_of(dg, xhat, l) + a3;
            EACH(c, i) dg[i] = rs * (dg[i] - a4 - xhat[i] * a5);
        } else {
            EACH(c, i) de[i] = dg[i];
        }
        EACH(c, i) {
            p.dghat[own + c] = dg[i];
            put(p.dv[row * p.dv_stride + at.head * l.d + c], -de[i]);
            p.dk[own + c] = p.residual ? de[i] : 0.0f;
        }
    }
    if (p.layer_norm) put_parameters(p, at, l, dgamma, dbeta, true);
}
