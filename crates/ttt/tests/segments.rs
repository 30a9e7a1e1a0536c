//! Training runs over sequences in segments: which tokens a step reads, what crosses cuts, resume, memory.

mod support;

use std::path::Path;

use proptest::prelude::*;
use support::runs::{StopAfter, corpus, never, settings};
use support::{Random, relative};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::data::{Sampler, Segmenting, Sources, Split as Part, Store, StoreOptions, Streams, Tokenizer};
use ttt::device::Device;
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::adamw;
use ttt::plan;
use ttt::tensor::DType;
use ttt::train::Settings;
use ttt::train::metrics::{self, Split};
use ttt::train::run::{Job, run};
use ttt::train::step::{Carry, MicroBatch, Optimizer, StepSettings};

/// Documents of the given lengths, as the tokens of a store.
fn store(folder: &Path, lengths: &[usize]) -> Store {
    let lines = lengths
        .iter()
        .enumerate()
        .map(|(i, n)| format!("{{\"text\": \"{}\"}}\n", ((b'a' + (i % 26) as u8) as char).to_string().repeat(*n)));
    let path = folder.join("documents.jsonl");
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    let mut options = StoreOptions::new(Sources::resolve(&[path.to_str().unwrap().to_owned()]).unwrap(), folder.join("cache"));
    options.validation_fraction = 0.0;
    Store::open_or_build(&options, &Tokenizer::bytes(258), &|_| ()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every stream reads whole windows, each token once and in order, window after window as the sampler deals them; it starts
    /// afresh at a window's beginning, at step 0, and at documents when asked to, and goes on at the end of a mini-batch only.
    #[test]
    fn streams_read_whole_sequences_and_go_on_at_ends_of_mini_batches(
        lengths in prop::collection::vec(1usize..60, 8..40),
        [mini_batch, of_segment, per_step, of_sequence] in [1usize..6, 1usize..4, 1usize..4, 1usize..4],
        streams in 1usize..5,
        seed in 0u64..100,
        reset_at_documents in any::<bool>(),
    ) {
        let segment = mini_batch * of_segment;
        let sequence = segment * per_step * of_sequence;
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), &lengths);
        let tokens = store.split(Part::Train);
        prop_assume!(tokens.len() > sequence);
        let sampler = Sampler::new(tokens.len(), sequence, seed).unwrap();
        let cut = Segmenting { segment, per_step, mini_batch, reset_at_documents };
        let all = Streams::new(sampler, streams, cut);
        let documents: Vec<_> = (0..tokens.documents()).map(|i| tokens.document(i).tokens).collect();
        let begins = |at: usize| documents.iter().any(|d| d.start == at);
        for stream in 0..streams {
            // Tokens read, and how many since the last fresh start.
            let (mut read, mut since) = (Vec::new(), 0usize);
            for step in 0..3 * of_sequence as u64 {
                for i in 0..per_step {
                    let stretches = all.stretches(tokens, step, stream..stream + 1, i);
                    let rows: usize = stretches.iter().map(|p| p.tokens.len()).sum();
                    prop_assert!(rows.abs_diff(segment) < mini_batch && (reset_at_documents || rows == segment));
                    for stretch in stretches {
                        prop_assert!(!stretch.tokens.is_empty() && stretch.stream == stream);
                        prop_assert!(stretch.fresh || since % mini_batch == 0);
                        let crosses = documents.iter().any(|d| stretch.tokens.start < d.start && d.start < stretch.tokens.end);
                        prop_assert!(!reset_at_documents || (!crosses && stretch.fresh >= begins(stretch.tokens.start)));
                        since = if stretch.fresh { 0 } else { since } + stretch.tokens.len();
                        read.extend(stretch.tokens.map(|t| (t, stretch.fresh)));
                    }
                }
            }
            // What comes before the first whole window is the rest of one.
            let steps = of_sequence as u64;
            let ahead = stream as u64 % steps;
            let window = |round: u64| sampler.range(sampler.nth(round * streams as u64 + stream as u64));
            let mut expected: Vec<usize> = Vec::new();
            for round in 0..4 {
                let window = window(round);
                expected.extend(window.start..window.end - 1);
            }
            let part = ahead as usize * segment * per_step;
            // With resets the first cut may have been moved back by less than a mini-batch.
            let at = read[0].0;
            let planned = expected[part];
            prop_assert!(at <= planned && planned - at < mini_batch && read[0].1);
            prop_assert!(at == planned || reset_at_documents);
            let expected = &expected[part - (planned - at)..];
            let got: Vec<usize> = read.iter().map(|(t, _)| *t).collect();
            prop_assert_eq!(&got[..], &expected[..got.len()]);
            for (i, (token, fresh)) in read.iter().enumerate() {
                let begins_window = (part - (planned - at) + i).is_multiple_of(sequence);
                prop_assert!(*fresh || !begins_window, "a window starts with what was before it, at {}", token);
            }
        }
    }
}

const ADAMW: adamw::Settings = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

fn step_settings(keep: Keep) -> StepSettings {
    StepSettings { lr: 1e-3, inner_lr: 1.0, clip: 1.0, adamw: ADAMW, keep }
}

fn small(inner: Inner) -> Config {
    Config {
        vocab_size: 64,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        ..Config::preset("tiny", inner).unwrap()
    }
}

/// Four sequences of 96 tokens, two at once, in three segments: `[group][segment]`.
fn groups() -> (Vec<Vec<u32>>, Vec<Vec<MicroBatch>>) {
    let sequences: Vec<Vec<u32>> = (0..4).map(|i| Random::new(i).tokens(97, 64)).collect();
    let segment = |group: usize, at: usize| {
        let mut micro = MicroBatch::default();
        for (slot, tokens) in sequences.iter().enumerate().skip(group).take(2) {
            let tokens = &tokens[at..at + 33];
            if at == 0 {
                micro.batch.push_fresh(&tokens[..32], slot)
            } else {
                micro.batch.push(&tokens[..32], slot)
            }
            micro.targets.extend(&tokens[1..]);
        }
        micro.mask = vec![1.0; 64];
        micro
    };
    let groups = [0, 2].map(|group| [0, 32, 64].map(|at| segment(group, at)).into()).into();
    (sequences, groups)
}

/// With gradient across its cuts a step over segments is the step over whole sequences; without, it is another one. What is kept
/// changes no bit.
#[test]
fn a_step_over_segments_is_the_step_over_the_whole() {
    let device = Device::cpu().unwrap();
    for inner in [Inner::Linear, Inner::Mlp] {
        let (sequences, groups) = groups();
        let keep = Keep::Saved { group: 2 };
        let fresh = || {
            let model = Lm::new(&small(inner), &device, DType::F32, 1).unwrap();
            let optimizer = Optimizer::new(&model).unwrap();
            let states = model.states(4).unwrap();
            (model, optimizer, states)
        };
        let (mut model, mut optimizer, _) = fresh();
        let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s[..96]).collect();
        let targets = sequences.iter().flat_map(|s| s[1..].to_vec()).collect();
        let whole = MicroBatch { batch: Batch::packed(&inputs), targets, mask: vec![1.0; 4 * 96] };
        let report = optimizer.step(&mut model, &[whole], &step_settings(keep)).unwrap();
        let m = optimizer.m.data().to_f64_vec();

        let in_segments = |gradient, recompute, keep| {
            let (mut model, mut optimizer, mut states) = fresh();
            let carry = Carry { states: &mut states, gradient, recompute };
            let report = optimizer.step_segments(&mut model, &groups, carry, &step_settings(keep)).unwrap();
            assert!((0..4).all(|slot| states.position(slot) == 96));
            (report, optimizer.m.data().to_f64_vec(), model.params().data().to_f64_vec())
        };
        let (across, across_m, weights) = in_segments(true, false, keep);
        assert!((across.loss - report.loss).abs() < 1e-6 && (across.grad_norm / report.grad_norm - 1.0).abs() < 1e-5);
        assert_eq!((across.counted, report.counted), (384.0, 384.0));
        assert!(relative(&across_m, &m) < 1e-4, "{inner:?} {}", relative(&across_m, &m));
        let others = [Keep::Input { group: 1 }, Keep::Start { group: 1 }].map(|keep| (false, keep));
        for (recompute, keep) in others.into_iter().chain([keep, Keep::Input { group: 3 }].map(|keep| (true, keep))) {
            let (again, _, again_weights) = in_segments(true, recompute, keep);
            assert!(again == across && again_weights == weights, "{inner:?} {recompute} {keep:?}");
        }
        let (truncated, truncated_m, _) = in_segments(false, false, keep);
        assert!((truncated.loss - report.loss).abs() < 1e-6);
        assert!(relative(&truncated_m, &m) > 1e-3, "{inner:?}");
    }
}

/// What must not differ between two runs.
fn measured(run: &Path) -> Vec<(Split, u64, u64, u64, Option<u64>)> {
    let records = metrics::read(run.join("metrics.jsonl")).unwrap();
    records.iter().map(|r| (r.split, r.step, r.tokens, r.loss.to_bits(), r.grad_norm.map(f64::to_bits))).collect()
}

/// Two layers over many short documents; sequences of 128 tokens in segments of 32.
fn segmented(folder: &Path, inner: &str, more: &[&str]) -> Settings {
    let mut settings = settings(folder, inner);
    let path = folder.join("documents.jsonl");
    let lines = (0..300).map(|i| format!("{{\"text\": \"{}\"}}\n", format!("{i} {}. ", i * i % 97).repeat(1 + i % 31)));
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    let data = format!("data.paths={}", path.display());
    let all = [&data, "train.sequence_length=128", "train.segment_length=32", "train.batch_tokens=256", "train.tokens=3072"];
    all.iter().chain(more).for_each(|a| settings.apply_override(a).unwrap());
    settings
}

#[test]
fn a_resumed_run_carries_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let across: &[&str] = &["train.segments_per_step=2", "train.carry=gradient", "train.micro_batch=2"];
    for (name, inner, more) in [
        ("a", "linear", &["train.reset_at_documents=true"][..]),
        ("b", "mlp", &[across, &["train.recompute=segment"]].concat()),
        ("c", "linear", &[across, &["train.reset_at_documents=true", "train.recompute=block"]].concat()),
    ] {
        let job = |part: &str, resume| Job {
            settings: segmented(folder.path(), inner, more),
            folder: folder.path().join(format!("{name}-{part}")),
            resume,
            device: Device::cpu().unwrap(),
        };
        let whole = run(&job("whole", false), &never()).unwrap();
        for stop in [5, 6] {
            let stopped = run(&job("parts", stop > 5), &StopAfter::steps(stop));
            assert!(matches!(stopped, Err(ttt::Error::Interrupted)), "{stopped:?}");
        }
        let parts = run(&job("parts", true), &never()).unwrap();
        assert_eq!(whole.validation.loss.to_bits(), parts.validation.loss.to_bits(), "{name}");
        let (a, b) = (job("whole", false).folder, job("parts", false).folder);
        assert_eq!(measured(&a), measured(&b), "{name}");
        for file in ["final/model.safetensors", "checkpoints/step-00000012/carried_states.safetensors"] {
            assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{name} {file}");
        }

        // The states matter: without them the run would go on otherwise.
        let states = b.join("checkpoints/step-00000012/carried_states.safetensors");
        std::fs::remove_file(states).unwrap();
        let mut longer = job("parts", true);
        longer.settings.apply_override("train.tokens=4096").unwrap();
        let error = run(&longer, &never()).unwrap_err().to_string();
        assert!(error.contains("carried_states.safetensors"), "{error}");
    }
}

/// With gradient across all cuts a run learns what it would from whole sequences, up to rounding; truncated, it sees the same
/// losses but learns something else. What is kept changes nothing.
#[test]
fn a_run_in_segments_is_the_run_over_whole_sequences() {
    let folder = tempfile::tempdir().unwrap();
    let measure = |name: &str, more: &[&str]| -> (Vec<f64>, Vec<f64>) {
        // One document: every segment and every sequence counts all of its targets, so that means of means are means.
        let text = format!("data.paths={}", corpus(folder.path()).display());
        let settings = segmented(folder.path(), "linear", &[&[&text, "train.batch_tokens=512"], more].concat());
        let job = Job { settings, folder: folder.path().join(name), resume: false, device: Device::cpu().unwrap() };
        run(&job, &never()).unwrap();
        let records = metrics::read(job.folder.join("metrics.jsonl")).unwrap();
        let steps = records.iter().filter(|r| r.split == Split::Train);
        steps.map(|r| (r.loss, r.grad_norm.unwrap())).unzip()
    };
    let across = ["train.segments_per_step=4", "train.carry=gradient"];
    let (loss, norm) = measure("across", &across);
    for (name, more) in
        [("whole", &["train.segment_length=128"][..]), ("fewer at once", &[&across[..], &["train.micro_batch=1"]].concat())]
    {
        let (same_loss, same_norm) = measure(name, more);
        // The first update has a rate of 0; AdamW makes much of the rounding of small gradients.
        assert!(relative(&same_loss[..2], &loss[..2]) < 1e-6, "{name}: {same_loss:?} {loss:?}");
        assert!(relative(&same_norm[..2], &norm[..2]) < 1e-4, "{name}: {same_norm:?} {norm:?}");
        assert!(relative(&same_loss, &loss) < 1e-3, "{name}: {same_loss:?} {loss:?}");
    }
    assert_eq!(measure("again", &[&across[..], &["train.recompute=segment"]].concat()), (loss.clone(), norm.clone()));
    let (truncated_loss, truncated_norm) = measure("truncated", &across[..1]);
    assert!(relative(&truncated_loss[..2], &loss[..2]) < 1e-6);
    assert!(relative(&truncated_norm[..1], &norm[..1]) > 1e-3, "{truncated_norm:?} {norm:?}");
}

#[test]
fn planned_memory_of_segments_is_within_a_tenth_of_the_measured_peak() {
    let ttt = |inner| Config::preset("tiny", inner).unwrap();
    for preset in [ttt(Inner::Linear), ttt(Inner::Mlp), Config::transformer("tiny").unwrap()] {
        let inner = preset.kind();
        for (keep, gradient, recompute) in [
            (Keep::Saved { group: 4 }, false, false),
            (Keep::Input { group: 4 }, false, false),
            (Keep::Start { group: 4 }, true, false),
            (Keep::Saved { group: 4 }, true, false),
            (Keep::Saved { group: 4 }, true, true),
            (Keep::Input { group: 4 }, true, false),
        ] {
            let config = Config { vocab_size: 512, ..preset.clone() };
            let device = Device::cpu().unwrap();
            let mut model = Lm::new(&config, &device, DType::F32, 1).unwrap();
            let mut optimizer = Optimizer::new(&model).unwrap();
            let mut states = model.states(4).unwrap();
            let segment = |seed: u64| {
                let mut micro = MicroBatch::default();
                (0..4).for_each(|slot| micro.batch.push(&Random::new(seed + slot).tokens(64, 512), slot as usize));
                micro.targets = micro.batch.tokens.clone();
                micro.mask = vec![1.0; 256];
                micro
            };
            let groups = [vec![segment(1), segment(5), segment(9)]];
            device.memory().reset_peak();
            let carry = Carry { states: &mut states, gradient, recompute };
            optimizer.step_segments(&mut model, &groups, carry, &step_settings(keep)).unwrap();
            let measured = device.memory().usage().peak as f64;
            let segments = plan::Segments { slots: 4, per_step: 3, sequence: 192, gradient, recompute };
            let planned =
                plan::Step { segments: Some(segments), ..plan::Step::new(&config, &[64; 4], keep, plan::Place::Cpu) }.memory();
            let total = planned.total() as f64;
            assert!(
                (total / measured - 1.0).abs() < 0.1,
                "{inner:?} {keep:?} {gradient} {recompute}: planned {planned:?}, measured {measured}"
            );
        }
    }
}
