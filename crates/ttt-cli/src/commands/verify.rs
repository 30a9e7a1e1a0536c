//! `ttt verify`: whether a model computes what a reference file says.

use std::io::Write;

use anyhow::{Result, bail};
use ttt::tensor::DType;

use crate::Usage;
use crate::args::Verify;
use crate::model;

/// Runs the command.
pub fn run(args: &Verify, out: &mut dyn Write) -> Result<()> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        return Err(Usage(format!("--tolerance {} is not a number from 0 up", args.tolerance)).into());
    }
    let lm = model::load(&args.model, &args.device, Some(DType::from(args.dtype).into()))?;
    let all = ttt::verify::verify(&lm, &args.reference)?;
    let width = all.iter().map(|c| c.name.len()).max().unwrap_or(0);
    writeln!(out, "{:width$}  {:>10}  {:>10}", "", "error", "relative")?;
    let mut failed = Vec::new();
    for c in &all {
        // Written so that a relative error that is not a number exceeds.
        let fits = c.relative <= args.tolerance;
        writeln!(out, "{:width$}  {:>10.2e}  {:>10.2e}{}", c.name, c.error, c.relative, if fits { "" } else { "  exceeds" })?;
        if !fits {
            failed.push(c.name.as_str());
        }
    }
    match failed.as_slice() {
        [] => Ok(writeln!(out, "all {} within {:e} of their largest magnitude", all.len(), args.tolerance)?),
        [first, rest @ ..] => {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            bail!("{first}{more} of {} exceed the tolerance of {:e}", all.len(), args.tolerance)
        }
    }
}
