//! `ttt compare`: runs side by side, as pictures, a table and JSON; `ttt report`: as one page.

mod report;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ttt::hub::write_atomic;
use ttt::results::Comparison;

pub use report::run as report;

use crate::args::Compare;

/// Runs the command.
pub fn run(args: &Compare, out: &mut dyn Write) -> Result<()> {
    let comparison = read(&args.runs)?;
    if args.json {
        return Ok(writeln!(out, "{}", comparison.json())?);
    }
    let table = comparison.markdown();
    write!(out, "{table}")?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make the folder {}", args.out.display()))?;
    let save = |name: &str, bytes: &[u8]| write_atomic(args.out.join(name), |w| w.write_all(bytes));
    save("table.md", table.as_bytes())?;
    save("compare.json", format!("{}\n", comparison.json()).as_bytes())?;
    let pictures = comparison.pictures();
    for (name, picture) in &pictures {
        save(&format!("{name}.svg"), picture.svg()?.as_bytes())?;
        save(&format!("{name}.png"), &picture.png()?)?;
    }
    let folder = args.out.display();
    writeln!(out, "\nwritten to {folder}: table.md, compare.json, and as .svg and .png")?;
    for (name, picture) in &pictures {
        writeln!(out, "  {name:24}  {}", picture.title)?;
    }
    Ok(())
}

/// The runs that were typed, each a folder or NAME=folder.
fn read(typed: &[String]) -> Result<Comparison> {
    let folder = |text: &String| match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !Path::new(text).exists() => (Some(name.to_owned()), PathBuf::from(path)),
        _ => (None, PathBuf::from(text)),
    };
    Ok(Comparison::read(&typed.iter().map(folder).collect::<Vec<_>>())?)
}
