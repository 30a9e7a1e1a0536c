//! Pictures as values: plots with their lines and axes, drawn as SVG, as PNG, or by a page that reads them as JSON.
//!
//! All pictures of this crate look the same because all of them are drawn here; what they show is put together beside the
//! numbers that they show ([`crate::train::plot`], [`crate::eval`], [`crate::results`]).

mod draw;
mod font;
mod raster;
pub(crate) mod scale;

use plotters::prelude::*;
use serde::Serialize;

pub(crate) use draw::{Area, Drawn, text};
pub use scale::{Axis, Scale, Unit};
pub(crate) use scale::{binary, trimmed};

use crate::{Error, Result};

pub(crate) const INK: RGBColor = RGBColor(0x2B, 0x30, 0x36);
pub(crate) const QUIET: RGBColor = RGBColor(0x5C, 0x63, 0x6A);
pub(crate) const GRID: RGBColor = RGBColor(0xE6, 0xE8, 0xEB);
pub(crate) const BLUE: RGBColor = RGBColor(0x1F, 0x66, 0xB0);
pub(crate) const ORANGE: RGBColor = RGBColor(0xD9, 0x4F, 0x0B);
pub(crate) const GREEN: RGBColor = RGBColor(0x2A, 0x8A, 0x57);

/// Colours of lines, told apart also by people who do not see red and green alike: their lightness differs.
pub(crate) const PALETTE: [RGBColor; 8] = [
    BLUE,
    ORANGE,
    GREEN,
    RGBColor(0x84, 0x3F, 0xA1),
    RGBColor(0xC2, 0x8A, 0x00),
    RGBColor(0xC4, 0x2B, 0x6B),
    RGBColor(0x18, 0x9A, 0xB4),
    RGBColor(0x6B, 0x51, 0x3A),
];

/// One or more plots on a page, drawn on white, 960 units wide.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Picture {
    /// What it shows.
    pub title: String,
    /// Plots of one kind each, one grid below the other.
    pub grids: Vec<Grid>,
}

/// Plots beside and below each other, with one legend for all of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grid {
    /// Plots in a row; more than one are drawn smaller.
    pub columns: usize,
    /// Height of a row.
    pub height: u32,
    /// Row by row.
    pub plots: Vec<Plot>,
}

/// Lines over two axes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plot {
    /// Which of the grid's plots it is; empty when there is one.
    pub title: String,
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// What is drawn, the last on top.
    pub lines: Vec<Line>,
}

/// A line through measured points.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Line {
    /// What it is called in the legend; lines of one name share an entry.
    pub name: String,
    /// Number of its colour; those from 8 on are dashed.
    pub color: usize,
    /// Thin and pale: the raw values behind a smoothed line.
    pub faint: bool,
    /// Whether every point has a mark.
    pub marks: bool,
    /// x and y, ascending in x.
    pub points: Vec<(f64, f64)>,
    /// An interval around the line: x, lower and upper end; empty without one.
    pub band: Vec<(f64, f64, f64)>,
}

impl Line {
    /// A line without marks.
    pub fn new(name: impl Into<String>, color: usize, points: Vec<(f64, f64)>) -> Line {
        Line { name: name.into(), color, points, ..Line::default() }
    }
}

impl Picture {
    /// A picture of one plot.
    pub fn of(title: impl Into<String>, plot: Plot) -> Picture {
        Picture { title: title.into(), grids: vec![Grid { columns: 1, height: 480, plots: vec![plot] }] }
    }

    /// As SVG text; its letters are those of whoever shows it.
    ///
    /// # Errors
    /// There is nothing to draw.
    pub fn svg(&self) -> Result<String> {
        self.check()?;
        svg(draw::size(self, 1)?, |root| draw::picture(root, self, 1))
    }

    /// As a PNG file with two pixels to a unit, for screens and documents that know no SVG.
    ///
    /// # Errors
    /// There is nothing to draw.
    pub fn png(&self) -> Result<Vec<u8>> {
        self.check()?;
        font::register();
        let (width, height) = draw::size(self, 2)?;
        let mut pixels = vec![0xFF; 3 * width as usize * height as usize];
        {
            let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
            draw::picture(&root, self, 2).and_then(|()| root.present()).map_err(undrawable)?;
        }
        raster::encode(&pixels, [width, height])
    }

    /// Whether any point has a place on its axes.
    pub fn has_points(&self) -> bool {
        let held = |plot: &Plot| plot.lines.iter().flat_map(|line| &line.points).any(|(x, y)| plot.x.holds(*x) && plot.y.holds(*y));
        self.grids.iter().flat_map(|grid| &grid.plots).any(held)
    }

    fn check(&self) -> Result<()> {
        match self.has_points() {
            true => Ok(()),
            false => Err(Error::Invalid(format!("there is nothing to draw for `{}`", self.title))),
        }
    }
}

/// A picture on white that plots itself.
pub(crate) fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    font::register();
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    root.fill(&WHITE).and_then(|()| draw(&root)).and_then(|()| root.present()).map_err(undrawable)?;
    drop(root);
    Ok(svg)
}

fn undrawable(error: impl std::fmt::Display) -> Error {
    Error::Invalid(format!("the plot cannot be drawn: {error}"))
}

#[cfg(test)]
mod tests;
