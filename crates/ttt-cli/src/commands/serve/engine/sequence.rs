//! One running choice: what it has accepted, how far its slot has read, what it tells its client.

use std::sync::Arc;
use std::time::Instant;

use ttt::data::{TextStream, Tokenizer};
use ttt::generate::{Choice, Sequence as Continued};

use super::decoded::{Decoded, TokenInfo};
use super::sampler::Sampler;
use super::shared::Shared;
use super::{Event, Finish, Job};
use crate::commands::serve::snapshots::PrefixHash;

/// A choice of a job. While its prompt is being read it stands for all choices of the job.
pub struct Sequence<'t> {
    pub job: Arc<Job>,
    /// Number of the choice in its job.
    pub index: usize,
    pub slot: usize,
    /// Slots of the other choices, until the prompt is read.
    pub reserved: Vec<usize>,
    /// Accepted ids: pending ones of the start, the prompt, what was chosen.
    pub tokens: Vec<u32>,
    /// How many of them come before the first that was chosen.
    pub prompt: usize,
    /// How many of them the slot has read.
    pub read: usize,
    pub hash: PrefixHash,
    sampler: Sampler,
    decoded: Decoded<'t>,
    echo: Option<TextStream<'t>>,
    last: Instant,
}

impl<'t> Sequence<'t> {
    /// A choice that has read the first `read` of `tokens`.
    pub fn new(job: Arc<Job>, slots: Vec<usize>, tokens: Vec<u32>, read: usize, tokenizer: &'t Tokenizer) -> Sequence<'t> {
        let (slot, reserved) = (slots[0], slots[1..].to_vec());
        let hash = PrefixHash::new(job.root);
        let (sampler, decoded) = (Sampler::new(job.sampling, 0), Decoded::new(tokenizer, &job.stop));
        let echo = job.prompt_logprobs.then(|| tokenizer.stream());
        let (prompt, last) = (tokens.len(), job.arrived);
        Sequence { job, index: 0, slot, reserved, tokens, prompt, read, hash, sampler, decoded, echo, last }
    }

    /// Another choice that has read the same, in another slot.
    pub fn fork(&self, index: usize, slot: usize, tokenizer: &'t Tokenizer) -> Sequence<'t> {
        Sequence {
            job: self.job.clone(),
            index,
            slot,
            reserved: Vec::new(),
            tokens: self.tokens.clone(),
            prompt: self.prompt,
            read: self.read,
            hash: self.hash.clone(),
            sampler: Sampler::new(self.job.sampling, index),
            decoded: Decoded::new(tokenizer, &self.job.stop),
            echo: None,
            last: self.last,
        }
    }

    /// Number of the choice in its request.
    pub fn choice(&self) -> usize {
        self.job.first_choice + self.index
    }

    /// Tokens to read before the last, which is read by decoding.
    pub fn unread(&self) -> usize {
        (self.prompt - 1).saturating_sub(self.read)
    }

    /// Whether somebody still waits for it.
    pub fn wanted(&self) -> bool {
        !self.job.events.is_closed()
    }

    /// Sends an event; nobody may be there to receive it.
    pub fn send(&self, event: Event) {
        let _ = self.job.events.send(event);
    }

    /// Reports tokens of the prompt, from number `from` on, with the logits that predicted each.
    pub fn report_prompt<'l>(&mut self, from: usize, logits: impl Iterator<Item = Option<&'l [f32]>>) {
        let (choice, top) = (self.choice(), self.job.top.unwrap_or(0));
        let Some(stream) = &mut self.echo else { return };
        let tokens = logits.zip(&self.tokens[from..self.prompt]).map(|(logits, &id)| {
            let text = stream.push(id);
            match logits {
                Some(logits) => info(id, text, logits, top),
                None => TokenInfo { id, text, logprob: None, top: Vec::new() },
            }
        });
        let tokens = tokens.collect();
        self.send(Event::Prompt { choice, tokens });
    }

    /// What its next token is chosen from: the token that it reads for it.
    pub fn next(&self) -> (Continued, u32) {
        let sequence = Continued { slot: self.slot, draw: self.sampler.draw(), ends: [None; 2] };
        (sequence, *self.tokens.last().expect("a prompt of at least one token"))
    }

    /// Takes the next token from where it was chosen.
    pub fn take(&mut self, Choice { token, logprob }: Choice) -> TokenInfo {
        self.sampler.next();
        TokenInfo { id: token, text: String::new(), logprob: Some(logprob), top: Vec::new() }
    }

    /// Chooses the next token, with what else was likely where that is wanted.
    pub fn choose(&mut self, logits: &[f32]) -> TokenInfo {
        let Choice { token, logprob } = self.sampler.choose(logits);
        match self.job.top {
            // By the same arithmetic for all of them, so that who compares finds the likeliest to be that.
            Some(k) => info(token, String::new(), logits, k),
            None => TokenInfo { id: token, text: String::new(), logprob: Some(logprob), top: Vec::new() },
        }
    }

    /// Accepts the next token; says why the choice is complete, if it is.
    pub fn accept(&mut self, info: TokenInfo, ends: [Option<u32>; 2], shared: &Shared) -> Option<Finish> {
        let token = info.id;
        let now = Instant::now();
        let times = if self.tokens.len() == self.prompt { &shared.first_token } else { &shared.next_token };
        times.add(now - self.last);
        self.last = now;
        self.tokens.push(token);
        if !self.job.ignore_eos && ends.contains(&Some(token)) {
            self.flush();
            return Some(Finish::Stop);
        }
        let (text, tokens, stopped) = self.decoded.push(info);
        if !text.is_empty() || !tokens.is_empty() {
            self.send(Event::Text { choice: self.choice(), text, tokens });
        }
        if stopped {
            return Some(Finish::Stop);
        }
        if self.tokens.len() - self.prompt == self.job.max_tokens {
            self.flush();
            return Some(Finish::Length);
        }
        None
    }

    /// Sends the text that was held back.
    pub fn flush(&mut self) {
        let (text, tokens) = self.decoded.finish();
        if !text.is_empty() || !tokens.is_empty() {
            self.send(Event::Text { choice: self.choice(), text, tokens });
        }
    }
}

/// A token with its own log-probability and the `k` highest.
fn info(id: u32, text: String, logits: &[f32], k: usize) -> TokenInfo {
    let log_sum = log_sum(logits);
    let logprob = Some(logits[id as usize] as f64 - log_sum);
    TokenInfo { id, text, logprob, top: likeliest(logits, k, log_sum) }
}

fn log_sum(logits: &[f32]) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    logits.iter().map(|x| (*x as f64 - top).exp()).sum::<f64>().ln() + top
}

/// The `k` likeliest tokens with their log-probabilities; ties go to the smaller id.
fn likeliest(logits: &[f32], k: usize, log_sum: f64) -> Vec<(u32, f64)> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let descending = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, descending);
        order.truncate(k);
    }
    order.sort_unstable_by(descending);
    order.into_iter().map(|id| (id, logits[id as usize] as f64 - log_sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_sum_to_one() {
        let logits = [0.5, 2.0, -1.0, 2.0, 0.0];
        let all = likeliest(&logits, 9, log_sum(&logits));
        assert_eq!(all.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 0, 4, 2]);
        assert!((all.iter().map(|(_, p)| p.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(likeliest(&logits, 2, log_sum(&logits)), all[..2]);
        assert!(likeliest(&logits, 0, 0.0).is_empty());
    }
}
