//! `metrics.jsonl`: what a run measured, one JSON object a line.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize};

use crate::hub::write_atomic;
use crate::{AtPath, Error, Result};

/// Which documents a loss was measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// The batch of a training step, before its update.
    Train,
    /// The validation part.
    Validation,
}

/// One line of `metrics.jsonl`. A number that is not finite is `null` in the file and NaN here; what was not measured is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What the loss was measured on.
    pub split: Split,
    /// Updates made so far.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean negative log likelihood, nats a token.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The same in bits a byte of text, which compares models with different tokenizers.
    #[serde(default, deserialize_with = "measured", skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Learning rate of the update.
    #[serde(default, deserialize_with = "measured", skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Norm of the whole gradient before clipping.
    #[serde(default, deserialize_with = "measured", skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Speed since the line before.
    #[serde(default, deserialize_with = "measured", skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Model FLOPs utilisation: the part of the device's peak arithmetic that the model's products take.
    #[serde(default, deserialize_with = "measured", skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Time trained so far, resumed parts included.
    #[serde(default, deserialize_with = "measured", skip_serializing_if = "Option::is_none")]
    pub elapsed_seconds: Option<f64>,
    /// Largest memory of the device in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// The inner models' own losses, a layer each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner: Option<Vec<InnerLoss>>,
}

impl Record {
    /// A record with only what every line has.
    pub fn new(split: Split, step: u64, tokens: u64, loss: f64) -> Record {
        Record {
            split,
            step,
            tokens,
            loss,
            bits_per_byte: None,
            lr: None,
            grad_norm: None,
            tokens_per_second: None,
            mfu: None,
            elapsed_seconds: None,
            memory_bytes: None,
            inner: None,
        }
    }
}

/// Mean squared error of one layer's inner models on the last token of each mini-batch, under three sets of weights (paper Figure 4).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InnerLoss {
    /// Under the weights that the sequence starts with, W_0.
    #[serde(deserialize_with = "number")]
    pub mse_init: f64,
    /// Under the weights before the mini-batch's gradient step.
    #[serde(deserialize_with = "number")]
    pub mse_step_0: f64,
    /// Under the weights after it.
    #[serde(deserialize_with = "number")]
    pub mse_step_1: f64,
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn measured<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer).map(Some)
}

/// Appends to a `metrics.jsonl`.
///
/// Steps of a split only grow: a record at a step that the file already has is not written again, so a resumed run may repeat the
/// evaluation that its checkpoint was saved after, and the file is that of a run without the interruption.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    last: Vec<(Split, u64)>,
}

impl Metrics {
    /// Starts an empty file; one that is there is replaced.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Metrics> {
        Self::start(path.as_ref(), &[])
    }

    /// Continues the file of a run that goes on after `step` updates: later lines, and a last line that was cut short, are removed. The
    /// file changes as a whole or not at all. Without a file, an empty one is started.
    ///
    /// # Errors
    /// The file cannot be read or written, or a line of it is not a record (see [`read`]).
    pub fn resume(path: impl AsRef<Path>, step: u64) -> Result<Metrics> {
        let path = path.as_ref();
        if !path.exists() {
            return Self::create(path);
        }
        let text = std::fs::read_to_string(path).at(path)?;
        let kept: Vec<_> = parse(&text, path)?.into_iter().filter(|(record, _)| record.step <= step).collect();
        Self::start(path, &kept)
    }

    fn start(path: &Path, kept: &[(Record, &str)]) -> Result<Metrics> {
        // The lines themselves are kept, not rewritten from the records: fields of a later version stay.
        let text: String = kept.iter().flat_map(|(_, line)| [line, "\n"]).collect();
        write_atomic(path, |w| w.write_all(text.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).at(path)?;
        let mut metrics = Metrics { path: path.to_owned(), file, last: Vec::new() };
        kept.iter().for_each(|(record, _)| metrics.advance(record.split, record.step));
        Ok(metrics)
    }

    /// Appends a line, which other programs can read at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        if self.last.iter().any(|&(split, step)| split == record.split && step >= record.step) {
            return Ok(());
        }
        let mut line = serde_json::to_string(record).expect("a record has no keys but names");
        line.push('\n');
        // One write a line, so that no reader sees a part of it for long.
        self.file.write_all(line.as_bytes()).and_then(|()| self.file.flush()).at(&self.path)?;
        self.advance(record.split, record.step);
        Ok(())
    }

    fn advance(&mut self, split: Split, step: u64) {
        match self.last.iter_mut().find(|last| last.0 == split) {
            Some(last) => last.1 = step,
            None => self.last.push((split, step)),
        }
    }
}

/// All records of a `metrics.jsonl`, in order. A last line without its end, as a run leaves while it writes or when it is killed, is
/// left out.
///
/// # Errors
/// The file cannot be read, or a line of it is not a record; the message names the line.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).at(path)?;
    Ok(parse(&text, path)?.into_iter().map(|(record, _)| record).collect())
}

fn parse<'t>(text: &'t str, path: &Path) -> Result<Vec<(Record, &'t str)>> {
    let mut records = Vec::new();
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let whole = line.ends_with('\n');
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        match serde_json::from_str(line) {
            Ok(record) => records.push((record, line)),
            Err(_) if !whole => {}
            Err(e) => {
                let message = format!("line {} is not a record: {e}; correct or delete the line", i + 1);
                return Err(Error::format(path, message));
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(step: u64) -> Record {
        Record { lr: Some(1e-3), grad_norm: Some(0.5), ..Record::new(Split::Train, step, step * 64, 5.0 - step as f64 * 0.1) }
    }

    fn validation(step: u64) -> Record {
        Record { bits_per_byte: Some(1.5), ..Record::new(Split::Validation, step, step * 64, 4.0) }
    }

    #[test]
    fn a_line_is_as_documented() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::create(&path).unwrap();
        let inner = Some(vec![InnerLoss { mse_init: 1.0, mse_step_0: 0.5, mse_step_1: f64::NAN }]);
        let full = Record {
            bits_per_byte: Some(2.5),
            tokens_per_second: Some(1000.0),
            mfu: Some(0.4),
            elapsed_seconds: Some(2.0),
            memory_bytes: Some(1 << 40),
            grad_norm: Some(f64::INFINITY),
            inner,
            ..train(1)
        };
        metrics.write(&full).unwrap();
        metrics.write(&Record::new(Split::Validation, 1, 64, f64::NAN)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let first = r#"{"split":"train","step":1,"tokens":64,"loss":4.9,"bits_per_byte":2.5,"lr":0.001,"grad_norm":null,"#
            .to_owned()
            + r#""tokens_per_second":1000.0,"mfu":0.4,"elapsed_seconds":2.0,"memory_bytes":1099511627776,"#
            + r#""inner":[{"mse_init":1.0,"mse_step_0":0.5,"mse_step_1":null}]}"#;
        let second = r#"{"split":"validation","step":1,"tokens":64,"loss":null}"#;
        assert_eq!(text, format!("{first}\n{second}\n"));

        let back = read(&path).unwrap();
        assert_eq!(back.len(), 2);
        assert!(back[0].grad_norm.unwrap().is_nan() && back[0].inner.as_ref().unwrap()[0].mse_step_1.is_nan());
        assert_eq!((back[0].loss, back[0].mfu, back[0].memory_bytes), (full.loss, full.mfu, full.memory_bytes));
        assert!(back[1].loss.is_nan());
        assert_eq!(back[1].grad_norm, None);
    }

    /// What a loop writes that starts at `from`: evaluates every 4 steps, then trains, and is stopped at `to`.
    fn run(metrics: &mut Metrics, from: u64, to: u64) {
        for step in from..=to {
            if step % 4 == 0 {
                metrics.write(&validation(step)).unwrap();
            }
            if step < to {
                metrics.write(&train(step + 1)).unwrap();
            }
        }
    }

    #[test]
    fn interrupted_and_resumed_equals_uninterrupted() {
        let folder = tempfile::tempdir().unwrap();
        let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
        run(&mut Metrics::create(&whole).unwrap(), 0, 12);

        run(&mut Metrics::create(&parts).unwrap(), 0, 7);
        let mut torn = OpenOptions::new().append(true).open(&parts).unwrap();
        torn.write_all(br#"{"split":"train","st"#).unwrap();
        assert_eq!(read(&parts).unwrap().len(), 9);
        run(&mut Metrics::resume(&parts, 4).unwrap(), 4, 12);
        assert_eq!(std::fs::read_to_string(&parts).unwrap(), std::fs::read_to_string(&whole).unwrap());

        run(&mut Metrics::resume(&parts, 0).unwrap(), 0, 12);
        assert_eq!(std::fs::read_to_string(&parts).unwrap(), std::fs::read_to_string(&whole).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "a temporary file was left");
    }

    #[test]
    fn resume_keeps_unknown_fields_and_starts_a_missing_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = r#"{"split":"train","step":3,"tokens":9,"loss":1.25,"novel":7}"#;
        std::fs::write(&path, line).unwrap();
        Metrics::resume(&path, 3).unwrap().write(&train(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().next(), Some(line));
        assert_eq!(text.lines().count(), 2);

        let new = folder.path().join("new.jsonl");
        Metrics::resume(&new, 10).unwrap();
        assert_eq!(read(&new).unwrap(), []);
    }

    #[test]
    fn a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let good = r#"{"split":"train","step":3,"tokens":9,"loss":1.25}"#;
        std::fs::write(&path, format!("{good}\n{{\"split\":\"test\"}}\n{good}\n")).unwrap();
        for error in [read(&path).unwrap_err(), Metrics::resume(&path, 9).unwrap_err()] {
            let message = error.to_string();
            assert!(message.contains("metrics.jsonl: line 2 is not a record"), "{message}");
            assert!(message.contains("`test`"), "{message}");
        }
        let missing = read(folder.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none: "), "{missing}");
    }
}
