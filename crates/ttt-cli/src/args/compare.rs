//! What `ttt compare` and `ttt report` read and write.

use std::path::PathBuf;

const COMPARE_HELP: &str = "\
Writes into the folder of --out: table.md, compare.json, and every picture that there are numbers for, as .svg and .png: \
loss against tokens, arithmetic and time; loss by position; decoding time and memory against length; inner losses of each layer. \
What is measured after training is read from the folder results/ of each run, where --keep puts it.

Examples:
  ttt compare runs/linear runs/mlp
  ttt eval runs/linear --data book.txt --keep             loss by position and inner losses, for the comparison
  ttt bench decode runs/linear --after 64,1024,16384 --keep
  ttt compare 'TTT-Linear=runs/a' 'TTT-MLP=runs/b' --out pictures";

/// Arguments of `ttt compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = COMPARE_HELP)]
pub struct Compare {
    /// Folders of runs, or NAME=RUN
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<String>,
    /// Folder to write; files of the same names are replaced
    #[arg(long, value_name = "DIR", default_value = "compare")]
    pub out: PathBuf,
    /// Print everything as a JSON object, and write nothing
    #[arg(long, conflicts_with = "out")]
    pub json: bool,
}

const REPORT_HELP: &str = "\
The page holds everything itself and works without a network: tables, and pictures in which lines can be hidden, a range looked at \
closely (drag; double-click goes back), and values read off.

Example:
  ttt report runs/linear runs/mlp --out report.html --title 'Linear or MLP?'";

/// Arguments of `ttt report`.
#[derive(Debug, clap::Args)]
#[command(after_help = REPORT_HELP)]
pub struct ReportPage {
    /// Folders of runs, or NAME=RUN
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<String>,
    /// File to write
    #[arg(long, value_name = "FILE.html", default_value = "report.html")]
    pub out: PathBuf,
    /// Title of the page [default: the names of the runs]
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,
}
