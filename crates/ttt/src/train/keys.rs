//! Keys and values of settings as people write them: names with typing errors, bare strings, `3M` tokens.

use std::cell::Cell;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, Visitor, value::Error as NoValue},
    forward_to_deserialize_any,
};
use toml::Value;

/// The names of a struct's fields, from its derived `Deserialize`.
pub fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Names<'a>(&'a Cell<&'static [&'static str]>);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = NoValue;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NoValue> {
            Err(NoValue::custom("only names are asked for"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, NoValue> {
            self.0.set(fields);
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let fields = Cell::new(&[][..]);
    _ = T::deserialize(Names(&fields));
    fields.get()
}

/// The known key that was probably meant by an unknown one: the nearest by edits, either as a whole or in its last part alone, so that
/// both `optimiser.learning_rate` and `learning_rate` find `optimizer.learning_rate`. None is near to gibberish.
pub(crate) fn nearest<'k>(unknown: &str, known: &'k [String]) -> Option<&'k str> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let distance = |key: &str| {
        let whole = strsim::damerau_levenshtein(unknown, key);
        // The section was wrong as well: second to an equally near key of the right one.
        let part = strsim::damerau_levenshtein(&last(unknown), &last(key));
        (whole.min(part), whole)
    };
    let (best, key) = known.iter().map(|key| (distance(key), key)).min_by_key(|(distance, _)| *distance)?;
    (best.0 <= 1.max(last(unknown).len() / 3)).then_some(key)
}

/// A value as typed after `key=`: TOML, or else the text itself.
pub fn typed(text: &str) -> Value {
    text.parse().unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// Reads a count that may be written `3000000`, `3e6` or `"3M"`.
pub fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let (number, text) = match Value::deserialize(deserializer)? {
        Value::Integer(n) => return u64::try_from(n).map_err(|_| D::Error::custom(format!("a count cannot be negative: {n}"))),
        Value::Float(x) => (x, x.to_string()),
        Value::String(text) => (suffixed(&text).unwrap_or(f64::NAN), text),
        other => (f64::NAN, other.to_string()),
    };
    // Above 2^53 an f64 no longer holds every integer.
    if number >= 0.0 && number.fract() == 0.0 && number <= (1u64 << 53) as f64 {
        return Ok(number as u64);
    }
    Err(D::Error::custom(format!("`{text}` is not a count; write a whole number such as 3000000, 3e6 or \"3M\" (k, M, B, T)")))
}

fn suffixed(text: &str) -> Option<f64> {
    let text = text.trim().replace('_', "");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "b" | "g" => 1e9,
        "t" => 1e12,
        _ => return None,
    };
    // Rounded, as 1.1 * 1e6 is not quite 1100000; a real fraction is far from a whole number at this precision.
    let number = digits.parse::<f64>().ok()? * scale;
    let whole = number.round();
    Some(if (number - whole).abs() < 1e-12 * whole { whole } else { number })
}

/// Reads one string or a list of strings as a list.
pub fn strings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let list = if value.is_str() { Value::Array(vec![value]) } else { value };
    Vec::deserialize(list).map_err(|_| D::Error::custom("expected a string or a list of strings"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn names_of_fields() {
        let names = fields_of::<Config>();
        assert_eq!(names[..2], ["mixer", "vocab_size"]);
        assert_eq!(names.last(), Some(&"scan_checkpoint_group_size"));
        assert_eq!(fields_of::<u32>(), &[] as &[&str]);
    }

    #[test]
    fn the_nearest_key() {
        let known =
            ["optimizer.learning_rate", "optimizer.end_learning_rate", "train.seed", "eval.every", "log.every"].map(String::from);
        for (unknown, meant) in [
            ("optimizer.lerning_rate", Some("optimizer.learning_rate")),
            ("optimiser.learning_rate", Some("optimizer.learning_rate")),
            ("learning_rate", Some("optimizer.learning_rate")),
            ("train.learning_rate", Some("optimizer.learning_rate")),
            ("log.evry", Some("log.every")),
            ("sead", Some("train.seed")),
            ("train.purple", None),
            ("x", None),
        ] {
            assert_eq!(nearest(unknown, &known), meant, "{unknown}");
        }
    }

    #[test]
    fn counts() {
        #[derive(Deserialize, Debug)]
        struct Run {
            #[serde(deserialize_with = "count")]
            n: u64,
        }
        let read = |value: &str| toml::from_str::<Run>(&format!("n = {value}")).map(|run| run.n);
        for (text, n) in [
            ("3000000", 3_000_000),
            ("3_000_000", 3_000_000),
            ("3e6", 3_000_000),
            ("'3M'", 3_000_000),
            ("'0.5m'", 500_000),
            ("'1.1M'", 1_100_000),
            ("'2.516_582_4B'", 2_516_582_400),
            ("'300k'", 300_000),
            ("'12'", 12),
            ("'26.2144G'", 26_214_400_000),
            ("'1T'", 1_000_000_000_000),
            ("0", 0),
        ] {
            assert_eq!(read(text).unwrap(), n, "{text}");
        }
        for text in ["-1", "1.5", "'1.5'", "'M'", "'3MB'", "''", "'-2k'", "inf", "nan", "1e300", "true", "'0.0005k'"] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains("count"), "{text}: {message}");
        }
    }
}
