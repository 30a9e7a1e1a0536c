//! The pictures of a comparison.

use super::run::{Decoding, DecodingRow, RunResults};
use crate::chart::{Axis, Line, Picture, Plot, Scale, Unit};
use crate::eval::{inner_grid, loss_line};
use crate::train::metrics::{Record, Split};
use crate::train::plot::{moving_average, thinned};

/// Validations that make a curve; with fewer, the averaged training loss is drawn.
const FEWEST: usize = 3;
/// Part of the longest run in which losses set the upper end of the axis: what comes before is steep and the same for all.
const START: f64 = 0.05;

/// All pictures that there are numbers for, each with the name of its file.
pub(super) fn all(runs: &[RunResults]) -> Vec<(String, Picture)> {
    let mut pictures = Vec::new();
    type At = fn(&RunResults, &Record) -> Option<f64>;
    let curves: [(&str, &str, &str, Unit, At); 3] = [
        ("loss-tokens", "Loss against tokens", "tokens trained on", Unit::Count, |_, r| Some(r.tokens as f64)),
        ("loss-flops", "Loss against arithmetic", "floating-point operations of training", Unit::Power, |run, r| {
            Some(run.flops_per_token() * r.tokens as f64)
        }),
        ("loss-time", "Loss against time", "time trained", Unit::Seconds, |_, r| r.elapsed_seconds),
    ];
    for (name, title, label, unit, at) in curves {
        pictures.extend(curve(runs, title, Axis::linear(label, unit).from_zero(), at).map(|p| (name.to_owned(), p)));
    }
    for name in names(runs, |run| run.evaluations.iter().map(|e| &*e.name).collect()) {
        pictures.extend(by_position(runs, &name));
    }
    for name in names(runs, |run| run.decoding.iter().map(|d| &*d.name).collect()) {
        pictures.extend(decoding(runs, &name));
    }
    for run in runs {
        for evaluation in &run.evaluations {
            let layers: Vec<_> = evaluation.inner.iter().map(|layer| layer.positions.clone()).collect();
            if let Some(grid) = inner_grid(&layers) {
                let title = format!("Inner losses by position: {}{}", run.name, of(&evaluation.name, "eval"));
                let file = format!("inner-loss-{}{}", run.name, suffix(&evaluation.name, "eval"));
                pictures.push((file_name(&file), Picture { title, grids: vec![grid] }));
            }
        }
    }
    pictures.retain(|(_, picture)| picture.has_points());
    pictures
}

/// Different names of results, in the order that they appear in.
fn names<'a>(runs: &'a [RunResults], of: impl Fn(&'a RunResults) -> Vec<&'a str>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in runs.iter().flat_map(of) {
        if !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    names
}

/// What a title says about results that do not have the usual name.
fn of(name: &str, usual: &str) -> String {
    if name == usual { String::new() } else { format!(" ({name})") }
}

fn suffix(name: &str, usual: &str) -> String {
    if name == usual { String::new() } else { format!("-{name}") }
}

/// A name that is one of a file everywhere.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect()
}

fn curve(runs: &[RunResults], title: &str, x: Axis, at: impl Fn(&RunResults, &Record) -> Option<f64>) -> Option<Picture> {
    let points = |run: &RunResults, split| -> Vec<(f64, f64)> {
        run.losses(split).filter_map(|record| Some((at(run, record)?, record.loss))).collect()
    };
    let mut lines: Vec<Line> = Vec::new();
    let mut trained = false;
    for (i, run) in runs.iter().enumerate() {
        let (validation, train) = (points(run, Split::Validation), points(run, Split::Train));
        if validation.len() >= FEWEST || train.len() < FEWEST {
            lines.push(Line { marks: validation.len() <= 60, ..Line::new(&run.name, i, validation) });
        } else {
            trained = true;
            lines.push(Line::new(&run.name, i, thinned(&moving_average(&train))));
        }
    }
    let all = || lines.iter().flat_map(|line| &line.points);
    let longest = all().map(|p| p.0).reduce(f64::max)?;
    let most = lines.iter().filter_map(|line| highest_from(line, START * longest)).reduce(f64::max)?;
    lines.iter_mut().for_each(|line| line.points = below(&line.points, most));
    let what = if trained { "loss (nats a token; training, averaged)" } else { "validation loss (nats a token)" };
    Some(Picture::of(title, Plot { title: String::new(), x, y: Axis::linear(what, Unit::Plain), lines }))
}

/// The highest point of a line from `x` on; its last where there is none.
fn highest_from(line: &Line, x: f64) -> Option<f64> {
    let later = line.points.iter().filter(|p| p.0 >= x).map(|p| p.1).reduce(f64::max);
    later.or(line.points.last().map(|p| p.1))
}

/// The line from where it first comes below `most`.
fn below(points: &[(f64, f64)], most: f64) -> Vec<(f64, f64)> {
    let Some(first) = points.iter().position(|p| p.1 <= most) else { return Vec::new() };
    let mut cut = Vec::new();
    if first > 0 {
        let ((x0, y0), (x1, y1)) = (points[first - 1], points[first]);
        if y1 < most {
            cut.push((x0 + (x1 - x0) * (y0 - most) / (y0 - y1), most));
        }
    }
    cut.extend(&points[first..]);
    cut
}

fn by_position(runs: &[RunResults], name: &str) -> Option<(String, Picture)> {
    let of_run = |(i, run): (usize, &RunResults)| {
        let evaluation = run.evaluations.iter().find(|e| e.name == name)?;
        Some(loss_line(&run.name, i, &evaluation.positions))
    };
    let lines: Vec<Line> = runs.iter().enumerate().filter_map(of_run).collect();
    // The first tokens of a text are hard for every model, and would take most of the picture.
    let most = lines.iter().filter_map(|line| highest_from(line, 16.0)).reduce(f64::max)?;
    let lines = lines
        .into_iter()
        .map(|mut line| {
            line.points = below(&line.points, most);
            let first = line.points.first().map_or(f64::INFINITY, |p| p.0);
            line.band.retain(|b| b.0 >= first);
            line
        })
        .collect();
    let plot = Plot {
        title: String::new(),
        x: Axis::log("position: tokens read before", Unit::Binary),
        y: Axis { most: Some(most), ..Axis::linear("loss (nats a token)", Unit::Plain) },
        lines,
    };
    let title = format!("Loss by position{}", of(name, "eval"));
    Some((file_name(&format!("loss-position{}", suffix(name, "eval"))), Picture::of(title, plot)))
}

fn decoding(runs: &[RunResults], name: &str) -> Vec<(String, Picture)> {
    let measured: Vec<(usize, &RunResults, &Decoding)> =
        runs.iter().enumerate().filter_map(|(i, run)| Some((i, run, run.decoding.iter().find(|d| d.name == name)?))).collect();
    let picture = |file: &str, title: &str, y: Axis, value: fn(&Decoding, &DecodingRow) -> f64| {
        let lines = measured.iter().map(|(i, run, decoding)| {
            let points = decoding.results.iter().map(|row| (row.after as f64, value(decoding, row))).collect();
            Line { marks: true, ..Line::new(&run.name, *i, points) }
        });
        let x = Axis::log("tokens read before", Unit::Binary);
        let plot = Plot { title: String::new(), x, y, lines: lines.collect() };
        let file = file_name(&format!("{file}{}", suffix(name, "decode")));
        (file, Picture::of(format!("{title}{}", of(name, "decode")), plot))
    };
    let time = Axis::linear("milliseconds from a token to the next", Unit::Plain).from_zero();
    let memory = Axis { scale: Scale::Log, ..Axis::linear("memory of a sequence's state", Unit::Bytes) };
    vec![
        picture("decode-latency", "Decoding: time a token against length", time, Decoding::latency),
        picture("decode-memory", "Decoding: memory against length", memory, |d, row| row.state_bytes as f64 / d.batch as f64),
    ]
}
