//! Functions of vectors that the fast scan is made of.

use pulp::Simd;

use crate::ops::inner::rows::exp;

/// Beyond this [`exp`] is not defined; e^−87 is 1.6e-38, the smallest that is no subnormal number.
const LIMIT: f32 = 87.0;

/// e^x for x <= 0 to 2 units in the last place; below −87 it stays at 1.6e-38.
#[inline(always)]
pub(super) fn decay<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // In this order a NaN stays one.
    exp(simd, simd.max_f32s(simd.splat_f32s(-LIMIT), x))
}

/// e^x for −87 <= x <= 87 to 2 units in the last place; beyond, that of the nearest.
#[inline(always)]
pub(super) fn bounded_exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    decay(simd, simd.min_f32s(simd.splat_f32s(LIMIT), x))
}

/// `ln(1 + e^x)` to a relative 4e-7; below −87 it stays at 1.6e-38.
///
/// It is max(x, 0) + ln(1 + e), e = e^−|x|, and ln(1 + e) = 2 artanh(z), z = e / (2 + e) <= 1/3, of whose series seven terms leave a
/// relative remainder of 1.5e-8.
#[inline(always)]
pub(super) fn softplus<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let zero = simd.splat_f32s(0.0);
    let minus = simd.sub_f32s(zero, x);
    let e = decay(simd, simd.min_f32s(minus, x));
    let z = simd.div_f32s(e, simd.add_f32s(simd.splat_f32s(2.0), e));
    let square = simd.mul_f32s(z, z);
    let mut p = simd.splat_f32s(2.0 / 13.0);
    for c in [2.0 / 11.0, 2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0, 2.0] {
        p = simd.mul_add_e_f32s(p, square, simd.splat_f32s(c));
    }
    let y = simd.mul_add_e_f32s(p, z, simd.max_f32s(zero, x));
    // 0, but for what is not finite, which a maximum of plain numbers would hide.
    simd.add_f32s(y, simd.sub_f32s(x, x))
}

/// `1 / (1 + e^−x)`, the derivative of [`softplus`], to a relative 4e-7.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let e = bounded_exp(simd, simd.sub_f32s(simd.splat_f32s(0.0), x));
    simd.div_f32s(one, simd.add_f32s(one, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::inner::test_lanes::{LANES, with_lanes};
    use crate::ops::selective_scan::reference;
    use crate::ops::swiglu::reference as activation;
    use pulp::WithSimd;

    struct Each<'a> {
        x: &'a [f32],
        y: [&'a mut [f32]; 3],
    }

    impl WithSimd for Each<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let x = S::as_simd_f32s(self.x).0;
            let [a, b, c] = self.y.map(|y| S::as_mut_simd_f32s(y).0);
            for i in 0..x.len() {
                a[i] = bounded_exp(simd, x[i]);
                b[i] = softplus(simd, x[i]);
                c[i] = sigmoid(simd, x[i]);
            }
        }
    }

    #[test]
    fn functions_are_exact_to_what_is_stated() {
        let x: Vec<f32> = (-86_000..86_000).map(|i| i as f32 / 1000.0).collect();
        for lanes in LANES {
            let mut y = [0; 3].map(|_| vec![f32::NAN; x.len()]);
            with_lanes(lanes, Each { x: &x, y: y.each_mut().map(Vec::as_mut_slice) });
            let exact: [fn(f64) -> f64; 3] = [f64::exp, reference::softplus, activation::sigmoid];
            for ((name, bound), (y, exact)) in
                [("exp", 2.4e-7), ("softplus", 4e-7), ("sigmoid", 4e-7)].into_iter().zip(y.iter().zip(exact))
            {
                for (x, y) in x.iter().zip(y) {
                    let (y, exact) = (*y as f64, exact(*x as f64));
                    assert!((y / exact - 1.0).abs() < bound, "{name}({x}) is {exact}, not {y}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_seen_and_what_is_large_is_bounded() {
        let x: Vec<f32> = [f32::NAN, -1e30, 1e30, -200.0, 200.0, 0.0, -0.0, 88.0].repeat(2);
        for lanes in LANES {
            let mut y = [0; 3].map(|_| vec![0.0; x.len()]);
            with_lanes(lanes, Each { x: &x, y: y.each_mut().map(Vec::as_mut_slice) });
            assert!(y[1][0].is_nan(), "NaN became {}", y[1][0]);
            for y in &y {
                assert!(y[0].is_nan() || lanes == 1, "NaN became {}", y[0]);
                let numbers = x.iter().zip(y.iter()).filter(|(x, _)| !x.is_nan());
                assert!(numbers.into_iter().all(|(_, y)| y.is_finite() && *y >= 0.0), "{y:?}");
            }
            assert_eq!((y[1][2], y[1][4], y[2][2]), (1e30, 200.0, 1.0));
        }
    }
}
