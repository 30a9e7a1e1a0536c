//! A needle in a haystack: one fact somewhere in a long text, asked for at its end (after Kamradt's test of 2023).

use std::sync::Arc;

use super::{Alphabet, Example, Random, invalid};
use crate::Result;
use crate::data::Tokenizer;

/// Tokens of the answer in a haystack of symbols; digits in one of text.
const ANSWER: usize = 4;

/// A fact at a chosen depth of a haystack, and at the end the question; the answer's tokens are judged.
#[derive(Clone, Debug)]
pub struct Needle {
    /// Tokens of a sequence.
    pub length: usize,
    /// Where the fact stands, from 0 (the beginning) to 1 (before the question); anywhere when there is none.
    pub depth: Option<f64>,
    /// What it is hidden in.
    pub haystack: Haystack,
}

/// What a needle is hidden in.
#[derive(Clone, Debug)]
pub enum Haystack {
    /// Random keys of the upper half. The fact is a key of the lower half and 4 values, the question that key.
    Symbols,
    /// A text. The fact is a sentence with 4 digits, the question its beginning.
    Text {
        /// Ids of the text, of which a part at a random place is taken; repeated where it is too short.
        ids: Arc<Vec<u32>>,
        /// Makes ids of the sentence.
        tokenizer: Arc<Tokenizer>,
    },
}

/// A fact and its question with the answer.
struct Fact {
    statement: Vec<u32>,
    question: Vec<u32>,
    answer: Vec<u32>,
}

impl Fact {
    fn len(&self) -> usize {
        self.statement.len() + self.question.len() + self.answer.len()
    }
}

impl Needle {
    pub(super) fn example(&self, alphabet: &Alphabet, random: &mut Random) -> Example {
        let fact = self.fact(alphabet, random).expect("the settings were checked");
        let hay = self.hay(self.length - fact.len(), alphabet, random);
        let at = match self.depth {
            Some(depth) => (depth * hay.len() as f64).round() as usize,
            None => random.below(hay.len() + 1),
        };
        let mut tokens = hay[..at].to_vec();
        tokens.extend(fact.statement);
        tokens.extend(&hay[at..]);
        tokens.extend(fact.question);
        let judged = (tokens.len()..tokens.len() + fact.answer.len()).collect();
        tokens.extend(fact.answer);
        Example { tokens, judged }
    }

    fn fact(&self, alphabet: &Alphabet, random: &mut Random) -> Result<Fact> {
        match &self.haystack {
            Haystack::Symbols => {
                let key = random.choose(&alphabet.keys[..alphabet.keys.len() / 2]);
                let answer: Vec<u32> = (0..ANSWER).map(|_| random.choose(&alphabet.values)).collect();
                Ok(Fact { statement: [&[key], &answer[..]].concat(), question: vec![key], answer })
            }
            Haystack::Text { tokenizer, .. } => {
                let digits: String = (0..ANSWER).map(|_| char::from(b'0' + random.below(10) as u8)).collect();
                let question = tokenizer.encode("\nThe secret number is ")?;
                Ok(Fact {
                    statement: tokenizer.encode(&format!("\nThe secret number is {digits}.\n"))?,
                    question,
                    answer: tokenizer.encode(&digits)?,
                })
            }
        }
    }

    fn hay(&self, n: usize, alphabet: &Alphabet, random: &mut Random) -> Vec<u32> {
        match &self.haystack {
            Haystack::Symbols => {
                let noise = &alphabet.keys[alphabet.keys.len() / 2..];
                (0..n).map(|_| random.choose(noise)).collect()
            }
            Haystack::Text { ids, .. } => {
                let from = random.below(ids.len().saturating_sub(n) + 1);
                ids.iter().cycle().skip(from).take(n).copied().collect()
            }
        }
    }

    /// Of one token of the answer.
    pub(super) fn chance(&self, alphabet: &Alphabet) -> f64 {
        match &self.haystack {
            Haystack::Symbols => 1.0 / alphabet.values.len() as f64,
            // A token may hold several digits; with one each it is this.
            Haystack::Text { .. } => 0.1,
        }
    }

    pub(super) fn validate(&self, alphabet: &Alphabet) -> Result<()> {
        if let Some(depth) = self.depth.filter(|depth| !(0.0..=1.0).contains(depth)) {
            return invalid(format!("a needle at depth {depth}: it must be from 0 to 1"));
        }
        match &self.haystack {
            Haystack::Symbols if alphabet.keys.len() < 2 || alphabet.values.is_empty() => {
                return invalid("a needle needs a vocabulary of at least 5 ids".into());
            }
            Haystack::Text { ids, .. } if ids.is_empty() => return invalid("the haystack holds no text".into()),
            _ => {}
        }
        // Facts of different digits may differ by a few tokens.
        let least = self.fact(alphabet, &mut Random::new(0, 0))?.len() + 2 * ANSWER;
        if self.length < least {
            return invalid(format!("a needle in {} tokens: it takes at least {least}", self.length));
        }
        Ok(())
    }
}
