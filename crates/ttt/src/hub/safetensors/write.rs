//! Writing: tensors stream one after the other; none has to be in memory in the file's type.

use std::cmp::Reverse;
use std::io::{self, Write};
use std::path::Path;

use ::safetensors::Dtype;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::Result;
use crate::hub::atomic::write_atomic;
use crate::tensor::{DType, Element};

/// Writes the bytes of a tensor.
type Producer<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

/// A tensor to write: what the header says about it, and where its bytes come from.
pub struct Source<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    produce: Producer<'a>,
}

impl<'a> Source<'a> {
    /// A tensor whose bytes (little endian, row-major) `produce` writes.
    pub fn new(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        produce: impl FnOnce(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Source<'a> {
        Source { name: name.into(), dtype, shape: shape.to_vec(), produce: Box::new(produce) }
    }

    /// Floating-point elements, written as `dtype`.
    ///
    /// Writing fails on a finite element that is infinite in half precision.
    ///
    /// # Panics
    /// When `dtype` is not F32, BF16, F16 or F64.
    pub fn floats<E: Element>(name: impl Into<String>, dtype: Dtype, shape: &[usize], values: &'a [E]) -> Source<'a> {
        let name = name.into();
        let tensor = name.clone();
        let narrow = move |w: &mut dyn Write, half: fn(f32) -> (bool, [u8; 2])| {
            stream(w, values, |x| {
                // Through f32: `half` drops low bits of an f64 before it rounds. f32 to half is rounded to nearest even.
                let x = x.to_f64() as f32;
                let (finite, bytes) = half(x);
                if x.is_finite() && !finite {
                    let message = format!("`{tensor}` holds {x}, which is too large for {dtype}; write a type with a wider range");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message));
                }
                Ok(bytes)
            })
        };
        Source::new(name, dtype, shape, move |w| match dtype {
            Dtype::F32 if cfg!(target_endian = "little") && E::DTYPE == DType::F32 => w.write_all(bytemuck::cast_slice(values)),
            Dtype::F32 => stream(w, values, |x| Ok((x.to_f64() as f32).to_le_bytes())),
            Dtype::F64 => stream(w, values, |x| Ok(x.to_f64().to_le_bytes())),
            Dtype::BF16 => narrow(w, |x| (bf16::from_f32(x).is_finite(), bf16::from_f32(x).to_le_bytes())),
            Dtype::F16 => narrow(w, |x| (f16::from_f32(x).is_finite(), f16::from_f32(x).to_le_bytes())),
            other => panic!("floating-point elements cannot be written as {other}"),
        })
    }

    /// BF16 elements.
    pub fn bf16s(name: impl Into<String>, shape: &[usize], values: &'a [bf16]) -> Source<'a> {
        Source::new(name, Dtype::BF16, shape, move |w| match cfg!(target_endian = "little") {
            true => w.write_all(bytemuck::cast_slice(values)),
            false => stream(w, values, |x| Ok(x.to_le_bytes())),
        })
    }

    /// U32 elements.
    pub fn u32s(name: impl Into<String>, shape: &[usize], values: &'a [u32]) -> Source<'a> {
        Source::new(name, Dtype::U32, shape, move |w| stream(w, values, |x| Ok(x.to_le_bytes())))
    }

    /// I64 elements.
    pub fn i64s(name: impl Into<String>, shape: &[usize], values: &'a [i64]) -> Source<'a> {
        Source::new(name, Dtype::I64, shape, move |w| stream(w, values, |x| Ok(x.to_le_bytes())))
    }

    /// Name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a safetensors file, atomically ([`write_atomic`]). Tensors come in the order usual for the format: wide types first,
/// then by name. `format: pt`, which PyTorch's loaders ask for, is added to `metadata`.
///
/// # Errors
/// [`crate::Error::Io`] that names `path`; nothing is left behind.
///
/// # Panics
/// When two tensors have one name, or a producer writes another number of bytes than its shape needs.
pub fn write(path: impl AsRef<Path>, metadata: &[(&str, String)], mut tensors: Vec<Source<'_>>) -> Result<()> {
    tensors.sort_by(|a, b| (Reverse(a.dtype.bitsize()), &a.name).cmp(&(Reverse(b.dtype.bitsize()), &b.name)));
    let header = header(metadata, &tensors);
    write_atomic(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for tensor in tensors {
            let (name, bytes) = (tensor.name.clone(), tensor.bytes());
            let mut counted = Counted { out: &mut *out, written: 0 };
            (tensor.produce)(&mut counted)?;
            assert_eq!(counted.written, bytes, "bytes written for `{name}` and bytes its shape needs");
        }
        Ok(())
    })
}

fn header(metadata: &[(&str, String)], tensors: &[Source]) -> Vec<u8> {
    let mut notes = Map::from_iter([("format".to_owned(), json!("pt"))]);
    notes.extend(metadata.iter().map(|(key, value)| ((*key).to_owned(), json!(value))));
    let mut header = Map::from_iter([("__metadata__".to_owned(), Value::Object(notes))]);
    let mut at = 0;
    for t in tensors {
        let entry = json!({"dtype": t.dtype.to_string(), "shape": t.shape, "data_offsets": [at, at + t.bytes()]});
        assert!(header.insert(t.name.clone(), entry).is_none(), "two tensors are called `{}`", t.name);
        at += t.bytes();
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The data begins at a multiple of 8, so that a map of the file has aligned elements.
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

/// Converts and writes a piece at a time.
fn stream<T, const N: usize>(w: &mut dyn Write, values: &[T], f: impl Fn(&T) -> io::Result<[u8; N]>) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(values.len().min(1 << 14) * N);
    for chunk in values.chunks(1 << 14) {
        buffer.clear();
        for x in chunk {
            buffer.extend_from_slice(&f(x)?);
        }
        w.write_all(&buffer)?;
    }
    Ok(())
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    written: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buffer)?;
        self.written += n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
