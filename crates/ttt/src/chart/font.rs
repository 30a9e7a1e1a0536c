//! The letters of pictures: measured for SVG, drawn for PNG.

use std::sync::Once;

use plotters::style::{FontStyle, register_font};

/// Roboto Regular, of which only what pictures write is kept (`font/README.md`).
static ROBOTO: &[u8] = include_bytes!("font/roboto.ttf");

/// Makes the letters known to plotters, which looks for no font on the system.
pub(crate) fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| assert!(register_font("sans-serif", FontStyle::Normal, ROBOTO).is_ok(), "the font is damaged"));
}
