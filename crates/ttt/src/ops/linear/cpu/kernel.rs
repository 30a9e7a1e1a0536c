//! The innermost product: a few rows of A by one packed panel of B, with all sums in registers.

use pulp::{Simd, WithSimd};

use super::prefetch;

/// `R` rows of A, `k` terms, one panel `[k, V vectors]` of B, and where the sums go.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) a: *const f32,
    pub(super) a_stride: usize,
    pub(super) b: *const f32,
    pub(super) k: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Whether the sums are added to what C holds.
    pub(super) add: bool,
}

/// `C = A B` or `C += A B` for R rows and V vectors. Every element is one chain of multiply-adds in the order of the terms, then one
/// addition: the same bits for any R, any V and any number of lanes that has fused multiply-adds.
///
/// Two terms a turn: four and more let the compiler move loads so far ahead that sums are spilled (99 % of the peak of a Zen 3
/// core with one or two, 96 % with four, 40 % with eight). For the same reason it is a function of its own.
///
/// # Safety
/// A is readable at `r * a_stride + l` (r < R, l < k), B in `k` rows of V vectors; C is readable and
/// writable in R rows of V vectors.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const R: usize, const V: usize>(simd: S, t: &Tile) {
    simd.vectorize(Multiply::<S, R, V>(simd, t));
}

/// The work of [`tile`], whose contract holds where one is made. It brings its own vectors: those that it is called with are
/// others when vectors are composed of smaller ones (in tests).
struct Multiply<'a, S, const R: usize, const V: usize>(S, &'a Tile);

impl<S: Simd, const R: usize, const V: usize> WithSimd for Multiply<'_, S, R, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<Same: Simd>(self, _: Same) {
        let Multiply(simd, &Tile { a, a_stride, mut b, k, c, c_stride, add }) = self;
        for r in 0..R {
            prefetch(c.cast_const().wrapping_add(r * c_stride), V * S::F32_LANES);
        }
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        let mut rows = [a; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = a.wrapping_add(r * a_stride);
        }
        let mut at = 0;
        macro_rules! term {
            () => {
                let mut bv = [simd.splat_f32s(0.0); V];
                for (v, bv) in bv.iter_mut().enumerate() {
                    // SAFETY: by the contract of `tile`; vectors have the alignment of their numbers.
                    *bv = unsafe { b.cast::<S::f32s>().add(v).read_unaligned() };
                }
                for r in 0..R {
                    // SAFETY: by the contract of `tile`.
                    let x = simd.splat_f32s(unsafe { *rows[r].add(at) });
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_e_f32s(x, bv[v], sums[r][v]);
                    }
                }
                b = b.wrapping_add(V * S::F32_LANES);
                at += 1;
            };
        }
        for _ in 0..k / 2 {
            term!();
            term!();
        }
        if k % 2 == 1 {
            term!();
        }
        let _ = (b, at);
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let c = c.wrapping_add(r * c_stride).cast::<S::f32s>().wrapping_add(v);
                // SAFETY: by the contract of `tile`.
                unsafe {
                    if add {
                        c.write_unaligned(simd.add_f32s(c.read_unaligned(), *sum));
                    } else {
                        c.write_unaligned(*sum);
                    }
                }
            }
        }
    }
}
