//! Learning the initial fast weights alone, and the files that this gives.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use support::Random;
use support::runs::{StopAfter, never, settings};
use ttt::Error;
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::{Device, Kernels};
use ttt::hub::safetensors::{Dtype, File, Source, write};
use ttt::hub::{Skill, base_hash, model_hash};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::adamw;
use ttt::params::{ParamId, ParamTable};
use ttt::plan;
use ttt::tensor::DType;
use ttt::train::run::{Job, Outcome, run};
use ttt::train::step::{MicroBatch, Optimizer, StepSettings};

const STEP: StepSettings = StepSettings {
    lr: 1e-3,
    inner_lr: 1.0,
    clip: f64::INFINITY,
    adamw: adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 },
    keep: Keep::Saved { group: 2 },
};

fn micro_batch(seed: u64, sequences: usize, len: usize, vocab_size: usize) -> MicroBatch {
    let data: Vec<Vec<u32>> = (0..sequences as u64).map(|i| Random::new(seed + i).tokens(len + 1, vocab_size)).collect();
    let inputs: Vec<&[u32]> = data.iter().map(|s| &s[..len]).collect();
    let batch = Batch::packed(&inputs);
    let mask = (0..batch.tokens.len()).map(|i| f64::from(u8::from(i % 7 != 0))).collect();
    MicroBatch { batch, targets: data.iter().flat_map(|s| s[1..].to_vec()).collect(), mask }
}

/// Every kind of model; on the last the reference loops run.
fn models() -> Vec<Lm> {
    let mut models = Vec::new();
    for (inner, mamba, tied, kernels) in [
        (Inner::Linear, true, true, Kernels::Fast),
        (Inner::Mlp, false, false, Kernels::Fast),
        (Inner::Mlp, true, false, Kernels::Reference),
    ] {
        let config = Config {
            vocab_size: 64,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            use_gate: mamba,
            share_qk: mamba,
            pre_conv: mamba,
            tie_word_embeddings: tied,
            ..Config::preset("tiny", inner).unwrap()
        };
        models.push(Lm::new(&config, &Device::cpu_with(2, kernels).unwrap(), DType::F32, 1).unwrap());
    }
    models
}

#[test]
fn only_w0_is_learned_and_its_gradient_is_that_of_full_training() {
    for (mut partly, mut whole) in models().into_iter().zip(models()) {
        let table = partly.params().table().clone();
        let before = partly.params().data().to_f64_vec();
        let mut some = Optimizer::of_initial_state(&partly).unwrap();
        let mut all = Optimizer::new(&whole).unwrap();
        assert!(some.m.table().entries().iter().all(|e| e.initial_state));
        assert!(some.m.table().parameters() * 5 < table.parameters());
        let micro_batches = [micro_batch(1, 2, 40, 64), micro_batch(5, 2, 40, 64)];
        let [ours, theirs] = [(&mut partly, &mut some), (&mut whole, &mut all)]
            .map(|(model, optimizer)| optimizer.step(model, &micro_batches, &STEP).unwrap());
        assert_eq!((ours.loss.to_bits(), ours.nll.to_bits()), (theirs.loss.to_bits(), theirs.nll.to_bits()));
        assert!(ours.grad_norm > 0.0 && ours.grad_norm < theirs.grad_norm);
        for (index, entry) in some.m.table().entries().iter().enumerate() {
            let id = table.find(&entry.name).unwrap();
            // After the first step both moments are the gradient and its square, scaled.
            for (ours, theirs) in [(&some.m, &all.m), (&some.v, &all.v)] {
                let (ours, theirs): (&[f32], &[f32]) = (ours.values(ParamId(index)), theirs.values(id));
                assert!(ours == theirs && ours.iter().any(|x| *x != 0.0), "{}", entry.name);
            }
            assert!(partly.params().values::<f32>(id) == whole.params().values::<f32>(id), "{}", entry.name);
        }
        let losses: Vec<f64> = (0..5).map(|_| some.step(&mut partly, &micro_batches, &STEP).unwrap().loss).collect();
        assert!(losses[4] < losses[0], "{losses:?}");
        for (index, entry) in table.entries().iter().enumerate() {
            let now = partly.params().values::<f32>(ParamId(index));
            let same = now.iter().zip(&before[entry.range()]).all(|(x, y)| f64::from(*x).to_bits() == y.to_bits());
            assert_eq!(same, !entry.initial_state, "{}", entry.name);
        }
    }
}

/// A job that starts from the model in `base` and learns its W0 alone.
fn skill_job(place: &Path, base: &Path, name: &str) -> Job {
    let mut settings = settings(place, "linear");
    let from = format!("model.folder={}", base.display());
    for assignment in [&from, "train.only_initial_state=true", "train.seed=3", "optimizer.learning_rate=2e-2"] {
        settings.apply_override(assignment).unwrap();
    }
    Job { settings, folder: place.join(name), resume: false, device: Device::cpu().unwrap() }
}

/// A base model and a skill for it.
fn trained(place: &Path, device: &Device) -> (PathBuf, Outcome) {
    let settings = settings(place, "linear");
    let job = Job { settings, folder: place.join("base"), resume: false, device: device.clone() };
    let base = run(&job, &never()).unwrap().model;
    let skill = run(&skill_job(place, &base, "letters"), &never()).unwrap();
    (base, skill)
}

#[test]
fn a_skill_over_its_base_is_the_trained_model() {
    let place = tempfile::tempdir().unwrap();
    let device = Device::cpu().unwrap();
    let (base, outcome) = trained(place.path(), &device);
    let file = outcome.skill.unwrap();
    assert_eq!(file, place.path().join("letters/skill.safetensors"));
    let load = |folder: &Path| Lm::load(folder, &device, DType::F32).unwrap();
    let (mut lm, learned) = (load(&base), load(&outcome.model));
    let base_hashes = (model_hash(lm.params()), base_hash(lm.params()));
    let info = lm.load_skill(&file).unwrap();
    assert_eq!((info.name.as_str(), info.tokens), ("letters", 6144));
    // The model with the skill is another one, so that its states are not taken for the base's.
    assert_ne!(model_hash(lm.params()), base_hashes.0);
    assert_eq!(model_hash(lm.params()), model_hash(learned.params()));
    assert_eq!(base_hash(lm.params()), base_hashes.1);
    let logits = |lm: &Lm| {
        let (hidden, _) = lm.forward(&Batch::one(&Random::new(4).tokens(50, 258)), None, Keep::Nothing, 1.0).unwrap();
        lm.logits(&hidden, &(0..50).collect::<Vec<_>>()).unwrap().to_f64_vec()
    };
    assert!(logits(&lm) == logits(&learned) && logits(&lm) != logits(&load(&base)));
    // It is small, and replaces another skill as well as the base's own W0.
    let weights = std::fs::metadata(base.join("model.safetensors")).unwrap().len();
    assert!(std::fs::metadata(&file).unwrap().len() * 4 < weights);
    let other = run(&skill_job(place.path(), &outcome.model, "again"), &never()).unwrap();
    let mut twice = load(&base);
    twice.load_skill(other.skill.unwrap()).unwrap();
    assert_ne!(model_hash(twice.params()), model_hash(lm.params()));
    twice.load_skill(&file).unwrap();
    assert_eq!(model_hash(twice.params()), model_hash(lm.params()));
}

#[test]
fn a_resumed_skill_is_the_uninterrupted_one_bit_for_bit() {
    let place = tempfile::tempdir().unwrap();
    let (base, _) = trained(place.path(), &Device::cpu().unwrap());
    let read = |file: &str| std::fs::read(place.path().join(file)).unwrap();
    let moments = read("letters/checkpoints/step-00000012/optimizer.safetensors");
    let weights = read("letters/final/model.safetensors");
    assert!(moments.len() < weights.len(), "moments of what is learned only");
    let job = skill_job(place.path(), &base, "sub/letters");
    assert!(matches!(run(&job, &StopAfter::steps(5)), Err(Error::Interrupted)));
    std::fs::remove_dir_all(base.parent().unwrap()).unwrap();
    let mut job = Job { settings: ttt::train::Settings::of_run(&job.folder).unwrap(), resume: true, ..job };
    run(&job, &never()).unwrap();
    for file in ["skill.safetensors", "final/model.safetensors", "checkpoints/step-00000012/optimizer.safetensors"] {
        assert!(read(&format!("letters/{file}")) == read(&format!("sub/letters/{file}")), "{file}");
    }
    job.settings.train.only_initial_state = false;
    let error = run(&job, &never()).unwrap_err().to_string();
    assert!(error.contains("`train.only_initial_state` is true in this run and cannot become false"), "{error}");
    job.settings.train.only_initial_state = true;
    job.settings.model.folder = None;
    let error = job.settings.validate().unwrap_err().to_string();
    assert!(error.contains("needs a trained model to start from: --init-from"), "{error}");
}

/// The tensors of a skill file by name: shape and numbers.
type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

#[test]
fn what_is_no_skill_of_this_model_is_refused_and_changes_nothing() {
    let place = tempfile::tempdir().unwrap();
    let device = Device::cpu().unwrap();
    let (base, outcome) = trained(place.path(), &device);
    let file = outcome.skill.unwrap();
    let mut lm = Lm::load(&base, &device, DType::F32).unwrap();
    let hash = model_hash(lm.params());
    let mut refused = |path: &Path, part: &str| {
        let error = lm.load_skill(path).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(path.to_str().unwrap()), "no `{part}` in: {error}");
        assert_eq!(model_hash(lm.params()), hash, "{part}");
    };

    let whole = std::fs::read(&file).unwrap();
    let damaged = place.path().join("damaged.safetensors");
    for (bytes, part) in [
        (&whole[..0], "empty or cut short"),
        (&whole[..100], "cut short"),
        (&whole[..whole.len() - 1], "damaged or cut short"),
        (b"not a skill at all", "no safetensors file"),
    ] {
        std::fs::write(&damaged, bytes).unwrap();
        refused(&damaged, part);
    }
    refused(&base.join("model.safetensors"), "no skill: skills are what `ttt train --only-initial-state` writes");
    refused(&place.path().join("absent"), "No such file");

    let opened = File::open(&file).unwrap();
    let tensors: Tensors = opened
        .names()
        .map(|name| {
            let tensor = opened.tensor(name).unwrap();
            (name.to_owned(), tensor.shape.to_vec(), tensor.to_vec::<f32>().unwrap())
        })
        .collect();
    let changed = |key: &str, value: &str, change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let mut metadata: Vec<(&str, String)> = opened.metadata().iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        metadata.retain(|(k, _)| *k != "format" && !(*k == key && value.is_empty()));
        metadata.iter_mut().filter(|(k, _)| *k == key).for_each(|(_, v)| *v = value.to_owned());
        write(&damaged, &metadata, tensors.iter().map(|(n, s, v)| Source::floats(n, Dtype::F32, s, v)).collect()).unwrap();
    };
    let nothing = |_: &mut Tensors| ();
    for (key, value, part) in [
        ("ttt_skill", "2", "skill format 2; this program reads format 1"),
        ("tokens", "many", "`tokens` in the skill's metadata is `many`"),
        ("name", "", "lacks `name`"),
        ("base", "é", "`base` in the skill's metadata is no SHA-256"),
        ("base", &"0".repeat(64), "was learned for another model (base 0000000000000000"),
    ] {
        changed(key, value, &nothing);
        refused(&damaged, part);
    }
    let last = tensors.len() - 1;
    type Change<'c> = &'c dyn Fn(&mut Tensors);
    let cases: [(Change<'_>, &str); 5] = [
        (&|t| t[last].2[3] = f32::NAN, "holds NaN at element 3"),
        (&|t| t[last].2[0] = f32::INFINITY, "holds inf"),
        (&|t| t[last].1.push(1), "has shape"),
        (&|t| drop(t.remove(0)), "there is no tensor"),
        (
            &|t| t.push(("model.norm.weight".into(), vec![1], vec![1.0])),
            "`model.norm.weight` is none of the model's initial fast weights",
        ),
    ];
    for (change, part) in cases {
        changed("", "-", change);
        refused(&damaged, part);
    }
    changed("name", "\u{1b}[2J", &nothing);
    assert_eq!(Skill::open(&damaged).unwrap().info().name, "\u{1b}[2J");
    lm.load_skill(&damaged).unwrap();
    assert_ne!(model_hash(lm.params()), hash);
}

#[test]
fn the_plan_knows_what_learning_w0_saves() {
    for inner in [Inner::Linear, Inner::Mlp] {
        let config = Config { vocab_size: 4096, ..Config::preset("tiny", inner).unwrap() };
        let device = Device::cpu().unwrap();
        let mut model = Lm::new(&config, &device, DType::F32, 1).unwrap();
        let mut optimizer = Optimizer::of_initial_state(&model).unwrap();
        device.memory().reset_peak();
        optimizer.step(&mut model, &[micro_batch(1, 1, 128, 4096)], &STEP).unwrap();
        let measured = device.memory().usage().peak as f64;
        let whole = plan::Step::new(&config, &[128], STEP.keep, plan::Place::Cpu).memory();
        let planned = whole.of_initial_state(&config).total() as f64;
        assert!((planned / measured - 1.0).abs() < 0.1, "{inner:?}: planned {planned}, measured {measured}");
        assert!(planned < 0.7 * whole.total() as f64);
        let table = Arc::new(ParamTable::new(&config).0);
        assert!(table.gradients_of_initial_state().parameters() * 2 < table.parameters());
    }
}
