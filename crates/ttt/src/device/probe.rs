//! What this machine reaches: the denominators of utilisation.

use std::time::Instant;

use rayon::prelude::*;

use crate::Result;
use crate::device::Device;
use crate::ops::linear;
use crate::tensor::{DType, Tensor};

/// Floating-point operations a second in the best of a few 1024 x 1024 x 1024 products, about a tenth of a second in all.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn matmul_flops(device: &Device) -> Result<f64> {
    const N: usize = 1024;
    let mut x = Tensor::zeros(device, &[N, N], DType::F32)?;
    x.as_mut_slice::<f32>().fill(0.5);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        device.install(|| linear::forward(x.view(), x.view()))?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (N as f64).powi(3) / best)
}

/// Bytes a second in the best of a few sums over 256 MiB by all threads: larger than caches, so it is main memory that is read.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn read_bandwidth(device: &Device) -> Result<f64> {
    const FLOATS: usize = 64 << 20;
    /// Read by one thread at a time.
    const PIECE: usize = 1 << 18;
    let mut x = Tensor::empty(device, &[FLOATS], DType::F32)?;
    // Written, so that every page is real.
    device.install(|| x.as_mut_slice::<f32>().par_chunks_mut(PIECE).for_each(|piece| piece.fill(1.0)));
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        let sum: f32 = device.install(|| x.as_slice::<f32>().par_chunks(PIECE).map(lanes_sum).sum());
        best = best.min(start.elapsed().as_secs_f64());
        assert!(sum > 0.0, "a sum of ones is positive");
    }
    Ok((FLOATS * size_of::<f32>()) as f64 / best)
}

/// A sum in 32 independent parts, which the compiler turns into vectors.
fn lanes_sum(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<32>();
    let mut sums = [0.0f32; 32];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    sums.iter().chain(rest).sum()
}
