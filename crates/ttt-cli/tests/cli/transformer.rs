//! A Transformer is a model like any other: every command that takes one.

use crate::{Place, TINY};

fn trained(place: &Place) {
    let mut line = vec!["train", "--data", "text.txt", "--out", "t", "-q", "model.mixer=attention", "model.num_key_value_heads=1"];
    line.extend(TINY);
    place.run(&line).ok();
}

#[test]
fn it_is_trained_described_and_gone_on_with() {
    let place = Place::new();
    trained(&place);
    place.run(&["info", "t"]).ok().says(&["Transformer: ", " of keys and values", "attention", "a token in f32"]);
    place.run(&["plan", "t"]).ok().says(&["Transformer", "of which the attention"]);
    let config: serde_json::Value = serde_json::from_slice(&place.read("t/final/config.json")).unwrap();
    assert_eq!((config["model_type"].as_str(), config["num_key_value_heads"].as_u64()), (Some("llama"), Some(1)));
    let eval = |model: &str| place.run(&["eval", model, "--data", "text.txt", "--json"]).ok().json()["loss"].as_f64().unwrap();
    let loss = eval("t");
    assert!(loss > 1.0 && loss < 258f64.ln(), "{loss}");
    place.run(&["eval", "t", "--data", "text.txt"]).ok().says(&["bits"]);
    place.run(&["quantize", "t", "narrow", "--to", "int8"]).ok();
    assert!((eval("narrow") / loss - 1.0).abs() < 0.02);

    let more = place.run(&["train", "--resume", "t", "train.tokens=3840", "-q"]).ok();
    more.says(&["going on after step 20"]);
    place
        .run(&["train", "--resume", "t", "model.num_key_value_heads=2"])
        .fails(1, &["model.num_key_value_heads", "cannot become 2"]);
}

#[test]
fn another_process_goes_on_from_its_keys_and_values() {
    let place = Place::new();
    trained(&place);
    let ask = |more: &[&str]| -> Vec<u64> {
        let line = [&["generate", "t", "--json", "--no-eos", "--temperature", "0"][..], more].concat();
        place.run(&line).ok().json()["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect()
    };
    let whole = ask(&["-p", "7 green bottles", "-n", "33"]);
    assert_eq!(ask(&["-p", "7 green bottles", "-n", "13", "--state-out", "a.state"]), whole[..13]);
    assert_eq!(ask(&["--state-in", "a.state", "-n", "20"]), whole[13..]);

    // A state is as large as what was read.
    place.run(&["state", "info", "a.state"]).ok().says(&["28 read, 1 pending", "attention, "]);
    let size = |name: &str| place.read(name).len();
    place.run(&["read", "t", "text.txt", "--state-out", "b.state"]).ok();
    let tokens = place.run(&["state", "info", "b.state", "--json"]).ok().json()["tokens"].as_u64().unwrap() as usize;
    let per_token = (size("b.state") - size("a.state")) as f64 / (tokens - 28) as f64;
    let stated = place.run(&["info", "t", "--json"]).ok().json()["state_bytes_per_token"].as_f64().unwrap();
    assert!((per_token / stated - 1.0).abs() < 0.01, "{per_token} and {stated}");
    place.run(&["state", "diff", "a.state", "b.state"]).ok().says(&["the states differ", "tokens read: 28 and ", "no distances"]);
    place.run(&["state", "fork", "a.state", "c.state"]).ok();
    place.run(&["state", "diff", "a.state", "c.state"]).ok().says(&["the states are equal"]);
    assert!(place.run(&["generate", "t", "--state-in", "b.state", "-n", "3"]).ok().out.ends_with('\n'));
}

#[test]
fn its_speed_is_measured() {
    let place = Place::new();
    for what in ["train", "prefill", "decode", "ops", "state"] {
        let line =
            ["bench", what, "--mixer", "attention", "--preset", "tiny", "--length", "48", "--repeat", "1", "--device", "cpu"];
        place.run(&line).ok().says(&["Transformer"]);
    }
}
