//! What this machine reaches: the denominators of utilisation.

use std::time::Instant;

use rayon::prelude::*;

use crate::Result;
use crate::device::Device;
use crate::ops::linear;
use crate::tensor::{DType, Tensor};

/// Floating-point operations a second in the best of a few products, about a tenth of a second in all: of 1024 x 1024 x 1024 in
/// f32, on a GPU of 8192 x 8192 x 8192 in bf16.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn matmul_flops(device: &Device) -> Result<f64> {
    let (n, dtype) = match device {
        Device::Cpu(_) => (1024, DType::F32),
        Device::Cuda(_) => (8192, DType::Bf16),
    };
    // Not constant: a GPU is faster with that.
    let values: Vec<f32> = (0..n * n).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    let mut x = Tensor::from_slice(device, &[n, n], &values)?;
    if dtype != DType::F32 {
        x = x.cast(dtype)?;
    }
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        device.synchronize();
        let start = Instant::now();
        device.install(|| linear::forward(x.view(), x.view()))?;
        device.synchronize();
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

/// Bytes a second in the best of a few sums over 256 MiB by all threads: larger than caches, so it is main memory that is read. On
/// a GPU bytes read and written in the best of a few copies of 1 GiB.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn read_bandwidth(device: &Device) -> Result<f64> {
    const FLOATS: usize = 64 << 20;
    /// Read by one thread at a time.
    const PIECE: usize = 1 << 18;
    if device.as_cuda().is_some() {
        return copy_bandwidth(device);
    }
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

fn copy_bandwidth(device: &Device) -> Result<f64> {
    const FLOATS: usize = 256 << 20;
    let x = Tensor::zeros(device, &[FLOATS], DType::F32)?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        device.synchronize();
        let start = Instant::now();
        let copy = x.copy()?;
        device.synchronize();
        best = best.min(start.elapsed().as_secs_f64());
        drop(copy);
    }
    Ok(2.0 * (FLOATS * size_of::<f32>()) as f64 / best)
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
