//! `compare` and `report` on runs that the program has made.

use crate::Place;

/// Two small runs with results: `m` and `n`.
fn two_runs() -> Place {
    let place = Place::with_model();
    place.train(&["--out", "n", "-q", "model.inner=mlp"]).ok();
    for run in ["m", "n"] {
        place.run(&["eval", run, "--data", "text.txt", "--keep"]).ok().says(&["kept in", "results/eval.json"]);
    }
    let line = ["bench", "decode", "m", "--after", "16,100", "--repeat", "1", "--keep"];
    place.run(&line).ok().says(&["decode 1, after 16 tokens", "decode 1, after 100 tokens", "kept in m/results/decode.json"]);
    place
}

#[test]
fn runs_are_compared_in_pictures_tables_and_json() {
    let place = two_runs();
    let ran = place.run(&["compare", "m", "other=n", "--out", "pictures"]).ok();
    let ran = ran.says(&["## Losses", "| m | TTT-Linear", "| other | TTT-MLP", "## Cost of training", "loss-tokens"]);
    let table = String::from_utf8(place.read("pictures/table.md")).unwrap();
    assert!(ran.out.starts_with(&table) && table.contains("| m | eval |"), "{table}");
    for name in [
        "loss-tokens",
        "loss-flops",
        "loss-time",
        "loss-position",
        "decode-latency",
        "decode-memory",
        "inner-loss-m",
        "inner-loss-other",
    ] {
        assert!(place.read(&format!("pictures/{name}.svg")).starts_with(b"<svg"), "{name}");
        assert!(place.read(&format!("pictures/{name}.png")).starts_with(b"\x89PNG"), "{name}");
    }
    let json = place.run(&["compare", "m", "other=n", "--json"]).ok().json();
    let written: serde_json::Value = serde_json::from_slice(&place.read("pictures/compare.json")).unwrap();
    assert_eq!(json, written);
    let run = &json["runs"][0];
    // 20 steps of 128 tokens; the losses are those of the run's own files.
    assert_eq!((run["tokens"].as_u64(), run["validation"]["step"].as_u64()), (Some(2560), Some(20)));
    let kept: serde_json::Value = serde_json::from_slice(&place.read("m/results/eval.json")).unwrap();
    let [read, wrote] = [&run["evaluations"][0], &kept].map(|e| e["loss"].as_f64().unwrap());
    assert!((read - wrote).abs() < 1e-12, "{read} {wrote}");
    assert!(kept["command"].as_array().unwrap().iter().any(|word| word == "--keep"), "{kept}");
    let decode = &run["decoding"][0]["results"];
    assert_eq!((decode[0]["after"].as_u64(), decode[1]["after"].as_u64()), (Some(16), Some(100)));
    assert_eq!(decode[0]["state_bytes"], decode[1]["state_bytes"], "the state of a TTT model has one size");
    // Again, over what is there.
    place.run(&["compare", "m", "--out", "pictures"]).ok();
    place.no_temporary_files();
}

#[test]
fn a_report_is_one_page() {
    let place = two_runs();
    place.run(&["report", "m", "n", "--out", "page.html", "--title", "two & more"]).ok().says(&["page.html", "tables", "pictures"]);
    let page = String::from_utf8(place.read("page.html")).unwrap();
    assert!(
        page.contains("<title>two &amp; more</title>") && page.contains("loss-position") && page.trim_end().ends_with("</html>")
    );
    assert!(!page.contains("https://") && !page.contains("src="));
    place.no_temporary_files();
}

#[test]
fn what_cannot_be_compared_is_said() {
    let place = Place::with_model();
    place.run(&["compare", "nowhere"]).fails(1, &["nowhere is no run folder", "settings.toml"]);
    place.run(&["compare", "m/final"]).fails(1, &["m/final is no run folder"]);
    place.run(&["compare", "x=m", "x=m"]).fails(1, &["two runs are called `x`", "OTHER=RUN"]);
    place.run(&["compare"]).fails(2, &["<RUN>"]);
    place.write("m/results/x.json", "{\"loss\": 1}");
    place.run(&["compare", "m"]).fails(1, &["x.json", "move it elsewhere"]);
    std::fs::remove_dir_all(place.path("m/results")).unwrap();
    place.run(&["bench", "decode", "--keep", "--repeat", "1"]).fails(2, &["name its folder"]);
    place.run(&["bench", "prefill", "m", "--keep"]).fails(2, &["--keep is for decode"]);
    place.run(&["bench", "prefill", "m", "--after", "5"]).fails(2, &["--after is for decode"]);
    place.run(&["eval", "m", "--data", "text.txt", "--keep=a/b"]).fails(1, &["letters, digits"]);
    std::fs::rename(place.path("m/final"), place.path("alone")).unwrap();
    place.run(&["eval", "alone", "--data", "text.txt", "--keep"]).fails(1, &["--keep puts the result into a run folder"]);
    assert!(!place.path("m/results").exists() && !place.path("compare").exists());
}
