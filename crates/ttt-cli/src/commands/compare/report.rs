//! `ttt report`: one page of HTML about some runs.

use std::io::Write;

use anyhow::Result;
use ttt::hub::write_atomic;

use crate::args::ReportPage;
use crate::units;

/// Runs the command.
pub fn run(args: &ReportPage, out: &mut dyn Write) -> Result<()> {
    let comparison = super::read(&args.runs)?;
    let names: Vec<&str> = comparison.runs.iter().map(|run| run.name.as_str()).collect();
    let title = args.title.clone().unwrap_or_else(|| names.join(", "));
    let page = comparison.html(&title);
    write_atomic(&args.out, |w| w.write_all(page.as_bytes()))?;
    let (tables, pictures) = (comparison.tables().len(), comparison.pictures().len());
    let size = units::bytes(page.len() as u64);
    Ok(writeln!(out, "{}: {size}, {tables} tables, {pictures} pictures; open it in a browser", args.out.display())?)
}
