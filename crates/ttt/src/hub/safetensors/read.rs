//! Reading: a memory map whose header was checked against the file's length.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::TensorInfo;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::MAX_HEADER;
use crate::hub::open_file;
use crate::tensor::{DType, Element};
use crate::{AtPath, Error, Result};

/// An open safetensors file. Every tensor's bytes lie inside the file and fit its shape.
pub struct File {
    path: PathBuf,
    map: Mmap,
    data: usize,
    header: Header,
}

/// One tensor of a [`File`].
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    path: &'a Path,
    name: &'a str,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes of the axes.
    pub shape: &'a [usize],
    /// The elements, little endian, row-major, at any alignment.
    pub bytes: &'a [u8],
}

impl File {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] that says what is wrong with the file.
    pub fn open(path: impl AsRef<Path>) -> Result<File> {
        let path = path.as_ref();
        let file = open_file(path)?;
        // SAFETY: the map is only read. Nobody here changes a file in place (`crate::hub::atomic` renames), so the bytes stay
        // as they are; another program that cut the file short while it is mapped would stop this one with SIGBUS.
        let map = unsafe { Mmap::map(&file) }.at(path)?;
        let (data, header) = parse(&map).map_err(|message| Error::format(path, message))?;
        Ok(File { path: path.to_owned(), map, data, header })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The file's own notes.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The tensor of a name, if there is one.
    pub fn find(&self, name: &str) -> Option<TensorRef<'_>> {
        let (name, info) = self.header.tensors.get_key_value(name)?;
        let (begin, end) = info.data_offsets;
        let bytes = &self.map[self.data + begin..self.data + end];
        Some(TensorRef { path: &self.path, name, dtype: info.dtype, shape: &info.shape, bytes })
    }

    /// The tensor of a name.
    ///
    /// # Errors
    /// [`Error::Format`] when the file has none.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        self.find(name).ok_or_else(|| Error::format(&self.path, format!("there is no tensor `{name}`")))
    }
}

impl TensorRef<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        // Cannot overflow: the file's bytes were checked against it.
        self.shape.iter().product()
    }

    /// Whether the elements are floating-point numbers that [`TensorRef::read`] reads.
    ///
    /// # Errors
    /// [`Error::Format`] with the type.
    pub fn check_float(&self) -> Result<()> {
        match self.dtype {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 => Ok(()),
            other => Err(self.wrong(format!("holds {other}; F32, BF16, F16 or F64 is needed"))),
        }
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// [`Error::Format`] with both shapes.
    pub fn check_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(self.wrong(format!("has shape {:?}; {shape:?} is needed", self.shape)))
    }

    /// Reads floating-point elements of any width; half precision widens exactly, f64 is rounded for an f32 `out`.
    ///
    /// # Errors
    /// [`Error::Format`] when the elements are no floating-point numbers.
    ///
    /// # Panics
    /// When `out` has another number of elements.
    pub fn read<E: Element>(&self, out: &mut [E]) -> Result<()> {
        assert_eq!(out.len(), self.elements(), "a buffer of {} elements for a tensor of shape {:?}", out.len(), self.shape);
        self.read_from(0, out)
    }

    /// [`TensorRef::read`] of the elements from `first` on.
    ///
    /// # Errors
    /// [`Error::Format`] when the elements are no floating-point numbers.
    ///
    /// # Panics
    /// When there are fewer than `out` holds.
    pub fn read_from<E: Element>(&self, first: usize, out: &mut [E]) -> Result<()> {
        self.check_float()?;
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.bytes[first * size..(first + out.len()) * size];
        match self.dtype {
            // Copied, not converted: every bit survives, those of a NaN too.
            Dtype::F32 if cfg!(target_endian = "little") && E::DTYPE == DType::F32 => {
                bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
            }
            Dtype::F32 => convert(bytes, out, |b| E::from_f64(f32::from_le_bytes(b) as f64)),
            Dtype::F64 => convert(bytes, out, |b| E::from_f64(f64::from_le_bytes(b))),
            Dtype::BF16 => convert(bytes, out, |b| E::from_f64(bf16::from_le_bytes(b).to_f64())),
            _ => convert(bytes, out, |b| E::from_f64(f16::from_le_bytes(b).to_f64())),
        }
        Ok(())
    }

    /// [`TensorRef::read`] into a new vector.
    ///
    /// # Errors
    /// [`Error::Format`] when the elements are no floating-point numbers.
    pub fn to_vec<E: Element>(&self) -> Result<Vec<E>> {
        self.check_float()?;
        let mut out = vec![E::ZERO; self.elements()];
        self.read(&mut out)?;
        Ok(out)
    }

    /// The elements of an I32, I64, U32 or U8 tensor.
    ///
    /// # Errors
    /// [`Error::Format`] when they are of another type.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> i64) -> Vec<i64> {
            bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
        }
        Ok(match self.dtype {
            Dtype::I32 => each(self.bytes, |b| i32::from_le_bytes(b).into()),
            Dtype::I64 => each(self.bytes, i64::from_le_bytes),
            Dtype::U32 => each(self.bytes, |b| u32::from_le_bytes(b).into()),
            Dtype::U8 => each(self.bytes, |[b]| b.into()),
            other => return Err(self.wrong(format!("holds {other}; I32, I64, U32 or U8 is needed"))),
        })
    }

    /// The elements of an I32, I64, U32 or U8 tensor as u32.
    ///
    /// # Errors
    /// [`Error::Format`] when they are of another type or do not fit.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        let fits = |x: i64| u32::try_from(x).map_err(|_| self.wrong(format!("holds {x}, which is not in 0..2^32")));
        self.to_i64()?.into_iter().map(fits).collect()
    }

    /// An [`Error::Format`] about this tensor.
    pub fn wrong(&self, message: impl fmt::Display) -> Error {
        Error::format(self.path, format!("`{}` {message}", self.name))
    }
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorRef(`{}` {} {:?})", self.name, self.dtype, self.shape)
    }
}

fn convert<const N: usize, E: Element>(bytes: &[u8], out: &mut [E], f: impl Fn([u8; N]) -> E + Sync) {
    const CHUNK: usize = 1 << 16;
    let (source, rest) = bytes.as_chunks::<N>();
    debug_assert!(rest.is_empty());
    out.par_chunks_mut(CHUNK).zip(source.par_chunks(CHUNK)).for_each(|(out, source)| {
        for (y, x) in out.iter_mut().zip(source) {
            *y = f(*x);
        }
    });
}

#[derive(Debug, Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where the data begins, and the header. Nothing is allocated for a length that the file does not have.
fn parse(file: &[u8]) -> Result<(usize, Header), String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are too few for a safetensors file; it is empty or cut short", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let cut = || {
        format!(
            "the header should have {length} bytes, the file has {} after it begins; this is no safetensors file, or it is cut short",
            rest.len()
        )
    };
    let length = usize::try_from(length).ok().filter(|n| *n <= rest.len()).ok_or_else(cut)?;
    if length > MAX_HEADER {
        return Err(format!("a header of {length} bytes; the format allows {MAX_HEADER}"));
    }
    let (json, data) = rest.split_at(length);
    let header: Header = serde_json::from_slice(json).map_err(|e| format!("the header is wrong: {e}"))?;
    header.check(data.len())?;
    Ok((8 + length, header))
}

impl Header {
    /// Tensors must cover the data without gap or overlap, and each must have the bytes its shape needs.
    fn check(&self, data: usize) -> Result<(), String> {
        let mut by_offset: Vec<(&String, &TensorInfo)> = self.tensors.iter().collect();
        by_offset.sort_by_key(|(_, info)| info.data_offsets);
        let mut at = 0;
        for (name, info) in by_offset {
            let (begin, end) = info.data_offsets;
            if end < begin || end > data {
                return Err(format!("`{name}` should lie in bytes {begin}..{end} of {data}; the file is damaged or cut short"));
            }
            if begin != at {
                let what = if begin < at { "overlaps the tensor before it" } else { "leaves a gap before it" };
                return Err(format!("`{name}` begins at byte {begin} and {what}, which ends at {at}"));
            }
            let needed = info.shape.iter().try_fold(info.dtype.bitsize(), |n, axis| n.checked_mul(*axis));
            if needed != (end - begin).checked_mul(8) {
                return Err(format!("`{name}` has {} bytes, which do not fit {} {:?}", end - begin, info.dtype, info.shape));
            }
            at = end;
        }
        if at != data {
            return Err(format!("the tensors end at byte {at} of {data}; the file is damaged"));
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                        continue;
                    }
                    // A map type would let the second of two tensors of one name win in silence.
                    match header.tensors.entry(name) {
                        Entry::Occupied(entry) => {
                            return Err(A::Error::custom(format!("two tensors are called `{}`", entry.key())));
                        }
                        Entry::Vacant(entry) => entry.insert(map.next_value()?),
                    };
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
