//! Tasks as training files.

use std::io::Write;

use serde_json::json;

use super::{Alphabet, Task};
use crate::{Error, Result};

/// Writes the sequences `0..sequences` of a seed as JSON lines with `prompt` and `completion`, byte by byte.
///
/// A run of judged tokens is a completion, what comes before it is its prompt, and so one sequence takes a line or more. A byte
/// tokenizer without BOS and EOS (a vocabulary of 256) joins the lines again: when `train.sequence_length` is the length of a
/// sequence, every training window is one sequence with its loss on the judged tokens.
///
/// # Errors
/// Settings that make no sequence; tokens that are no ASCII; what `out` reports.
pub fn write_lines(out: &mut dyn Write, task: &Task, alphabet: &Alphabet, seed: u64, sequences: u64) -> Result<()> {
    task.validate(alphabet)?;
    for index in 0..sequences {
        let example = task.example(alphabet, seed, index);
        let text = |tokens: &[u32]| -> Result<String> {
            let ascii = |t: &u32| u8::try_from(*t).ok().filter(u8::is_ascii).map(char::from);
            let no_text = || Error::Invalid("the sequence holds ids that are no ASCII, so it is no text".into());
            tokens.iter().map(ascii).collect::<Option<String>>().ok_or_else(no_text)
        };
        let mut from = 0;
        for run in example.judged.chunk_by(|a, b| a + 1 == *b) {
            let (first, end) = (run[0], run[run.len() - 1] + 1);
            let line = json!({"prompt": text(&example.tokens[from..first])?, "completion": text(&example.tokens[first..end])?});
            writeln!(out, "{line}").map_err(|e| Error::io("the training file", e))?;
            from = end;
        }
    }
    Ok(())
}
