//! Small f32 products and transpositions in registers: what the fast code of both learners spends its time in.
//!
//! Every product is `C (+)= alpha A B` where rows of B and C lie along the vectors and A is read one number at a time, so A may be
//! a matrix or its transpose and nothing is packed. Widths are multiples of 16.

use pulp::{Simd, WithSimd};

/// `c[m, n] = alpha a b`, or `+=` with `add`. `a` is `[m, k]` with any two strides; `b` `[k, n]` and `c` have the row strides
/// given. n is a multiple of 16.
pub(crate) struct Product<'a> {
    pub(crate) c: &'a mut [f32],
    pub(crate) c_stride: usize,
    pub(crate) a: &'a [f32],
    pub(crate) a_strides: [usize; 2],
    pub(crate) b: &'a [f32],
    pub(crate) b_stride: usize,
    /// m, k, n.
    pub(crate) sizes: [usize; 3],
    pub(crate) alpha: f32,
    pub(crate) add: bool,
}

/// Addresses of a [`Product`] whose bounds were checked.
#[derive(Clone, Copy)]
struct Raw {
    c: *mut f32,
    c_stride: usize,
    a: *const f32,
    a_strides: [usize; 2],
    b: *const f32,
    b_stride: usize,
    k: usize,
    alpha: f32,
    add: bool,
}

/// Rows of C that one register block holds. With 8 lanes and 16 registers: 6 rows x 2 vectors of sums, 2 vectors of B, 1 number
/// of A. With 16 lanes one vector spans the 16 columns, and 8 sums hide the latency of a multiply-add.
pub(crate) const fn block_rows<S: Simd>() -> usize {
    if S::F32_LANES == 16 { 8 } else { 6 }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { c, c_stride, a, a_strides, b, b_stride, sizes: [m, k, n], alpha, add } = self;
        assert!(n.is_multiple_of(16), "{n} columns");
        if m == 0 || n == 0 {
            return;
        }
        assert!((m - 1) * c_stride + n <= c.len(), "c of {} for {m} rows of {n}", c.len());
        if k > 0 {
            assert!((k - 1) * b_stride + n <= b.len(), "b of {} for {k} rows of {n}", b.len());
            assert!((m - 1) * a_strides[0] + (k - 1) * a_strides[1] < a.len(), "a of {} for {m} x {k}", a.len());
        }
        let raw = Raw { c: c.as_mut_ptr(), c_stride, a: a.as_ptr(), a_strides, b: b.as_ptr(), b_stride, k, alpha, add };
        // SAFETY: the asserts above bound every address that m x k x n blocks of these strides touch.
        unsafe {
            match S::F32_LANES {
                16 => panels::<S, 1, 4, 8>(simd, raw, m, n),
                8 => panels::<S, 2, 8, 6>(simd, raw, m, n),
                4 => panels::<S, 4, 16, 6>(simd, raw, m, n),
                _ => panels::<S, 16, 64, 1>(simd, raw, m, n),
            }
        }
    }
}

/// All of C in blocks of `R` rows x 16 columns (`V` vectors); a single row in blocks of 64 columns (`W` vectors).
///
/// # Safety
/// As [`block`], for m x n.
#[inline(always)]
unsafe fn panels<S: Simd, const V: usize, const W: usize, const R: usize>(simd: S, p: Raw, m: usize, n: usize) {
    let mut j = 0;
    while j < n {
        let (b, c) = (p.b.wrapping_add(j), p.c.wrapping_add(j));
        if m == 1 && j + 64 <= n {
            // SAFETY: columns j..j + 64 exist.
            unsafe { block::<S, W, 1>(simd, Raw { b, c, ..p }) };
            j += 64;
            continue;
        }
        let mut i = 0;
        while i < m {
            let at = Raw { a: p.a.wrapping_add(i * p.a_strides[0]), b, c: c.wrapping_add(i * p.c_stride), ..p };
            let rows = (m - i).min(R);
            // SAFETY: rows i..i + rows and columns j..j + 16 exist.
            unsafe {
                match rows {
                    1 => block::<S, V, 1>(simd, at),
                    2 => block::<S, V, 2>(simd, at),
                    3 => block::<S, V, 3>(simd, at),
                    4 => block::<S, V, 4>(simd, at),
                    5 => block::<S, V, 5>(simd, at),
                    6 => block::<S, V, 6>(simd, at),
                    7 => block::<S, V, 7>(simd, at),
                    _ => block::<S, V, 8>(simd, at),
                }
            }
            i += rows;
        }
        j += 16;
    }
}

/// `R` rows x `V` vectors of C.
///
/// # Safety
/// A is readable at `r * a_strides[0] + l * a_strides[1]` (r < R, l < k), `V` vectors of B at each of k rows; `V` vectors of C are
/// writable at each of R rows and lie apart from A and B.
#[inline(always)]
unsafe fn block<S: Simd, const V: usize, const R: usize>(simd: S, p: Raw) {
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    let mut b = p.b;
    let mut a = [p.a; R];
    let mut r = 0;
    while r < R {
        a[r] = p.a.wrapping_add(r * p.a_strides[0]);
        r += 1;
    }
    let mut at = 0;
    for _ in 0..p.k {
        let mut bv = [simd.splat_f32s(0.0); V];
        for (v, bv) in bv.iter_mut().enumerate() {
            // SAFETY: by this function's contract; vectors have the alignment of their numbers.
            *bv = unsafe { b.cast::<S::f32s>().add(v).read_unaligned() };
        }
        for r in 0..R {
            // SAFETY: by this function's contract.
            let x = simd.splat_f32s(unsafe { *a[r].add(at) });
            for v in 0..V {
                sums[r][v] = simd.mul_add_e_f32s(x, bv[v], sums[r][v]);
            }
        }
        b = b.wrapping_add(p.b_stride);
        at += p.a_strides[1];
    }
    let alpha = simd.splat_f32s(p.alpha);
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            let c = p.c.wrapping_add(r * p.c_stride).cast::<S::f32s>().wrapping_add(v);
            // SAFETY: by this function's contract.
            unsafe {
                if p.add {
                    c.write_unaligned(simd.mul_add_e_f32s(alpha, *sum, c.read_unaligned()));
                } else {
                    c.write_unaligned(simd.mul_f32s(alpha, *sum));
                }
            }
        }
    }
}

/// `out[j, i] = x[i, j]` for the m x n matrix x, or with `add: Some(alpha)` `out[j, i] += alpha x[i, j]`.
#[inline(always)]
pub(crate) fn transpose<S: Simd>(
    _: S,
    out: &mut [f32],
    out_stride: usize,
    x: &[f32],
    x_stride: usize,
    [m, n]: [usize; 2],
    add: Option<f32>,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * x_stride + n <= x.len(), "x of {} for {m} rows of {n}", x.len());
    assert!((n - 1) * out_stride + m <= out.len(), "out of {} for {n} rows of {m}", out.len());
    let (m8, n8) = if cfg!(target_arch = "x86_64") && S::F32_LANES >= 8 { (m / 8 * 8, n / 8 * 8) } else { (0, 0) };
    #[cfg(target_arch = "x86_64")]
    for j in (0..n8).step_by(8) {
        for i in (0..m8).step_by(8) {
            // SAFETY: the 8 x 8 block lies inside both matrices (asserted above); a `Simd` of 8 or more lanes on x86-64 exists
            // only where AVX does.
            unsafe {
                let (x, out) = (x.as_ptr().add(i * x_stride + j), out.as_mut_ptr().add(j * out_stride + i));
                transpose_8x8(out, out_stride, x, x_stride, add);
            }
        }
    }
    let mut rest = |rows: std::ops::Range<usize>, columns: std::ops::Range<usize>| {
        for i in rows {
            for j in columns.clone() {
                let (x, out) = (x[i * x_stride + j], &mut out[j * out_stride + i]);
                *out = add.map_or(x, |alpha| *out + alpha * x);
            }
        }
    };
    rest(m8..m, 0..n);
    rest(0..m8, n8..n);
}

/// # Safety
/// AVX is there; 8 rows of 8 numbers are readable at `x` and writable at `out`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
#[inline]
unsafe fn transpose_8x8(out: *mut f32, out_stride: usize, x: *const f32, x_stride: usize, add: Option<f32>) {
    use std::arch::x86_64::*;
    // SAFETY: by this function's contract.
    unsafe {
        let row = |i: usize| _mm256_loadu_ps(x.add(i * x_stride));
        let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
        let (r4, r5, r6, r7) = (row(4), row(5), row(6), row(7));
        // Pairs of rows, then fours, then halves.
        let (a0, a1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
        let (a2, a3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
        let (a4, a5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
        let (a6, a7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
        let b0 = _mm256_shuffle_ps::<0x44>(a0, a2);
        let b1 = _mm256_shuffle_ps::<0xEE>(a0, a2);
        let b2 = _mm256_shuffle_ps::<0x44>(a1, a3);
        let b3 = _mm256_shuffle_ps::<0xEE>(a1, a3);
        let b4 = _mm256_shuffle_ps::<0x44>(a4, a6);
        let b5 = _mm256_shuffle_ps::<0xEE>(a4, a6);
        let b6 = _mm256_shuffle_ps::<0x44>(a5, a7);
        let b7 = _mm256_shuffle_ps::<0xEE>(a5, a7);
        let columns = [
            _mm256_permute2f128_ps::<0x20>(b0, b4),
            _mm256_permute2f128_ps::<0x20>(b1, b5),
            _mm256_permute2f128_ps::<0x20>(b2, b6),
            _mm256_permute2f128_ps::<0x20>(b3, b7),
            _mm256_permute2f128_ps::<0x31>(b0, b4),
            _mm256_permute2f128_ps::<0x31>(b1, b5),
            _mm256_permute2f128_ps::<0x31>(b2, b6),
            _mm256_permute2f128_ps::<0x31>(b3, b7),
        ];
        for (j, column) in columns.into_iter().enumerate() {
            let out = out.add(j * out_stride);
            let value = match add {
                Some(alpha) => _mm256_add_ps(_mm256_loadu_ps(out), _mm256_mul_ps(_mm256_set1_ps(alpha), column)),
                None => column,
            };
            _mm256_storeu_ps(out, value);
        }
    }
}
