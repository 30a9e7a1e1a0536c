//! Axes: where values stand, which of them are written, and how.

use serde::Serialize;

/// One axis of a plot.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Axis {
    /// What is measured, with its unit.
    pub label: String,
    /// How values are spread.
    pub scale: Scale,
    /// How numbers are written.
    pub unit: Unit,
    /// Whether the axis begins at 0, on a linear scale.
    pub from_zero: bool,
    /// Where the axis ends at most; what lies above is drawn on its edge.
    pub most: Option<f64>,
}

/// How an axis spreads its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Equal differences are equally long.
    Linear,
    /// Equal ratios are equally long; values that are not positive are left out.
    Log,
}

/// How an axis writes its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// `0.25`, `1500`.
    Plain,
    /// `1.5M`: powers of 1000.
    Count,
    /// `2k`, `1M`: powers of 1024.
    Binary,
    /// `2e15`.
    Power,
    /// `90 s`, `20 min`, `2 h`.
    Seconds,
    /// `1.5 MiB`.
    Bytes,
}

impl Axis {
    /// A linear axis.
    pub fn linear(label: impl Into<String>, unit: Unit) -> Axis {
        Axis { label: label.into(), scale: Scale::Linear, unit, from_zero: false, most: None }
    }

    /// A logarithmic axis.
    pub fn log(label: impl Into<String>, unit: Unit) -> Axis {
        Axis { scale: Scale::Log, ..Axis::linear(label, unit) }
    }

    /// The same from 0 on.
    #[must_use]
    pub fn from_zero(self) -> Axis {
        Axis { from_zero: true, ..self }
    }

    /// Whether a value has a place on the axis.
    pub fn holds(&self, value: f64) -> bool {
        value.is_finite() && (self.scale == Scale::Linear || value > 0.0)
    }

    /// Both ends of the axis: all values, with `air` (a part of the whole) on either side.
    pub(crate) fn range(&self, values: impl Iterator<Item = f64>, air: f64) -> (f64, f64) {
        let values = values.filter(|x| self.holds(*x));
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        if low > high {
            return if self.scale == Scale::Log { (1.0, 10.0) } else { (0.0, 1.0) };
        }
        let high = self.most.filter(|most| *most > low).map_or(high, |most| high.min(most));
        match self.scale {
            Scale::Log => {
                // A single value stands in the middle.
                let air = if high > low { (high / low).powf(air) } else { 2.0 };
                (low / air, high * air)
            }
            Scale::Linear if self.from_zero => {
                let end = if high > 0.0 { high * (1.0 + air) } else { 1.0 };
                (low.min(0.0), end)
            }
            Scale::Linear => {
                let air = if high > low { air * (high - low) } else { (0.05 * high.abs()).max(1e-3) };
                (low - air, high + air)
            }
        }
    }

    /// Place of a value between the ends, from 0 to 1.
    pub(crate) fn place(&self, value: f64, (low, high): (f64, f64)) -> f64 {
        match self.scale {
            Scale::Linear => (value - low) / (high - low),
            Scale::Log => (value / low).ln() / (high / low).ln(),
        }
    }

    /// Values to write between the ends, at most about `most` of them.
    pub(crate) fn ticks(&self, (low, high): (f64, f64), most: usize) -> Vec<f64> {
        match self.scale {
            Scale::Linear => self.linear_ticks(low, high, most),
            Scale::Log if matches!(self.unit, Unit::Binary | Unit::Bytes) => powers(2.0, low, high, most),
            Scale::Log => {
                let decades = (high / low).log10();
                if decades < 1.0 {
                    return self.linear_ticks(low, high, most);
                }
                let each = |factors: &[f64]| -> Vec<f64> {
                    let range = low.log10().floor() as i32..=high.log10().ceil() as i32;
                    let all = range.flat_map(|n| factors.iter().map(move |f| f * 10f64.powi(n)));
                    all.filter(|x| (low..=high).contains(x)).collect()
                };
                let fine = each(&[1.0, 2.0, 5.0]);
                if fine.len() <= most { fine } else { powers(10.0, low, high, most) }
            }
        }
    }

    fn linear_ticks(&self, low: f64, high: f64, most: usize) -> Vec<f64> {
        let wanted = (high - low) / most.max(2) as f64;
        let decimal = || {
            let power = 10f64.powf(wanted.log10().floor());
            [1.0, 2.0, 5.0, 10.0].map(|f| f * power).into_iter().find(|step| *step >= wanted * (1.0 - 1e-9)).unwrap_or(wanted)
        };
        let step = match self.unit {
            Unit::Seconds if wanted > 5.0 => {
                let steps = [10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21_600.0, 43_200.0, 86_400.0];
                steps.into_iter().find(|step| *step >= wanted).unwrap_or_else(decimal)
            }
            Unit::Bytes | Unit::Binary if wanted > 1.0 => 2f64.powf(wanted.log2().ceil()),
            _ => decimal(),
        };
        let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
        // One more than asked for at most, but for a step that is not a number.
        (first..=last).take(4 * most.max(2)).map(|i| i as f64 * step).collect()
    }
}

impl Unit {
    /// A value as it is read.
    pub fn write(self, value: f64) -> String {
        match self {
            Unit::Plain if value != 0.0 && !(1e-3..1e6).contains(&value.abs()) => power(value),
            Unit::Plain => trimmed(value, 3),
            Unit::Count => short(value),
            Unit::Binary if value >= 0.0 && value.fract() == 0.0 && value < 9e15 => binary(value as u64),
            Unit::Binary => trimmed(value, 1),
            Unit::Power => power(value),
            Unit::Seconds => seconds(value),
            Unit::Bytes => bytes(value),
        }
    }
}

/// Powers of `base` between the ends, with gaps of whole powers so that they are few enough.
fn powers(base: f64, low: f64, high: f64, most: usize) -> Vec<f64> {
    let exponent = |x: f64| x.ln() / base.ln();
    let (first, last) = ((exponent(low) - 1e-9).ceil() as i64, (exponent(high) + 1e-9).floor() as i64);
    let gap = ((last - first + 1) as usize).div_ceil(most.max(1)).max(1);
    (first..=last).step_by(gap).map(|n| base.powi(n as i32)).collect()
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
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// `2048` as `2k`, `1500` as `1500`.
pub(crate) fn binary(n: u64) -> String {
    match n {
        n if n > 0 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n > 0 && n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

/// `2e15`.
fn power(number: f64) -> String {
    if number == 0.0 {
        return "0".into();
    }
    let text = format!("{number:.1e}");
    text.replace(".0e", "e")
}

fn seconds(s: f64) -> String {
    match s.abs() {
        x if x >= 7200.0 => format!("{} h", trimmed(s / 3600.0, 1)),
        x if x >= 120.0 => format!("{} min", trimmed(s / 60.0, 1)),
        _ => format!("{} s", trimmed(s, 2)),
    }
}

fn bytes(n: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (n, 0);
    while value.abs() >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", trimmed(value, if unit == 0 { 0 } else { 2 }), units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(axis: &Axis, ends: (f64, f64), most: usize) -> Vec<String> {
        axis.ticks(ends, most).into_iter().map(|x| axis.unit.write(x)).collect()
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0.0, 999.0, 1e3, 1.5e6, 2.5e9, 26e9, 1e12].map(short);
        assert_eq!(numbers, ["0", "999", "1k", "1.5M", "2.5B", "26B", "1T"]);
        assert_eq!([0, 1500, 2048, 1 << 20].map(binary), ["0", "1500", "2k", "1M"]);
        assert_eq!([0.0, 2e15, 1.5e-7].map(power), ["0", "2e15", "1.5e-7"]);
        assert_eq!([0.5, 90.0, 1200.0, 9000.0].map(seconds), ["0.5 s", "90 s", "20 min", "2.5 h"]);
        assert_eq!([512.0, 1536.0, 1048576.0].map(bytes), ["512 B", "1.5 KiB", "1 MiB"]);
        assert_eq!([trimmed(100.0, 0), trimmed(2.50, 3), trimmed(-0.1, 1)], ["100", "2.5", "-0.1"]);
    }

    #[test]
    fn ticks_are_round_and_few() {
        let count = Axis::linear("", Unit::Count);
        assert_eq!(written(&count, (0.0, 3.03e6), 9), ["0", "500k", "1M", "1.5M", "2M", "2.5M", "3M"]);
        assert_eq!(written(&Axis::linear("", Unit::Plain), (1.0, 5.7), 8), ["1", "2", "3", "4", "5"]);
        assert_eq!(written(&Axis::linear("", Unit::Seconds), (0.0, 130.0), 8), ["0 s", "30 s", "60 s", "90 s", "2 min"]);
        assert_eq!(written(&Axis::log("", Unit::Binary), (900.0, 70_000.0), 9), ["1k", "2k", "4k", "8k", "16k", "32k", "64k"]);
        assert_eq!(written(&Axis::log("", Unit::Binary), (1.0, 1.1e6), 6).len(), 6);
        assert_eq!(written(&Axis::log("", Unit::Bytes), (9e5, 5e6), 6), ["1 MiB", "2 MiB", "4 MiB"]);
        assert_eq!(written(&Axis::log("", Unit::Power), (8e13, 3e15), 8), ["1e14", "2e14", "5e14", "1e15", "2e15"]);
        assert_eq!(written(&Axis::log("", Unit::Power), (1e3, 1e15), 5), ["1e3", "1e6", "1e9", "1e12", "1e15"]);
        assert_eq!(written(&Axis::log("", Unit::Plain), (2.1, 3.9), 5), ["2.5", "3", "3.5"]);
        for unit in [Unit::Plain, Unit::Count, Unit::Binary, Unit::Seconds, Unit::Bytes] {
            for (low, high) in [(0.0, 1e-9), (-3.0, 1e12), (5.0, 5.0001)] {
                let n = Axis::linear("", unit).ticks((low, high), 8).len();
                assert!(n <= 9, "{n} ticks of {unit:?} from {low} to {high}");
            }
        }
    }

    #[test]
    fn ranges_hold_their_values() {
        let plain = Axis::linear("", Unit::Plain);
        let values = |v: &'static [f64]| v.iter().copied();
        assert_eq!(plain.range(values(&[]), 0.1), (0.0, 1.0));
        assert_eq!(plain.range(values(&[f64::NAN, 1.0, 3.0]), 0.5), (0.0, 4.0));
        assert_eq!(plain.clone().from_zero().range(values(&[1.0, 4.0]), 0.25), (0.0, 5.0));
        let (low, high) = plain.range(values(&[2.0]), 0.1);
        assert!(low < 2.0 && high > 2.0);
        let capped = Axis { most: Some(5.0), ..plain };
        assert_eq!(capped.range(values(&[1.0, 1e9]), 0.0), (1.0, 5.0));
        let log = Axis::log("", Unit::Plain);
        assert_eq!(log.range(values(&[0.0, -1.0, 1.0, 100.0]), 0.0), (1.0, 100.0));
        assert!((log.place(10.0, (1.0, 100.0)) - 0.5).abs() < 1e-12);
        let (low, high) = log.range(values(&[8.0]), 0.1);
        assert_eq!((low, high), (4.0, 16.0));
    }
}
