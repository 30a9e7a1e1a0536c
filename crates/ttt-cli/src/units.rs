//! Numbers as people read them.

/// `512 B`, `3.4 MiB`.
pub fn bytes(n: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), units[unit])
}

/// `512`, `3.40k`, `2.07M`: powers of 1000.
pub fn count(n: f64) -> String {
    let units = ["", "k", "M", "G", "T", "P", "E"];
    let (mut value, mut unit) = (n, 0);
    while value.abs() >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 if value.fract() == 0.0 => format!("{value}"),
        _ => format!("{}{}", three_digits(value), units[unit]),
    }
}

/// `4.2 s`, `3 min 20 s`, `2 h 5 min`.
pub fn seconds(s: f64) -> String {
    if !s.is_finite() {
        return "?".into();
    }
    let whole = s.max(0.0).round() as u64;
    match whole {
        0..10 => format!("{s:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// Digits in groups of three: `2,069,952`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three significant digits of a number below 1000.
fn three_digits(value: f64) -> String {
    match value.abs() {
        x if x >= 99.95 => format!("{value:.0}"),
        x if x >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Reads a size such as `500MB`, `2GiB`, `1e9`: MB are powers of 1000, MiB of 1024.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write bytes, or 500MB, 2GiB, ...");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale: f64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1048576.0,
        "gib" => 1073741824.0,
        "tib" => 1099511627776.0,
        _ => return Err(wrong()),
    };
    let size = digits.trim().replace('_', "").parse::<f64>().map_err(|_| wrong())? * scale;
    if (1.0..=1e18).contains(&size) { Ok(size as u64) } else { Err(wrong()) }
}

/// Text whose control characters, but for line ends and tabs, cannot command a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{FFFD}' } else { c }).collect()
}

/// An argument as it can be typed in a shell.
pub fn quoted(text: impl AsRef<std::ffi::OsStr>) -> String {
    let text = text.as_ref().to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:,+@".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!([0, 1023, 1024, 1_000_000, 5 << 30].map(bytes), ["0 B", "1023 B", "1.00 KiB", "977 KiB", "5.00 GiB"]);
        assert_eq!([0.0, 999.0, 1000.0, 2_069_952.0, 12.5].map(count), ["0", "999", "1.00k", "2.07M", "12.5"]);
        assert_eq!(
            [0.25, 59.6, 200.0, 7500.0, 100_000.0].map(seconds),
            ["0.2 s", "1 min 0 s", "3 min 20 s", "2 h 5 min", "1 d 3 h"]
        );
        assert_eq!([7, 1000, 2_069_952].map(grouped), ["7", "1,000", "2,069,952"]);
        assert_eq!(["500MB", "2GiB", "1e3", "7"].map(|t| parse_bytes(t).unwrap()), [500_000_000, 2 << 30, 1000, 7]);
        assert!(["", "MB", "-1", "5x", "0"].iter().all(|t| parse_bytes(t).is_err()));
        assert_eq!(["runs/tiny", "a b", "it's", ""].map(quoted), ["runs/tiny", "'a b'", r"'it'\''s'", "''"]);
        assert_eq!(printable("a\tb\n\x1b[2J"), "a\tb\n\u{FFFD}[2J");
    }
}
