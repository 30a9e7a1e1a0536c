//! Pictures of evaluations: loss and inner errors by position, and accuracy of a needle by depth and length.

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, VPos},
};

use super::report::{InnerRow, LossRow, Report};
use crate::chart::{self, Axis, Grid, INK, Line, ORANGE, Picture, Plot, QUIET, Unit, binary, text, trimmed};
use crate::{Error, Result};

/// Loss by position with its 95 % interval, and below it for each layer the inner models' errors under the initial weights, before
/// and after each update (paper, Figure 4), as SVG text.
///
/// # Errors
/// Nothing was judged.
pub fn report_svg(report: &Report, title: &str) -> Result<String> {
    let (loss, inner) = (report.loss_by_position(), report.inner_by_position());
    if loss.is_empty() {
        return Err(Error::Invalid("there is no loss to plot: nothing was judged".into()));
    }
    let plot = Plot {
        title: String::new(),
        x: Axis::log("position: tokens read before", Unit::Binary),
        y: Axis::linear("loss (nats a token)", Unit::Plain),
        lines: vec![loss_line("mean", 0, &loss)],
    };
    let mut picture = Picture::of(title, plot);
    picture.grids.extend(inner_grid(&inner));
    picture.svg()
}

/// The loss by position with its interval.
pub(crate) fn loss_line(name: &str, color: usize, rows: &[LossRow]) -> Line {
    let point = |row: &LossRow| (middle(row.from, row.to), row.loss);
    let band = |row: &LossRow| row.margin.map(|m| (middle(row.from, row.to), row.loss - m, row.loss + m));
    let band = rows.iter().filter_map(band).collect();
    Line { marks: true, band, ..Line::new(name, color, rows.iter().map(point).collect()) }
}

/// The inner models' errors of each layer that has any; nothing where none was measured.
pub(crate) fn inner_grid(layers: &[Vec<InnerRow>]) -> Option<Grid> {
    type Value = fn(&InnerRow) -> f64;
    let value: [(&str, usize, Value); 3] = [
        ("inner loss under W0", 2, |row| row.initial),
        ("before each update", 1, |row| row.before),
        ("after it", 0, |row| row.after),
    ];
    let plot = |(layer, rows): (usize, &Vec<InnerRow>)| Plot {
        title: format!("layer {layer}"),
        x: Axis::log("position: tokens read before", Unit::Binary),
        y: Axis::linear("inner loss (mean squared error)", Unit::Plain),
        lines: value
            .iter()
            .map(|(name, color, value)| {
                Line::new(*name, *color, rows.iter().map(|row| (middle(row.from, row.to), value(row))).collect())
            })
            .collect(),
    };
    let plots: Vec<Plot> = layers.iter().enumerate().filter(|(_, rows)| !rows.is_empty()).map(plot).collect();
    (!plots.is_empty()).then(|| Grid { columns: plots.len().clamp(2, 4), height: 210, plots })
}

/// Values from 0 to 1 by depth (downwards) and length (to the right), as SVG text: `values[length][depth]`, darker for more.
/// `chance` is marked on the scale below.
///
/// # Errors
/// No length or no depth.
pub fn grid_svg(title: &str, lengths: &[usize], depths: &[f64], values: &[Vec<f64>], chance: f64) -> Result<String> {
    if lengths.is_empty() || depths.is_empty() {
        return Err(Error::Invalid("there is no grid to plot: no length, or no depth".into()));
    }
    let (cell, high) = ((760 / lengths.len() as i32).clamp(28, 110), 44);
    let (left, top) = (110, 76);
    let [right, bottom] = [left + cell * lengths.len() as i32, top + high * depths.len() as i32];
    let size = ((right + 40).max(620) as u32, bottom as u32 + 130);
    chart::svg(size, |root| {
        let at = text;
        root.draw(&Text::new(title.to_owned(), (left, 18), at(20, INK, HPos::Left, VPos::Top)))?;
        root.draw(&Text::new("depth", (left - 12, top - 16), at(15, QUIET, HPos::Right, VPos::Center)))?;
        for (d, depth) in depths.iter().enumerate() {
            let label = format!("{} %", trimmed(depth * 100.0, 1));
            let y = top + high * d as i32;
            root.draw(&Text::new(label, (left - 12, y + high / 2), at(14, QUIET, HPos::Right, VPos::Center)))?;
            for (l, values) in values.iter().enumerate() {
                let (x, value) = (left + cell * l as i32, values[d].clamp(0.0, 1.0));
                root.draw(&Rectangle::new([(x + 1, y + 1), (x + cell - 1, y + high - 1)], shade(value).filled()))?;
                let ink = if value > 0.55 { WHITE } else { INK };
                let label = format!("{:.0}", value * 100.0);
                root.draw(&Text::new(label, (x + cell / 2, y + high / 2), at(13, ink, HPos::Center, VPos::Center)))?;
            }
        }
        for (l, length) in lengths.iter().enumerate() {
            let x = left + cell * l as i32 + cell / 2;
            root.draw(&Text::new(binary(*length as u64), (x, bottom + 14), at(14, QUIET, HPos::Center, VPos::Center)))?;
        }
        root.draw(&Text::new("length (tokens)", (left, bottom + 38), at(15, QUIET, HPos::Left, VPos::Center)))?;
        // The scale.
        let (x, y, wide) = (left, bottom + 78, 400);
        for i in 0..100 {
            let shade = shade((i as f64 + 0.5) / 100.0).filled();
            root.draw(&Rectangle::new([(x + i * wide / 100, y), (x + (i + 1) * wide / 100, y + 14)], shade))?;
        }
        for (part, label) in [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 % right")] {
            let place = (x + (wide as f64 * part) as i32, y + 28);
            root.draw(&Text::new(label, place, at(13, QUIET, HPos::Center, VPos::Center)))?;
        }
        let mark = x + (wide as f64 * chance) as i32;
        root.draw(&PathElement::new([(mark, y - 4), (mark, y + 18)], ORANGE.stroke_width(2)))?;
        root.draw(&Text::new("chance", (mark, y - 12), at(13, ORANGE, HPos::Center, VPos::Center)))
    })
}

/// From nearly white to blue.
fn shade(value: f64) -> RGBColor {
    let mix = |from: u8, to: u8| (from as f64 + (to as f64 - from as f64) * value).round() as u8;
    RGBColor(mix(0xF2, chart::BLUE.0), mix(0xF4, chart::BLUE.1), mix(0xF6, chart::BLUE.2))
}

/// Where the positions `from..to` stand on the axis: their geometric middle.
fn middle(from: u64, to: u64) -> f64 {
    (from as f64 * (to - 1) as f64).sqrt()
}
