//! Comparisons of runs: small run folders with known numbers.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ttt::params::ParamTable;
use ttt::plan;
use ttt::results::Comparison;
use ttt::train::Settings;
use ttt::train::metrics::{Metrics, Record, Split};

/// A run of some seed whose validation loss ends at `last`.
fn run(folder: &Path, name: &str, inner: &str, seed: u64, last: f64) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir_all(path.join("results")).unwrap();
    let mut settings = Settings::default();
    for assignment in [&format!("model.inner={inner}"), &format!("train.seed={seed}"), &format!("log.every={}", seed + 1)] {
        settings.apply_override(assignment).unwrap();
    }
    std::fs::write(path.join("settings.toml"), settings.to_toml()).unwrap();
    let mut metrics = Metrics::create(path.join("metrics.jsonl")).unwrap();
    for step in 0..=100u64 {
        let at = step as f64 / 100.0;
        let loss = last + 4.0 * (1.0 - at).powi(3);
        if step > 0 {
            let more = Record {
                tokens_per_second: Some(1000.0 + at),
                elapsed_seconds: Some(2.0 * step as f64),
                ..Record::new(Split::Train, step, step * 1000, loss)
            };
            metrics.write(&more).unwrap();
        }
        if step % 10 == 0 {
            let more = Record {
                bits_per_byte: Some(loss / 2.0),
                elapsed_seconds: Some(2.0 * step as f64),
                memory_bytes: Some(3 << 20),
                ..Record::new(Split::Validation, step, step * 1000, loss)
            };
            metrics.write(&more).unwrap();
        }
    }
    path
}

fn keep(run: &Path, name: &str, result: &Value) {
    std::fs::write(run.join("results").join(name), result.to_string()).unwrap();
}

fn evaluation(loss: f64) -> Value {
    let row = |from: u64, to: u64, loss: f64| json!({"from": from, "to": to, "tokens": to - from, "loss": loss, "margin": 0.05, "clusters": "documents"});
    let positions: Vec<_> = (0..12).map(|i| row(1 << i, 2 << i, loss + 3.0 * 0.7f64.powi(i))).collect();
    let inner = |layer: f64| {
        let row =
            |i: i32| json!({"from": 1 << i, "to": 2 << i, "mini_batches": 3, "initial": 2.0 + layer, "before": 1.5, "after": 1.2});
        json!({"positions": (4..12).map(row).collect::<Vec<_>>()})
    };
    json!({"loss": loss, "margin": 0.01, "bits_per_byte": loss / 2.0, "tokens": 4095, "context": null, "positions": positions, "inner": [inner(0.0), inner(1.0)], "novel": 7})
}

fn decoding(batch: u64) -> Value {
    let row = |after: u64| {
        let rates = json!({"median": 500.0, "min": 400.0, "max": 600.0, "all": [400.0, 500.0, 600.0]});
        json!({"name": "decode", "after": after, "tokens_per_second": rates, "state_bytes": 1u64 << 21, "peak_memory_bytes": 5u64 << 20})
    };
    json!({"device": "a test", "batch": batch, "results": [row(64), row(1024), row(65536)]})
}

fn compared(folders: &[PathBuf]) -> Comparison {
    Comparison::read(&folders.iter().map(|f| (None, f.clone())).collect::<Vec<_>>()).unwrap()
}

/// Two runs with everything, and one of another seed with training alone.
fn three(folder: &Path) -> Comparison {
    let [a, b, c] = [("linear", "linear", 0, 2.0), ("mlp", "mlp", 0, 1.75), ("linear-1", "linear", 1, 2.5)]
        .map(|(name, inner, seed, last)| run(folder, name, inner, seed, last));
    for (run, loss) in [(&a, 2.1), (&b, 1.8)] {
        keep(run, "eval.json", &evaluation(loss));
        keep(run, "decode.json", &decoding(2));
    }
    keep(&a, "short.json", &evaluation(2.2));
    let task = json!({"task": "recall", "seed": 0, "sequences": 10, "results": [{"pairs": 8, "length": 32, "accuracy": 0.75, "margin": 0.1, "chance": 0.125, "exact": 0.5, "loss": 1.0, "judged": 80}]});
    keep(&b, "recall.json", &task);
    std::fs::write(a.join("results/notes.txt"), "no result").unwrap();
    compared(&[a, b, c])
}

#[test]
fn a_run_folder_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let comparison = three(folder.path());
    let json = comparison.json();
    let run = &json["runs"][0];
    let settings = Settings::load(folder.path().join("linear/settings.toml")).unwrap();
    let config = settings.model_config().unwrap();
    assert_eq!(run["parameters"].as_u64(), Some(ParamTable::new(&config).0.parameters() as u64));
    assert_eq!(run["flops"].as_f64(), Some(plan::flops(&config, 256).training * 100_000.0));
    assert_eq!(
        (run["seconds"].as_f64(), run["tokens"].as_u64(), run["memory_bytes"].as_u64()),
        (Some(200.0), Some(100_000), Some(3 << 20))
    );
    assert_eq!((run["validation"]["loss"].as_f64(), run["validation"]["step"].as_u64()), (Some(2.0), Some(100)));
    assert_eq!(run["tokens_per_second"].as_f64(), Some(1000.51));
    assert_eq!(run["evaluations"].as_array().unwrap().len(), 2);
    assert_eq!(run["evaluations"][0]["name"], "eval");
    assert_eq!(json["runs"][1]["tasks"][0]["results"][0]["accuracy"], 0.75);
    // Two sequences share 500 tokens a second.
    let decoding = &comparison.runs[0].decoding[0];
    assert_eq!(decoding.latency(&decoding.results[0]), 4.0);
}

#[test]
fn pictures_hold_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = three(folder.path()).pictures();
    let names: Vec<&str> = pictures.iter().map(|p| &*p.0).collect();
    let all = [
        "loss-tokens",
        "loss-flops",
        "loss-time",
        "loss-position",
        "loss-position-short",
        "decode-latency",
        "decode-memory",
        "inner-loss-linear",
        "inner-loss-linear-short",
        "inner-loss-mlp",
    ];
    assert_eq!(names, all);
    let plot = |name: &str| pictures.iter().find(|p| p.0 == name).unwrap().1.grids[0].plots[0].clone();
    let tokens = plot("loss-tokens");
    assert_eq!(tokens.lines.iter().map(|l| &*l.name).collect::<Vec<_>>(), ["linear", "mlp", "linear-1"]);
    // The end is the last validation; the steep start is cut where the highest of the runs is after a twentieth of the tokens.
    let end = |name: &str| plot(name).lines.iter().map(|line| *line.points.last().unwrap()).collect::<Vec<_>>();
    assert_eq!(end("loss-tokens"), [(100_000.0, 2.0), (100_000.0, 1.75), (100_000.0, 2.5)]);
    assert_eq!(end("loss-time")[1], (200.0, 1.75));
    let highest = 2.5 + 4.0 * 0.9f64.powi(3);
    let first = tokens.lines[0].points[0];
    assert!((first.1 - highest).abs() < 1e-12 && first.0 > 0.0 && first.0 < 10_000.0, "{first:?}");
    let [linear, mlp] = [0, 1].map(|i| end("loss-flops")[i].0);
    assert!(mlp > 1.1 * linear, "TTT-MLP needs more for a token");
    let position = plot("loss-position");
    assert_eq!(position.lines.len(), 2);
    assert!(position.lines.iter().all(|line| line.points.len() == line.band.len() || line.points.len() == line.band.len() + 1));
    assert_eq!(plot("decode-latency").lines[0].points, [(64.0, 4.0), (1024.0, 4.0), (65536.0, 4.0)]);
    assert_eq!(plot("decode-memory").lines[1].points[0], (64.0, (1 << 20) as f64));
    let inner = &pictures.iter().find(|p| p.0 == "inner-loss-mlp").unwrap().1.grids[0];
    assert_eq!(inner.plots.iter().map(|p| &*p.title).collect::<Vec<_>>(), ["layer 0", "layer 1"]);
    assert_eq!(inner.plots[1].lines.iter().map(|l| l.points[0].1).collect::<Vec<_>>(), [3.0, 1.5, 1.2]);
    for (name, picture) in &pictures {
        assert!(picture.svg().unwrap().starts_with("<svg"), "{name}");
        assert!(picture.png().unwrap().starts_with(b"\x89PNG"), "{name}");
    }
}

#[test]
fn tables_are_markdown() {
    let folder = tempfile::tempdir().unwrap();
    let text = three(folder.path()).markdown();
    for line in [
        "## Losses",
        "| mlp | TTT-MLP, Mamba backbone, 4 x 192 | 2.138M | 100k | 1.7500 | 5.75 | 0.8750 | 1.7500 |",
        "| linear | eval | 2.1000 ± 0.0100 | 8.17 | 1.0500 | 4.095k | all |",
        "| mlp | recall, pairs 8, length 32 | 75.0 % ± 10.0 % | 12.5 % |",
        "| linear | a test | 2 | 64k | 4.000 | 500 | 1 MiB | 5 MiB |",
        "| linear | 2 | 2.2500 | 0.5000 |",
        "| mlp | 1 | 1.7500 | - |",
    ] {
        assert!(text.lines().any(|l| l == line), "`{line}` is not in\n{text}");
    }
    // 2.25 and 1.75 are no further apart than the two seeds.
    assert!(text.contains("no more than that: linear and mlp."), "{text}");
    let mut one = three(folder.path());
    one.runs.truncate(2);
    assert!(!one.markdown().contains("Seeds"));
}

#[test]
fn the_page_holds_everything_and_nothing_foreign() {
    let folder = tempfile::tempdir().unwrap();
    three(folder.path());
    let hostile = "</script><script>alert(1)</script> {{data}}";
    let folders = [(Some(hostile.to_owned()), folder.path().join("linear")), (None, folder.path().join("mlp"))];
    let comparison = Comparison::read(&folders).unwrap();
    let page = comparison.html("a & b <i>");
    assert!(page.starts_with("<!doctype html>") && page.contains("<title>a &amp; b &lt;i&gt;</title>"));
    assert_eq!(page.matches("<script").count(), 2, "a name has become a script");
    assert_eq!(page.matches("</script>").count(), 2);
    assert!(!page.contains("http://") || page.matches("http://").count() == page.matches("http://www.w3.org/2000/svg").count());
    assert!(!page.contains("https://") && !page.contains("@import") && !page.contains("src="), "the page asks for something");
    let data = page.split("type=\"application/json\">").nth(1).unwrap().split("</script>").next().unwrap();
    assert!(serde_json::from_str::<Value>(data).unwrap()["palette"].is_array());
    for (name, picture) in comparison.pictures() {
        assert!(page.contains(&format!("data-picture=\"{}\"", name.replace('<', "&lt;"))), "{name}");
        assert!(data.contains(&json!(picture.grids).to_string().replace('<', "\\u003c")), "{name}");
    }
    for table in comparison.tables() {
        assert_eq!(page.matches(&format!("<h2>{}</h2>", table.title)).count(), 1);
    }
    assert!(page.contains("<b>mlp</b>"), "the best run");
}

#[test]
fn names_differ_and_wrong_folders_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["x/run", "y/run"].map(|name| run(folder.path(), name, "linear", 0, 2.0));
    assert_eq!(compared(&[a.clone(), b.clone()]).runs.iter().map(|r| &*r.name).collect::<Vec<_>>(), ["x/run", "y/run"]);
    let read = |folders: &[(Option<&str>, &Path)]| {
        let folders: Vec<_> = folders.iter().map(|(name, path)| (name.map(str::to_owned), path.to_path_buf())).collect();
        Comparison::read(&folders).map(|c| c.runs.into_iter().map(|r| r.name).collect::<Vec<_>>()).map_err(|e| e.to_string())
    };
    assert_eq!(read(&[(Some("old"), &a), (None, &b)]).unwrap(), ["old", "run"]);
    assert!(read(&[(Some("z"), &a), (Some("z"), &b)]).unwrap_err().contains("two runs are called `z`"));
    assert!(read(&[]).unwrap_err().contains("no run"));
    assert!(read(&[(None, folder.path())]).unwrap_err().contains("is no run folder: there is no settings.toml"));
    keep(&a, "eval.json", &json!({"positions": 3}));
    let message = read(&[(None, &a)]).unwrap_err();
    assert!(message.contains("eval.json: this is no result of `ttt eval --json`") && message.contains("move it"), "{message}");
    std::fs::write(a.join("results/eval.json"), "{").unwrap();
    assert!(read(&[(None, &a)]).unwrap_err().contains("eval.json"));
}

#[test]
fn a_run_that_has_just_begun_compares() {
    let folder = tempfile::tempdir().unwrap();
    let path = run(folder.path(), "new", "linear", 0, 2.0);
    std::fs::remove_file(path.join("metrics.jsonl")).unwrap();
    let comparison = compared(std::slice::from_ref(&path));
    assert!(comparison.pictures().is_empty());
    assert!(comparison.markdown().contains("| new | TTT-Linear, Mamba backbone, 4 x 192 |"));
    assert!(comparison.html("x").contains("1 run."));
    // Training alone, before the third validation, is drawn averaged.
    let mut metrics = Metrics::create(path.join("metrics.jsonl")).unwrap();
    (1..50).for_each(|i| metrics.write(&Record::new(Split::Train, i, i * 10, 5.0 - 0.01 * i as f64)).unwrap());
    let pictures = compared(&[path]).pictures();
    assert_eq!(pictures.iter().map(|p| &*p.0).collect::<Vec<_>>(), ["loss-tokens", "loss-flops"]);
    assert!(pictures[0].1.grids[0].plots[0].y.label.contains("training, averaged"));
}
