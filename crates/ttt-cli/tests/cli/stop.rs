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

/// So does a run whose sequences are longer than a step: it saves the states that it carries.
#[test]
fn a_run_that_carries_states_ends_the_same_too() {
    let place = Place::new();
    let long = [
        "train.tokens=38400",
        "train.sequence_length=128",
        "train.segment_length=32",
        "train.segments_per_step=2",
        "train.carry=gradient",
        "train.recompute=segment",
        "checkpoint.every=0",
        "eval.every=0",
        "sample.every=0",
    ];
    let ran = place.train(&[&long[..], &["--out", "whole"]].concat()).ok();
    ran.says(&["carry   sequences of 128 tokens in segments of 32; 2 a step, with gradient across the cuts in a step"]);
    let mut child = place.command(&train_line(&[&long[..], &["--out", "parts", "-q"]].concat())).spawn().unwrap();
    // Stagger and sequence both are under way.
    wait_for_step(&place, &mut child, "parts", 33);
    assert_eq!(interrupt(child).code, Some(130));
    place.run(&["train", "--resume", "parts", "-q"]).ok().says(&["going on after step"]);
    for file in ["final/model.safetensors", "checkpoints/step-00000300/carried_states.safetensors"] {
        assert!(place.read(&format!("parts/{file}")) == place.read(&format!("whole/{file}")), "{file}");
    }
    assert_eq!(losses(&place, "parts"), losses(&place, "whole"));
    let longer = ["train", "--resume", "parts", "train.segment_length=64"];
    place.run(&longer).fails(1, &["`train.segment_length` is 32 in this run and cannot become 64"]);
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

/// Ctrl-C while reading writes the state so far; what is printed goes on to the state that reading without a stop gives.
#[test]
fn ctrl_c_keeps_what_was_read() {
    let place = Place::with_model();
    let text = String::from_utf8(place.read("text.txt")).unwrap();
    place.write("a.txt", text.repeat(3));
    place.write("b.txt", text.repeat(10));
    let line = ["read", "m", "a.txt", "b.txt", "--threads", "1", "--device", "reference", "--state-out"];
    place.run(&[&line[..], &["whole.state"]].concat()).ok().says(&["of 2 documents", "loss of W0"]);

    // Too early there is nothing to keep, and nothing is written.
    let stopped = |delay: u64, line: &[&str]| {
        let child = place.command(line).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        interrupt(child)
    };
    let ran = (0..8).map(|i| stopped(50 << i, &[&line[..], &["part.state"]].concat())).find(|ran| {
        assert_eq!(ran.code, Some(130), "{}{}", ran.out, ran.err);
        assert_eq!(ran.out.contains("go on with"), place.path("part.state").exists(), "{}{}", ran.out, ran.err);
        ran.out.contains("go on with")
    });
    let ran = ran.unwrap().says(&["tokens of ", "state after ", "interrupted; go on with"]);
    assert!(!ran.err.contains("error"), "{}", ran.err);
    place.no_temporary_files();

    // As often as one likes.
    let command = |ran: &Ran| ran.out.lines().find(|line| line.contains("--skip-tokens")).unwrap().trim().to_owned();
    let words = |line: &str| line.split(' ').skip_while(|word| *word != "read").map(str::to_owned).collect::<Vec<_>>();
    let mut next = words(&command(&ran));
    let end = next.iter().position(|word| word == "--state-in").unwrap();
    assert_eq!(next[..end], ["read", "m", "a.txt", "b.txt"], "{next:?}");
    let borrowed: Vec<&str> = next.iter().map(String::as_str).collect();
    let again = stopped(400, &borrowed);
    if again.out.contains("--skip-tokens") {
        next = words(&command(&again));
    }
    if again.code == Some(130) {
        place.run(&next.iter().map(String::as_str).collect::<Vec<_>>()).ok();
    }
    assert!(place.read("part.state") == place.read("whole.state"), "the states differ");

    let most = ["read", "m", "a.txt", "--state-in", "part.state", "--skip-tokens", "100000000", "--state-out", "x.state"];
    place.run(&most).fails(1, &["--skip-tokens leaves out 9", "tokens more than the files have"]);
    place.run(&["read", "m", "a.txt", "--skip-tokens", "5", "--state-out", "x.state"]).fails(2, &["--state-in"]);
    // What an unreadable text finds read is kept, too.
    place.write("c.txt", [text.repeat(3).as_bytes(), b"\xe9"].concat());
    let ran = place.run(&["read", "m", "b.txt", "c.txt", "--state-out", "x.state"]).fails(1, &["c.txt: not UTF-8"]);
    place.write("c.txt", text.repeat(3));
    let next = words(&command(&ran));
    place.run(&next.iter().map(String::as_str).collect::<Vec<_>>()).ok();
    place.run(&["read", "m", "b.txt", "c.txt", "--state-out", "y.state"]).ok();
    place.run(&["state", "diff", "x.state", "y.state"]).ok().says(&["the states are equal"]);
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
