//! Reading plain, gzip and Zstandard files as one stream of bytes.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use crate::{AtPath, Error, Result};

/// How a file is packed, by its last extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub fn of(path: &Path) -> Packing {
        match path.extension().and_then(|e| e.to_str()) {
            Some("gz") => Packing::Gzip,
            Some("zst") => Packing::Zstd,
            _ => Packing::Plain,
        }
    }
}

/// An open file.
pub(super) struct Opened {
    /// The unpacked bytes.
    pub reader: Box<dyn BufRead + Send>,
    /// Bytes that were taken from the file, packed.
    pub taken: Arc<AtomicU64>,
}

/// Opens `path`, unpacking `.gz` and `.zst`. Files of several gzip members or Zstandard frames are read to their end.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let taken = Arc::new(AtomicU64::new(0));
    let file = BufReader::with_capacity(1 << 16, Counting { inner: File::open(path).at(path)?, taken: taken.clone() });
    let reader: Box<dyn BufRead + Send> = match Packing::of(path) {
        Packing::Plain => Box::new(file),
        Packing::Gzip => Box::new(BufReader::with_capacity(1 << 16, flate2::bufread::MultiGzDecoder::new(file))),
        Packing::Zstd => {
            Box::new(BufReader::with_capacity(1 << 16, Zstd { source: file, decoder: FrameDecoder::new(), open: false, frames: 0 }))
        }
    };
    Ok(Opened { reader, taken })
}

/// The error of a read: the operating system's, or that the file is not packed as its name says.
pub(super) fn read_error(path: &Path, error: io::Error) -> Error {
    let name = match Packing::of(path) {
        Packing::Gzip if error.raw_os_error().is_none() => "gzip",
        Packing::Zstd if error.raw_os_error().is_none() => "Zstandard",
        _ => return Error::io(path, error),
    };
    Error::format(path, format!("not a whole {name} file: {error}"))
}

/// Counts what is read.
struct Counting {
    inner: File,
    taken: Arc<AtomicU64>,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.taken.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// All frames of a Zstandard file.
struct Zstd {
    source: BufReader<Counting>,
    decoder: FrameDecoder,
    /// Whether `decoder` is inside a frame.
    open: bool,
    frames: usize,
}

impl Zstd {
    /// Starts the next frame; false at the end of the file.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return if self.frames == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(false) };
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => {
                    (self.open, self.frames) = (true, self.frames + 1);
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    self.frames += 1;
                    if io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())? < length.into() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::other(e)),
            }
        }
    }
}

impl Read for Zstd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            if !self.open && !self.next_frame()? {
                break;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let strategy = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, strategy).map_err(io::Error::other)?;
            }
            let n = self.decoder.read(buffer)?;
            if n > 0 {
                return Ok(n);
            }
            self.open = false;
            let (said, is) = (self.decoder.get_checksum_from_data(), self.decoder.get_calculated_checksum());
            if said.is_some() && is.is_some() && said != is {
                return Err(io::Error::other("its checksum is wrong"));
            }
        }
        Ok(0)
    }
}
