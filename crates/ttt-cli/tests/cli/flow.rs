//! Train, evaluate, generate, go on: what the README shows.

use std::io::Read;

use crate::{Place, TINY};

#[test]
fn train_eval_generate_resume() {
    let place = Place::new();
    let ran = place.train(&[]).ok();
    let ran = ran.says(&[
        "TTT-Linear",
        "parameters",
        "memory",
        "folder  runs/tiny\n",
        "bits/byte",
        "done in",
        "generate runs/tiny --prompt 'The '",
    ]);
    // Validation at steps 0, 5, ..., 20, and two samples.
    let rows = ran.out.lines().filter(|l| l.trim_start().starts_with(|c: char| c.is_ascii_digit())).count();
    assert_eq!(rows, 5, "{}", ran.out);
    assert_eq!(ran.out.matches("│ The ").count(), 2, "{}", ran.out);
    for file in
        ["final/model.safetensors", "final/config.json", "best/model.safetensors", "loss.svg", "metrics.jsonl", "settings.toml"]
    {
        assert!(!place.read(&format!("runs/tiny/{file}")).is_empty(), "{file}");
    }
    place.no_temporary_files();

    // A run folder, its final model and its newest checkpoint are the same model.
    let line = |model: &'static str| ["eval", model, "--data", "text.txt", "--json"];
    let result = place.run(&line("runs/tiny")).ok().json();
    for model in ["runs/tiny/final", "runs/tiny/checkpoints/step-00000020"] {
        assert_eq!(place.run(&line(model)).ok().json(), result, "{model}");
    }
    let text = place.read("text.txt");
    // BOS comes first, so every byte is predicted.
    assert_eq!((result["tokens"].as_u64(), result["bytes"].as_f64()), (Some(text.len() as u64), Some(text.len() as f64)));
    let (loss, bits) = (result["loss"].as_f64().unwrap(), result["bits_per_byte"].as_f64().unwrap());
    assert!(loss > 1.0 && loss < 258f64.ln(), "{loss}");
    assert!((bits - loss / 2f64.ln()).abs() < 1e-9);
    assert!((result["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-6);

    let generated = place.run(&["generate", "runs/tiny", "-p", "1 green", "-n", "30"]).ok().out;
    assert!(generated.ends_with('\n'));
    let more = place.run(&["train", "--resume", "runs/tiny", "train.tokens=3840", "-q"]).ok();
    more.says(&["going on after step 20"]);
    let steps = String::from_utf8(place.read("runs/tiny/metrics.jsonl")).unwrap();
    assert!(steps.contains(r#""split":"validation","step":30"#), "{steps}");

    // A folder in use is not touched: the next run has its own, or is refused.
    let before = place.read("runs/tiny/metrics.jsonl");
    place.train(&["-q"]).ok().says(&["folder  runs/tiny-2\n"]);
    place.train(&["--out", "runs/tiny"]).fails(1, &["runs/tiny exists and is not empty", "--resume runs/tiny"]);
    assert_eq!(place.read("runs/tiny/metrics.jsonl"), before);
}

#[test]
fn settings_come_from_everywhere_and_flags_win() {
    let place = Place::new();
    place.write("mine.toml", "[train]\nseed = 1\ntokens = 256\n[optimizer]\nlearning_rate = 1e-3\nclip = 0.5\n");
    let mut line = vec!["train", "mine.toml", "--data", "text.txt", "--seed", "3", "--recompute", "block", "-q"];
    line.extend(TINY.iter().filter(|s| !s.starts_with("train.tokens")));
    line.extend(["train.seed=2", "optimizer.learning_rate=2e-3", "--tokens", "0.256k"]);
    place.run(&line).ok().says(&["folder  runs/mine\n"]);
    let settings = String::from_utf8(place.read("runs/mine/settings.toml")).unwrap();
    for set in ["seed = 3\n", "learning_rate = 0.002\n", "clip = 0.5\n", "recompute = \"block\"\n", "tokens = 256\n"] {
        assert!(settings.contains(set), "no `{set}` in {settings}");
    }

    // A new run from a trained model has its shape and its weights.
    let line = ["train", "--data", "text.txt", "--init-from", "runs/mine", "--out", "next", "-q"];
    let short: Vec<&str> = TINY.iter().copied().filter(|s| !s.starts_with("model.")).collect();
    place.run(&[&line[..], &short].concat()).ok();
    let start = |metrics: &str| {
        let text = String::from_utf8(place.read(metrics)).unwrap();
        let records = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        records.filter(|r| r["split"] == "validation").map(|r| r["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(start("next/metrics.jsonl")[0], *start("runs/mine/metrics.jsonl").last().unwrap());
}

#[test]
fn generate() {
    let place = Place::with_model();
    let line = |more: &[&'static str]| [&["generate", "m", "--prompt", "7 green", "-n", "12"][..], more].concat();
    let json = place.run(&line(&["--json", "--no-eos"])).ok().json();
    let tokens: Vec<u8> = json["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap().min(255) as u8).collect();
    assert_eq!((tokens.len(), json["logprobs"].as_array().unwrap().len()), (12, 12));
    assert!(json["logprobs"].as_array().unwrap().iter().all(|p| p.as_f64().unwrap() <= 0.0));
    // The stream shows the same text as the object; the same seed the same, another seed another.
    let text = json["text"].as_str().unwrap();
    assert_eq!(place.run(&line(&["--no-eos"])).ok().out, format!("{text}\n"));
    assert_eq!(place.run(&line(&["--no-eos", "--echo"])).ok().out, format!("7 green{text}\n"));
    assert_ne!(place.run(&line(&["--no-eos", "--seed", "1"])).ok().out, format!("{text}\n"));
    place.write("prompt.txt", "7 green");
    assert_eq!(place.run(&["generate", "m", "--prompt-file", "prompt.txt", "-n", "12", "--no-eos"]).ok().out, format!("{text}\n"));
    let verbose = place.run(&line(&["-v"])).ok();
    assert!(verbose.err.contains("tokens/s"), "{}", verbose.err);

    // Without a tokenizer ids go in and out.
    std::fs::remove_file(place.path("m/final/tokenizer_config.json")).unwrap();
    place.run(&line(&[])).fails(1, &["no tokenizer", "--prompt-tokens"]);
    let greedy = ["generate", "m", "--prompt-tokens", "256,55,32,103", "-n", "5", "--temperature", "0", "--no-eos"];
    let ids = place.run(&greedy).ok().out;
    assert_eq!(ids.split_whitespace().map(|id| id.parse::<u32>().unwrap()).filter(|id| *id < 258).count(), 5, "{ids}");
    let json = place.run(&[&greedy[..], &["--json"]].concat()).ok().json();
    assert!(json["text"].is_null());
    let same: Vec<String> = json["tokens"].as_array().unwrap().iter().map(|t| t.to_string()).collect();
    assert_eq!(same.join(" "), ids.trim());
    place.run(&line(&["--tokenizer", "bytes"])).ok();
}

#[test]
fn a_broken_pipe_is_no_failure() {
    let place = Place::with_model();
    for line in [&["generate", "m", "-n", "20000", "--no-eos"][..], &["info", "m", "--tensors"], &["completions", "bash"]] {
        let mut child = place.command(line).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut one = [0];
        out.read_exact(&mut one).unwrap();
        drop(out);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
