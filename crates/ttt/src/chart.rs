//! How this crate's pictures look: colours, letters, numbers, legends.

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

pub(crate) const INK: RGBColor = RGBColor(0x2B, 0x30, 0x36);
pub(crate) const QUIET: RGBColor = RGBColor(0x5C, 0x63, 0x6A);
pub(crate) const GRID: RGBColor = RGBColor(0xE6, 0xE8, 0xEB);
pub(crate) const BLUE: RGBColor = RGBColor(0x1F, 0x66, 0xB0);
pub(crate) const ORANGE: RGBColor = RGBColor(0xD9, 0x4F, 0x0B);
pub(crate) const GREEN: RGBColor = RGBColor(0x2A, 0x8A, 0x57);

/// Where pictures are drawn.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Whether it went well.
pub(crate) type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// Letters of a size in pixels.
pub(crate) fn font(size: u32, color: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&color)
}

/// Lines with their labels, from `(x, y)` to the right.
pub(crate) fn legend(area: &Area<'_>, mut x: i32, y: i32, entries: &[(&str, ShapeStyle)]) -> Drawn {
    for (label, style) in entries {
        area.draw(&PathElement::new([(x, y), (x + 24, y)], *style))?;
        area.draw(&Text::new((*label).to_owned(), (x + 32, y), font(14, QUIET).pos(Pos::new(HPos::Left, VPos::Center))))?;
        // No font is at hand to measure with; at this size a letter takes at most 8 pixels on average.
        x += 32 + 8 * label.len() as i32 + 24;
    }
    Ok(())
}

/// `1500000` as `1.5M`.
pub(crate) fn short(number: f64) -> String {
    let (scale, suffix) = match number.abs() {
        x if x >= 1e12 => (1e12, "T"),
        x if x >= 1e9 => (1e9, "B"),
        x if x >= 1e6 => (1e6, "M"),
        x if x >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    trimmed(number / scale, 3) + suffix
}

/// With at most so many decimals and no zeros at the end.
pub(crate) fn trimmed(number: f64, decimals: usize) -> String {
    let text = format!("{number:.decimals$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
