//! The page: tables as they are, pictures as data that a small script draws.

use serde_json::json;

use super::{Comparison, Table};
use crate::chart::PALETTE;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The whole page.
pub(super) fn page(comparison: &Comparison, title: &str) -> String {
    let pictures = comparison.pictures();
    let sections: String = pictures.iter().map(|(name, picture)| section(name, &picture.title)).collect();
    let data: serde_json::Map<_, _> = pictures.iter().map(|(name, picture)| (name.clone(), json!(picture.grids))).collect();
    let palette: Vec<String> = PALETTE.iter().map(|c| format!("#{:02x}{:02x}{:02x}", c.0, c.1, c.2)).collect();
    let data = json!({"pictures": data, "palette": palette});
    let tables: String = comparison.tables().iter().map(table).collect();
    let parts = [
        ("{{title}}", escaped(title)),
        ("{{style}}", STYLE.to_owned()),
        ("{{summary}}", summary(comparison)),
        ("{{tables}}", tables),
        ("{{pictures}}", sections),
        // Nothing in it can end the script, whatever runs are called.
        ("{{data}}", data.to_string().replace('<', "\\u003c")),
        ("{{script}}", SCRIPT.to_owned()),
    ];
    fill(PAGE, &parts)
}

/// The template with its places filled, in one pass: what is put in is not looked at again.
fn fill(template: &str, parts: &[(&str, String)]) -> String {
    let mut page = String::new();
    let mut rest = template;
    while let Some(start) = rest.find("{{") {
        page += &rest[..start];
        rest = &rest[start..];
        let (place, value) = parts.iter().find(|(place, _)| rest.starts_with(place)).expect("every place of the page is known");
        page += value;
        rest = &rest[place.len()..];
    }
    page + rest
}

fn summary(comparison: &Comparison) -> String {
    let runs = comparison.runs.len();
    let best = comparison.runs.iter().filter_map(|run| Some((run.validation()?.loss, &run.name)));
    let best = best.min_by(|a, b| a.0.total_cmp(&b.0));
    let best = best.map_or(String::new(), |(loss, name)| {
        format!(" Lowest validation loss: {loss:.4} nats a token, <b>{}</b>.", escaped(name))
    });
    let noun = if runs == 1 { "run" } else { "runs" };
    format!("{runs} {noun}.{best}")
}

fn section(name: &str, title: &str) -> String {
    let (name, title) = (escaped(name), escaped(title));
    format!(
        "<section class=\"picture\" id=\"{name}\"><h2>{title}</h2><div class=\"grids\" data-picture=\"{name}\"></div></section>\n"
    )
}

fn table(table: &Table) -> String {
    let cell = |tag: &str, (i, text): (usize, &String)| {
        let class = if i < table.words { " class=\"word\"" } else { "" };
        format!("<{tag}{class}>{}</{tag}>", escaped(text))
    };
    let row =
        |tag: &str, cells: &[String]| format!("<tr>{}</tr>\n", cells.iter().enumerate().map(|c| cell(tag, c)).collect::<String>());
    let rows: String = table.rows.iter().map(|cells| row("td", cells)).collect();
    let note = if table.note.is_empty() { String::new() } else { format!("<p class=\"note\">{}</p>", escaped(&table.note)) };
    format!(
        "<section><h2>{}</h2><div class=\"scroll\"><table><thead>{}</thead><tbody>{rows}</tbody></table></div>{note}</section>\n",
        escaped(&table.title),
        row("th", &table.head)
    )
}

/// Text as HTML, also between quotes.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}
