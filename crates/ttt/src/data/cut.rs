//! Cutting long documents where it does not change their ids.

use std::ops::Range;

use crate::{Result, data::tokenizer::Tokenizer};

/// A piece has at most so many bytes: small enough to keep all cores busy and memory low, large enough that looking for cuts
/// costs nothing.
pub(super) const PIECE: usize = 1 << 18;
/// A cut is looked for in so many bytes before the end of a piece.
const SEARCH: usize = 1 << 13;
/// Bytes on each side of a cut of which the ids are compared.
const CONTEXT: usize = 256;

/// Bytes of a text after which [`piece`] finds the same first piece in its beginning as in all of it.
pub(super) const ENOUGH: usize = PIECE + 2 * CONTEXT;

/// The first piece of `text[from..]`, and where the next one starts.
///
/// A cut is taken before a space if `encode(left) + encode(right) == encode(left + right)` for the text around it. Some tokenizers
/// put a space before every text (Llama 2); for them the cut also leaves out the space that they put back. Should no place pass
/// (a text without spaces), the piece ends at a character.
pub(super) fn piece(tokenizer: &Tokenizer, text: &str, from: usize) -> Result<(Range<usize>, usize)> {
    if text.len() - from <= PIECE {
        return Ok((from..text.len(), text.len()));
    }
    let end = boundary(text, from + PIECE);
    if tokenizer.is_bytes() {
        return Ok((from..end, end));
    }
    let search = boundary(text, end - SEARCH)..end;
    for (at, _) in text[search.clone()].rmatch_indices([' ', '\n']).take(64) {
        let at = search.start + at;
        let (low, high) = (boundary(text, at - CONTEXT), boundary(text, (at + CONTEXT).min(text.len())));
        let whole = tokenizer.encode(&text[low..high])?;
        let left = tokenizer.encode(&text[low..at])?;
        if !whole.starts_with(&left) {
            continue;
        }
        let skips = if text.as_bytes()[at] == b' ' { 0..=1 } else { 0..=0 };
        for skip in skips {
            if high > at + skip && tokenizer.encode(&text[at + skip..high])? == whole[left.len()..] {
                return Ok((from..at, at + skip));
            }
        }
    }
    Ok((from..end, end))
}

/// Ids of `prompt` and those of `completion` behind it.
///
/// Where the ids of both together begin with those of the prompt, these are the ids that a model which has read the prompt goes
/// on with; otherwise (a token spans the border) the two are encoded apart.
pub(super) fn encode_pair(tokenizer: &Tokenizer, prompt: &str, completion: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let first = tokenizer.encode(prompt)?;
    let mut both = tokenizer.encode(&[prompt, completion].concat())?;
    if both.starts_with(&first) {
        let second = both.split_off(first.len());
        return Ok((first, second));
    }
    Ok((first, tokenizer.encode(completion)?))
}

/// The last boundary between characters at or before `at`.
pub(super) fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_encode_like_the_whole() {
        let words = ["the", " cat,", "\n\nsat", " on", "  a", " mat.", " Straße", " 1234", "\n"];
        let text: String = (0..120_000u64).map(|i| words[(i * i % 1009 % 9) as usize]).collect();
        let tokenizer = Tokenizer::train_bpe([&text[..50_000]].into_iter(), 400, &["<s>", "</s>"]).unwrap();
        let (mut from, mut ids, mut pieces) = (0, Vec::new(), 0);
        while from < text.len() {
            let (range, next) = piece(&tokenizer, &text, from).unwrap();
            ids.extend(tokenizer.encode(&text[range]).unwrap());
            (from, pieces) = (next, pieces + 1);
        }
        assert!(pieces >= 2, "{pieces}");
        assert!(ids == tokenizer.encode(&text).unwrap());
    }

    #[test]
    fn a_text_without_spaces_is_cut_at_a_character() {
        let text = "€".repeat(PIECE);
        for tokenizer in [Tokenizer::bytes(258), Tokenizer::train_bpe(["x"].into_iter(), 300, &[]).unwrap()] {
            let (range, next) = piece(&tokenizer, &text, 0).unwrap();
            assert_eq!((range.end, next), (PIECE / 3 * 3, PIECE / 3 * 3));
        }
    }

    #[test]
    fn a_pair_joins_where_it_can() {
        let t = Tokenizer::train_bpe(["ab ab ab ab"].into_iter(), 300, &[]).unwrap();
        let (p, c) = encode_pair(&t, "x", " ab").unwrap();
        assert_eq!([p, c].concat(), t.encode("x ab").unwrap());
        let (p, c) = encode_pair(&t, "a", "b").unwrap(); // "ab" is one token
        assert_eq!((p, c), (t.encode("a").unwrap(), t.encode("b").unwrap()));
    }
}
