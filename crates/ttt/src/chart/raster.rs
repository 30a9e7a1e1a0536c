//! Pixels as a PNG file.

use crate::{Error, Result};

/// A PNG file of `width x height` pixels of red, green and blue.
pub(super) fn encode(pixels: &[u8], [width, height]: [u32; 2]) -> Result<Vec<u8>> {
    let failed = |e: png::EncodingError| Error::Invalid(format!("the picture cannot be encoded: {e}"));
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(pixels).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(file)
}
