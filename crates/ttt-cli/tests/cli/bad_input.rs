//! Mistakes: each has one readable message and an exit code, and leaves nothing behind.

use crate::Place;

/// Text files, whatever is wrong with them.
#[test]
fn data_that_cannot_be_used() {
    let place = Place::new();
    place.write("empty.txt", "");
    place.write("latin.txt", b"caf\xe9");
    place.write("bad.jsonl", "{\"text\": \"good\"}\nnot json\n");
    place.write("field.jsonl", "{\"body\": \"good\"}\n");
    place.write("short.txt", "hi");
    std::fs::create_dir(place.path("nothing")).unwrap();
    let cases: [(&str, &[&str]); 7] = [
        ("missing.txt", &["missing.txt does not exist"]),
        ("empty.txt", &["no text"]),
        ("nothing", &["nothing holds no text files"]),
        ("latin.txt", &["latin.txt: not UTF-8: byte 3 is 0xe9", "iconv"]),
        ("bad.jsonl", &["bad.jsonl: line 2: not JSON"]),
        ("field.jsonl", &["field.jsonl: line 1", "its fields are `body`"]),
        ("short.txt", &["a sequence of 32 tokens", "shorten the sequence or add data"]),
    ];
    for (file, message) in cases {
        let line = ["train", "--data", file, "--out", "run", "train.sequence_length=32", "train.batch_tokens=128"];
        place.run(&line).fails(1, message);
        assert!(!place.path("run").exists(), "{file} left a run folder");
        place.no_temporary_files();
    }
}

#[test]
fn settings_that_make_no_run() {
    let place = Place::new();
    place.write("unclosed.toml", "[model\n");
    place.write("unknown.toml", "[train]\nsequence_lenght = 64\n");
    place.run(&["tokenizer", "train", "--data", "text.txt", "--vocab-size", "270", "--out", "tok"]).ok();
    let cases: [(i32, &[&str], &[&str]); 15] = [
        (1, &["train.sequence_length=8"], &["train.sequence_length 8", "mini-batch size 16", "16 is"]),
        (1, &["model.num_attention_heads=3"], &["hidden_size 32 is not divisible by num_attention_heads 3"]),
        (1, &["model.num_attention_heads=32"], &["head size 1", "even"]),
        (1, &["--tokenizer", "tok"], &["the tokenizer has 270 ids", "vocab_size is 258", "model.vocab_size=270"]),
        (1, &["model.vocab_size=64"], &["beyond the vocabulary of 64 ids"]),
        (1, &["--tokenizer", "none.json"], &["none.json"]),
        (1, &["train.sequence_lenght=64"], &["unknown key `train.sequence_lenght`", "did you mean `train.sequence_length`?"]),
        (1, &["unknown.toml"], &["unknown key `train.sequence_lenght` in unknown.toml", "`train.sequence_length`"]),
        (1, &["unclosed.toml"], &["unclosed.toml"]),
        (1, &["absent.toml"], &["absent.toml"]),
        (1, &["optimizer.learning_rate=fast"], &["optimizer.learning_rate"]),
        (1, &["--tokens", "1.5"], &["train.tokens", "not a count"]),
        (1, &["--init-from", "absent"], &["absent does not exist"]),
        (2, &["--seed", "minus"], &["--seed"]),
        (2, &["unclosed.toml", "unknown.toml"], &["two settings files"]),
    ];
    for (code, arguments, message) in cases {
        place.train(&[arguments, &["--out", "run"]].concat()).fails(code, message);
        assert!(!place.path("run").exists(), "{arguments:?} left a run folder");
    }
    place.run(&["train", "letters.txt"]).fails(2, &["neither a settings file", "--data letters.txt"]);
    place.run(&["train", "--resume", "absent"]).fails(1, &["absent is no run folder"]);
    place.run(&["frobnicate"]).fails(2, &["frobnicate"]);
    assert_eq!(place.run(&[]).code, Some(2));
}

/// Model folders that are damaged, hostile or something else.
#[test]
fn models_that_cannot_be_read() {
    let place = Place::with_model();
    let whole = place.read("m/final/model.safetensors");
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = |json: &str| [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
    let cases: [(Vec<u8>, &str); 7] = [
        (Vec::new(), "empty or cut short"),
        (whole[..8 + length / 2].to_vec(), "cut short"),
        (whole[..whole.len() - 1].to_vec(), "damaged or cut short"),
        ([&u64::MAX.to_le_bytes(), &b"{}"[..]].concat(), "no safetensors file, or it is cut short"),
        (header("{not json"), "the header is wrong"),
        (header(r#"{"model.norm.weight":{"dtype":"F32","shape":[4611686018427387904,16],"data_offsets":[0,0]}}"#), "do not fit"),
        (header("{}"), "model.embed_tokens.weight"),
    ];
    for (bytes, message) in cases {
        place.write("m/final/model.safetensors", bytes);
        for line in [
            &["generate", "m", "--prompt", "a"][..],
            &["info", "m"],
            &["convert", "m", "out"],
            &["eval", "m", "--data", "text.txt"],
        ] {
            place.run(line).fails(1, &["model.safetensors", message]);
        }
        assert!(!place.path("out").exists());
        place.no_temporary_files();
    }
    place.write("m/final/model.safetensors", &whole);

    let config = String::from_utf8(place.read("m/final/config.json")).unwrap();
    let cases = [
        ("\"ttt\"", "\"gpt2\"", "models of type \"ttt\""),
        ("\"hidden_size\": 32", "\"hidden_size\": 33", "not divisible"),
        ("\"hidden_size\": 32", "\"hidden_size\": \"wide\"", "hidden_size is \"wide\""),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "model.layers.2"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 999999999", "num_hidden_layers"),
        ("{", "", "config.json"),
    ];
    for (from, to, message) in cases {
        assert!(config.contains(from));
        place.write("m/final/config.json", config.replacen(from, to, 1));
        place.run(&["generate", "m", "--prompt", "a"]).fails(1, &[message]);
    }
    place.write("m/final/config.json", &config);
    place.run(&["generate", "m", "--prompt", "a", "-n", "1"]).ok();

    place.run(&["generate", "absent"]).fails(1, &["absent does not exist"]);
    place.run(&["generate", "text.txt"]).fails(1, &["text.txt is a file"]);
    place.run(&["generate", "."]).fails(1, &["holds no model"]);
    place.run(&["generate", "m", "--prompt-tokens", "258"]).fails(1, &["token id 258", "vocabulary of 258"]);
    place.run(&["generate", "m", "--temperature=-1"]).fails(1, &["temperature is -1"]);
    place.run(&["generate", "m", "--top-p", "1.5"]).fails(1, &["top-p is 1.5"]);
    place.run(&["generate", "m", "--prompt", "a", "--prompt-tokens", "1"]).fails(2, &["cannot be used with"]);
    place.write("empty.txt", "");
    place.run(&["eval", "m", "--data", "empty.txt"]).fails(1, &["nothing to predict"]);
}
