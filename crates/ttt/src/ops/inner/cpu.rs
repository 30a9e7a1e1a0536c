//! Small f32 products and transpositions in registers: what the fast code of both learners spends its time in.
//!
//! Every product is `C (+)= alpha Σ A B` where rows of B and C lie along the vectors and A is read one number at a time, so A may be
//! a matrix or its transpose and nothing is packed. Widths are multiples of 16.

use pulp::{Simd, WithSimd};

/// `c[m, n] = alpha Σ a b` over the `terms` `[a, b]`, or `+=` with `add`. Every `a` is `[m, k]` with any two strides; `b` `[k, n]`
/// and `c` have the row strides given. n is a multiple of 16.
pub(crate) struct Product<'a> {
    pub(crate) c: &'a mut [f32],
    pub(crate) c_stride: usize,
    pub(crate) terms: &'a [[&'a [f32]; 2]],
    pub(crate) a_strides: [usize; 2],
    pub(crate) b_stride: usize,
    /// m, k, n.
    pub(crate) sizes: [usize; 3],
    pub(crate) alpha: f32,
    pub(crate) add: bool,
}

/// Addresses of a [`Product`] whose bounds were checked.
#[derive(Clone, Copy)]
struct Raw<'a> {
    c: *mut f32,
    c_stride: usize,
    terms: &'a [[&'a [f32]; 2]],
    /// Where in each a and each b the block begins.
    at: [usize; 2],
    a_strides: [usize; 2],
    b_stride: usize,
    k: usize,
    alpha: f32,
    add: bool,
}

/// Rows of C that one register block holds. With 8 lanes and 16 registers: 6 rows x 2 vectors of sums, 2 vectors of B, 1 number
/// of A. With 16 lanes: 8 rows x 2 vectors, where there are 32 columns, so that loads (10 for 16 multiply-adds) are not what takes
/// the time (9 for 8 with one vector).
pub(crate) const fn block_rows<S: Simd>() -> usize {
    if S::F32_LANES == 16 { 8 } else { 6 }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { c, c_stride, terms, a_strides, b_stride, sizes: [m, k, n], alpha, add } = self;
        assert!(n.is_multiple_of(16), "{n} columns");
        if m == 0 || n == 0 {
            return;
        }
        assert!((m - 1) * c_stride + n <= c.len(), "c of {} for {m} rows of {n}", c.len());
        for [a, b] in terms.iter().filter(|_| k > 0) {
            assert!((k - 1) * b_stride + n <= b.len(), "b of {} for {k} rows of {n}", b.len());
            assert!((m - 1) * a_strides[0] + (k - 1) * a_strides[1] < a.len(), "a of {} for {m} x {k}", a.len());
        }
        let raw = Raw { c: c.as_mut_ptr(), c_stride, terms, at: [0, 0], a_strides, b_stride, k, alpha, add };
        // SAFETY: the asserts above bound every address that m x k x n blocks of these strides touch.
        unsafe {
            match S::F32_LANES {
                16 => panels::<S, 1, 2, 4, 8>(simd, raw, m, n),
                8 => panels::<S, 2, 2, 8, 6>(simd, raw, m, n),
                4 => panels::<S, 4, 4, 16, 6>(simd, raw, m, n),
                _ => panels::<S, 16, 16, 64, 1>(simd, raw, m, n),
            }
        }
    }
}

/// All of C in blocks of `R` rows x `V` vectors, and what is left of the columns in blocks of 16 (`N` vectors); a single row in
/// blocks of 64 columns (`W` vectors).
///
/// Few rows of B are kept in the first-level cache while C, a weight matrix then, is walked along its rows; many rows of B, a
/// weight matrix then, are walked one block at a time.
///
/// # Safety
/// As [`block`], for m x n.
#[inline(always)]
unsafe fn panels<S: Simd, const N: usize, const V: usize, const W: usize, const R: usize>(simd: S, p: Raw<'_>, m: usize, n: usize) {
    let whole = n / (V * S::F32_LANES) * (V * S::F32_LANES);
    if m == 1 && n > 128 {
        // SAFETY: by this function's contract.
        unsafe { sweep(simd, p, n) };
    } else if m == 1 {
        let wide = n / 64 * 64;
        for j in (0..wide).step_by(64) {
            // SAFETY: columns j..j + 64 exist.
            unsafe { block::<S, W, 1>(simd, Raw { at: [0, j], c: p.c.wrapping_add(j), ..p }) };
        }
        for j in (wide..n).step_by(16) {
            // SAFETY: columns j..j + 16 exist.
            unsafe { block::<S, N, 1>(simd, Raw { at: [0, j], c: p.c.wrapping_add(j), ..p }) };
        }
    } else if p.k <= 32 {
        for i in (0..m).step_by(R) {
            for j in (0..whole).step_by(V * S::F32_LANES) {
                // SAFETY: rows i..min(i + R, m) and the columns of V vectors from j on exist.
                unsafe { rows::<S, V, R>(simd, p, i, j, m) };
            }
            for j in (whole..n).step_by(16) {
                // SAFETY: rows i..min(i + R, m) and columns j..j + 16 exist.
                unsafe { rows::<S, N, R>(simd, p, i, j, m) };
            }
        }
    } else {
        for j in (0..whole).step_by(V * S::F32_LANES) {
            for i in (0..m).step_by(R) {
                // SAFETY: as above.
                unsafe { rows::<S, V, R>(simd, p, i, j, m) };
            }
        }
        for j in (whole..n).step_by(16) {
            for i in (0..m).step_by(R) {
                // SAFETY: as above.
                unsafe { rows::<S, N, R>(simd, p, i, j, m) };
            }
        }
    }
}

/// One row of C, four rows of B at a time from end to end: B comes from far away, and long runs of it are fetched ahead.
///
/// # Safety
/// As [`block`], for 1 x n.
#[inline(always)]
unsafe fn sweep<S: Simd>(simd: S, p: Raw<'_>, n: usize) {
    let c = p.c.cast::<S::f32s>();
    let vectors = n / S::F32_LANES;
    if !p.add {
        // SAFETY: row 0 of C has n numbers.
        unsafe { std::slice::from_raw_parts_mut(p.c, n) }.fill(0.0);
    }
    for [a, b] in p.terms {
        let mut l = 0;
        while l < p.k {
            let rows = if p.k - l >= 4 { 4 } else { 1 };
            let (mut factor, mut row) = ([simd.splat_f32s(0.0); 4], [b.as_ptr().cast::<S::f32s>(); 4]);
            for r in 0..rows {
                factor[r] = simd.splat_f32s(p.alpha * a[(l + r) * p.a_strides[1]]);
                row[r] = b.as_ptr().wrapping_add((l + r) * p.b_stride).cast();
            }
            for v in 0..vectors {
                // SAFETY: vector v of n columns, of row l or of the rows l..l + 4.
                unsafe {
                    let mut sum = c.add(v).read_unaligned();
                    sum = simd.mul_add_e_f32s(factor[0], row[0].add(v).read_unaligned(), sum);
                    if rows == 4 {
                        sum = simd.mul_add_e_f32s(factor[1], row[1].add(v).read_unaligned(), sum);
                        sum = simd.mul_add_e_f32s(factor[2], row[2].add(v).read_unaligned(), sum);
                        sum = simd.mul_add_e_f32s(factor[3], row[3].add(v).read_unaligned(), sum);
                    }
                    c.add(v).write_unaligned(sum);
                }
            }
            l += rows;
        }
    }
}

/// The rows i..min(i + R, m) of C in the columns of V vectors from j on.
///
/// # Safety
/// As [`block`], for these rows and columns.
#[inline(always)]
unsafe fn rows<S: Simd, const V: usize, const R: usize>(simd: S, p: Raw<'_>, i: usize, j: usize, m: usize) {
    let at = Raw { at: [i * p.a_strides[0], j], c: p.c.wrapping_add(i * p.c_stride + j), ..p };
    // SAFETY: by this function's contract.
    unsafe {
        match (m - i).min(R) {
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
}

/// `R` rows x `V` vectors of C.
///
/// # Safety
/// From `at` on every A is readable at `r * a_strides[0] + l * a_strides[1]` (r < R, l < k), `V` vectors of every B at each of k
/// rows; `V` vectors of C are writable at each of R rows and lie apart from A and B.
#[inline(always)]
unsafe fn block<S: Simd, const V: usize, const R: usize>(simd: S, p: Raw<'_>) {
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    for [a, b] in p.terms {
        let mut b = b.as_ptr().wrapping_add(p.at[1]);
        let mut rows = [a.as_ptr(); R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = a.as_ptr().wrapping_add(p.at[0] + r * p.a_strides[0]);
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
                let x = simd.splat_f32s(unsafe { *rows[r].add(at) });
                for v in 0..V {
                    sums[r][v] = simd.mul_add_e_f32s(x, bv[v], sums[r][v]);
                }
            }
            b = b.wrapping_add(p.b_stride);
            at += p.a_strides[1];
        }
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
pub(crate) unsafe fn transpose_8x8(out: *mut f32, out_stride: usize, x: *const f32, x_stride: usize, add: Option<f32>) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::inner::test_lanes::{LANES, with_lanes};
    use pulp::Arch;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed).wrapping_mul(40_503) >> 16) as f32 / 32_768.0 - 1.0).collect()
    }

    /// Every number of rows in a block, both orders of A, both orders of the walk, one row, and the numbers around C untouched.
    #[test]
    fn products_are_sums_of_products() {
        for (m, k, n) in
            [(1, 3, 16), (1, 40, 112), (1, 39, 144), (5, 1, 16), (6, 33, 32), (7, 0, 16), (13, 16, 48), (16, 64, 64), (23, 5, 16)]
        {
            for (a_strides, add, alpha) in [([k + 2, 1], false, 1.0), ([1, m + 1], true, -0.5)] {
                let (b_stride, c_stride) = (n + 3, n + 5);
                let [a, a2] = [1, 6].map(|seed| numbers((m + 2) * (k + 2), seed));
                let [b, b2] = [2, 7].map(|seed| numbers(k * b_stride + n, seed));
                let start = numbers(m * c_stride, 3);
                let mut expected = start.clone();
                for i in 0..m {
                    for j in 0..n {
                        let at = |l: usize| (i * a_strides[0] + l * a_strides[1], l * b_stride + j);
                        let product = |a: &[f32], b: &[f32], l| a[at(l).0] as f64 * b[at(l).1] as f64;
                        let sum: f64 = (0..k).map(|l| product(&a, &b, l) + product(&a2, &b2, l)).sum();
                        let c = &mut expected[i * c_stride + j];
                        *c = (alpha as f64 * sum + if add { *c as f64 } else { 0.0 }) as f32;
                    }
                }
                for lanes in LANES {
                    let mut c = start.clone();
                    let sizes = [m, k, n];
                    let terms = &[[&a[..], &b[..]], [&a2, &b2]];
                    with_lanes(lanes, Product { c: &mut c, c_stride, terms, a_strides, b_stride, sizes, alpha, add });
                    for (i, (c, e)) in c.iter().zip(&expected).enumerate() {
                        assert!((c - e).abs() < 2e-5, "{m} x {k} x {n}, element {i}: {c}, not {e}");
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "b of 31 for 2 rows of 16")]
    fn a_product_outside_its_operands_is_refused() {
        let (mut c, a, b) = ([0.0; 16], [0.0; 2], [0.0; 31]);
        let sizes = [1, 2, 16];
        let product =
            Product { c: &mut c, c_stride: 16, terms: &[[&a, &b]], a_strides: [2, 1], b_stride: 16, sizes, alpha: 1.0, add: true };
        Arch::new().dispatch(product);
    }

    struct Transpose<'a>(&'a mut [f32], usize, &'a [f32], usize, [usize; 2], Option<f32>);

    impl WithSimd for Transpose<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            transpose(simd, self.0, self.1, self.2, self.3, self.4, self.5);
        }
    }

    #[test]
    fn transposes_of_all_sizes() {
        for (m, n) in [(1, 16), (8, 8), (15, 48), (16, 17), (64, 3), (0, 4)] {
            let (x, start) = (numbers(m * (n + 1) + n, 4), numbers(n * (m + 2) + m, 5));
            for (add, lanes) in [None, Some(-2.0)].into_iter().flat_map(|add| LANES.map(|lanes| (add, lanes))) {
                let mut out = start.clone();
                with_lanes(lanes, Transpose(&mut out, m + 2, &x, n + 1, [m, n], add));
                for (at, (got, before)) in out.iter().zip(&start).enumerate() {
                    let (j, i) = (at / (m + 2), at % (m + 2));
                    let inside = j < n && i < m;
                    let expected =
                        if !inside { *before } else { add.map_or(0.0, |_| *before) + add.unwrap_or(1.0) * x[i * (n + 1) + j] };
                    assert_eq!(*got, expected, "{m} x {n}, row {j}, column {i}");
                }
            }
        }
    }
}
