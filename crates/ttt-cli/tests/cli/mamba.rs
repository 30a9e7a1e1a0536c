//! Mamba, from training to a state file, with the commands that TTT models have.

use crate::{Place, TINY};

/// A trained model in `m`.
fn place() -> Place {
    let place = Place::new();
    let mut line = vec!["train", "--data", "text.txt", "--threads", "2", "--out", "m", "model.mixer=mamba"];
    line.extend(TINY.iter().filter(|s| !s.contains("intermediate_size") && !s.contains("attention_heads")));
    place.run(&line).ok().says(&["Mamba", "parameters", "memory", "bits/byte", "done in"]);
    place
}

#[test]
fn train_resume_generate_and_go_on() {
    let place = place();
    let config: serde_json::Value = serde_json::from_slice(&place.read("m/final/config.json")).unwrap();
    assert_eq!((&config["model_type"], &config["architectures"][0]), (&"mamba".into(), &"MambaForCausalLM".into()));
    assert!(config.get("num_attention_heads").is_none() && config.get("mini_batch_size").is_none(), "{config}");
    place.run(&["train", "--resume", "m", "train.tokens=3840", "-q"]).ok().says(&["going on after step 20"]);

    let generate = |more: &[&str]| {
        let line = [&["generate", "m", "--json", "--no-eos", "--temperature", "0"][..], more].concat();
        let json = place.run(&line).ok().json();
        json["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect::<Vec<_>>()
    };
    let whole = generate(&["-p", "7 green bottles", "-n", "40"]);
    assert_eq!(generate(&["-p", "7 green bottles", "-n", "13", "--state-out", "a.state"]), whole[..13]);
    assert_eq!(generate(&["--state-in", "a.state", "-n", "27"]), whole[13..]);
    place.run(&["state", "info", "a.state"]).ok().says(&["Mamba, 2 layers", "28 read, 1 pending"]);

    place.run(&["generate", "m", "--state-in", "a.state", "-n", "5", "--state-out", "b.state"]).ok();
    let diff = place.run(&["state", "diff", "a.state", "b.state"]).ok().says(&["distance of the recurrent state"]);
    assert!(!diff.out.contains("fast weights"), "{}", diff.out);

    // A state of another model is refused in words.
    place.train(&["--out", "ttt", "-q"]).ok();
    place.run(&["generate", "ttt", "--state-in", "a.state"]).fails(1, &["mamba", "use the model that made the state"]);

    let losses = ["m", "narrow"].map(|model| {
        if model == "narrow" {
            place.run(&["quantize", "m", "narrow", "--to", "int8"]).ok();
        }
        place.run(&["eval", model, "--data", "text.txt", "--json"]).ok().json()["loss"].as_f64().unwrap()
    });
    assert!((losses[0] - losses[1]).abs() < 0.1 * losses[0] && losses[0] < 4.0, "{losses:?}");
}

#[test]
fn hugging_face_s_model_is_verified() {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../ttt/tests/fixtures/mamba");
    let reference = format!("{fixture}/reference.safetensors");
    let place = Place::new();
    place.run(&["verify", fixture, &reference]).ok().says(&["grad.backbone.layers.1.mixer.A_log", "all 24 within 1e-4"]);
    place.run(&["convert", fixture, "bf16", "--dtype", "bf16"]).ok();
    place.run(&["verify", "bf16", &reference]).fails(1, &["exceed the tolerance"]);
    place.run(&["info", fixture]).ok().says(&["Mamba", "22"]);
}

#[test]
fn what_only_ttt_has_is_refused() {
    let place = Place::new();
    place
        .run(&["train", "--data", "text.txt", "model.mixer=mamba", "model.mini_batch_size=8"])
        .fails(1, &["model.mini_batch_size is no field of this model, whose mixer is mamba"]);
    place.run(&["plan", "model.mixer=mamba", "model.preset=130m"]).ok().says(&["Mamba: 24 layers of 768", "115,096,320"]);
}
