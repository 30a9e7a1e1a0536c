//! From texts to batches: documents, tokenizer, tokens on disk, sampler.
//!
//! ```text
//! Sources (files) -> Document (text) -> Tokenizer (ids) -> Store (memory-mapped splits) -> Tokens -> Sampler (windows)
//! ```

mod bpe;
mod build;
mod cut;
mod default_corpus;
mod document;
mod pieces;
mod plain;
mod read;
mod sampler;
mod source;
mod store;
mod stream;
mod streams;
mod tokenizer;
mod tokens;
mod writer;

pub use default_corpus::{DefaultCorpus, default_corpus, default_corpus_in};
pub use document::{Document, Documents};
pub use pieces::{Pieces, TextPiece};
pub use sampler::{Examples, Sampler};
pub use source::{SourceFile, Sources};
pub use store::{Progress, Split, Store, StoreOptions};
pub use stream::TextStream;
pub use streams::{Segmenting, Streams, Stretch};
pub use tokenizer::Tokenizer;
pub use tokens::{DocumentSpan, Tokens};
