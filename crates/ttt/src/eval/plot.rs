//! Pictures of evaluations: loss and inner errors by position, and accuracy of a needle by depth and length.

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::report::{InnerRow, LossRow, Report};
use crate::chart::{Area, BLUE, Drawn, GREEN, GRID, INK, ORANGE, QUIET, font, legend, trimmed};
use crate::{Error, Result};

const WIDTH: u32 = 960;
/// Height of title and loss, and of a row of layers.
const TOP: u32 = 440;
const ROW: u32 = 210;
/// Layers side by side.
const COLUMNS: usize = 4;
/// Left edge of the upper plot itself.
const LEFT: i32 = 76;

/// Loss by position with its 95 % interval, and below it for each layer the inner models' errors under the initial weights, before
/// and after each update (paper, Figure 4), as SVG text.
///
/// # Errors
/// Nothing was judged.
pub fn report_svg(report: &Report, title: &str) -> Result<String> {
    let (loss, inner) = (report.loss_by_position(), report.inner_by_position());
    let inner: Vec<&[InnerRow]> = inner.iter().map(|rows| &rows[..]).filter(|rows| !rows.is_empty()).collect();
    if loss.is_empty() {
        return Err(Error::Invalid("there is no loss to plot: nothing was judged".into()));
    }
    let height = TOP + if inner.is_empty() { 0 } else { 40 + ROW * inner.len().div_ceil(COLUMNS) as u32 };
    svg((WIDTH, height), |root| {
        root.draw(&Text::new(title.to_owned(), (LEFT, 18), font(20, INK)))?;
        let (upper, lower) = root.split_vertically(TOP);
        draw_loss(&upper, &loss)?;
        if inner.is_empty() {
            return Ok(());
        }
        let (head, layers) = lower.split_vertically(40);
        let line = |color: RGBColor| color.stroke_width(2);
        let entries = [("inner loss under W0", line(GREEN)), ("before each update", line(ORANGE)), ("after it", line(BLUE))];
        legend(&head, LEFT, 22, &entries)?;
        for (i, (area, rows)) in layers.split_evenly((inner.len().div_ceil(COLUMNS), COLUMNS)).iter().zip(&inner).enumerate() {
            draw_layer(area, i, rows)?;
        }
        Ok(())
    })
}

fn draw_loss(area: &Area<'_>, rows: &[LossRow]) -> Drawn {
    let place = |row: &LossRow| middle(row.from, row.to);
    let (low, high) = range(rows.iter().flat_map(|r| [r.loss - r.margin.unwrap_or(0.0), r.loss + r.margin.unwrap_or(0.0)]));
    let mut chart = ChartBuilder::on(area)
        .margin_top(78)
        .margin_right(32)
        .margin_bottom(14)
        .margin_left(14)
        .x_label_area_size(50)
        .y_label_area_size(LEFT as u32 - 14)
        .build_cartesian_2d(0.0..place(&rows[rows.len() - 1]).max(1.0) + 0.2, low..high)?;
    chart
        .configure_mesh()
        .x_labels(14)
        .y_labels(8)
        .x_label_formatter(&|x| power(*x))
        .y_label_formatter(&|loss| trimmed(*loss, 3))
        .x_desc("position: tokens read before")
        .y_desc("loss (nats a token)")
        .axis_desc_style(font(15, QUIET))
        .label_style(font(14, QUIET))
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(QUIET)
        .draw()?;
    let known: Vec<(f64, f64, f64)> = rows.iter().filter_map(|r| Some((place(r), r.loss, r.margin?))).collect();
    let upper = known.iter().map(|(x, loss, margin)| (*x, loss + margin));
    let lower = known.iter().rev().map(|(x, loss, margin)| (*x, loss - margin));
    chart.draw_series([Polygon::new(upper.chain(lower).collect::<Vec<_>>(), BLUE.mix(0.2).filled())])?;
    chart.draw_series(LineSeries::new(rows.iter().map(|r| (place(r), r.loss)), BLUE.stroke_width(2)))?;
    chart.draw_series(rows.iter().map(|r| Circle::new((place(r), r.loss), 3, BLUE.filled())))?;
    legend(area, LEFT, 58, &[("mean", BLUE.stroke_width(2)), ("95 % interval", BLUE.mix(0.2).stroke_width(12))])
}

fn draw_layer(area: &Area<'_>, layer: usize, rows: &[InnerRow]) -> Drawn {
    let place = |row: &InnerRow| middle(row.from, row.to);
    let (low, high) = range(rows.iter().flat_map(|r| [r.initial, r.before, r.after]));
    let (first, last) = (place(&rows[0]), place(&rows[rows.len() - 1]));
    area.draw(&Text::new(format!("layer {layer}"), (56, 4), font(14, INK)))?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(24)
        .margin_right(12)
        .margin_bottom(8)
        .margin_left(4)
        .x_label_area_size(24)
        .y_label_area_size(48)
        .build_cartesian_2d(first - 0.2..last.max(first + 1.0) + 0.2, low..high)?;
    chart
        .configure_mesh()
        .x_labels(5)
        .y_labels(5)
        .x_label_formatter(&|x| power(*x))
        .y_label_formatter(&|error| trimmed(*error, 3))
        .label_style(font(12, QUIET))
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(QUIET)
        .draw()?;
    let value: [fn(&InnerRow) -> f64; 3] = [|r| r.initial, |r| r.before, |r| r.after];
    for (value, color) in value.into_iter().zip([GREEN, ORANGE, BLUE]) {
        let points: Vec<(f64, f64)> = rows.iter().map(|r| (place(r), value(r))).collect();
        if let [only] = points[..] {
            chart.draw_series([Circle::new(only, 3, color.filled())])?;
        }
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
    }
    Ok(())
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
    svg(size, |root| {
        let at = |size, color, h, v| font(size, color).pos(Pos::new(h, v));
        root.draw(&Text::new(title.to_owned(), (left, 18), font(20, INK)))?;
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
    RGBColor(mix(0xF2, BLUE.0), mix(0xF4, BLUE.1), mix(0xF6, BLUE.2))
}

/// A picture on white.
fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let drawn = root.fill(&WHITE).and_then(|()| draw(&root)).and_then(|()| root.present());
    drawn.map_err(|e| Error::Invalid(format!("the plot cannot be drawn: {e}")))?;
    drop(root);
    Ok(svg)
}

/// Where the positions `from..to` stand on the axis: log2 of their geometric middle.
fn middle(from: u64, to: u64) -> f64 {
    ((from as f64).log2() + ((to - 1) as f64).log2()) / 2.0
}

/// All values that are numbers, with a little air.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.filter(|x| x.is_finite()).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low > high {
        return (0.0, 1.0);
    }
    let air = 0.05 * (high - low).max(1e-3);
    (low - air, high + air)
}

/// 2ˣ where x is whole: `512`, `2k`, `1M`.
fn power(x: f64) -> String {
    if x.fract().abs() > 1e-9 || !(0.0..63.0).contains(&x) { String::new() } else { binary(1 << x as u64) }
}

/// `2048` as `2k`, `1500` as `1500`.
fn binary(n: u64) -> String {
    match n {
        n if n > 0 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n > 0 && n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}
