//! The paper's ladder, made small: every configuration trains, reads in pieces, writes, and is compared with the others.

use std::path::Path;

use crate::{Place, TINY};

#[test]
fn every_rung_trains_and_is_compared() {
    let place = Place::new();
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/ladder");
    let mut names: Vec<String> = std::fs::read_dir(&configs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".toml").map(str::to_owned))
        .collect();
    names.sort();
    assert_eq!(names.len(), 8);
    // README.md beside them has these keys too.
    let small = ["data.validation_paths=[]", "data.tokenizer=bytes", "data.cache=cache", "model.vocab_size=258", "-q"];
    for name in &names {
        let config = configs.join(format!("{name}.toml"));
        let line = [&["train", config.to_str().unwrap(), "--data", "text.txt", "--threads", "2", "--out", name][..], &TINY, &small];
        place.run(&line.concat()).ok();
        let line = ["generate", name, "--prompt", "12 green", "-n", "5", "--json", "--no-eos", "--state-out", "a.state"];
        assert_eq!(place.run(&line).ok().json()["tokens"].as_array().unwrap().len(), 5);
        let learner = if name.as_str() < "3" {
            "linear_attention"
        } else if name.as_str() < "6" {
            "batch"
        } else {
            "linear"
        };
        assert_eq!(place.run(&["state", "info", "a.state", "--json"]).ok().json()["learner"], learner);
        // The sums of unnormalised linear attention grow with what is read: rungs before mini-batches read at the length they were
        // trained at, the others the whole text.
        let context: &[&str] = if name.as_str() < "6" { &["--context", "32"] } else { &[] };
        place.run(&[&["eval", name, "--data", "text.txt", "--keep", "--json"], context].concat()).ok();
        place.run(&["plan", name]).ok();
    }
    let line: Vec<&str> = ["compare"].into_iter().chain(names.iter().map(String::as_str)).chain(["--json"]).collect();
    let json = place.run(&line).ok().json();
    let runs = json["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 8);
    for run in runs {
        // From ln 258, 5.55, in 20 steps.
        let loss = run["validation"]["loss"].as_f64().unwrap();
        assert!(loss < 5.0, "{} ended at {loss}", run["name"]);
        let read = run["evaluations"][0]["loss"].as_f64().unwrap();
        assert!(read < 5.0, "{} reads on at {read}", run["name"]);
    }
    // What only remembers has no inner loss; what learns in mini-batches has one.
    let inner = |i: usize| runs[i]["evaluations"][0]["inner"].as_array().unwrap().len();
    assert_eq!((0..8).map(inner).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 2, 2, 2]);
    let models: Vec<&str> = runs.iter().map(|run| run["model"].as_str().unwrap()).collect();
    assert!(models[0].starts_with("linear attention") && models[7].starts_with("TTT-Linear, Mamba backbone"), "{models:?}");
}
