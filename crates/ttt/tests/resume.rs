//! Going on with a run: what it refuses, what may change, and what it finds again.

mod support;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use support::runs::{StopAfter, corpus, never, settings};
use ttt::Error;
use ttt::device::Device;
use ttt::train::Settings;
use ttt::train::observe::{Event, Observer};
use ttt::train::run::{Job, run};
use ttt::train::settings::MAY_CHANGE;

/// A run in `folder/run` that was stopped after four of its twelve steps.
fn stopped(folder: &Path) -> Job {
    let settings = settings(folder, "linear");
    let job = Job { settings, folder: folder.join("run"), resume: false, device: Device::cpu().unwrap() };
    assert!(matches!(run(&job, &StopAfter::steps(4)), Err(Error::Interrupted)));
    Job { resume: true, settings: Settings::of_run(&job.folder).unwrap(), ..job }
}

fn refused(job: &Job, assignment: &str) -> String {
    let mut job = job.clone();
    job.settings.apply_override(assignment).unwrap();
    let before = std::fs::read(job.folder.join("settings.toml")).unwrap();
    let error = run(&job, &never()).unwrap_err().to_string();
    assert_eq!(std::fs::read(job.folder.join("settings.toml")).unwrap(), before, "{assignment}");
    error
}

/// Waits at every event until it is let go.
struct Hold(mpsc::SyncSender<()>, std::sync::Mutex<mpsc::Receiver<()>>);

impl Observer for Hold {
    fn event(&self, event: Event<'_>) {
        if let Event::Start { .. } = event {
            self.0.send(()).unwrap();
            self.1.lock().unwrap().recv().unwrap();
        }
    }
}

#[test]
fn a_run_is_trained_by_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let job = stopped(folder.path());
    // As a process leaves it that is killed while it saves.
    let half = job.folder.join("checkpoints/.ttt-99999-7.tmp");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("model.safetensors"), "half").unwrap();
    let ((started, is_started), (go, let_go)) = (mpsc::sync_channel(0), mpsc::sync_channel(0));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| run(&job, &Hold(started, let_go.into())).map(|outcome| outcome.model));
        is_started.recv().unwrap();
        assert!(!half.exists());
        let error = run(&job, &never()).unwrap_err().to_string();
        assert!(error.contains("another process is training the run in"), "{error}");
        go.send(()).unwrap();
        assert_eq!(first.join().unwrap().unwrap(), job.folder.join("final"));
    });
    run(&job, &never()).unwrap();
}

#[test]
fn what_fixes_the_run_cannot_change() {
    let folder = tempfile::tempdir().unwrap();
    let job = stopped(folder.path());
    for (assignment, parts) in [
        ("train.seed=1", &["`train.seed` is 0 in this run and cannot become 1", "--init-from"][..]),
        ("train.batch_tokens=256", &["`train.batch_tokens` is 512"]),
        ("train.sequence_length=128", &["`train.sequence_length` is 64"]),
        ("model.hidden_size=64", &["`model.hidden_size` is 32 in this run and cannot become 64"]),
        ("model.inner=mlp", &["`model.inner` is \"linear\" in this run"]),
        ("optimizer.warmup_steps=3", &["`optimizer.warmup_steps` is not set in this run and cannot become 3"]),
        ("optimizer.beta2=0.99", &["`optimizer.beta2`"]),
        ("data.validation_fraction=0.06", &["`data.validation_fraction` is 0.05"]),
        ("data.document_separator=--", &["`data.document_separator`"]),
        ("model.folder=elsewhere", &["elsewhere"]),
    ] {
        let error = refused(&job, assignment);
        assert!(parts.iter().all(|part| error.contains(part)), "{assignment}: {error}");
    }
    let keys = Settings::keys();
    for key in MAY_CHANGE {
        assert!(keys.iter().any(|k| k == key), "{key} is no setting");
    }
}

#[test]
fn what_does_not_fix_the_run_can_change() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = stopped(folder.path());
    let run_settings = job.settings.clone();
    let elsewhere = folder.path().join("cache").display().to_string();
    let changes = [
        "optimizer.learning_rate=1e-3",
        "optimizer.end_learning_rate=1e-4",
        "optimizer.weight_decay=0.2",
        "optimizer.clip=0.5",
        "train.tokens=8192",
        "train.micro_batch=8",
        "train.recompute=block",
        "train.checkpoint_group=2",
        "train.threads=1",
        "eval.every=5",
        "eval.tokens=512",
        "checkpoint.every=2",
        "checkpoint.keep=1",
        "checkpoint.milestone_every=7",
        "checkpoint.best=false",
        "sample.every=8",
        "sample.prompt=line",
        "sample.tokens=3",
        "log.every=3",
        "log.tensorboard=false",
        &format!("data.cache={elsewhere}"),
    ];
    for change in changes {
        job.settings.apply_override(change).unwrap();
    }
    let unchanged = |key: &&str| !changes.iter().any(|change| change.starts_with(&format!("{key}=")));
    assert_eq!(MAY_CHANGE.iter().filter(|key| unchanged(key)).collect::<Vec<_>>(), [&"data.paths", &"data.validation_paths"]);
    run(&job, &never()).unwrap();
    // The run became longer; what of it was warm-up did not.
    let after = Settings::of_run(&job.folder).unwrap();
    assert_eq!((after.steps(), after.warmup_steps()), (16, run_settings.warmup_steps()));
    assert_eq!(after.optimizer.learning_rate, 1e-3);
    let again = job.settings.continued(&run_settings, &job.folder).unwrap();
    assert_eq!(again.learning_rate().at(1), 1e-3);
}

#[test]
fn moved_data_is_found_and_changed_data_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let job = stopped(folder.path());
    let text = corpus(folder.path());
    let resume = |job: &Job, steps| run(job, &StopAfter::steps(steps)).map(|_| ());
    let interrupted = |result: ttt::Result<()>| assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");

    let file = std::fs::File::options().append(true).open(&text).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    interrupted(resume(&job, 5));
    let moved = folder.path().join("deep/er/text.txt");
    std::fs::create_dir_all(moved.parent().unwrap()).unwrap();
    std::fs::rename(&text, &moved).unwrap();
    let mut at_new_place = job.clone();
    at_new_place.settings.apply_override(&format!("data.paths={}", moved.display())).unwrap();
    interrupted(resume(&at_new_place, 6));

    let mut changed = std::fs::read(&moved).unwrap();
    changed[100] ^= 1;
    std::fs::write(&moved, &changed).unwrap();
    let error = resume(&at_new_place, 7).unwrap_err().to_string();
    assert!(error.contains("the training texts (") && error.contains("--init-from"), "{error}");
    let mut own_validation = at_new_place.clone();
    own_validation.settings.apply_override(&format!("data.validation_paths={}", moved.display())).unwrap();
    let error = resume(&own_validation, 7).unwrap_err().to_string();
    assert!(error.contains("the validation texts (none then, "), "{error}");
    changed[100] ^= 1;
    std::fs::write(&moved, &changed).unwrap();
    resume(&at_new_place, 99).unwrap();
}

/// Paths of a run's settings are kept absolute.
#[test]
fn paths_do_not_depend_on_the_current_folder() {
    let here = std::env::current_dir().unwrap();
    let mut settings = Settings::default();
    for assignment in
        ["data.paths=[\"a.txt\", \"/b/*.txt\", \"c/*.txt\"]", "data.tokenizer=t.json", "data.cache=cache", "model.folder=m"]
    {
        settings.apply_override(assignment).unwrap();
    }
    let located = settings.located().unwrap();
    let absolute = |name: &str| here.join(name).to_str().unwrap().to_owned();
    assert_eq!(located.data.paths, [absolute("a.txt"), "/b/*.txt".into(), absolute("c/*.txt")]);
    assert_eq!(located.data.tokenizer, absolute("t.json"));
    assert_eq!((located.data.cache, located.model.folder), (Some(here.join("cache")), Some(here.join("m"))));
    assert_eq!(Settings::default().located().unwrap(), Settings::default());
}

#[test]
fn ids_without_text_are_mentioned_once() {
    let folder = tempfile::tempdir().unwrap();
    let warnings = |vocab_size: usize| {
        let mut settings = settings(folder.path(), "linear");
        settings.apply_override(&format!("model.vocab_size={vocab_size}")).unwrap();
        let folder: PathBuf = folder.path().join(vocab_size.to_string());
        let watch = StopAfter::steps(1);
        let job = Job { settings, folder, resume: false, device: Device::cpu().unwrap() };
        assert!(matches!(run(&job, &watch), Err(Error::Interrupted)));
        watch.warnings.into_inner().unwrap()
    };
    assert_eq!(warnings(258), [] as [String; 0]);
    assert_eq!(warnings(300), ["the model has 300 ids, the tokenizer makes 258: ids 258 to 299 stand for no text"]);
}
