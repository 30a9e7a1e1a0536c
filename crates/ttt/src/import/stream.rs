//! The official checkpoints on disk: a stream of MessagePack pairs `[path, bytes]`, where the bytes are what
//! `flax.serialization.to_bytes` makes of one array.
//!
//! An array is an extension of type 1 around `[shape, name of the type, little-endian elements]`. One of more than a gibibyte is a
//! map with its `shape` and its flat `chunks`, each an array.

use std::borrow::Cow;

use half::{bf16, f16};
use rmp::Marker;
use rmp::decode;

/// Names in a path, and axes of an array, that no checkpoint has.
const MOST_NAMES: u32 = 64;
const MOST_AXES: u32 = 8;
/// Chunks of an array; a thousand are a tebibyte.
const MOST_CHUNKS: u32 = 1024;

/// Type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    F32,
    F64,
    Bf16,
    F16,
}

impl Number {
    fn parse(name: &str) -> Result<Number, String> {
        match name {
            "float32" => Ok(Number::F32),
            "float64" => Ok(Number::F64),
            "bfloat16" => Ok(Number::Bf16),
            "float16" => Ok(Number::F16),
            other => Err(format!("holds {other}; float32, bfloat16, float16 or float64 is needed")),
        }
    }

    fn size(self) -> usize {
        match self {
            Number::F32 => 4,
            Number::F64 => 8,
            Number::Bf16 | Number::F16 => 2,
        }
    }
}

/// One array of a checkpoint; its elements stay in the file.
#[derive(Clone, Debug)]
pub(super) struct Array<'a> {
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    number: Number,
    parts: Vec<&'a [u8]>,
}

impl Array<'_> {
    /// The elements, row-major.
    pub fn values(&self) -> Vec<f32> {
        fn widen<const N: usize>(bytes: &[u8], to: impl Fn([u8; N]) -> f32) -> impl Iterator<Item = f32> {
            bytes.as_chunks::<N>().0.iter().map(move |b| to(*b))
        }
        let mut values = Vec::with_capacity(self.shape.iter().product());
        for part in &self.parts {
            match self.number {
                Number::F32 => values.extend(widen(part, f32::from_le_bytes)),
                Number::F64 => values.extend(widen(part, |b| f64::from_le_bytes(b) as f32)),
                Number::Bf16 => values.extend(widen(part, |b| bf16::from_le_bytes(b).to_f32())),
                Number::F16 => values.extend(widen(part, |b| f16::from_le_bytes(b).to_f32())),
            }
        }
        values
    }
}

/// Calls `found` with the path of every entry and what reads its array.
///
/// The reader is lazy: entries that `found` does not want may hold anything. Errors name the byte where the entry begins.
pub(super) fn entries<'a>(
    file: &'a [u8],
    mut found: impl FnMut(Vec<Cow<'a, str>>, &dyn Fn() -> Result<Array<'a>, String>) -> Result<(), String>,
) -> Result<(), String> {
    let mut rest = file;
    while !rest.is_empty() {
        let at = file.len() - rest.len();
        let (path, bytes) = pair(&mut rest).map_err(|message| match (at, rest.is_empty()) {
            (0, _) => format!("this is no checkpoint of the official JAX code ({message})"),
            (_, true) => format!("the entry at byte {at} is cut off ({message}); the copy is incomplete, make it again"),
            _ => format!("the entry at byte {at}: {message}"),
        })?;
        let name = path.join("/");
        found(path, &|| array(bytes).map_err(|message| format!("`{name}` {message}")))?;
    }
    Ok(())
}

/// `[path, bytes]`.
fn pair<'a>(rest: &mut &'a [u8]) -> Result<(Vec<Cow<'a, str>>, &'a [u8]), String> {
    expect(decode::read_array_len(rest).map_err(text)?, 2, "a pair")?;
    let names = decode::read_array_len(rest).map_err(text)?;
    if names == 0 || names > MOST_NAMES {
        return Err(format!("a path of {names} names"));
    }
    let path = (0..names).map(|_| string(rest)).collect::<Result<_, _>>()?;
    let len = decode::read_bin_len(rest).map_err(text)?;
    Ok((path, take(rest, len)?))
}

/// One array as flax packs it, alone or in chunks.
fn array(mut bytes: &[u8]) -> Result<Array<'_>, String> {
    let whole = match Marker::from_u8(*bytes.first().ok_or("is empty")?) {
        Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => chunked(&mut bytes)?,
        _ => simple(&mut bytes)?,
    };
    if !bytes.is_empty() {
        return Err(format!("is followed by {} bytes that belong to nothing", bytes.len()));
    }
    Ok(whole)
}

fn simple<'a>(rest: &mut &'a [u8]) -> Result<Array<'a>, String> {
    let extension = decode::read_ext_meta(rest).map_err(|e| format!("is no array ({})", text(e)))?;
    if extension.typeid != 1 {
        return Err(format!("is no array but an extension of type {}", extension.typeid));
    }
    let mut body = take(rest, extension.size)?;
    let body = &mut body;
    expect(decode::read_array_len(body).map_err(text)?, 3, "an array's parts")?;
    let axes = decode::read_array_len(body).map_err(text)?;
    if axes > MOST_AXES {
        return Err(format!("has {axes} axes"));
    }
    let shape = (0..axes).map(|_| decode::read_int(body).map_err(text)).collect::<Result<Vec<usize>, String>>()?;
    let number = Number::parse(&string(body)?)?;
    let len = decode::read_bin_len(body).map_err(text)?;
    let elements = take(body, len)?;
    check_len(&shape, number, elements.len())?;
    Ok(Array { shape, number, parts: vec![elements] })
}

fn chunked<'a>(rest: &mut &'a [u8]) -> Result<Array<'a>, String> {
    let (mut shape, mut chunks) = (None, None);
    for _ in 0..decode::read_map_len(rest).map_err(text)? {
        match &*string(rest)? {
            "__msgpack_chunked_array__" => {
                decode::read_bool(rest).map_err(text)?;
            }
            "shape" => shape = Some(numbered(rest, MOST_AXES, |rest| decode::read_int::<usize, _>(rest).map_err(text))?),
            "chunks" => chunks = Some(numbered(rest, MOST_CHUNKS, simple)?),
            other => return Err(format!("is no array but a map with `{other}`")),
        }
    }
    let (Some(shape), Some(chunks)) = (shape, chunks) else { return Err("is no array but a map".into()) };
    let number = chunks.first().ok_or("has no chunks")?.number;
    if chunks.iter().any(|c| c.number != number) {
        return Err("has chunks of different types".into());
    }
    let parts: Vec<&[u8]> = chunks.iter().flat_map(|c| c.parts.iter().copied()).collect();
    check_len(&shape, number, parts.iter().map(|p| p.len()).sum())?;
    Ok(Array { shape, number, parts })
}

/// `{"0": a, "1": b, ...}`, which is how flax writes a tuple.
fn numbered<'a, T>(rest: &mut &'a [u8], most: u32, read: impl Fn(&mut &'a [u8]) -> Result<T, String>) -> Result<Vec<T>, String> {
    let count = decode::read_map_len(rest).map_err(text)?;
    if count > most {
        return Err(format!("has a tuple of {count}"));
    }
    let mut all = Vec::new();
    for i in 0..count {
        let key = string(rest)?;
        if key != i.to_string() {
            return Err(format!("has a tuple whose item {i} is called `{key}`"));
        }
        all.push(read(rest)?);
    }
    Ok(all)
}

fn check_len(shape: &[usize], number: Number, bytes: usize) -> Result<(), String> {
    let wanted = shape.iter().try_fold(number.size(), |product, axis| product.checked_mul(*axis));
    if wanted == Some(bytes) {
        return Ok(());
    }
    Err(format!("has shape {shape:?} of {number:?}, but {bytes} bytes"))
}

/// A string; older versions of flax wrote some as bytes.
fn string<'a>(rest: &mut &'a [u8]) -> Result<Cow<'a, str>, String> {
    let mut bytes = *rest;
    let len = match decode::read_str_len(&mut bytes) {
        Ok(len) => len,
        Err(e) => {
            bytes = *rest;
            decode::read_bin_len(&mut bytes).map_err(|_| format!("a name is no string ({})", text(e)))?
        }
    };
    let name = take(&mut bytes, len)?;
    *rest = bytes;
    Ok(String::from_utf8_lossy(name))
}

fn take<'a>(rest: &mut &'a [u8], len: u32) -> Result<&'a [u8], String> {
    let Some((taken, left)) = rest.split_at_checked(len as usize) else {
        let message = format!("{len} bytes are announced and {} are left", rest.len());
        *rest = &[];
        return Err(message);
    };
    *rest = left;
    Ok(taken)
}

fn expect(found: u32, wanted: u32, what: &str) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what} of {found} instead of {wanted}")) }
}

fn text(error: impl std::error::Error) -> String {
    // The cause says more than "failed to read MessagePack marker" does.
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}
