//! State files between processes: generate, eval, read and the `state` commands.

use serde_json::Value;

use crate::{Place, Ran};

fn tokens(ran: &Ran) -> Vec<u64> {
    ran.json()["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect()
}

/// `ttt generate m` greedily, past the end of the text.
fn greedy(place: &Place, more: &[&str]) -> Ran {
    place.run(&[&["generate", "m", "--json", "--no-eos", "--temperature", "0"][..], more].concat()).ok()
}

#[test]
fn another_process_goes_on_as_if_nothing_had_happened() {
    let place = Place::with_model();
    let whole = tokens(&greedy(&place, &["-p", "7 green bottles", "-n", "63"]));
    let first = greedy(&place, &["-p", "7 green bottles", "-n", "13", "--state-out", "a.state"]);
    assert_eq!(tokens(&first), whole[..13]);
    let size = place.read("a.state").len() as u64;
    let state = &first.json()["state"];
    // BOS, 15 bytes and 12 of the 13 new tokens; the last is pending.
    assert_eq!((state["bytes"].as_u64(), state["tokens"].as_u64()), (Some(size), Some(28)));
    let header = place.run(&["state", "info", "a.state", "--json"]).ok().json();
    assert_eq!((header["pending"][0].as_u64(), header["phase"].as_u64()), (Some(whole[12]), Some(12)));
    assert_eq!(tokens(&greedy(&place, &["--state-in", "a.state", "-n", "50"])), whole[13..]);
    // It is also what follows when the first process does not choose at all.
    greedy(&place, &["-p", "7 green bottles", "-n", "0", "--state-out", "b.state"]);
    assert_eq!(tokens(&greedy(&place, &["--state-in", "b.state", "-n", "63"])), whole);

    // A prompt continues too: read at once or in two processes.
    greedy(&place, &["-p", "7 green", "-n", "0", "--state-out", "c.state", "--dtype", "f64"]);
    let two = greedy(&place, &["--state-in", "c.state", "-p", " bottles", "-n", "20", "--dtype", "f64"]);
    assert_eq!(tokens(&two), tokens(&greedy(&place, &["-p", "7 green bottles", "-n", "20", "--dtype", "f64"])));
    place.run(&["generate", "m", "--state-in", "c.state"]).fails(1, &["made in F64 and the model runs in F32", "--dtype"]);
}

#[test]
fn a_read_text_is_the_prompt_of_many() {
    let place = Place::with_model();
    let text = String::from_utf8(place.read("text.txt")).unwrap();
    place.write("short.txt", &text[..3000]);
    // Longer than a chunk and not a multiple of the mini-batch. In f64, so that other chunks give the same choice.
    let read = |args: &[&str]| place.run(&[&["read", "m", "--dtype", "f64"][..], args].concat());
    let ran = read(&["short.txt", "--state-out", "book.state", "--json"]).ok().json();
    assert_eq!([&ran["tokens"], &ran["bytes"], &ran["documents"]].map(|n| n.as_u64().unwrap()), [3000, 3000, 1]);
    assert_eq!(ran["state"]["bytes"].as_u64().unwrap(), place.read("book.state").len() as u64);
    // Measured on the first 128 of each 2,048 tokens, and what was learned helps.
    let inner = ran["inner"].as_array().unwrap();
    assert_eq!(inner.iter().map(|layer| layer["mini_batches"].as_u64().unwrap()).collect::<Vec<_>>(), [16, 16]);
    let mean = |name: &str| inner.iter().map(|layer| layer[name].as_f64().unwrap()).sum::<f64>();
    assert!(mean("after") < mean("before") && mean("before") < mean("initial"), "{ran}");
    let before = place.read("book.state");
    let ask = |args: &[&str]| tokens(&greedy(&place, &[&["--dtype", "f64", "-n", "20"][..], args].concat()));
    assert_eq!(ask(&["--state-in", "book.state"]), ask(&["--prompt-file", "short.txt"]));
    assert!(place.read("book.state") == before);

    // In two parts, and packed.
    place.write("1.txt", &text[..1111]);
    place.write("2.txt", &text[1111..3000]);
    read(&["1.txt", "--state-out", "1.state"])
        .ok()
        .says(&["read 1,111 tokens of 1 documents", "state after 1,111 tokens: 1.state"]);
    read(&["2.txt", "--state-in", "1.state", "--state-out", "2.state"]).ok();
    let diff = place.run(&["state", "diff", "book.state", "2.state", "--json"]).ok().json();
    assert_eq!(diff["tokens"], serde_json::json!([3000, 3000]));
    assert!(diff["distance"].as_array().unwrap().iter().all(|d| d.as_f64().unwrap() < 1e-9), "{diff}");

    // Two documents have an end and a beginning between them; two lines of JSON do too.
    place.write("a.txt", "abc");
    place.write("b.txt", "de");
    place.write("ab.jsonl", "{\"text\": \"abc\"}\n{\"text\": \"de\"}\n");
    read(&["a.txt", "b.txt", "--state-out", "ab.state"]).ok();
    read(&["ab.jsonl", "--state-out", "lines.state"]).ok();
    let ids = "256,97,98,99,257,256,100,101";
    let line = ["generate", "m", "--prompt-tokens", ids, "-n", "0", "--dtype", "f64", "--state-out", "ids.state"];
    place.run(&line).ok();
    for other in ["lines.state", "ids.state"] {
        place.run(&["state", "diff", "ab.state", other]).ok().says(&["the states are equal", "tokens read: 7 and 7"]);
    }

    let empty = ["read", "m", "empty.txt", "--state-out", "x.state"];
    place.write("empty.txt", "");
    place.run(&empty).fails(1, &["no text"]);
    place.write("latin.txt", b"caf\xe9");
    place.run(&["read", "m", "latin.txt", "--state-out", "x.state"]).fails(1, &["latin.txt: not UTF-8: byte 3 is 0xe9"]);
    std::fs::remove_file(place.path("m/final/tokenizer_config.json")).unwrap();
    place.run(&["read", "m", "a.txt", "--state-out", "x.state"]).fails(1, &["no tokenizer", "--tokenizer bytes"]);
    assert!(!place.path("x.state").exists());
    place.run(&["read", "m", "a.txt", "--tokenizer", "bytes", "--state-out", "x.state"]).ok();
    place.no_temporary_files();
}

#[test]
fn eval_judges_the_continuation() {
    let place = Place::with_model();
    let text = place.read("text.txt");
    place.write("whole.txt", &text[..2500]);
    place.write("1.txt", &text[..1234]);
    place.write("2.txt", &text[1234..2500]);
    let eval = |args: &[&str]| place.run(&[&["eval", "m", "--dtype", "f64", "--json", "--data"][..], args].concat());
    let sum = |ran: &Value| ran["loss"].as_f64().unwrap() * ran["tokens"].as_f64().unwrap();
    let whole = eval(&["whole.txt"]).ok().json();
    let first = eval(&["1.txt", "--state-out", "1.state"]).ok().json();
    let second = eval(&["2.txt", "--state-in", "1.state", "--state-out", "2.state"]).ok().json();
    assert_eq!((second["tokens"].as_u64(), second["bytes"].as_f64()), (Some(1266), Some(1266.0)));
    assert_eq!(second["state"]["tokens"].as_u64(), Some(2500));
    let (parts, whole) = (sum(&first) + sum(&second), sum(&whole));
    assert!((parts - whole).abs() < 1e-8 * whole, "{parts} and {whole}");
    // Without what came before, it is another task.
    assert!((sum(&eval(&["2.txt"]).ok().json()) - sum(&second)).abs() > 1e-3);
    // Every document continues the same state, which stays as it is.
    let twice = eval(&["2.txt", "2.txt", "--state-in", "1.state"]).ok().json();
    assert_eq!(twice["loss"], second["loss"]);
    eval(&["1.txt", "2.txt", "--state-out", "x.state"]).fails(1, &["several", "give one file"]);
    eval(&["2.txt", "--state-in", "1.state", "--context", "64"]).fails(2, &["--context"]);
    assert!(!place.path("x.state").exists());
    place.run(&["eval", "m", "--data", "1.txt", "--state-out", "y.state"]).ok().says(&["state after 1,234 tokens: y.state"]);
}

#[test]
fn states_are_described_compared_and_forked() {
    let place = Place::with_model();
    let run = |line: &str| place.run(&line.split(' ').collect::<Vec<_>>());
    run("generate m -p green -n 40 --no-eos --state-out a.state").ok();
    let info = run("state info a.state --model m").ok();
    let size = place.read("a.state").len();
    assert!(size > 10_000, "{size}");
    let info = info.says(&[
        "tokens     45 read, 1 pending",
        "phase      13 of 16",
        "TTT-Linear, 2 layers, f32",
        "bytes",
        "layer  fast weights moved",
    ]);
    assert_eq!(info.out.lines().count(), 10, "{}", info.out);
    let json = run("state info a.state --model m --json").ok().json();
    assert!(json["moved"].as_array().unwrap().iter().all(|m| m.as_f64().unwrap() > 0.0), "{json}");
    assert_eq!(json["bytes"].as_u64().unwrap() as usize, size);
    assert_eq!(json["model"], run("info m --json").ok().json()["hash"]);

    // Forks are equal, go their own ways, and leave the original alone.
    let original = place.read("a.state");
    run("state fork a.state b.state c.state").ok().says(&["b.state, ", "c.state, "]);
    run("state diff a.state c.state").ok().says(&["the states are equal", "tokens read: 45 and 45"]);
    run("generate m --state-in b.state -n 40 --no-eos --state-out b.state").ok();
    assert!(place.read("a.state") == original && place.read("c.state") == original);
    let diff = run("state diff a.state b.state").ok().says(&["the states differ", "tokens read: 45 and 85"]);
    assert!(!diff.out.contains("0.000000"), "{}", diff.out);
    // Of several names one that exists is enough to write none.
    run("state fork a.state d.state c.state").fails(1, &["c.state exists", "--force"]);
    assert!(!place.path("d.state").exists());
    run("state fork a.state d.state b.state --force").ok();
    assert!(place.read("b.state") == original);

    // What does not fit is refused, and nothing is written.
    place.write("cut.state", &original[..size / 2]);
    place.train(&["--out", "other", "-q", "--seed", "9"]).ok();
    let cases = [
        ("generate m --state-in cut.state", "cut short"),
        ("generate m --state-in text.txt", "text.txt"),
        ("generate m --state-in m/final/model.safetensors", "no state file"),
        ("generate m --state-in none.state", "none.state"),
        ("generate other --state-in a.state --state-out x.state", "another model"),
        ("eval other --data text.txt --state-in a.state", "another model"),
        ("read other text.txt --state-in a.state --state-out x.state", "another model"),
        ("state info a.state --model other", "another model"),
        ("state fork cut.state x.state", "cut short"),
    ];
    for (line, message) in cases {
        run(line).fails(1, &[message]);
    }
    assert!(!place.path("x.state").exists());
    run("tokenizer train --data text.txt --vocab-size 258 --out tok").ok();
    run("generate m --state-in a.state --tokenizer tok").fails(1, &["another tokenizer (bytes)"]);
    place.no_temporary_files();
}
