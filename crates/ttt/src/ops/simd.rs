//! Plain loops that the compiler turns into vector code, compiled for each instruction set and picked at run time.

/// Defines a function whose body is compiled once for each instruction set that `pulp` knows (AVX2, AVX-512, NEON, none), and
/// picks the best one of this machine when called. What the body calls must be `#[inline(always)]`.
macro_rules! vectorise {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$lt:lifetime>($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name<$lt>($($arg: $type),*) $(-> $out)? {
            struct Work<$lt> { $($arg: $type),* }
            impl<$lt> pulp::WithSimd for Work<$lt> {
                type Output = vectorise!(@out $($out)?);
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
                    let Work { $($arg),* } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Work { $($arg),* })
        }
    };
    (@out) => { () };
    (@out $out:ty) => { $out };
}
pub(crate) use vectorise;

/// Independent sums in flight: enough for four registers of AVX2, two of AVX-512.
const LANES: usize = 32;

// No `array::map` and no `array::from_fn` here: where they are not inlined (which no attribute of theirs asks for), they stay
// scalar code behind a call in the innermost loop.

/// The first `len` elements of every row.
#[inline(always)]
fn cut<const N: usize>(mut rows: [&[f32]; N], len: usize) -> [&[f32]; N] {
    for row in &mut rows {
        *row = &row[..len];
    }
    rows
}

/// Element `i` of every row.
#[inline(always)]
fn column<const N: usize>(rows: &[&[f32]; N], i: usize) -> [f32; N] {
    let mut column = [0.0; N];
    for n in 0..N {
        column[n] = rows[n][i];
    }
    column
}

/// `y[i] = f([rows[0][i], rows[1][i], ...], y[i])`.
///
/// # Panics
/// When a row is shorter than `y`.
#[inline(always)]
pub(crate) fn map<const N: usize>(y: &mut [f32], rows: [&[f32]; N], f: impl Fn([f32; N], f32) -> f32) {
    let rows = cut(rows, y.len());
    for (i, y) in y.iter_mut().enumerate() {
        *y = f(column(&rows, i), *y);
    }
}

/// `(y[i], z[i]) = f([rows[0][i], rows[1][i], ...])`.
///
/// # Panics
/// When a row or `z` is shorter than `y`.
#[inline(always)]
pub(crate) fn map_two<const N: usize>(y: &mut [f32], z: &mut [f32], rows: [&[f32]; N], f: impl Fn([f32; N]) -> (f32, f32)) {
    let rows = cut(rows, y.len());
    let z = &mut z[..y.len()];
    for (i, y) in y.iter_mut().enumerate() {
        (*y, z[i]) = f(column(&rows, i));
    }
}

/// `Σ_i f([rows[0][i], rows[1][i], ...])`, in an order that depends on the length alone.
///
/// # Panics
/// When a row is shorter than the first.
#[inline(always)]
pub(crate) fn sum<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    fold(rows, 0.0, |sum, x| sum + f(x), |a, b| a + b)
}

/// The largest element; −∞ of none.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    fold([x], f32::NEG_INFINITY, |a, [x]| larger(a, x), larger)
}

#[inline(always)]
fn fold<const N: usize>(rows: [&[f32]; N], start: f32, f: impl Fn(f32, [f32; N]) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let len = rows.first().map_or(0, |row| row.len());
    let rows = cut(rows, len);
    let mut lanes = [start; LANES];
    let whole = len / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let mut chunks = rows;
        for n in 0..N {
            chunks[n] = &rows[n][at..at + LANES];
        }
        for (lane, acc) in lanes.iter_mut().enumerate() {
            *acc = f(*acc, column(&chunks, lane));
        }
    }
    for i in whole..len {
        lanes[i - whole] = f(lanes[i - whole], column(&rows, i));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// e^x to 2 units in the last place; below −87.3 it stays at 1.2e-38, above 88.3 at 2.3e38.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the significand.
    const SHIFT: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits that its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    // (e^r − 1 − r) / r² interpolated at the five Chebyshev nodes of ±ln(2)/2: e^r comes out to a relative 1.0e-8.
    let p = 0.001_392_618_4 * r + 0.008_363_179;
    let p = p * r + 0.041_666_556;
    let p = p * r + 0.166_665_76;
    let p = p * r + 0.5;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    (p * r * r + r + 1.0) * power
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh-gelu and its derivative, from `½ (1 + tanh u) = sigmoid(2u)`, which has no cancellation: with
/// `u = √(2/π) (a + 0.044715 a³)` and `s = sigmoid(2u)`, gelu is `a s` and its derivative `s + 2 a s (1 − s) u′`.
#[inline(always)]
pub(crate) fn gelu(a: f32) -> (f32, f32) {
    const TWICE: f32 = 1.595_769_2; // 2 √(2/π)
    const CUBIC: f32 = 0.044_715;
    let square = a * a;
    let e = exp(-TWICE * a * (1.0 + CUBIC * square));
    let s = 1.0 / (1.0 + e);
    // e s is 1 − s without its rounding.
    (a * s, s + a * s * (e * s) * (TWICE * (1.0 + 3.0 * CUBIC * square)))
}

#[cfg(test)]
mod tests {
    use super::*;

    vectorise! {
        fn exps<'a>(y: &'a mut [f32], x: &'a [f32]) {
            map(y, [x], |[x], _| exp(x));
        }
    }

    fn largest_error(from: f32, to: f32, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let points = 400_000;
        let x = (0..=points).map(|i| from + (to - from) * (i as f32 / points as f32));
        x.map(|x| ((f(x) as f64) / exact(x as f64) - 1.0).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_exact_to_two_units() {
        let error = largest_error(-87.3, 88.3, exp, f64::exp);
        assert!(error < 2.0 * f32::EPSILON as f64 / 2.0 * 2.0, "{error:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 2e38);
    }

    #[test]
    fn vector_code_computes_the_same() {
        let x: Vec<f32> = (0..103).map(|i| i as f32 * 0.7 - 40.0).collect();
        let mut y = vec![f32::NAN; x.len()];
        exps(&mut y, &x);
        for (y, x) in y.iter().zip(&x) {
            assert!((y / x.exp() - 1.0).abs() < 3e-7, "e^{x} = {y}");
        }
    }

    #[test]
    fn sigmoid_and_gelu_are_exact_to_a_few_units() {
        let exact = |a: f64| 1.0 / (1.0 + (-(8.0 / std::f64::consts::PI).sqrt() * (a + 0.044715 * a * a * a)).exp());
        let error = largest_error(-80.0, 80.0, sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        assert!(error < 4e-7, "sigmoid: {error:e}");
        // An argument of −u grows the error of u to u times as much.
        let error = largest_error(-5.0, 9.0, |x| gelu(x).0 / x, exact);
        assert!(error < 5e-6, "gelu: {error:e}");
        let reference = crate::ops::gelu_gate::reference::gelu::<f64>;
        for i in -900..=900 {
            let a = i as f32 / 100.0;
            let (value, slope) = reference(a as f64);
            assert!((gelu(a).0 as f64 - value).abs() < 1e-6, "gelu({a})");
            assert!((gelu(a).1 as f64 - slope).abs() < 1e-6, "gelu′({a})");
        }
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for len in [0usize, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum([&x, &x], |[a, b]| a + b), (len * len.saturating_sub(1)) as f32);
            let reversed: Vec<f32> = x.iter().rev().copied().collect();
            assert_eq!(largest(&reversed), x.last().copied().unwrap_or(f32::NEG_INFINITY));
        }
    }
}
