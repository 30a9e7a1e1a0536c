//! Totals, tables and JSON of an evaluation.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use ttt::eval::{Clusters, Evaluation, InnerRow, Report};

use crate::units;

/// The totals of a text or all of them, and the tables by position.
pub fn print(report: &Report, out: &mut dyn Write) -> Result<()> {
    let (total, overall) = (report.total(), report.overall());
    writeln!(out, "tokens         {}", units::grouped(total.tokens))?;
    writeln!(out, "bytes          {}", units::grouped(total.bytes as u64))?;
    let margin = overall.margin.map_or(String::new(), |m| format!(" ± {m:.4}"));
    writeln!(out, "loss           {:.4}{margin} nats a token", total.loss())?;
    writeln!(out, "perplexity     {:.4}", total.perplexity())?;
    writeln!(out, "bits per byte  {:.4}", total.bits_per_byte())?;

    let rows = report.loss_by_position();
    writeln!(out, "\n{:>21}  {:>13}  {:>8}  {:>8}", "position", "tokens", "loss", "± 95 %")?;
    for row in &rows {
        let margin = row.margin.map_or("-".into(), |m| format!("{m:.4}"));
        writeln!(out, "{:>21}  {:>13}  {:>8.4}  {margin:>8}", span(row.from, row.to), units::grouped(row.tokens), row.loss)?;
    }
    if rows.iter().any(|row| row.clusters == Clusters::Parts) {
        writeln!(out, "where fewer than 8 documents reach, the interval is over sixteenths of the bucket")?;
    }
    inner_table(&report.inner(), out)
}

/// The inner models' losses, layer by layer, where there are any.
pub fn inner_table(layers: &[InnerRow], out: &mut dyn Write) -> Result<()> {
    if !layers.is_empty() {
        writeln!(out, "\n{:>5}  {:>12}  {:>10}  {:>13}  {:>8}", "layer", "mini-batches", "loss of W0", "before update", "after")?;
        for (layer, row) in layers.iter().enumerate() {
            let count = units::grouped(row.mini_batches);
            writeln!(out, "{layer:>5}  {count:>12}  {:>10.4}  {:>13.4}  {:>8.4}", row.initial, row.before, row.after)?;
        }
    }
    Ok(())
}

/// Everything.
pub fn object(report: &Report) -> Value {
    let mut object = numbers(report.total());
    object["margin"] = json!(report.overall().margin);
    object["positions"] = json!(report.loss_by_position());
    object["inner"] = inner(report);
    object
}

/// The inner models' losses, layer by layer, in all and by position.
pub fn inner(report: &Report) -> Value {
    let layers = report.inner().into_iter().zip(report.inner_by_position());
    let layer = |(row, positions)| {
        let mut object = json!(row);
        object["positions"] = json!(positions as Vec<InnerRow>);
        object
    };
    layers.map(layer).collect()
}

/// A line about one document.
pub fn line(e: &Evaluation) -> String {
    format!("{:>10} tokens  loss {:.4}  {:.4} bits/byte", units::grouped(e.tokens), e.loss(), e.bits_per_byte())
}

/// Its numbers.
pub fn numbers(e: &Evaluation) -> Value {
    json!({
        "loss": e.loss(), "perplexity": e.perplexity(), "bits_per_byte": e.bits_per_byte(), "tokens": e.tokens, "bytes": e.bytes,
    })
}

/// An object with a name in it.
pub fn with_name(name: &str, mut object: Value) -> Value {
    object["name"] = json!(name);
    object
}

/// `1`, `2-3`, `1,024-2,047`.
fn span(from: u64, to: u64) -> String {
    if to == from + 1 { units::grouped(from) } else { format!("{}-{}", units::grouped(from), units::grouped(to - 1)) }
}
