//! Evaluation by position, tasks, and runs that learn them.

use crate::Place;

#[test]
fn losses_come_by_position() {
    let place = Place::with_model();
    let ran = place.run(&["eval", "m", "--data", "text.txt", "--plot", "loss.svg"]).ok();
    let size = place.read("text.txt").len();
    ran.says(&["bits per byte", "position", "2-3", "1,024-2,047", "sixteenths", "loss of W0", "before update"]);
    let svg = String::from_utf8(place.read("loss.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("position: tokens read before") && svg.contains("layer 1"));

    let json = place.run(&["eval", "m", "--data", "text.txt", "--json", "--buckets", "2"]).ok().json();
    let rows = json["positions"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["tokens"].as_u64().unwrap()).sum::<u64>(), size as u64);
    assert!(rows.iter().any(|r| r["from"] == 6) && rows.iter().all(|r| r["clusters"] == "parts"), "{rows:?}");
    assert!(json["margin"].as_f64().unwrap() > 0.0);
    let inner = json["inner"].as_array().unwrap();
    assert_eq!(inner.len(), 2);
    for layer in inner {
        assert_eq!(layer["mini_batches"].as_u64().unwrap(), size as u64 / 16);
        let [before, after] = ["before", "after"].map(|key| layer[key].as_f64().unwrap());
        assert!(after < before, "an update on a token lowers its loss: {layer}");
        assert!(!layer["positions"].as_array().unwrap().is_empty());
    }
    // The inner losses cost time and change nothing else.
    let without = place.run(&["eval", "m", "--data", "text.txt", "--json", "--buckets", "2", "--no-inner"]).ok().json();
    assert_eq!(without["inner"].as_array().map(Vec::len), Some(0));
    let [with, without] = [&json, &without].map(|j| j["loss"].as_f64().unwrap());
    assert!((with - without).abs() < 1e-5 * with, "{with} {without}");
}

#[test]
fn tasks_are_judged() {
    let place = Place::with_model();
    let line = ["eval", "m", "--sequences", "20", "--task"];
    let run = |more: &[&str]| place.run(&[&line[..], more].concat());
    run(&["recall", "--pairs", "2,8"]).ok().says(&["pairs", "accuracy", "50.0 %", "12.5 %", "all right"]);
    run(&["copy", "--lengths", "16"]).ok().says(&["length", "3.8 %"]);
    let json = run(&["recall", "--json"]).ok().json();
    let row = &json["results"][0];
    assert_eq!((row["pairs"].as_u64(), row["length"].as_u64(), row["judged"].as_u64()), (Some(8), Some(32), Some(160)));
    assert_eq!((json["task"].as_str(), row["chance"].as_f64()), (Some("recall"), Some(0.125)));
    // The seed is all that the sequences depend on.
    assert_eq!(run(&["recall", "--json"]).ok().json(), json);
    assert_ne!(run(&["recall", "--json", "--seed", "1"]).ok().json()["results"], json["results"]);

    let grid = ["needle", "--lengths", "64,128", "--depths", "0,1", "--json", "--plot", "grid.svg"];
    assert_eq!(run(&grid).ok().json()["results"].as_array().unwrap().len(), 4);
    assert!(String::from_utf8(place.read("grid.svg")).unwrap().contains("depth"));
    run(&["needle", "--lengths", "128", "--haystack", "text.txt"]).ok().says(&["0.25", "10.0 %"]);

    run(&["recall", "--pairs", "50"]).fails(1, &["there may be 1 to 26"]);
    run(&["needle", "--lengths", "8"]).fails(1, &["at least"]);
    run(&["copy", "--pairs", "8"]).fails(2, &["--pairs belongs to --task recall"]);
    run(&["recall", "--plot", "x.svg"]).fails(2, &["--plot belongs to --task needle"]);
    place.no_temporary_files();
}

#[test]
fn tasks_are_learned_from_files() {
    let place = Place::new();
    place
        .run(&["task", "recall", "--pairs", "4", "--sequences", "300", "--out", "r"])
        .ok()
        .says(&["300 sequences of 16", "train r/run.toml"]);
    assert_eq!(place.files().iter().filter(|f| f.starts_with("r/")).count(), 3);
    let line = ["train", "r/run.toml", "--out", "m", "-q", "model.hidden_size=32", "--threads", "2"];
    place.run(&line).ok().says(&["steps   19 of 256 tokens"]);
    place.run(&["eval", "m", "--task", "recall", "--pairs", "4"]).ok().says(&["25.0 %"]);
    for (task, length) in [("copy", "64"), ("needle", "64")] {
        place.run(&["task", task, "--sequences", "5", "--out", task]).ok().says(&[&format!("5 sequences of {length}")]);
    }
    place.run(&["task", "copy", "--out", "r"]).fails(1, &["r exists and is not empty"]);
    place.run(&["task", "recall", "--pairs", "99", "--out", "x"]).fails(1, &["there may be 1 to 26"]);
    place.run(&["task", "copy", "--length", "24", "--out", "x"]).fails(1, &["not a multiple of the mini-batch size"]);
    assert!(!place.path("x").exists());
}
