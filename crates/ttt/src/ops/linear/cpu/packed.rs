//! Products with many rows: B is packed into panels that stay in the second-level cache, A is read where it lies.
//!
//! Work is dealt out in blocks of columns, so that no panel is packed twice; only when there are too few columns for the threads
//! are rows split as well. While a block is multiplied, what the next one is packed from is fetched ahead. How C is dealt out
//! never changes a sum: it depends on the number of terms alone.

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};

use super::kernel::{Tile, tile};
use super::pack::{Columns, Source};
use crate::device::par::{self, ColsPerUnit, RowsPerUnit};
use crate::device::view::{Mat, MatMut};

/// Columns of the widest panel: those of a block are a multiple of the machine's panels.
const WIDEST: usize = 64;

/// Below so many multiply-adds a product stays on one thread: 50 microseconds of one core.
const SERIAL: usize = 2_000_000;

/// `C = A B`.
///
/// # Panics
/// When the shapes do not fit.
pub(super) fn product<B: Columns>(a: Mat<f32>, b: B, c: MatMut<f32>) {
    let ([m, k], [terms, n]) = ([a.rows(), a.cols()], b.shape());
    assert!(k == terms && [c.rows(), c.cols()] == [m, n], "{m} x {k} times {terms} x {n} into {} x {}", c.rows(), c.cols());
    let [rows, cols] = unit(Arch::new().dispatch(Panels), m, block_terms::<B>(k), k, n);
    par::for_each(n.div_ceil(cols), ColsPerUnit { mat: c, cols }, &|j, c: ColsPerUnit<MatMut<f32>>| {
        par::for_each(m.div_ceil(rows), RowsPerUnit { mat: c.mat, rows }, &|i, c: RowsPerUnit<MatMut<f32>>| {
            Unit { a, b: &b, c: c.mat, at: [i * rows, j * cols] }.run();
        });
    });
}

/// Terms of a block of a sum of `k`: as even as multiples of 16 allow.
fn block_terms<B: Columns>(k: usize) -> usize {
    k.div_ceil(k.div_ceil(B::MAX_TERMS).max(1)).next_multiple_of(16).max(16)
}

/// What a machine's vectors make of the panels: their elements, half of the second-level cache of the processors in mind, and what
/// a block's columns are a multiple of.
struct Panels;

impl WithSimd for Panels {
    type Output = [usize; 2];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [usize; 2] {
        // 512 KiB of the 1 or 2 MiB that come with AVX-512, 256 KiB of 512 elsewhere.
        if S::F32_LANES == 16 { [131_072, 64] } else { [65_536, 32] }
    }
}

/// Rows and columns of a unit of work on `m x k x n`.
fn unit([packed, grain]: [usize; 2], m: usize, block_terms: usize, k: usize, n: usize) -> [usize; 2] {
    let wanted = match rayon::current_num_threads() {
        threads if threads > 1 && m * n * k >= SERIAL => 4 * threads,
        _ => 1,
    };
    let most = (packed / block_terms).max(grain);
    let across = n.div_ceil(most).max(wanted.min(n / (2 * grain))).max(1);
    let down = wanted.div_ceil(across).min(m / 256).max(1);
    [m.div_ceil(down).next_multiple_of(12), n.div_ceil(across).next_multiple_of(grain)]
}

/// The block of C from row and column `at` on.
struct Unit<'a, B> {
    a: Mat<'a, f32>,
    b: &'a B,
    c: MatMut<'a, f32>,
    at: [usize; 2],
}

thread_local! {
    static SPACE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl<B: Columns> Unit<'_, B> {
    /// Elements of the panels.
    fn space(&self) -> usize {
        block_terms::<B>(self.a.cols()) * self.c.cols().next_multiple_of(WIDEST)
    }

    fn run(self) {
        SPACE.with_borrow_mut(|space| {
            let size = self.space();
            if space.len() < size + 16 {
                space.resize(size + 16, 0.0);
            }
            // From a cache line on.
            let skip = space.as_ptr().align_offset(64);
            Arch::new().dispatch(Packed { unit: self, space: &mut space[skip..skip + size] });
        });
    }
}

struct Packed<'a, B> {
    unit: Unit<'a, B>,
    space: &'a mut [f32],
}

impl<B: Columns> WithSimd for Packed<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Registers: R x V sums, V of B, one of A, out of 16 (8 lanes) or 32. Twelve rows would need as many addresses, more than
        // there are general registers: a third to a half of the speed of six.
        match S::F32_LANES {
            16 => self.multiply::<S, 6, 4>(simd),
            8 => self.multiply::<S, 6, 2>(simd),
            4 => self.multiply::<S, 6, 4>(simd),
            _ => self.multiply::<S, 2, 16>(simd),
        }
    }
}

impl<B: Columns> Packed<'_, B> {
    #[inline(always)]
    fn multiply<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let Packed { unit: Unit { a, b, mut c, at: [first_row, first_col] }, space: panels } = self;
        let ([m, n], k, [_, end], width) = ([c.rows(), c.cols()], a.cols(), b.shape(), V * S::F32_LANES);
        let (step, c_stride) = (block_terms::<B>(k), c.stride());
        let mut from = 0;
        // Without terms there is one empty block, so that C is written.
        while from < k.max(1) {
            let terms = from..(from + step).min(k);
            b.pack(simd, panels, V * S::F32_LANES, terms.clone(), first_col..first_col + n);
            let next = if terms.end < k {
                b.source(terms.end..(terms.end + step).min(k), first_col..first_col + n)
            } else if first_col + n < end {
                b.source(0..step.min(k), first_col + n..(first_col + 2 * n).min(end))
            } else {
                Source::none()
            };
            let (mut next, tiles_of_block) = (next, m.div_ceil(R) * n.div_ceil(width));
            let lines = next.lines().div_ceil(tiles_of_block);
            let mut i = 0;
            while i < m {
                let rows = match m - i {
                    left if left >= R => R,
                    left if left >= 4 => 4,
                    left if left >= 2 => 2,
                    _ => 1,
                };
                for j in (0..n).step_by(width) {
                    next.fetch(lines);
                    let t = Tile {
                        a: a.as_ptr().wrapping_add((first_row + i) * a.stride() + terms.start),
                        a_stride: a.stride(),
                        b: panels[j * terms.len()..].as_ptr(),
                        k: terms.len(),
                        c: c.as_mut_ptr().wrapping_add(i * c_stride + j),
                        c_stride,
                        add: from > 0,
                    };
                    // SAFETY: the rows and terms lie in A, a panel was packed for these columns, which C has;
                    // `partial` touches those that exist.
                    unsafe {
                        if j + width <= n {
                            tiles::<S, R, V>(simd, &t, rows);
                        } else {
                            partial::<S, R, V>(simd, &t, rows, n - j);
                        }
                    }
                }
                i += rows;
            }
            from += step;
        }
    }
}

/// A [`tile`] of R, 4, 2 or 1 rows.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn tiles<S: Simd, const R: usize, const V: usize>(simd: S, t: &Tile, rows: usize) {
    // SAFETY: by this function's contract.
    unsafe {
        match rows {
            1 => tile::<S, 1, V>(simd, t),
            2 => tile::<S, 2, V>(simd, t),
            4 => tile::<S, 4, V>(simd, t),
            _ => tile::<S, R, V>(simd, t),
        }
    }
}

/// A tile of which only `columns` columns are in C: through a buffer, with the same sums.
///
/// # Safety
/// As [`tile`], for so many columns.
#[inline(always)]
unsafe fn partial<S: Simd, const R: usize, const V: usize>(simd: S, t: &Tile, rows: usize, columns: usize) {
    let mut buffer = [0.0f32; 6 * WIDEST];
    let whole = Tile { c: buffer.as_mut_ptr(), c_stride: V * S::F32_LANES, add: false, ..*t };
    // SAFETY: the buffer holds the largest tile; the rest by this function's contract.
    unsafe { tiles::<S, R, V>(simd, &whole, rows) };
    for r in 0..rows {
        for (j, sum) in buffer[r * whole.c_stride..][..columns].iter().enumerate() {
            let c = t.c.wrapping_add(r * t.c_stride + j);
            // SAFETY: column j of row r, by this function's contract.
            unsafe { *c = if t.add { *c + sum } else { *sum } };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use half::bf16;

    use super::super::pack::{Plain, Transposed};
    use super::*;
    use crate::ops::inner::test_lanes::{LANES, with_lanes};

    /// Numbers between -1 and 1 in rows of `cols` that lie `cols + 3` apart, NaN between them.
    struct Wide(Vec<f32>, [usize; 2]);

    impl Wide {
        fn new(rows: usize, cols: usize, seed: u32) -> Wide {
            let number = |i: u32| ((i.wrapping_mul(2_654_435_761) ^ seed).wrapping_mul(40_503) >> 16) as f32 / 32_768.0 - 1.0;
            let stride = cols + 3;
            let at = |i: usize| if i % stride < cols { number(i as u32) } else { f32::NAN };
            Wide((0..rows * stride).map(at).collect(), [rows, cols])
        }

        fn mat(&self) -> Mat<'_, f32> {
            Mat::new(&self.0, self.1[0], self.1[1] + 3).col_range(0..self.1[1])
        }

        fn mat_mut(&mut self) -> MatMut<'_, f32> {
            let [rows, cols] = self.1;
            MatMut::new(&mut self.0, rows, cols + 3).col_range(0..cols)
        }
    }

    fn transposed_of(wide: &Wide) -> Transposed<'_, f32> {
        Transposed { rows: wide.mat(), scales: None }
    }

    /// What one unit computes at other widths than this machine's.
    fn one_unit<B: Columns>(lanes: usize, a: Mat<f32>, b: &B, c: MatMut<f32>) {
        let unit = Unit { a, b, c, at: [0, 0] };
        let mut space = vec![f32::NAN; unit.space()];
        with_lanes(lanes, Packed { unit, space: &mut space });
    }

    #[test]
    fn products_of_all_sizes_orders_and_widths() {
        for [m, k, n] in [[1, 1, 1], [2, 0, 5], [3, 7, 16], [5, 31, 17], [6, 16, 48], [13, 1025, 33], [29, 40, 64], [12, 2050, 7]] {
            for transposed in [false, true] {
                let a = Wide::new(m, k, 1);
                let b = if transposed { Wide::new(n, k, 2) } else { Wide::new(k, n, 2) };
                let before = Wide::new(m, n, 3);
                let exact = |i: usize, j: usize| {
                    let a = |l: usize| a.mat().row(i)[l] as f64;
                    let b = |l: usize| if transposed { b.mat().row(j)[l] } else { b.mat().row(l)[j] } as f64;
                    (0..k).map(|l| a(l) * b(l)).sum::<f64>()
                };
                let mut results = Vec::new();
                for lanes in LANES.into_iter().chain([0]) {
                    let mut c = Wide(before.0.clone(), [m, n]);
                    match (lanes, transposed) {
                        (0, true) => product(a.mat(), transposed_of(&b), c.mat_mut()),
                        (0, false) => product(a.mat(), Plain(b.mat()), c.mat_mut()),
                        (_, true) => one_unit(lanes, a.mat(), &transposed_of(&b), c.mat_mut()),
                        (_, false) => one_unit(lanes, a.mat(), &Plain(b.mat()), c.mat_mut()),
                    }
                    for i in 0..m {
                        for (j, c) in c.mat().row(i).iter().enumerate() {
                            let error = (*c as f64 - exact(i, j)).abs();
                            assert!(error < 2e-6 * (k as f64 + 4.0), "{m} x {k} x {n} at {i}, {j}, {lanes} lanes: {error:e}");
                        }
                    }
                    assert!(c.0.iter().zip(&before.0).all(|(c, before)| before.is_nan() == c.is_nan()), "between the rows");
                    // Bits, the gaps of not-a-numbers too; one lane may have no fused multiply-add.
                    if lanes != 1 {
                        results.push(c.0.iter().map(|c| c.to_bits()).collect::<Vec<_>>());
                    }
                }
                assert!(results.iter().all(|r| *r == results[0]), "{m} x {k} x {n}: bits depend on the width");
            }
        }
    }

    /// Of bf16 and int8, at sizes with whole and partial panels and blocks.
    #[test]
    fn narrow_weights_are_the_numbers_that_they_stand_for() {
        for [m, k, n] in [[3, 300, 37], [70, 1045, 16]] {
            let (a, w) = (Wide::new(m, k, 1), Wide::new(n, k, 2));
            let halves: Vec<bf16> = w.0.iter().map(|w| bf16::from_f32(*w)).collect();
            let integers: Vec<i8> = w.0.iter().map(|w| (100.0 * w) as i8).collect();
            let scales: Vec<f32> = (0..n).map(|j| 0.01 + j as f32).collect();
            let (mut of_halves, mut of_integers) = (Wide::new(m, n, 3), Wide::new(m, n, 3));
            let rows = Mat::new(&halves, n, k + 3).col_range(0..k);
            product(a.mat(), Transposed { rows, scales: None }, of_halves.mat_mut());
            let rows = Mat::new(&integers, n, k + 3).col_range(0..k);
            product(a.mat(), Transposed { rows, scales: Some(&scales) }, of_integers.mat_mut());
            for i in 0..m {
                for (j, scale) in scales.iter().enumerate() {
                    let sum = |w: &dyn Fn(usize) -> f64| (0..k).map(|l| a.mat().row(i)[l] as f64 * w(j * (k + 3) + l)).sum::<f64>();
                    let exact = [sum(&|at| halves[at].to_f64()), sum(&|at| integers[at] as f64 * *scale as f64)];
                    let [half, integer] = [of_halves.mat().row(i)[j] as f64, of_integers.mat().row(i)[j] as f64];
                    assert!((half - exact[0]).abs() < 2e-6 * k as f64, "bf16 at {i}, {j}: {half}, not {}", exact[0]);
                    let error = (integer - exact[1]).abs() / *scale as f64;
                    assert!(error < 2e-4 * k as f64, "int8 at {i}, {j}: {integer}, not {}", exact[1]);
                }
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_other_rows() {
        let [m, k, n] = [1100, 130, 530];
        let (a, b) = (Wide::new(m, k, 1), Wide::new(n, k, 2));
        let run = |threads: usize, rows: Range<usize>| {
            let mut c = Wide::new(rows.len(), n, 3);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let a = a.mat().row_range(rows);
            pool.install(|| product(a, transposed_of(&b), c.mat_mut()));
            c
        };
        let all = run(1, 0..m);
        for (threads, rows) in [(2, 0..m), (3, 0..m), (16, 0..m), (2, 7..8), (3, 400..1001)] {
            let some = run(threads, rows.clone());
            for (i, row) in rows.enumerate() {
                assert_eq!(some.mat().row(i), all.mat().row(row), "row {row} on {threads} threads");
            }
        }
    }

    #[test]
    #[should_panic(expected = "2 x 3 times 4 x 5 into 2 x 5")]
    fn operands_that_do_not_fit_are_refused() {
        let (a, b, mut c) = (Wide::new(2, 3, 1), Wide::new(4, 5, 2), Wide::new(2, 5, 3));
        product(a.mat(), Plain(b.mat()), c.mat_mut());
    }
}
