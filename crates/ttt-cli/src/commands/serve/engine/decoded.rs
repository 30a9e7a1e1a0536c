//! From chosen tokens to text that is certain: characters are complete, and no stop text has begun.

use std::collections::VecDeque;

use ttt::data::{TextStream, Tokenizer};

/// A token as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInfo {
    /// Its id.
    pub id: u32,
    /// The text that it completed.
    pub text: String,
    /// Its log-probability; the first token of a prompt has none.
    pub logprob: Option<f64>,
    /// The likeliest tokens in its place, the likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// Text of one choice, held back where it may yet turn out to be a stop text.
pub struct Decoded<'t> {
    stream: Option<TextStream<'t>>,
    stops: Vec<String>,
    /// Text that was not given out.
    held: String,
    /// Tokens that were not given out, and where in `held` each one's text begins and ends.
    tokens: VecDeque<(TokenInfo, usize, usize)>,
}

impl<'t> Decoded<'t> {
    /// Nothing yet.
    pub fn new(tokenizer: &'t Tokenizer, stops: &[String]) -> Decoded<'t> {
        Decoded { stream: Some(tokenizer.stream()), stops: stops.to_vec(), held: String::new(), tokens: VecDeque::new() }
    }

    /// Adds a token; returns what is now certain, and whether a stop text came. Nothing may be added after one.
    pub fn push(&mut self, token: TokenInfo) -> (String, Vec<TokenInfo>, bool) {
        let text = self.stream.as_mut().expect("not finished").push(token.id);
        self.add(Some(token), text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            return (self.held[..at].to_owned(), self.take_tokens(at, false), true);
        }
        let certain = self.held.len() - self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let text = self.held[..certain].to_owned();
        let tokens = self.take_tokens(certain, true);
        self.held.drain(..certain);
        for (_, from, to) in &mut self.tokens {
            (*from, *to) = (from.saturating_sub(certain), *to - certain);
        }
        (text, tokens, false)
    }

    /// All that was held back, at the end without a stop text.
    pub fn finish(&mut self) -> (String, Vec<TokenInfo>) {
        let rest = self.stream.take().expect("not finished").finish();
        self.add(None, rest);
        let end = self.held.len();
        let at = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        let tokens = self.take_tokens(at.unwrap_or(end), at.is_none());
        (self.held[..at.unwrap_or(end)].to_owned(), tokens)
    }

    fn add(&mut self, token: Option<TokenInfo>, text: String) {
        let from = self.held.len();
        self.held += &text;
        match (token, self.tokens.back_mut()) {
            (Some(token), _) => self.tokens.push_back((TokenInfo { text, ..token }, from, self.held.len())),
            // What the end made certain belongs to the last token.
            (None, Some((last, _, to))) => {
                last.text += &text;
                *to = self.held.len();
            }
            (None, None) => {}
        }
    }

    /// Tokens whose text ends by `at`, or else that begin before it.
    fn take_tokens(&mut self, at: usize, whole: bool) -> Vec<TokenInfo> {
        let mut taken = Vec::new();
        while self.tokens.front().is_some_and(|(_, from, to)| if whole { *to <= at } else { *from < at }) {
            taken.extend(self.tokens.pop_front().map(|(token, ..)| token));
        }
        taken
    }
}

/// Length of the longest end of `text` that `stop` begins with, shorter than `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|n| text.as_bytes().ends_with(&stop.as_bytes()[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], text: &str) -> (String, Vec<String>, bool) {
        let tokenizer = Tokenizer::bytes(258);
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut decoded = Decoded::new(&tokenizer, &stops);
        let (mut all, mut tokens) = (String::new(), Vec::new());
        for byte in text.bytes() {
            let (text, done, stopped) =
                decoded.push(TokenInfo { id: byte.into(), text: String::new(), logprob: None, top: vec![] });
            all += &text;
            tokens.extend(done.into_iter().map(|t| t.text));
            if stopped {
                return (all, tokens, true);
            }
        }
        let (text, done) = decoded.finish();
        tokens.extend(done.into_iter().map(|t| t.text));
        (all + &text, tokens, false)
    }

    #[test]
    fn text_ends_before_a_stop_text() {
        for (stops, text, wanted) in [
            (&["\n\n"][..], "a\nb\n\nc", "a\nb"),
            (&["bc", "abd"][..], "ababdx", "ab"),
            (&["ééé"][..], "xééèéééy", "xééè"),
            (&["x"][..], "x", ""),
        ] {
            let (got, tokens, stopped) = run(stops, text);
            assert_eq!((got.as_str(), stopped), (wanted, true));
            assert_eq!(tokens.concat(), wanted, "tokens say the same");
        }
    }

    #[test]
    fn without_a_stop_text_nothing_is_lost() {
        for (stops, text) in [(&["abc"][..], "xxabab"), (&[][..], "plain"), (&["\n\n"][..], "a\n")] {
            let (got, tokens, stopped) = run(stops, text);
            assert_eq!((got.as_str(), tokens.concat().as_str(), stopped), (text, text, false));
        }
    }

    #[test]
    fn what_may_be_a_stop_text_is_held_back_and_no_more() {
        let tokenizer = Tokenizer::bytes(258);
        let mut decoded = Decoded::new(&tokenizer, &["END".into()]);
        let mut push = |c: char| decoded.push(TokenInfo { id: c as u32, text: String::new(), logprob: None, top: vec![] }).0;
        assert_eq!(["a", "E", "N", "E", "x"].map(|c| push(c.chars().next().unwrap())), ["a", "", "", "EN", "Ex"]);
    }
}
