//! One dense layer under mini-batch gradient descent, of which TTT-Linear has one and TTT-MLP two, on row-major tiles
//! `[n, width]`. `columns` is the number of tokens of a mini-batch rounded up to 16: the width of tiles whose columns are tokens.

use pulp::Simd;

use super::cpu::{Product, block_rows, transpose};
use super::rows::{axpy, dot, fill_rows};

/// y[n, a] (+)= alpha x[n, b] Wᵀ for W `[a, b]`. `xt` `[b, columns]` receives xᵀ, `yt` `[a, columns]` is scratch.
#[inline(always)]
pub(crate) fn times_transposed<S: Simd>(
    simd: S,
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    [n, a, b, columns]: [usize; 4],
    [xt, yt]: [&mut [f32]; 2],
    (alpha, add): (f32, bool),
) {
    if n < 4 {
        // Too few tokens for tiles of them.
        for (y, x) in y.chunks_exact_mut(a).zip(x.chunks_exact(b)).take(n) {
            for (y, w) in y.iter_mut().zip(w.chunks_exact(b)) {
                *y = alpha * dot(simd, x, w) + if add { *y } else { 0.0 };
            }
        }
        return;
    }
    to_columns(simd, xt, x, [n, b, columns]);
    times_transposed_columns(simd, y, xt, w, [n, a, b, columns], yt, (alpha, add));
}

/// [`times_transposed`] from xᵀ `[b, columns]`, for 4 tokens or more.
#[inline(always)]
fn times_transposed_columns<S: Simd>(
    simd: S,
    y: &mut [f32],
    xt: &[f32],
    w: &[f32],
    [n, a, b, columns]: [usize; 4],
    yt: &mut [f32],
    (alpha, add): (f32, bool),
) {
    simd.vectorize(Product {
        c: yt,
        c_stride: columns,
        a_strides: [b, 1],
        terms: &[[w, xt]],
        b_stride: columns,
        sizes: [a, b, columns],
        alpha,
        add: false,
    });
    transpose(simd, y, a, yt, columns, [a, n], add.then_some(1.0));
}

/// The tile `[n, width]` as `[width, columns]`, zero in the columns of tokens that are not there.
#[inline(always)]
pub(crate) fn to_columns<S: Simd>(simd: S, out: &mut [f32], x: &[f32], [n, width, columns]: [usize; 3]) {
    if n < columns {
        for row in out.chunks_exact_mut(columns).take(width) {
            row[n..].fill(0.0);
        }
    }
    transpose(simd, out, columns, x, width, [n, width], None);
}

/// c[n, width] += m x for the lower-trapezoidal m `[n, columns]` whose row i ends with column `first + i`.
#[inline(always)]
fn lower_product<S: Simd>(simd: S, c: &mut [f32], m: &[f32], x: &[f32], [first, n, width, columns]: [usize; 4]) {
    let step = block_rows::<S>();
    for i in (0..n).step_by(step) {
        let rows = step.min(n - i);
        simd.vectorize(Product {
            c: &mut c[i * width..],
            c_stride: width,
            a_strides: [columns, 1],
            terms: &[[&m[i * columns..], x]],
            b_stride: width,
            sizes: [rows, first + i + rows, width],
            alpha: 1.0,
            add: true,
        });
    }
}

/// c[n, width] = mᵀ x for the lower-triangular m `[n, columns]`.
#[inline(always)]
fn lower_transposed_product<S: Simd>(simd: S, c: &mut [f32], m: &[f32], x: &[f32], [n, width, columns]: [usize; 3]) {
    let step = block_rows::<S>();
    for j in (0..n).step_by(step) {
        let rows = step.min(n - j);
        simd.vectorize(Product {
            c: &mut c[j * width..],
            c_stride: width,
            a_strides: [1, columns],
            terms: &[[&m[j * columns + j..], &x[j * width..]]],
            b_stride: width,
            sizes: [rows, n - j, width],
            alpha: 1.0,
            add: false,
        });
    }
}

/// Sizes of a dense layer `[a] -> [b]` and of the tokens `first..first + n` that it sees.
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) a: usize,
    pub(crate) b: usize,
    pub(crate) first: usize,
    pub(crate) n: usize,
    pub(crate) columns: usize,
}

impl Layer {
    /// y[n, b] = x[n, a] W + bias.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(&self, simd: S, y: &mut [f32], x: &[f32], [w, bias]: [&[f32]; 2]) {
        let Layer { b, n, .. } = *self;
        fill_rows(&mut y[..n * b], bias);
        self.add_product(simd, y, x, w);
    }

    /// The layer after descent: y = x W + bias - τ ⊙ (M Ĝ), M = tril(x leftᵀ + 1). `left` and `ghat` hold the mini-batch's rows
    /// from its start. `m` `[n, columns]` becomes M, `neg` -τ ⊙ M; `left_t` `[a, columns]` is scratch.
    #[inline(always)]
    pub(crate) fn output<S: Simd>(
        &self,
        simd: S,
        y: &mut [f32],
        x: &[f32],
        weights: [&[f32]; 2],
        [left, ghat]: [&[f32]; 2],
        tok: &[f32],
        [m, neg, left_t]: [&mut [f32]; 3],
    ) {
        let Layer { a, b, first, n, columns } = *self;
        let end = first + n;
        if n < 4 {
            for i in 0..n {
                for j in 0..=first + i {
                    m[i * columns + j] = dot(simd, &x[i * a..][..a], &left[j * a..][..a]);
                }
            }
        } else {
            to_columns(simd, left_t, left, [end, a, columns]);
            let (a_strides, sizes) = ([a, 1], [n, a, columns]);
            let (c_stride, b_stride) = (columns, columns);
            simd.vectorize(Product { c: m, c_stride, a_strides, terms: &[[x, left_t]], b_stride, sizes, alpha: 1.0, add: false });
        }
        for i in 0..n {
            let (m, neg) = (&mut m[i * columns..][..columns], &mut neg[i * columns..][..columns]);
            let tau = tok[first + i];
            m[first + i + 1..].fill(0.0);
            neg[first + i + 1..].fill(0.0);
            for (m, neg) in m[..=first + i].iter_mut().zip(&mut neg[..=first + i]) {
                *m += 1.0;
                *neg = -tau * *m;
            }
        }
        self.apply(simd, y, x, weights);
        lower_product(simd, y, neg, ghat, [first, n, b, columns]);
    }

    /// y[n, b] += x[n, a] W.
    #[inline(always)]
    pub(crate) fn add_product<S: Simd>(&self, simd: S, y: &mut [f32], x: &[f32], w: &[f32]) {
        let Layer { a, b, n, .. } = *self;
        let (a_strides, sizes) = ([a, 1], [n, a, b]);
        simd.vectorize(Product { c: y, c_stride: b, a_strides, terms: &[[x, w]], b_stride: b, sizes, alpha: 1.0, add: true });
    }

    /// W += alpha leftᵀ right over n rows, and bias += alpha Σ right. With alpha = -τ and right = Ĝ: the descent step.
    #[inline(always)]
    pub(crate) fn descend<S: Simd>(&self, simd: S, alpha: f32, [w, bias]: [&mut [f32]; 2], left: &[f32], right: &[f32]) {
        self.gradient(simd, alpha, w, &[[left, right]]);
        self.bias_gradient(simd, alpha, bias, right);
    }

    /// W += alpha Σ leftᵀ right over the pairs `[left, right]` of n rows, in one pass over W.
    #[inline(always)]
    pub(crate) fn gradient<S: Simd>(&self, simd: S, alpha: f32, w: &mut [f32], terms: &[[&[f32]; 2]]) {
        let Layer { a, b, n, .. } = *self;
        let (a_strides, sizes) = ([1, a], [a, n, b]);
        simd.vectorize(Product { c: w, c_stride: b, a_strides, terms, b_stride: b, sizes, alpha, add: true });
    }

    /// bias += alpha Σ right over n rows.
    #[inline(always)]
    pub(crate) fn bias_gradient<S: Simd>(&self, simd: S, alpha: f32, bias: &mut [f32], right: &[f32]) {
        for right in right.chunks_exact(self.b).take(self.n) {
            axpy(simd, bias, alpha, right);
        }
    }

    /// Backward of [`Layer::output`] (first = 0) in everything but the weights, from dy: `dghat`, `dx` and `dleft` are overwritten,
    /// `dtok` is added to. `ghat_t` `[b, columns]` becomes Ĝᵀ; `dm`, `dy_t` `[b, columns]`, `dx_t` `[a, columns]` are scratch.
    #[inline(always)]
    pub(crate) fn output_backward<S: Simd>(
        &self,
        simd: S,
        dy: &[f32],
        [x, w, left, ghat]: [&[f32]; 4],
        tok: &[f32],
        [m, neg]: [&[f32]; 2],
        [dghat, dx, dleft, dtok]: [&mut [f32]; 4],
        [dm, ghat_t, dy_t, dx_t]: [&mut [f32]; 4],
    ) {
        let Layer { a, b, n, columns, .. } = *self;
        to_columns(simd, ghat_t, ghat, [n, b, columns]);
        let (c_stride, b_stride, a_strides, sizes) = (columns, columns, [b, 1], [n, b, columns]);
        simd.vectorize(Product { c: dm, c_stride, a_strides, terms: &[[dy, ghat_t]], b_stride, sizes, alpha: 1.0, add: false });
        for i in 0..n {
            let (dm, m) = (&mut dm[i * columns..][..columns], &m[i * columns..][..columns]);
            // M is zero above the diagonal.
            dtok[i] -= dot(simd, dm, m);
            dm[i + 1..].fill(0.0);
            for dm in &mut dm[..=i] {
                *dm *= -tok[i];
            }
        }
        lower_transposed_product(simd, dghat, neg, dy, [n, b, columns]);
        times_transposed(simd, dx, dy, w, [n, a, b, columns], [dy_t, dx_t], (1.0, false));
        lower_product(simd, dx, dm, left, [0, n, a, columns]);
        lower_transposed_product(simd, dleft, dm, x, [n, a, columns]);
    }

    /// Backward of [`Layer::descend`] in its rows: adds to `dghat` and `dleft`, returns the gradient of τ. `ghat_t` is Ĝᵀ as
    /// [`Layer::output_backward`] left it; `p` `[n, b]` and `dleft_t` `[a, columns]` are scratch.
    #[inline(always)]
    pub(crate) fn commit_backward<S: Simd>(
        &self,
        simd: S,
        tau: f32,
        dweights: [&[f32]; 2],
        [left, ghat, ghat_t]: [&[f32]; 3],
        [dghat, dleft]: [&mut [f32]; 2],
        [p, dleft_t]: [&mut [f32]; 2],
    ) -> f32 {
        let Layer { a, b, n, columns, .. } = *self;
        self.apply(simd, p, left, dweights);
        let (p, ghat) = (&p[..n * b], &ghat[..n * b]);
        axpy(simd, &mut dghat[..n * b], -tau, p);
        times_transposed_columns(simd, dleft, ghat_t, dweights[0], [n, a, b, columns], dleft_t, (-tau, true));
        -dot(simd, p, ghat)
    }
}
