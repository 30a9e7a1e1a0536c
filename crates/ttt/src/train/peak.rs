//! How fast this device multiplies matrices: the denominator of model FLOPs utilisation.

use std::time::Instant;

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
