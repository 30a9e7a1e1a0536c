//! What pictures hold, on both backends.

use super::*;

fn plot(title: &str, lines: Vec<Line>) -> Plot {
    Plot { title: title.into(), x: Axis::log("position", Unit::Binary), y: Axis::linear("loss", Unit::Plain), lines }
}

fn falling(name: &str, color: usize) -> Line {
    let points: Vec<(f64, f64)> = (0..12).map(|i| (2f64.powi(i), 5.0 - 0.25 * i as f64 - 0.1 * color as f64)).collect();
    let band = points.iter().map(|(x, y)| (*x, y - 0.1, y + 0.1)).collect();
    Line { marks: true, band, ..Line::new(name, color, points) }
}

fn picture() -> Picture {
    let mut picture = Picture::of("two <runs>", plot("", vec![falling("a", 0), falling("b & c", 9)]));
    picture.grids.push(Grid {
        columns: 3,
        height: 200,
        plots: (0..4).map(|i| plot(&format!("layer {i}"), vec![falling("inner", 2)])).collect(),
    });
    picture
}

#[test]
fn svg_has_titles_legend_ticks_lines_and_bands() {
    let svg = picture().svg().unwrap();
    for part in ["two &lt;runs&gt;", "b &amp; c", "95 % interval", "layer 3", "position", "loss", "1k", "512", "inner"] {
        assert!(svg.lines().any(|line| line.trim() == part), "{part} is not in the picture");
    }
    // 1 and 4 plots with their lines and bands; one line is dashed, so in pieces.
    assert_eq!(svg.matches("<polygon").count(), 6);
    assert!(svg.matches("<polyline").count() > 20);
    assert_eq!(svg.matches("<circle").count(), 6 * 12);
    let height: u32 = svg.split("height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
    assert_eq!(height, 40 + (34 + 480) + (34 + 2 * 200));
}

#[test]
fn png_is_a_picture_of_twice_the_size_in_the_same_colours() {
    let file = picture().png().unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height), (1920, 2 * (40 + 514 + 434)));
    let count = |color: RGBColor| pixels.chunks(3).filter(|p| **p == [color.0, color.1, color.2]).count();
    assert!(count(WHITE) > pixels.len() / 3 / 2, "the paper");
    assert!(count(PALETTE[0]) > 2000 && count(PALETTE[1]) > 1000 && count(PALETTE[2]) > 1000, "the lines");
    assert_eq!(count(PALETTE[5]), 0);
    // The title's letters.
    let title = &pixels[3 * 1920 * 30..3 * 1920 * 80];
    assert!(title.chunks(3).filter(|p| p.iter().all(|c| *c < 0x60)).count() > 300);
    assert!(file.len() < 200_000, "{} bytes", file.len());
}

#[test]
fn odd_values_are_left_out_or_cut() {
    let nothing = Picture::of("empty", plot("", vec![Line::new("a", 0, vec![(1.0, f64::NAN)])]));
    assert!(nothing.svg().unwrap_err().to_string().contains("nothing to draw for `empty`"));
    assert!(nothing.png().is_err());
    let mut odd = plot("", vec![Line::new("a", 0, vec![(0.0, 1.0), (1.0, 1.0), (2.0, f64::INFINITY), (4.0, 1e9), (8.0, 2.0)])]);
    odd.y.most = Some(3.0);
    let svg = Picture::of("odd", odd.clone()).svg().unwrap();
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
    // Three points: position 0 has no place on a logarithmic axis, and the spike is drawn on the upper edge.
    let points = svg.split("points=\"").map(|p| p.split('"').next().unwrap().split_whitespace().count()).max().unwrap();
    assert_eq!(points, 3);
    let one = plot("", vec![Line::new("a", 0, vec![(7.0, 3.0)])]);
    assert_eq!(Picture::of("one", one).svg().unwrap().matches("<circle").count(), 1);
}

#[test]
fn long_legends_wrap() {
    let many = plot("", (0..12).map(|i| falling(&format!("a run with a long name {i}"), i)).collect());
    let svg = Picture::of("many", many).svg().unwrap();
    let rows = |y: &str| svg.contains(&format!(" y=\"{y}\""));
    assert!(rows("52") && rows("76") && rows("100"), "three rows of the legend");
}
