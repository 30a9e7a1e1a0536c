//! `ttt chat`: a conversation with a model whose state goes on learning.

mod input;
mod moment;
mod reply;
pub mod template;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use ttt::data::Tokenizer;
use ttt::generate::{Generator, Sampling};
use ttt::lm::Lm;

use crate::args::Chat as Arguments;
use crate::state::{self, Start};
use crate::{model, units};
use input::{Asked, Lines};
use moment::Moment;
use template::{Message, Template};

/// Turns that can be taken back, and the memory that their states may take.
const MOST_TURNS: usize = 100;
const MOST_BYTES: usize = 1 << 30;
/// The branch that a conversation begins in.
const FIRST: &str = "main";

const HELP: &str = "\
Type a text and press Enter: the model reads the line and goes on. A line that ends in \\ is not ended: the model goes on right behind
it. An empty line lets the model go on. // at the beginning stands for one slash. Ctrl-C stops an answer.

  /save FILE     write the state to a file: ttt chat --state FILE goes on from it
  /load FILE     go on from a state file
  /undo          back to the state before the last turn
  /fork NAME     go on in a branch of this name; the one left stays as it is
  /switch NAME   go on in another branch; without a name: which there are
  /stats         loss of the inner models in each layer over the last 1,000 tokens
  /quit          end (also Ctrl-D)";

/// Runs the command.
pub fn run(args: &Arguments, out: &mut dyn Write) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let folder = model::resolve(&args.model)?;
    let mut lm = model::load(&folder, &args.device, args.dtype)?;
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer", folder.display());
    };
    model::load_skill(&mut lm, args.skill.as_deref(), Some(&tokenizer))?;
    let template = if args.plain { None } else { Template::of_folder(&folder)? };
    if template.is_none() && args.system.is_some() {
        bail!("--system needs a model with a chat template; without one, type the text as the first line");
    }
    let mut lines = Lines::open()?;
    let stopped = Arc::new(AtomicBool::new(false));
    if lines.interactive() {
        let flag = stopped.clone();
        ctrlc::set_handler(move || flag.store(true, Ordering::SeqCst)).context("cannot watch for Ctrl-C")?;
    }
    let now = load(&lm, &tokenizer, args.state.as_deref())?;
    if let Some(path) = &args.state {
        writeln!(out, "{}", about(&lm, &now, &path.display().to_string()))?;
    }
    if lines.interactive() {
        let how = if template.is_some() { "with the model's chat template" } else { "plain text, which the model continues" };
        writeln!(out, "A conversation: {how}. /help says what can be done.")?;
    }
    let mut chat = Chat {
        generator: Generator::new(&lm, sampling)?,
        now,
        turns: Vec::new(),
        branches: BTreeMap::new(),
        branch: FIRST.to_owned(),
        lm: &lm,
        tokenizer: &tokenizer,
        template,
        args,
        stopped,
    };
    chat.begin();
    while let Some(line) = lines.next("> ")? {
        // Somebody who types wants to go on after a mistake; in a pipe it ends the program.
        match chat.answer(&line, out) {
            Ok(true) => {}
            Ok(false) => break,
            Err(e) if lines.interactive() => writeln!(out, "error: {e:#}")?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Everything that a conversation has.
struct Chat<'m> {
    lm: &'m Lm,
    tokenizer: &'m Tokenizer,
    template: Option<Template>,
    generator: Generator<'m>,
    args: &'m Arguments,
    stopped: Arc<AtomicBool>,
    now: Moment,
    /// The moments before each turn, the newest last.
    turns: Vec<Arc<Moment>>,
    /// The branches that are not this one, with their turns.
    branches: BTreeMap<String, Branch>,
    branch: String,
}

/// A branch that was left.
struct Branch {
    now: Moment,
    turns: Vec<Arc<Moment>>,
}

impl Chat<'_> {
    /// The system's message, in a conversation with a template.
    fn begin(&mut self) {
        if let (Some(_), Some(system)) = (&self.template, &self.args.system) {
            self.now.messages.push(Message { role: "system", content: system.clone() });
        }
    }

    /// Does what a line asks for; whether to go on.
    fn answer(&mut self, line: &str, out: &mut dyn Write) -> Result<bool> {
        match input::parse(line) {
            Asked::Text(text) => self.turn(text, out)?,
            Asked::Help => writeln!(out, "{HELP}")?,
            Asked::Save(file) => {
                let now = &self.now;
                writeln!(out, "{}", state::save(&now.states, self.lm, &now.pending, Some(self.tokenizer), Path::new(file))?)?;
            }
            Asked::Load(file) => {
                let loaded = load(self.lm, self.tokenizer, Some(Path::new(file)))?;
                self.remember()?;
                self.now = loaded;
                writeln!(out, "{}", about(self.lm, &self.now, file))?;
            }
            Asked::Fork(name) => self.fork(name, out)?,
            Asked::Switch(None) => {
                let mut all: Vec<(&str, &Moment)> = self.branches.iter().map(|(name, b)| (name.as_str(), &b.now)).collect();
                all.push((&self.branch, &self.now));
                all.sort_by_key(|(name, _)| *name);
                for (name, moment) in all {
                    let here = if name == self.branch { "*" } else { " " };
                    writeln!(out, "{here} {name}  {} tokens", units::grouped(moment.tokens()))?;
                }
            }
            Asked::Switch(Some(name)) => {
                if name != self.branch {
                    let Some(branch) = self.branches.remove(name) else {
                        bail!("there is no branch {name}; /switch lists them, /fork {name} makes one");
                    };
                    self.leave(name, branch);
                }
                writeln!(out, "in {name}, {} tokens", units::grouped(self.now.tokens()))?;
            }
            Asked::Undo => {
                let Some(before) = self.turns.pop() else { bail!("there is no turn to take back") };
                self.now = before.fork()?;
                writeln!(out, "back to {} tokens", units::grouped(self.now.tokens()))?;
            }
            Asked::Stats => self.stats(out)?,
            Asked::Quit => return Ok(false),
            Asked::Wrong(message) => bail!(message),
        }
        Ok(true)
    }

    /// Keeps this moment for `/undo`; the oldest go when there are too many.
    fn remember(&mut self) -> Result<()> {
        self.turns.push(Arc::new(self.now.fork()?));
        let most = (MOST_BYTES / self.now.states.bytes().max(1)).clamp(1, MOST_TURNS);
        let extra = self.turns.len().saturating_sub(most);
        self.turns.drain(..extra);
        Ok(())
    }

    fn fork(&mut self, name: &str, out: &mut dyn Write) -> Result<()> {
        if name == self.branch || self.branches.contains_key(name) {
            bail!("there is a branch {name} already; take another name");
        }
        let branch = Branch { now: self.now.fork()?, turns: self.turns.clone() };
        let left = self.branch.clone();
        self.leave(name, branch);
        writeln!(out, "in {name}; {left} stays at {} tokens (/switch {left} goes back)", units::grouped(self.now.tokens()))?;
        Ok(())
    }

    /// Puts this branch away and goes on in another.
    fn leave(&mut self, name: &str, to: Branch) {
        let left = Branch { now: std::mem::replace(&mut self.now, to.now), turns: std::mem::replace(&mut self.turns, to.turns) };
        self.branches.insert(std::mem::replace(&mut self.branch, name.to_owned()), left);
    }

    fn stats(&self, out: &mut dyn Write) -> Result<()> {
        let Some(mini_batch) = self.lm.config().mini_batch() else {
            writeln!(out, "this model has no inner loop to look at")?;
            writeln!(out, "state  {}", units::bytes(self.now.states.bytes() as u64))?;
            return Ok(());
        };
        let Some((layers, tokens)) = self.now.inner_errors(self.lm)? else {
            bail!("no mini-batch of {mini_batch} tokens was read here yet");
        };
        writeln!(out, "inner loss over the last {} tokens read here", units::grouped(tokens as u64))?;
        writeln!(out, "layer  {:>10}  {:>10}  {:>10}", "W0", "before", "after")?;
        for (layer, [initial, before, after]) in layers.iter().enumerate() {
            writeln!(out, "{layer:>5}  {initial:>10.5}  {before:>10.5}  {after:>10.5}")?;
        }
        writeln!(out, "state  {}, however long it is", units::bytes(self.now.states.bytes() as u64))?;
        Ok(())
    }
}

/// The moment that a state file holds, or the beginning.
fn load(lm: &Lm, tokenizer: &Tokenizer, path: Option<&Path>) -> Result<Moment> {
    let Start { states, pending } = state::start(lm, path, Some(tokenizer))?;
    Moment::new(states, pending)
}

fn about(lm: &Lm, moment: &Moment, name: &str) -> String {
    format!(
        "{name}: {} tokens read, state of {} in {} layers",
        units::grouped(moment.tokens()),
        units::bytes(moment.states.bytes() as u64),
        lm.blocks().len()
    )
}
