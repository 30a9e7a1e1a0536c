//! TensorBoard event files with scalars: TFRecord framing around hand-written protocol buffers, no service and no library needed.
//!
//! A record is `length: u64, crc(length): u32, data, crc(data): u32`, little endian; `crc` is CRC-32C, masked. The data is a
//! `tensorflow.Event`: `wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5, session_log = 7`.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::metrics::{Record, Split};
use crate::{AtPath, Result};

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a new event file in `folder`, which is made if missing. `resumed` is the step that a run goes on from: TensorBoard then
    /// drops what earlier files of the folder say about later steps.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn create(folder: impl AsRef<Path>, resumed: Option<u64>) -> Result<EventFile> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).at(folder)?;
        let now = now();
        // TensorBoard reads the files of a folder in the order of their names.
        let (seconds, micros, process) = (now as u64, (now.fract() * 1e6) as u64, std::process::id());
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.{micros:06}.{process}.ttt"));
        let file = OpenOptions::new().append(true).create_new(true).open(&path).at(&path)?;
        let mut events = EventFile { path, file };
        let mut version = event(now, 0);
        bytes_field(&mut version, 3, b"brain.Event:2");
        events.append(&version)?;
        if let Some(step) = resumed {
            // SessionLog { status = 1: START = 1 } makes readers forget what has this event's step or a later one.
            let mut start = event(now, step + 1);
            bytes_field(&mut start, 7, &[1 << 3, 1]);
            events.append(&start)?;
        }
        Ok(events)
    }

    /// Where the events go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends scalars, tag and value, of one step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, scalar) in scalars {
            let mut value = Vec::new();
            bytes_field(&mut value, 1, tag.as_bytes());
            key(&mut value, 2, 5);
            value.extend_from_slice(&(*scalar as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &value);
        }
        let mut event = event(now(), step);
        bytes_field(&mut event, 5, &summary);
        self.append(&event)
    }

    /// Appends everything that a record measured, as [`scalars`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_record(&mut self, record: &Record) -> Result<()> {
        self.write(record.step, &scalars(record))
    }

    fn append(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc32c(data).to_le_bytes());
        self.file.write_all(&record).at(&self.path)
    }
}

/// Tags and values of a record: `loss/train`, `bits_per_byte/validation`, `optimizer/grad_norm`, `speed/tokens_per_second`,
/// `inner/mse_step_0/layer_00` and so on. What comes before the slash is a group of charts.
pub fn scalars(record: &Record) -> Vec<(String, f64)> {
    let split = match record.split {
        Split::Train => "train",
        Split::Validation => "validation",
    };
    let mut scalars = vec![(format!("loss/{split}"), record.loss)];
    let mut add = |tag: String, value: Option<f64>| scalars.extend(value.map(|value| (tag, value)));
    add(format!("bits_per_byte/{split}"), record.bits_per_byte);
    add("optimizer/lr".into(), record.lr);
    add("optimizer/grad_norm".into(), record.grad_norm);
    // The speed of an evaluation is another quantity than that of training.
    let speed = if record.split == Split::Train { "speed" } else { "speed_validation" };
    add(format!("{speed}/tokens_per_second"), record.tokens_per_second);
    add(format!("{speed}/mfu"), record.mfu);
    add("memory/bytes".into(), record.memory_bytes.map(|bytes| bytes as f64));
    for (layer, loss) in record.inner.iter().flatten().enumerate() {
        add(format!("inner/mse_init/layer_{layer:02}"), Some(loss.mse_init));
        add(format!("inner/mse_step_0/layer_{layer:02}"), Some(loss.mse_step_0));
        add(format!("inner/mse_step_1/layer_{layer:02}"), Some(loss.mse_step_1));
    }
    scalars
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The fields that every event has.
fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    key(&mut event, 1, 1);
    event.extend_from_slice(&wall_time.to_le_bytes());
    key(&mut event, 2, 0);
    varint(&mut event, step);
    event
}

/// A field's number and how it is encoded: 0 varint, 1 eight bytes, 2 a length and that many bytes, 5 four bytes.
fn key(out: &mut Vec<u8>, field: u64, wire: u64) {
    varint(out, field << 3 | wire);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    key(out, field, 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// CRC-32C (Castagnoli), one table entry per byte.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                // 0x1EDC6F41 with its bits reversed.
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, &byte| TABLE[((crc ^ byte as u32) & 0xFF) as usize] ^ crc >> 8)
}

/// TFRecord stores checksums rotated and shifted, so that a checksum of data that holds checksums stays useful.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::InnerLoss;

    /// A field of a message, parsed without the writer's helpers.
    #[derive(Debug, PartialEq)]
    enum Field {
        Varint(u64),
        Fixed64([u8; 8]),
        Bytes(Vec<u8>),
        Fixed32([u8; 4]),
    }

    fn read_varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0u64;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte % 128) << shift;
            if byte < 128 {
                return value;
            }
        }
        unreachable!()
    }

    fn message(mut bytes: &[u8]) -> Vec<(u64, Field)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = read_varint(&mut bytes);
            let length = match key % 8 {
                0 => {
                    fields.push((key / 8, Field::Varint(read_varint(&mut bytes))));
                    continue;
                }
                1 => 8,
                2 => read_varint(&mut bytes) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            let (value, rest) = bytes.split_at(length);
            bytes = rest;
            let field = match key % 8 {
                1 => Field::Fixed64(value.try_into().unwrap()),
                5 => Field::Fixed32(value.try_into().unwrap()),
                _ => Field::Bytes(value.to_vec()),
            };
            fields.push((key / 8, field));
        }
        fields
    }

    /// CRC-32C bit by bit, as polynomial division, then the mask by arithmetic: the low 15 bits go to the top.
    fn slow_masked_crc(bytes: &[u8]) -> u32 {
        let mut register = u32::MAX;
        for byte in bytes {
            for bit in 0..8 {
                let top = register >> 31 ^ u32::from(byte >> bit & 1);
                register <<= 1;
                if top == 1 {
                    register ^= 0x1EDC_6F41;
                }
            }
        }
        let crc = !register.reverse_bits();
        (crc / 32_768 + crc % 32_768 * 131_072).wrapping_add(0xa282ead8)
    }

    fn events(path: &Path) -> Vec<Vec<(u64, Field)>> {
        let bytes = fs::read(path).unwrap();
        let (mut at, mut events) = (0, Vec::new());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            assert_eq!(u32_at(at + 8), slow_masked_crc(&bytes[at..at + 8]));
            let data = &bytes[at + 12..at + 12 + length];
            assert_eq!(u32_at(at + 12 + length), slow_masked_crc(data));
            events.push(message(data));
            at += 16 + length;
        }
        assert_eq!(at, bytes.len());
        events
    }

    fn scalars_of(event: &[(u64, Field)]) -> Vec<(String, f32)> {
        let summary = event.iter().find(|field| field.0 == 5).map(|field| &field.1);
        let Some(Field::Bytes(summary)) = summary else { panic!("no summary in {event:?}") };
        message(summary)
            .into_iter()
            .map(|(number, value)| {
                let Field::Bytes(value) = value else { panic!("{value:?}") };
                assert_eq!(number, 1);
                match &message(&value)[..] {
                    [(1, Field::Bytes(tag)), (2, Field::Fixed32(x))] => {
                        (String::from_utf8(tag.clone()).unwrap(), f32::from_le_bytes(*x))
                    }
                    other => panic!("{other:?}"),
                }
            })
            .collect()
    }

    #[test]
    fn crc32c_has_its_published_values() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46DD_794E);
    }

    #[test]
    fn events_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path().join("events"), None).unwrap();
        file.write(300, &[("loss/train".into(), 2.5), ("ü".repeat(200), -1e-3)]).unwrap();
        file.write(u64::from(u32::MAX) + 7, &[("x".into(), f64::NAN)]).unwrap();
        assert!(file.path().file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));

        let events = events(file.path());
        assert_eq!(events.len(), 3);
        assert_eq!(events[0][2], (3, Field::Bytes(b"brain.Event:2".to_vec())));
        for (event, step) in events.iter().zip([0, 300, u64::from(u32::MAX) + 7]) {
            assert_eq!(event[1], (2, Field::Varint(step)));
            let (1, Field::Fixed64(time)) = &event[0] else { panic!("{event:?}") };
            let age = now() - f64::from_le_bytes(*time);
            assert!((0.0..60.0).contains(&age), "{age}");
        }
        assert_eq!(scalars_of(&events[1]), [("loss/train".into(), 2.5), ("ü".repeat(200), -1e-3)]);
        assert!(scalars_of(&events[2])[0].1.is_nan());
    }

    #[test]
    fn resuming_starts_a_session_after_the_step() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventFile::create(folder.path(), None).unwrap();
        let second = EventFile::create(folder.path(), Some(299)).unwrap();
        assert!(first.path() < second.path());
        let events = events(second.path());
        assert_eq!(events.len(), 2);
        assert_eq!(events[1][1..], [(2, Field::Varint(300)), (7, Field::Bytes(vec![8, 1]))]);
    }

    #[test]
    fn a_record_becomes_scalars() {
        let inner = Some(vec![InnerLoss { mse_init: 3.0, mse_step_0: 2.0, mse_step_1: 1.0 }]);
        let record = Record {
            bits_per_byte: Some(1.0),
            lr: Some(0.1),
            grad_norm: Some(0.2),
            tokens_per_second: Some(5.0),
            memory_bytes: Some(7),
            inner,
            ..Record::new(Split::Train, 1, 2, 4.0)
        };
        let mut expected = vec![
            ("loss/train", 4.0),
            ("bits_per_byte/train", 1.0),
            ("optimizer/lr", 0.1),
            ("optimizer/grad_norm", 0.2),
            ("speed/tokens_per_second", 5.0),
            ("memory/bytes", 7.0),
        ];
        expected.extend([("inner/mse_init/layer_00", 3.0), ("inner/mse_step_0/layer_00", 2.0), ("inner/mse_step_1/layer_00", 1.0)]);
        let scalars = scalars(&record);
        assert_eq!(scalars.iter().map(|(tag, value)| (tag.as_str(), *value)).collect::<Vec<_>>(), expected);
        assert_eq!(super::scalars(&Record::new(Split::Validation, 1, 2, 4.0)), [("loss/validation".into(), 4.0)]);
    }
}
