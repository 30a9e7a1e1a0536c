//! `loss.svg`: training and validation loss against tokens.

use std::path::Path;

use super::metrics::{Record, Split};
use crate::chart::{Axis, Line, Picture, Plot, Unit};
use crate::hub::write_atomic;
use crate::{Error, Result};

/// Colours of the palette.
const TRAIN: usize = 0;
const VALIDATION: usize = 1;

/// Points that a line of training losses is thinned to, about two a pixel: longer runs look the same and make no larger file.
const MOST_POINTS: usize = 1600;

/// Draws `loss.svg` of a run's records to `path`, replacing the file as a whole.
///
/// # Errors
/// No record has a finite loss, or the file cannot be written.
pub fn write_loss_svg(path: impl AsRef<Path>, records: &[Record], title: &str) -> Result<()> {
    {
        let svg = loss_svg(records, title)?;
        write_atomic(path, |w| w.write_all(svg.as_bytes()))
    }
}

/// The picture as SVG text: every training loss as a thin line, their moving average and the validation losses, in nats a token against
/// tokens trained on. Losses that are not finite are left out.
///
/// # Errors
/// No record has a finite loss.
pub fn loss_svg(records: &[Record], title: &str) -> Result<String> {
    let points = |split| -> Vec<(f64, f64)> {
        let records = records.iter().filter(|record| record.split == split && record.loss.is_finite());
        records.map(|record| (record.tokens as f64, record.loss)).collect()
    };
    let (train, validation) = (points(Split::Train), points(Split::Validation));
    if train.is_empty() && validation.is_empty() {
        return Err(Error::Invalid("there is no loss to plot yet; the first line is written after `log.every` steps".into()));
    }
    // The start is near ln(vocabulary), and what rises above it has little to say; validation is always shown whole.
    let highest = validation.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    let most = train.first().map(|first| first.1.max(highest));
    let mut lines = Vec::new();
    if !train.is_empty() {
        lines.push(Line { faint: true, ..Line::new("training", TRAIN, thinned(&train)) });
        lines.push(Line::new("training, averaged", TRAIN, thinned(&moving_average(&train))));
    }
    if !validation.is_empty() {
        // Marks show where it was measured; many would hide the line.
        let marks = validation.len() <= 60;
        lines.push(Line { marks, ..Line::new("validation", VALIDATION, validation) });
    }
    let plot = Plot {
        title: String::new(),
        x: Axis::linear("tokens trained on", Unit::Count).from_zero(),
        y: Axis { most, ..Axis::linear("loss (nats a token)", Unit::Plain) },
        lines,
    };
    Picture::of(title, plot).svg()
}

/// A centred average over a fiftieth of the points to either side, which unlike a running one does not lag.
pub(crate) fn moving_average(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 50;
    let mut sums = vec![0.0];
    sums.extend(points.iter().scan(0.0, |sum, point| {
        *sum += point.1;
        Some(*sum)
    }));
    let mean = |i: usize| {
        // At the steep start as far on one side as on the other, or the curve would bend; at the flat end all that there is.
        let before = reach.min(i);
        let after = before.min(points.len() - 1 - i);
        (sums[i + after + 1] - sums[i - before]) / (before + after + 1) as f64
    };
    points.iter().enumerate().map(|(i, point)| (point.0, mean(i))).collect()
}

/// At most [`MOST_POINTS`] of the points: of each run of neighbours the lowest and the highest, so that no spike is lost.
pub(crate) fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let mut kept = Vec::new();
    for run in points.chunks(points.len().div_ceil(MOST_POINTS / 2)) {
        let (mut low, mut high) = (0, 0);
        for (i, point) in run.iter().enumerate() {
            low = if point.1 < run[low].1 { i } else { low };
            high = if point.1 > run[high].1 { i } else { high };
        }
        kept.push(run[low.min(high)]);
        if low != high {
            kept.push(run[low.max(high)]);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that falls from ln 258 towards 1.2 with noise, `train` training and `validation` validation lines over `tokens`.
    fn falling(train: u64, validation: u64, tokens: u64) -> Vec<Record> {
        let loss = |at: f64| 1.2 + 4.35 * (-6.0 * at).exp() / (1.0 + 3.0 * at);
        let mut records = Vec::new();
        for i in 0..train {
            let noise = ((i * 7919 % 1000) as f64 / 1000.0 - 0.5) * 0.25;
            let at = i as f64 / train as f64;
            records.push(Record::new(Split::Train, i, (at * tokens as f64) as u64, loss(at) + noise));
        }
        for i in 0..validation {
            let at = i as f64 / (validation.max(2) - 1) as f64;
            records.push(Record::new(Split::Validation, i, (at * tokens as f64) as u64, loss(at) + 0.06));
        }
        records
    }

    /// What lies between `open` and `close`, everywhere in `text`.
    fn between<'t>(text: &'t str, open: &str, close: &str) -> Vec<&'t str> {
        text.split(open).skip(1).map(|rest| rest.split(close).next().unwrap()).collect()
    }

    /// The points of the polyline of colour and width, in pixels.
    fn line(svg: &str, color: usize, width: u32) -> Vec<(f64, f64)> {
        let color = crate::chart::PALETTE[color];
        let color = format!("stroke=\"#{:02X}{:02X}{:02X}\"", color.0, color.1, color.2);
        let tag = between(svg, "<polyline ", "/>");
        let tag = tag.iter().filter(|tag| tag.contains(&color) && tag.contains(&format!("stroke-width=\"{width}\"")));
        // The legend draws the same style with two points.
        let points = tag.map(|tag| between(tag, "points=\"", "\"")[0]).max_by_key(|points| points.len()).unwrap();
        points
            .split_whitespace()
            .map(|p| p.split_once(',').unwrap())
            .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
            .collect()
    }

    #[test]
    fn the_picture_has_its_parts() {
        let svg = loss_svg(&falling(300, 11, 3_000_000), "tiny & <small>").unwrap();
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
        let texts: Vec<_> = between(&svg, "<text ", "</text>").iter().map(|t| t.rsplit('>').next().unwrap().trim()).collect();
        for part in
            ["tiny &amp; &lt;small&gt;", "tokens trained on", "loss (nats a token)", "training", "training, averaged", "validation"]
        {
            assert!(texts.contains(&part), "{part} is not in {texts:?}");
        }
        for tick in ["1M", "2.5M", "500k", "0", "2", "5"] {
            assert!(texts.contains(&tick), "{tick} is not in {texts:?}");
        }
        assert_eq!(between(&svg, "<circle ", "/>").len(), 11);
        let (thin, smooth, validation) = (line(&svg, TRAIN, 1), line(&svg, TRAIN, 2), line(&svg, VALIDATION, 2));
        assert_eq!((thin.len(), smooth.len(), validation.len()), (300, 300, 11));
        for points in [thin, smooth, validation] {
            assert!(points.windows(2).all(|pair| pair[0].0 <= pair[1].0), "tokens go left to right");
            assert!(points.iter().all(|&(x, y)| (76.0..=928.0).contains(&x) && (74.0..=496.0).contains(&y)), "{points:?}");
            assert!(points[0].1 < points.last().unwrap().1 - 200.0, "the loss falls");
        }
    }

    #[test]
    fn odd_inputs() {
        let nothing = loss_svg(&[Record::new(Split::Train, 1, 1, f64::NAN)], "x").unwrap_err();
        assert!(nothing.to_string().contains("no loss to plot"));
        // One point, one split, a constant, a gap, a spike.
        assert_eq!(between(&loss_svg(&falling(1, 0, 0), "x").unwrap(), "<circle ", "/>").len(), 1);
        let validation_only = loss_svg(&falling(0, 3, 100), "x").unwrap();
        assert!(!validation_only.contains("training,"));
        loss_svg(&[1, 2, 3].map(|i| Record::new(Split::Train, i, i, 0.0)), "x").unwrap();
        let mut records = falling(200, 5, 1000);
        let calm = line(&loss_svg(&records, "x").unwrap(), VALIDATION, 2);
        records[50].loss = f64::INFINITY;
        records[60].loss = 1e9;
        let wild = loss_svg(&records, "x").unwrap();
        assert_eq!(line(&wild, VALIDATION, 2), calm, "a spike moves the axis");
        assert_eq!(line(&wild, TRAIN, 1).len(), 199);
    }

    #[test]
    fn long_runs_are_thinned_and_keep_their_spikes() {
        let mut points: Vec<_> = (0..100_000).map(|i| (i as f64, 0.0)).collect();
        points[31_234].1 = 5.0;
        points[77_777].1 = -5.0;
        let thin = thinned(&points);
        assert!(thin.len() <= MOST_POINTS, "{}", thin.len());
        assert!(thin.contains(&(31_234.0, 5.0)) && thin.contains(&(77_777.0, -5.0)));
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let size = loss_svg(&falling(50_000, 100, 26_000_000_000), "x").unwrap().len();
        assert!(size < 100_000, "{size} bytes");
    }

    #[test]
    fn averages_do_not_lag() {
        let ramp: Vec<_> = (0..500).map(|i| (i as f64, 2.0 * i as f64)).collect();
        let averaged = moving_average(&ramp);
        for (mean, point) in averaged.iter().zip(&ramp).take(490) {
            assert!((mean.1 - point.1).abs() < 1e-9, "{mean:?} is not {point:?}");
        }
        // The last one is the mean of the last eleven.
        assert_eq!(averaged[499], (499.0, 2.0 * 494.0));
        let zigzag: Vec<_> = (0..500).map(|i| (i as f64, (i % 2) as f64)).collect();
        assert!((moving_average(&zigzag)[250].1 - 0.5).abs() < 0.03);
    }

    #[test]
    fn the_file_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        std::fs::write(&path, "old").unwrap();
        write_loss_svg(&path, &falling(10, 2, 100), "x").unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("<svg"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
