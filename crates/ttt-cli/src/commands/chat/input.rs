//! Lines from the keyboard, with editing and history, or from a pipe; and what they mean.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use anyhow::Result;
use rustyline::DefaultEditor;
use rustyline::config::Config;
use rustyline::error::ReadlineError;

/// Where lines come from.
pub enum Lines {
    /// A terminal.
    Keyboard {
        /// Editing and history.
        editor: Box<DefaultEditor>,
        /// File of the history.
        history: Option<PathBuf>,
    },
    /// Anything else.
    Pipe(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Lines {
    /// The standard input.
    pub fn open() -> Result<Lines> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Lines::Pipe(stdin.lock().lines()));
        }
        let config = Config::builder().auto_add_history(true).max_history_size(1000)?.build();
        let mut editor = Box::new(DefaultEditor::with_config(config)?);
        let history = history_file();
        if let Some(file) = &history {
            // There is none the first time.
            let _ = editor.load_history(file);
        }
        Ok(Lines::Keyboard { editor, history })
    }

    /// The next line; `None` at the end (Ctrl-D). Ctrl-C gives up the line that was being typed.
    pub fn next(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Lines::Pipe(lines) => Ok(lines.next().transpose()?),
            Lines::Keyboard { editor, history } => loop {
                match editor.readline(prompt) {
                    Ok(line) => {
                        if let Some(file) = &history {
                            // What cannot be kept is no reason to stop talking.
                            let _ = file.parent().map(std::fs::create_dir_all);
                            let _ = editor.append_history(file);
                        }
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => println!("(Ctrl-D or /quit ends the conversation)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(e) => return Err(e.into()),
                }
            },
        }
    }

    /// Whether somebody types.
    pub fn interactive(&self) -> bool {
        matches!(self, Lines::Keyboard { .. })
    }
}

/// `$XDG_STATE_HOME/ttt/chat_history`, by default below `~/.local/state`.
fn history_file() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_STATE_HOME").or_else(|| Some(set("HOME").or_else(|| set("USERPROFILE"))?.join(".local/state")))?;
    Some(base.join("ttt/chat_history"))
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked<'l> {
    /// A text to read and answer.
    Text(&'l str),
    /// `/help`.
    Help,
    /// `/save FILE`.
    Save(&'l str),
    /// `/load FILE`.
    Load(&'l str),
    /// `/fork NAME`.
    Fork(&'l str),
    /// `/switch NAME`, or without a name what there is.
    Switch(Option<&'l str>),
    /// `/undo`.
    Undo,
    /// `/stats`.
    Stats,
    /// `/quit`.
    Quit,
    /// A command that does not exist, or not so; what to say.
    Wrong(String),
}

/// The meaning of a line. Two slashes begin a text with one.
pub fn parse(line: &str) -> Asked<'_> {
    let Some(command) = line.strip_prefix('/') else { return Asked::Text(line) };
    if command.starts_with('/') {
        return Asked::Text(command);
    }
    let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let argument = Some(argument.trim()).filter(|a| !a.is_empty());
    let need = |make: fn(&str) -> Asked<'_>, what: &str| match argument {
        Some(a) => make(a),
        None => Asked::Wrong(format!("/{name} needs {what}")),
    };
    match (name, argument) {
        ("save", _) => need(|a| Asked::Save(a), "a file to write"),
        ("load", _) => need(|a| Asked::Load(a), "a state file"),
        ("fork", _) => need(|a| Asked::Fork(a), "a name for the new branch"),
        ("switch", _) => Asked::Switch(argument),
        ("help" | "?", None) => Asked::Help,
        ("undo", None) => Asked::Undo,
        ("stats", None) => Asked::Stats,
        ("quit" | "exit" | "q", None) => Asked::Quit,
        ("help" | "undo" | "stats" | "quit" | "exit", Some(_)) => Asked::Wrong(format!("/{name} takes nothing after it")),
        _ => Asked::Wrong(format!("there is no /{name}; /help lists what there is (a text can begin with // for one slash)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_commands() {
        assert_eq!(parse("fn main() {"), Asked::Text("fn main() {"));
        assert_eq!(parse(""), Asked::Text(""));
        assert_eq!(parse("// a comment"), Asked::Text("/ a comment"));
        assert_eq!(parse("/save  my file.state "), Asked::Save("my file.state"));
        assert_eq!(parse("/switch"), Asked::Switch(None));
        assert_eq!(parse("/switch b"), Asked::Switch(Some("b")));
        assert_eq!(parse("/undo"), Asked::Undo);
        assert!(matches!(parse("/save"), Asked::Wrong(_)));
        assert!(matches!(parse("/undo 2"), Asked::Wrong(_)));
        assert!(matches!(parse("/usr/bin"), Asked::Wrong(_)));
    }
}
