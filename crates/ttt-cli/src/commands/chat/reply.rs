//! One turn: what is typed is read, and the model goes on.

use std::io::{IsTerminal, Write};
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};

use super::Chat;
use super::template::Message;
use crate::units;

impl Chat<'_> {
    /// Reads a line and lets the model go on. On an error the conversation is where it was.
    pub(super) fn turn(&mut self, line: &str, out: &mut dyn Write) -> Result<()> {
        self.remember()?;
        let done = self.take(line, out);
        if done.is_err() {
            self.now = self.turns.pop().expect("was kept above").fork()?;
        }
        done
    }

    fn take(&mut self, line: &str, out: &mut dyn Write) -> Result<()> {
        self.stopped.store(false, Ordering::SeqCst);
        let text = match &self.template {
            Some(_) if line.is_empty() && self.now.text.is_empty() => bail!("there is nothing to go on from; type something"),
            Some(_) if line.is_empty() => String::new(),
            Some(_) => self.templated(line)?,
            None => self.plain(line),
        };
        let mut tokens = std::mem::take(&mut self.now.pending);
        // A template writes the token that begins a text itself.
        if self.template.is_none() && tokens.is_empty() && self.now.states.position(0) == 0 {
            tokens.extend(self.tokenizer.bos());
        }
        tokens.extend(self.tokenizer.encode(&text)?);
        if tokens.is_empty() {
            bail!("the model has ended its text; type something");
        }
        self.read(&tokens)?;
        let reply = self.stream(out)?;
        if self.template.is_some() {
            self.now.text += &reply;
            match self.now.messages.last_mut() {
                // An empty line let the model go on with its message.
                Some(last) if last.role == "assistant" => last.content += &reply,
                _ => self.now.messages.push(Message { role: "assistant", content: reply }),
            }
        } else {
            self.now.open_line = !reply.ends_with('\n');
        }
        Ok(())
    }

    /// The text of a line as it stands on the screen: the end of the model's line, what was typed, and Enter.
    fn plain(&mut self, line: &str) -> String {
        if line.is_empty() {
            return String::new();
        }
        let before = if self.now.open_line { "\n" } else { "" };
        match line.strip_suffix('\\') {
            Some(open) => format!("{before}{open}"),
            None => format!("{before}{line}\n"),
        }
    }

    /// What the template adds for a message of the user. A template that changes what it made of earlier messages makes the model
    /// read the conversation again from where it began: the state cannot unlearn.
    fn templated(&mut self, line: &str) -> Result<String> {
        let template = self.template.as_ref().expect("the caller has one");
        self.now.messages.push(Message { role: "user", content: line.to_owned() });
        let text = template.render(&self.now.messages)?;
        let new = match text.strip_prefix(&self.now.text) {
            Some(new) => new.to_owned(),
            None => {
                self.now.read_again()?;
                text.clone()
            }
        };
        self.now.text = text;
        Ok(new)
    }

    fn read(&mut self, mut tokens: &[u32]) -> Result<()> {
        while !tokens.is_empty() {
            let step = self.now.note(self.lm, tokens)?;
            self.generator.read(&mut self.now.states, 0, &tokens[..step])?;
            tokens = &tokens[step..];
        }
        Ok(())
    }

    /// Chooses and shows tokens until the model ends its text, the limit, a stop text or Ctrl-C; returns the text.
    fn stream(&mut self, out: &mut dyn Write) -> Result<String> {
        let terminal = std::io::stdout().is_terminal();
        let mut decoder = self.tokenizer.stream();
        let mut reply = String::new();
        let mut show = |reply: &mut String, text: &str| -> Result<()> {
            reply.push_str(text);
            out.write_all(if terminal { units::printable(text) } else { text.to_owned() }.as_bytes())?;
            Ok(out.flush()?)
        };
        let ends = [self.tokenizer.eos(), self.lm.config().eos_token_id];
        let mut next = None;
        for n in 0..self.args.max_new_tokens {
            let choice = next.take().unwrap_or_else(|| self.generator.choose());
            if ends.contains(&Some(choice.token)) {
                // The end is not accepted: what comes next says how the text goes on.
                break;
            }
            show(&mut reply, &decoder.push(choice.token))?;
            self.now.pending = vec![choice.token];
            let stop = self.args.stop.iter().any(|stop| reply.contains(stop.as_str()));
            if stop || n + 1 == self.args.max_new_tokens || self.stopped.load(Ordering::SeqCst) {
                break;
            }
            self.now.pending.clear();
            self.now.note(self.lm, &[choice.token])?;
            next = Some(self.generator.step(&mut self.now.states, 0, choice.token)?);
        }
        show(&mut reply, &decoder.finish())?;
        if !reply.ends_with('\n') {
            writeln!(out)?;
        }
        Ok(reply)
    }
}
