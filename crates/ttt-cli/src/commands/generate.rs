//! `ttt generate`: continues a text, token by token.

use std::io::{IsTerminal, Read, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use ttt::data::Tokenizer;
use ttt::generate::{Generator, Sampling, learn};

use crate::args::Generate;
use crate::progress::warn;
use crate::state::{self, Start};
use crate::{model, units};

/// Runs the command.
pub fn run(args: &Generate, out: &mut dyn Write) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    sampling.validate()?;
    let folder = model::resolve(&args.model)?;
    let mut lm = model::load(&folder, &args.device, args.dtype)?;
    let tokenizer = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)?;
    model::load_skill(&mut lm, args.skill.as_deref(), tokenizer.as_ref())?;
    if let Some(warning) = tokenizer.as_ref().and_then(|t| t.unused_ids(lm.config().vocab_size)) {
        warn(&warning);
    }
    let (prompt, text) = prompt(args, tokenizer.as_ref())?;
    let Start { mut states, mut pending } = state::start(&lm, args.state_in.as_deref(), tokenizer.as_ref())?;
    pending.extend(prompt);
    let prompt = pending;
    let Some(last) = prompt.len().checked_sub(1) else {
        bail!(
            "there is nothing to continue: give a text with --prompt (neither the state nor the tokenizer has a token to begin with)"
        );
    };

    let start = Instant::now();
    let mut generator = Generator::new(&lm, sampling)?;
    // Accepted but not read: what a continuation begins with.
    let mut pending = prompt[last];
    if args.max_new_tokens > 0 {
        generator.read(&mut states, 0, &prompt)?;
    } else {
        learn(&lm, &mut states, 0, &prompt[..last])?;
    }
    let read = start.elapsed().as_secs_f64();

    let eos = match &tokenizer {
        Some(tokenizer) => tokenizer.eos(),
        None => lm.config().eos_token_id,
    };
    let mut output = Output::new(tokenizer.as_ref(), args.json, out);
    if args.echo && !args.json {
        output.show(&text)?;
    }
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    let start = Instant::now();
    if args.max_new_tokens > 0 {
        let ends = [if args.no_eos { None } else { eos }, None];
        let last = generator.write(&mut states, 0, args.max_new_tokens, ends, |choice| {
            tokens.push(choice.token);
            logprobs.push(choice.logprob);
            output.push(choice.token).map(|()| true)
        })?;
        pending = last.expect("at least one token was chosen");
    }
    let written = start.elapsed().as_secs_f64();
    let text = output.finish()?;
    let saved = match &args.state_out {
        Some(path) => Some(state::save(&states, &lm, &[pending], tokenizer.as_ref(), path)?),
        None => None,
    };
    if args.json {
        let mut object = serde_json::json!({"tokens": tokens, "text": text, "logprobs": logprobs});
        if let Some(saved) = &saved {
            object["state"] = saved.json();
        }
        writeln!(out, "{object}")?;
    } else if let Some(saved) = &saved {
        writeln!(std::io::stderr(), "{saved}")?;
    }
    if args.verbose {
        // The last token is chosen but not read.
        let steps = tokens.len().saturating_sub(1) as f64;
        writeln!(
            std::io::stderr(),
            "read {} tokens in {} ({} tokens/s), wrote {} ({} tokens/s); state of {}",
            prompt.len(),
            units::seconds(read),
            units::count(prompt.len() as f64 / read),
            tokens.len(),
            units::count((steps / written.max(1e-9)).round()),
            units::bytes(states.bytes() as u64),
        )?;
    }
    Ok(())
}

/// Ids to continue, and the text that they stand for.
fn prompt(args: &Generate, tokenizer: Option<&Tokenizer>) -> Result<(Vec<u32>, String)> {
    if let Some(ids) = &args.prompt_tokens {
        let text = tokenizer.map_or_else(|| joined(ids), |t| t.decode(ids));
        return Ok((ids.clone(), text));
    }
    let Some(tokenizer) = tokenizer else {
        if args.state_in.is_some() && args.prompt.is_none() && args.prompt_file.is_none() {
            return Ok(Default::default());
        }
        bail!("the model has no tokenizer; name one with --tokenizer, or give ids with --prompt-tokens");
    };
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            text
        }
        (None, Some(path)) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        (None, None) => String::new(),
    };
    let mut ids: Vec<u32> = tokenizer.bos().filter(|_| args.state_in.is_none()).into_iter().collect();
    ids.extend(tokenizer.encode(&text)?);
    Ok((ids, text))
}

fn joined(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

/// Where the new tokens go: as text, or as ids where there is no tokenizer; only collected for JSON.
struct Output<'a, 'o> {
    stream: Option<ttt::data::TextStream<'a>>,
    collected: String,
    out: Option<&'o mut dyn Write>,
    /// Control characters are for programs; a terminal would obey them.
    terminal: bool,
}

impl<'a, 'o> Output<'a, 'o> {
    fn new(tokenizer: Option<&'a Tokenizer>, json: bool, out: &'o mut dyn Write) -> Output<'a, 'o> {
        let stream = tokenizer.map(Tokenizer::stream);
        let out = (!json).then_some(out);
        Output { stream, collected: String::new(), out, terminal: std::io::stdout().is_terminal() }
    }

    fn push(&mut self, token: u32) -> Result<()> {
        let text = match &mut self.stream {
            Some(stream) => stream.push(token),
            None => format!("{token} "),
        };
        self.show(&text)
    }

    fn show(&mut self, text: &str) -> Result<()> {
        let Some(out) = &mut self.out else {
            self.collected += text;
            return Ok(());
        };
        let shown = if self.terminal { units::printable(text) } else { text.to_owned() };
        out.write_all(shown.as_bytes())?;
        Ok(out.flush()?)
    }

    /// The whole text when it was only collected and there is a tokenizer.
    fn finish(mut self) -> Result<Option<String>> {
        let rest = self.stream.take().map(|stream| stream.finish());
        self.show(rest.as_deref().unwrap_or_default())?;
        if let Some(out) = &mut self.out {
            writeln!(out)?;
        }
        Ok(rest.map(|_| self.collected))
    }
}
