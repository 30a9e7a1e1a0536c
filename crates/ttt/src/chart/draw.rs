//! Drawing of pictures with plotters, the same on SVG and on pixels. All lengths are units times `s`, the pixels of a unit.

use std::ops::Range;

use plotters::{
    coord::{
        Shift,
        ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged},
    },
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Axis, GRID, Grid, INK, Line, PALETTE, Picture, Plot, QUIET};
use crate::Result;

const WIDTH: u32 = 960;
/// Left edge of a large plot itself, and of titles and legends.
const LEFT: i32 = 76;
const TITLE: u32 = 40;
/// Height of a row of the legend.
const LEGEND: u32 = 24;
/// What the title of a small plot takes above it.
const SMALL_TITLE: u32 = 22;

/// Where pictures are drawn that plot themselves.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Whether it went well.
pub(crate) type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

type On<DB> = DrawingArea<DB, Shift>;
type DrawnOn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Letters of a size, anchored at a point.
pub(crate) fn text(size: u32, color: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&color).pos(Pos::new(h, v))
}

/// Width and height in pixels.
pub(super) fn size(picture: &Picture, s: u32) -> Result<(u32, u32)> {
    let grids = picture.grids.iter().map(|grid| legend_height(grid) + grid.height * rows(grid) as u32);
    Ok((WIDTH * s, (TITLE + grids.sum::<u32>()) * s))
}

fn rows(grid: &Grid) -> usize {
    grid.plots.len().div_ceil(grid.columns.max(1))
}

/// Entries of a grid's legend: the first line of each name, and whether any has an interval.
fn entries(grid: &Grid) -> (Vec<&Line>, bool) {
    let mut entries: Vec<&Line> = Vec::new();
    let lines = || grid.plots.iter().flat_map(|plot| &plot.lines);
    for line in lines() {
        if !entries.iter().any(|e| e.name == line.name) && !line.name.is_empty() {
            entries.push(line);
        }
    }
    (entries, lines().any(|line| !line.band.is_empty()))
}

const INTERVAL: &str = "95 % interval";

/// Where legend entries stand: the row and the distance from the left edge of each, and the number of rows. At the size of a legend a
/// letter takes 7 units on average, in whatever font it will be shown.
fn placed(grid: &Grid) -> (Vec<(u32, i32)>, u32) {
    let (entries, band) = entries(grid);
    let names = entries.iter().map(|line| line.name.as_str()).chain(band.then_some(INTERVAL));
    let (mut places, mut row, mut x) = (Vec::new(), 0, 0);
    for name in names {
        let wide = 32 + 7 * name.chars().count() as i32 + 24;
        if x > 0 && LEFT + x + wide > WIDTH as i32 {
            (row, x) = (row + 1, 0);
        }
        places.push((row, x));
        x += wide;
    }
    let count = if places.is_empty() { 0 } else { row + 1 };
    (places, count)
}

fn legend_height(grid: &Grid) -> u32 {
    placed(grid).1 * LEGEND + 10
}

fn style(line: &Line, s: u32) -> ShapeStyle {
    let color = PALETTE[line.color % PALETTE.len()];
    if line.faint { color.mix(0.45).stroke_width(s) } else { color.stroke_width(2 * s) }
}

fn dashed(line: &Line) -> bool {
    line.color >= PALETTE.len()
}

/// Draws everything.
pub(super) fn picture<DB: DrawingBackend>(root: &On<DB>, picture: &Picture, s: u32) -> DrawnOn<DB> {
    let title = text(20 * s, INK, HPos::Left, VPos::Top);
    root.draw(&Text::new(picture.title.clone(), (LEFT * s as i32, 16 * s as i32), title))?;
    let mut rest = root.split_vertically(TITLE * s).1;
    for grid in &picture.grids {
        let head = legend_height(grid);
        let (own, below) = rest.split_vertically((head + grid.height * rows(grid) as u32) * s);
        rest = below;
        let (head, plots) = own.split_vertically(head * s);
        legend(&head, grid, s)?;
        let small = grid.columns > 1;
        for (area, plot) in plots.split_evenly((rows(grid), grid.columns.max(1))).iter().zip(&grid.plots) {
            draw_plot(area, plot, small, s)?;
        }
    }
    Ok(())
}

fn legend<DB: DrawingBackend>(area: &On<DB>, grid: &Grid, s: u32) -> DrawnOn<DB> {
    let (entries, band) = entries(grid);
    let styles = entries.iter().map(|line| (line.name.as_str(), style(line, s), dashed(line)));
    let interval = band.then(|| (INTERVAL, QUIET.mix(0.25).stroke_width(12 * s), false));
    let s = s as i32;
    for ((name, style, dashed), (row, x)) in styles.chain(interval).zip(placed(grid).0) {
        let (x, y) = ((LEFT + x) * s, (12 + (row * LEGEND) as i32) * s);
        let ends = vec![(x, y), (x + 24 * s, y)];
        match dashed {
            true => area.draw(&DashedPathElement::new(ends, 6 * s, 4 * s, style))?,
            false => area.draw(&PathElement::new(ends, style))?,
        }
        area.draw(&Text::new(name.to_owned(), (x + 32 * s, y), text(14 * s as u32, QUIET, HPos::Left, VPos::Center)))?;
    }
    Ok(())
}

/// An axis with its ends and what is written on it.
struct Coord<'a> {
    axis: &'a Axis,
    ends: (f64, f64),
    ticks: Vec<f64>,
}

impl Ranged for Coord<'_> {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (self.axis.place(*value, self.ends) * (to - from) as f64).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.ends.0..self.ends.1
    }
}

impl plotters::coord::ranged1d::ValueFormatter<f64> for Coord<'_> {
    fn format_ext(&self, value: &f64) -> String {
        self.axis.unit.write(*value)
    }
}

fn draw_plot<DB: DrawingBackend>(area: &On<DB>, plot: &Plot, small: bool, s: u32) -> DrawnOn<DB> {
    let points = || plot.lines.iter().flat_map(|line| &line.points).filter(|(x, y)| plot.x.holds(*x) && plot.y.holds(*y));
    // One wide interval would flatten all lines: none reaches further from them than half of what they span.
    let (lowest, highest) = points().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), (_, y)| (a.min(*y), b.max(*y)));
    let more = (highest - lowest).max(0.0) / 2.0;
    let ends = plot.lines.iter().flat_map(|line| &line.band).flat_map(|(_, low, high)| [*low, *high]);
    let bands = ends.filter(|y| !y.is_nan()).map(|y| y.max(lowest - more).min(highest + more));
    let xs = plot.x.range(points().map(|p| p.0), 0.015);
    let ys = plot.y.range(points().map(|p| p.1).chain(bands), 0.05);
    let (most_x, most_y, letters) = if small { (4, 5, 12) } else { (9, 8, 14) };
    let x = Coord { axis: &plot.x, ends: xs, ticks: plot.x.ticks(xs, most_x) };
    let y = Coord { axis: &plot.y, ends: ys, ticks: plot.y.ticks(ys, most_y) };

    let margins = if small { [SMALL_TITLE, 12, 8, 4] } else { [6, 32, 14, 14] };
    let labels = if small { [24, 50] } else { [50, LEFT as u32 - 14] };
    if small {
        let at = ((labels[1] + margins[3]) * s) as i32;
        area.draw(&Text::new(plot.title.clone(), (at, 3 * s as i32), text(14 * s, INK, HPos::Left, VPos::Top)))?;
    }
    let mut chart = ChartBuilder::on(area)
        .margin_top(margins[0] * s)
        .margin_right(margins[1] * s)
        .margin_bottom(margins[2] * s)
        .margin_left(margins[3] * s)
        .x_label_area_size(labels[0] * s)
        .y_label_area_size(labels[1] * s)
        .build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    let quiet = |size: u32| ("sans-serif", size * s).into_font().color(&QUIET);
    if !small {
        mesh.x_desc(&plot.x.label).y_desc(&plot.y.label);
    }
    mesh.set_all_tick_mark_size(4 * s)
        .axis_desc_style(quiet(15))
        .label_style(quiet(letters))
        .bold_line_style(GRID.stroke_width(s))
        .light_line_style(TRANSPARENT)
        .axis_style(QUIET.stroke_width(s))
        .draw()?;

    let inside = |x: f64, y: f64| (plot.x.holds(x) && plot.y.holds(y)).then(|| (x, y.clamp(ys.0, ys.1)));
    for line in &plot.lines {
        let color = PALETTE[line.color % PALETTE.len()];
        let band = |end: fn(&(f64, f64, f64)) -> f64| line.band.iter().filter_map(move |b| inside(b.0, end(b)));
        let upper: Vec<_> = band(|b| b.2).collect();
        if upper.len() > 1 {
            let lower: Vec<_> = band(|b| b.1).collect();
            let around: Vec<_> = upper.into_iter().chain(lower.into_iter().rev()).collect();
            chart.draw_series([Polygon::new(around, color.mix(0.2).filled())])?;
        }
    }
    for line in &plot.lines {
        let points: Vec<_> = line.points.iter().filter_map(|p| inside(p.0, p.1)).collect();
        let style = style(line, s);
        match dashed(line) {
            true => {
                chart.draw_series(DashedLineSeries::new(points.clone(), 6 * s as i32, 4 * s as i32, style))?;
            }
            false => {
                chart.draw_series(LineSeries::new(points.clone(), style))?;
            }
        }
        if line.marks || (points.len() == 1 && !line.faint) {
            let mark = style.color.to_rgba().filled();
            chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3 * s as i32, mark)))?;
        }
    }
    Ok(())
}
