//! `ttt quantize`, and `--dtype` of what reads models.

use crate::Place;

#[test]
fn a_quantised_model_is_measured_and_used() {
    let place = Place::with_model();
    let hash = |model| place.run(&["info", model, "--json"]).ok().json()["hash"].clone();
    let text = |model: &str, more: &[&str]| {
        let line =
            [&["generate", model, "--prompt", "fn", "-n", "12", "--temperature", "0", "--json", "--no-eos"][..], more].concat();
        place.run(&line).ok().json()["tokens"].clone()
    };
    for to in ["bf16", "int8"] {
        let line = ["quantize", "m", to, "--to", to, "--data", "text.txt", "--tokens", "300", "--json"];
        let done = place.run(&line).ok().json();
        let number = |pointer| done.pointer(pointer).unwrap().as_f64().unwrap();
        assert!(number("/bytes") < number("/bytes_before"), "{done}");
        assert!(number("/worst_relative_error") > 0.0 && number("/worst_relative_error") < 0.01, "{done}");
        let (before, after) = (number("/before/bits_per_byte"), number("/after/bits_per_byte"));
        assert!(before != after && (after / before - 1.0).abs() < 0.01, "{done}");
        // As stored, and quantised on loading: the same model.
        assert_eq!(text(to, &[]), text("m", &["--dtype", to]));
        assert_ne!(hash(to), hash("m"));
        place.run(&["info", to]).ok().says(&["stored as", to, "in memory"]);
        let eval = |model: &str, more: &[&str]| {
            let line = [&["eval", model, "--data", "text.txt", "--json"][..], more].concat();
            place.run(&line).ok().json()["loss"].as_f64().unwrap()
        };
        assert_eq!(eval(to, &[]), eval("m", &["--dtype", to]));
        assert!((eval(to, &["--dtype", "f64"]) - eval(to, &[])).abs() < 1e-4);
    }
    place.run(&["quantize", "m", "none", "--to", "int8", "--no-eval"]).ok().says(&["worst matrix"]);
    place.run(&["quantize", "m", "none", "--to", "bf16", "--no-eval"]).fails(1, &["none", "not empty"]);
    place.run(&["quantize", "m", "x", "--to", "f32", "--no-eval"]).fails(1, &["bf16 and int8"]);
    place.run(&["quantize", "m", "x", "--to", "int3", "--no-eval"]).fails(2, &["int3"]);
    place.run(&["train", "--init-from", "int8", "--data", "text.txt", "--out", "r"]).fails(1, &["int8", "training"]);
    place.run(&["plan", "int8"]).ok().says(&["as int8"]);
    place.run(&["bench", "decode", "--preset", "tiny", "--dtype", "int8", "--repeat", "1"]).ok().says(&["int8 weights"]);
    place.run(&["bench", "train", "--preset", "tiny", "--dtype", "int8"]).fails(2, &["--dtype"]);
}
