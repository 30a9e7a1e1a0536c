//! Runs that stop before their end: Ctrl-C, and a full disk. Nothing is lost, and what goes on ends as if nothing had happened.

use std::os::unix::process::CommandExt;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Place, Ran, train_line};

/// Waits until the run has trained for some steps.
fn wait_for_step(place: &Place, child: &mut Child, run: &str, step: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let line = format!(r#""split":"train","step":{step},"#);
    while !std::fs::read_to_string(place.path(run).join("metrics.jsonl")).is_ok_and(|text| text.contains(&line)) {
        assert!(Instant::now() < deadline, "no step {step} after a minute");
        assert!(child.try_wait().unwrap().is_none(), "the run ended before step {step}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a run measured, without the times.
fn losses(place: &Place, run: &str) -> Vec<(Value, Value, Value, Value)> {
    let text = String::from_utf8(place.read(&format!("{run}/metrics.jsonl"))).unwrap();
    let record = |line: &str| {
        let mut r: Value = serde_json::from_str(line).unwrap();
        (r["split"].take(), r["step"].take(), r["loss"].take(), r["grad_norm"].take())
    };
    text.lines().map(record).collect()
}

#[test]
fn ctrl_c_saves_and_resume_ends_the_same() {
    let place = Place::new();
    // 600 steps; checkpoints only at the end, so that what is resumed is what Ctrl-C saved.
    let long = ["train.tokens=76800", "checkpoint.every=0", "eval.every=100", "sample.every=0"];
    place.train(&[&long[..], &["--out", "whole", "-q"]].concat()).ok();

    let mut child = place.command(&train_line(&[&long[..], &["--out", "parts"]].concat())).spawn().unwrap();
    wait_for_step(&place, &mut child, "parts", 30);
    let ran = interrupt(child);
    assert_eq!(ran.code, Some(130), "{}{}", ran.out, ran.err);
    let ran = ran.says(&["interrupted; go on with", "train --resume parts"]);
    assert!(!ran.err.contains("error"), "{}", ran.err);
    assert!(!place.path("parts/final").exists());
    place.no_temporary_files();

    // The run folder is a model already.
    place.run(&["generate", "parts", "--prompt", "a", "-n", "2"]).ok();
    place.run(&["info", "parts"]).ok().says(&["training    step"]);
    place.run(&["train", "--resume", "parts", "-q"]).ok().says(&["going on after step"]);
    assert!(place.read("parts/final/model.safetensors") == place.read("whole/final/model.safetensors"), "the weights differ");
    assert_eq!(losses(&place, "parts"), losses(&place, "whole"));
}

/// Asks a run to save and stop.
fn interrupt(child: Child) -> Ran {
    // SAFETY: the signal goes to the child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    Ran::from(child.wait_with_output().unwrap())
}

/// What is printed goes on exactly as before, from the same folder; and from another one, where the data was named by a relative path.
#[test]
fn the_printed_command_goes_on() {
    let place = Place::new();
    let more = ["train.tokens=25600", "checkpoint.every=0", "eval.every=0", "sample.every=0", "--device", "reference", "-q"];
    let mut child = place.command(&train_line(&[&more[..], &["--out", "run"]].concat())).spawn().unwrap();
    wait_for_step(&place, &mut child, "run", 3);
    // While it trains, nobody else may.
    place.run(&["train", "--resume", "run", "-q"]).fails(1, &["another process is training the run in run"]);
    let ran = interrupt(child);
    let line = ran.out.lines().find(|line| line.contains("--resume")).unwrap_or_else(|| panic!("{}{}", ran.out, ran.err)).trim();
    assert!(line.ends_with("train --resume run --device reference --quiet"), "{line}");
    let mut again = std::process::Command::new("sh");
    again.args(["-c", &format!("exec {line}")]).current_dir(place.path(""));
    let mut child = again.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    wait_for_step(&place, &mut child, "run", 20);
    assert_eq!(interrupt(child).code, Some(130));

    place.write("sub/x", "");
    let mut elsewhere = place.command(&["train", "--resume", "../run", "train.tokens=25600", "-q"]);
    elsewhere.current_dir(place.path("sub"));
    Ran::from(elsewhere.output().unwrap()).ok().says(&["going on after step", "model  ../run/final"]);
    place.no_temporary_files();
}

/// Writing more than `bytes` to a file fails, as on a full disk.
fn limited(place: &Place, args: &[&str], bytes: u64) -> Ran {
    let mut command = place.command(args);
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: between fork and exec only these two calls are made, both of which are safe there.
    unsafe {
        command.pre_exec(move || {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    Ran::from(command.output().unwrap())
}

#[test]
fn a_full_disk_keeps_the_last_checkpoint() {
    let place = Place::new();
    place.train(&["--out", "run", "-q"]).ok();
    let kept: Vec<String> =
        place.files().into_iter().filter(|f| f.starts_with("run/checkpoints") || f.starts_with("run/final")).collect();
    let before: Vec<Vec<u8>> = kept.iter().map(|f| place.read(f)).collect();
    assert!(kept.iter().any(|f| f.contains("step-00000020")));

    // The weights fit, the optimizer's moments, twice as large, do not.
    let weights = place.read("run/final/model.safetensors").len() as u64;
    let line = ["train", "--resume", "run", "train.tokens=5120", "eval.every=100", "-q"];
    let ran = limited(&place, &line, weights * 3 / 2);
    let ran = ran.fails(1, &["run/checkpoints/step-00000025/optimizer.safetensors", "File too large"]);
    ran.says(&["nothing before run/checkpoints/step-00000020 is lost", "train --resume run"]);
    place.no_temporary_files();
    for (file, bytes) in kept.iter().zip(&before) {
        assert!(place.read(file) == *bytes, "{file} changed");
    }
    assert_eq!(place.read("run/latest"), b"step-00000020\n");
    place.run(&line).ok().says(&["going on after step 20"]);

    // Nor is anything left of a conversion, or of tokens, that did not fit.
    limited(&place, &["convert", "run", "out"], weights / 2).fails(1, &["out/model.safetensors", "File too large"]);
    assert!(!place.path("out").exists());
    limited(&place, &train_line(&["--out", "new/run"]), 1000).fails(1, &["File too large"]);
    assert!(!place.path("new/run").exists());
    place.no_temporary_files();
}
