//! Skills from the command line: learned, shown, used, refused.

use crate::{Place, TINY};

#[test]
fn a_skill_is_learned_and_used() {
    let place = Place::with_model();
    let text: String = (0..400).map(|i| format!("{i} yellow submarines under the sea\n")).collect();
    place.write("sea.txt", text);
    let settings: Vec<&str> = TINY.iter().copied().filter(|s| !s.starts_with("model.")).collect();
    let line = ["train", "--only-initial-state", "--init-from", "m", "--data", "sea.txt", "optimizer.learning_rate=3e-2", "-q"];
    let ran = place.run(&[&line[..], &settings].concat()).ok();
    ran.says(&["of which", "are learned", "folder  runs/skill\n", "skill  runs/skill/skill.safetensors", "--skill"]);
    place.no_temporary_files();

    let skill = ["--skill", "runs/skill/skill.safetensors"];
    let loss = |more: &[&str]| {
        let line = [&["eval", "m", "--data", "sea.txt", "--json"][..], more].concat();
        place.run(&line).ok().json()["loss"].as_f64().unwrap()
    };
    let (without, with) = (loss(&[]), loss(&skill));
    assert!(with < without, "{without} without, {with} with");
    let learned = place.run(&["eval", "runs/skill", "--data", "sea.txt", "--json"]).ok().json();
    assert_eq!(learned["loss"].as_f64().unwrap(), with);
    let generate =
        |model: &str, more: &[&str]| place.run(&[&["generate", model, "-p", "7 ", "-n", "20"][..], more].concat()).ok().out;
    assert_eq!(generate("m", &skill), generate("runs/skill", &[]));

    // What `info` says of model and file is enough to see what belongs together.
    let info = place.run(&["info", "runs/skill/skill.safetensors", "--json"]).ok().json();
    let of = |model: &str| place.run(&["info", model, "--json"]).ok().json();
    assert_eq!((&info["skill"], &info["tokens"]), (&"skill".into(), &2560.into()));
    assert_eq!(info["base"], of("m")["base"]);
    assert_eq!(info["tokenizer"], of("m")["tokenizer"]["fingerprint"]);
    assert_eq!(of("runs/skill")["base"], of("m")["base"]);
    assert_ne!(of("runs/skill")["hash"], of("m")["hash"]);
    place.run(&["info", "runs/skill/skill.safetensors"]).ok().says(&["skill       \"skill\"", "from 2,560 tokens", "base"]);

    // Another model, another tokenizer, another file.
    place.train(&["--out", "other", "--seed", "1", "-q"]).ok();
    let with = |more: &[&'static str]| [&["generate", "m", "-p", "a", "-n", "1"][..], more].concat();
    let line = ["generate", "other", "-p", "a", "-n", "1", skill[0], skill[1]];
    place.run(&line).fails(1, &["skill.safetensors: the skill \"skill\" was learned for another model"]);
    place.run(&with(&["--skill", "m/final/model.safetensors"])).fails(1, &["no skill"]);
    place.run(&with(&["--skill", "absent"])).fails(1, &["absent"]);
    place.run(&["tokenizer", "train", "--data", "text.txt", "--vocab-size", "258", "--out", "tok"]).ok();
    place.run(&with(&["--tokenizer", "tok", skill[0], skill[1]])).fails(1, &["learned with another tokenizer"]);
    place.run(&["info", "sea.txt"]).fails(1, &["sea.txt"]);
    place.train(&["--only-initial-state", "--out", "no"]).fails(1, &["needs a trained model to start from: --init-from MODEL"]);
    assert!(!place.path("no").exists());
}
