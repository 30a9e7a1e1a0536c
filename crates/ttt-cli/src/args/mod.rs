//! What can be typed. What it means is in [`crate::commands`].

mod bench;
mod compare;
mod device;
mod eval;
mod generate;
mod machine;
mod model;
mod serve;
mod state;
mod tokenizer;
mod train;

use clap::{Parser, Subcommand};

pub use bench::{Bench, BenchWhat, InnerName};
pub use compare::{Compare, ReportPage};
pub use device::{DeviceArgs, DeviceName, Precision, Recompute};
pub use eval::{Eval, Task, TaskName};
pub use generate::{Chat, Generate};
pub use machine::{Completions, Doctor, Kernels};
pub use model::{Convert, Import, Info, Plan, Quantize, Verify};
pub use serve::{Load, Serve};
pub use state::{Read, State, StateDiff, StateFork, StateInfo};
pub use tokenizer::{Tokenizer, TokenizerEncode, TokenizerName, TokenizerTrain};
pub use train::Train;

/// Language models whose hidden state is itself a model that learns while it reads (TTT-Linear and TTT-MLP, arXiv 2407.04620).
#[derive(Debug, Parser)]
#[command(name = "ttt", version, max_term_width = 120, after_help = EXAMPLES)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ttt train                                        a small model on the Rust sources on this machine
  ttt train --data texts/ --tokens 10M             the same model on your own texts
  ttt train configs/125m-ttt-linear.toml --data texts/ --tokenizer tokenizer.json
  ttt generate runs/tiny --prompt 'fn main() {'    continue a text
  ttt eval runs/tiny --data book.txt               bits per byte of a text that is new to the model
  ttt train --resume runs/tiny                     go on after Ctrl-C or a crash

A MODEL is a folder with config.json and model.safetensors, or the folder of a run.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model, or go on with a run
    Train(Train),
    /// Measure how well a model predicts texts that are new to it, or does a task
    Eval(Eval),
    /// Compare runs: pictures, a table and JSON of what their folders hold
    Compare(Compare),
    /// Show runs on one page of HTML that needs no network
    Report(ReportPage),
    /// Write training files of a task: recall, a needle in a haystack, copying
    Task(Task),
    /// Continue a text
    Generate(Generate),
    /// Learn texts of any length into a state file, in constant memory
    Read(Read),
    /// Describe, compare and copy state files
    #[command(subcommand)]
    State(State),
    /// Talk with a model whose state goes on learning
    Chat(Chat),
    /// Serve a model over HTTP: OpenAI's API, states as resources, a page
    Serve(Serve),
    /// Compare a model with reference results, to see that its weights were read right
    Verify(Verify),
    /// Say what a model costs: parameters, memory by part, arithmetic
    Plan(Plan),
    /// Describe a model folder, a run or a skill file
    Info(Info),
    /// Write a model in another number type, or in several files
    Convert(Convert),
    /// Make a model folder of a checkpoint of the official JAX code
    #[command(after_help = model::IMPORT_EXAMPLES)]
    Import(Import),
    /// Write a model with bf16 or int8 matrices, and say what that changes
    Quantize(Quantize),
    /// Train a tokenizer, or try one
    #[command(subcommand)]
    Tokenizer(Tokenizer),
    /// Measure speed on this machine
    Bench(Bench),
    /// Check this machine and this program
    Doctor(Doctor),
    /// Compile the GPU kernels for machines without a compiler
    #[command(subcommand)]
    Kernels(Kernels),
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  ttt completions bash > ~/.local/share/bash-completion/completions/ttt")]
    Completions(Completions),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Every command and every argument says what it is for.
    #[test]
    fn everything_is_explained() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {argument}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        Args::command().debug_assert();
        check(&Args::command());
    }
}
