//! The other commands: that each does what its help says.

use crate::Place;

#[test]
fn help_of_every_command() {
    let place = Place::new();
    let help = place.run(&["--help"]).ok();
    let commands = [
        "train",
        "eval",
        "compare",
        "report",
        "task",
        "generate",
        "read",
        "state",
        "chat",
        "serve",
        "verify",
        "plan",
        "info",
        "convert",
        "import",
        "quantize",
        "tokenizer",
        "bench",
        "doctor",
        "kernels",
        "completions",
    ];
    let listed: Vec<&str> = help.out.lines().filter_map(|l| l.strip_prefix("  ")?.split_whitespace().next()).collect();
    assert_eq!(listed[..commands.len()], commands, "{}", help.out);
    for command in commands {
        let help = place.run(&[command, "--help"]).ok();
        assert!(help.out.contains("Usage: ttt"), "{}", help.out);
    }
    place.run(&["--version"]).ok().says(&["ttt "]);
}

#[test]
fn info_convert_and_eval() {
    let place = Place::with_model();
    let info = place.run(&["info", "m", "--json"]).ok().json();
    let parts = info["parameters_by_part"].as_object().unwrap();
    assert_eq!(parts.values().map(|n| n.as_u64().unwrap()).sum::<u64>(), info["parameters"].as_u64().unwrap());
    assert_eq!(info["config"]["hidden_size"], 32);
    place.run(&["info", "m", "--tensors"]).ok().says(&["a sequence", "however long it is", "[258, 32] model.embed_tokens.weight"]);

    // The same weights in shards are the same model; rounded ones are not, but nearly.
    place.run(&["convert", "m", "shards", "--max-shard-size", "20kB"]).ok().says(&["model.safetensors.index.json"]);
    place.run(&["convert", "m", "half", "--dtype", "bf16"]).ok();
    place.run(&["convert", "m", "half"]).fails(1, &["half", "not empty"]);
    place.run(&["convert", "m", "no", "--dtype", "int3"]).fails(2, &["int3"]);
    let hash = |model| place.run(&["info", model, "--json"]).ok().json()["hash"].clone();
    assert_eq!(hash("shards"), info["hash"]);
    assert_ne!(hash("half"), info["hash"]);
    let loss = |model: &str, more: &[&str]| {
        let line = [&["eval", model, "--data", "text.txt", "--json"][..], more].concat();
        place.run(&line).ok().json()["loss"].as_f64().unwrap()
    };
    assert_eq!(loss("shards", &[]), loss("m", &[]));
    assert!((loss("half", &[]) - loss("m", &[])).abs() < 0.05);
    assert!((loss("m", &["--dtype", "f64"]) - loss("m", &[])).abs() < 1e-4);
    assert_ne!(loss("m", &["--context", "16"]), loss("m", &[]));

    // Documents add up to the whole.
    place.write("two.jsonl", "{\"text\": \"one two three\"}\n{\"text\": \"four\"}\n");
    let line = ["eval", "m", "--data", "two.jsonl", "text.txt", "--per-document"];
    let all = place.run(&[&line[..], &["--json"]].concat()).ok().json();
    let each = all["per_document"].as_array().unwrap();
    assert_eq!(each.iter().map(|d| d["name"].as_str().unwrap()).collect::<Vec<_>>(), ["two.jsonl:1", "two.jsonl:2", "text.txt"]);
    let nll: f64 = each.iter().map(|d| d["loss"].as_f64().unwrap() * d["tokens"].as_f64().unwrap()).sum();
    assert!((nll / all["tokens"].as_f64().unwrap() - all["loss"].as_f64().unwrap()).abs() < 1e-9);
    place.run(&line).ok().says(&["two.jsonl:2", "documents      3", "bits per byte"]);
}

#[test]
fn plan() {
    let place = Place::new();
    place.write("wide.toml", "[model]\npreset = \"125m\"\ninner = \"mlp\"\n");
    let plan = place.run(&["plan", "wide.toml", "--batch", "2", "--length", "64", "--json"]).ok().json();
    assert_eq!(plan["parameters"], 114_589_776);
    let total = |kind: &str| plan["memory_bytes"][kind]["total"].as_u64().unwrap();
    assert!(
        total("training") > total("training_recompute_inner")
            && total("training_recompute_inner") > total("training_recompute_block")
    );
    assert!(total("training_recompute_block") > total("inference"));
    place.run(&["plan"]).ok().says(&["parameters", "--recompute block", "MiB"]);
    place.run(&["plan", "wide.toml", "model.hiden_size=3"]).fails(1, &["did you mean `model.hidden_size`?"]);
}

#[test]
fn tokenizers() {
    let place = Place::new();
    let train = ["tokenizer", "train", "--data", "text.txt", "--vocab-size", "280", "--out", "tok"];
    place.run(&train).ok().says(&["280 ids"]);
    place.run(&train).fails(1, &["tok/tokenizer.json exists"]);
    place.run(&["tokenizer", "info", "--tokenizer", "tok"]).ok().says(&["280", "BOS          0"]);
    let text = "12 green bottles, déjà vu";
    for tokenizer in ["tok", "bytes"] {
        let ids = place.run(&["tokenizer", "encode", text, "--tokenizer", tokenizer]).ok().out;
        let back = place.run(&["tokenizer", "decode", ids.trim(), "--tokenizer", tokenizer]).ok().out;
        assert_eq!(back.trim_end(), text);
    }
    place.write("latin.txt", b"\xe9");
    place
        .run(&["tokenizer", "train", "--data", "latin.txt", "--vocab-size", "280", "--out", "no"])
        .fails(1, &["latin.txt: not UTF-8"]);
    place.run(&["tokenizer", "train", "--data", "text.txt", "--vocab-size", "10", "--out", "no"]).fails(1, &["too small", "258"]);
    assert!(!place.path("no").exists());

    // A model with it, end to end.
    place.train(&["--tokenizer", "tok", "model.vocab_size=280", "--out", "run", "-q"]).ok();
    place.run(&["generate", "run", "--prompt", "3 green", "-n", "5"]).ok();
    assert!(!place.run(&["generate", "run", "--prompt", "3", "-n", "1"]).ok().err.contains("warning"));

    // Of ids without text there is one line; too few are refused.
    let ran = place.train(&["--tokenizer", "tok", "model.vocab_size=288", "--out", "padded", "-q"]).ok();
    let warning = "warning: the model has 288 ids, the tokenizer makes 280: ids 280 to 287 stand for no text\n";
    assert_eq!(ran.err.matches(warning).count(), 1, "{}", ran.err);
    let ran = place.run(&["generate", "padded", "--prompt", "3 green", "-n", "5"]).ok();
    assert_eq!(ran.err, warning);
    place
        .train(&["--tokenizer", "tok", "model.vocab_size=279", "--out", "no"])
        .fails(1, &["the tokenizer has 280 ids", "model.vocab_size=280"]);
    place.run(&["info", "run"]).ok().says(&["tokenizer.json, 280 ids, BOS 0, EOS 1"]);
}

#[test]
fn bench_and_doctor() {
    let place = Place::new();
    let small = ["model.hidden_size=32", "model.num_attention_heads=2", "model.num_hidden_layers=1", "model.vocab_size=64"];
    let line = |more: &[&'static str]| [&["bench"][..], more, &["--length", "32", "--repeat", "2", "--json"]].concat();
    for (what, results) in [
        (&["train"][..], 1),
        (&["train", "--no-optimizer", "--recompute", "block"], 1),
        (&["train", "--only-initial-state"], 1),
        (&["ops"], 17),
    ] {
        let json = place.run(&line(&[what, &small].concat())).ok().json();
        let all = json["results"].as_array().unwrap();
        assert_eq!(all.len(), results, "{json}");
        assert!(json["matmul_flops"].as_f64().unwrap() > 0.0 && json["read_bandwidth"].as_f64().unwrap() > 0.0);
        for r in all {
            let [min, median, max] = ["min", "median", "max"].map(|k| r["tokens_per_second"][k].as_f64().unwrap());
            assert!(0.0 < min && min <= median && median <= max, "{r}");
            assert!(r["arithmetic_utilisation"].as_f64().unwrap() > 0.0, "{r}");
        }
    }
    place
        .run(&["bench", "--preset", "tiny", "--inner", "mlp", "--length", "16", "--repeat", "1"])
        .ok()
        .says(&["TTT-MLP", "decode 1"]);
    place.run(&["bench", "prefill", "--preset", "huge"]).fails(1, &["no preset is called `huge`"]);
    place.run(&["doctor"]).ok().says(&["self test  TTT-MLP", "GFLOP/s", "device     the processor"]);
    assert_eq!(place.run(&["doctor", "--json"]).ok().json()["passed"], true);
    place.run(&["completions", "zsh"]).ok().says(&["#compdef ttt"]);
}
