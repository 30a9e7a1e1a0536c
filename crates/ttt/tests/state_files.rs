//! State files: what is in them, what is refused and why, and bytes that mean harm.

#[path = "support/state_harness.rs"]
mod state_harness;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use state_harness::Harness;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::generate::learn;
use ttt::lm::Lm;
use ttt::state::{Learner, StateFile, StateHeader};
use ttt::tensor::DType;

/// Remembers the largest request of each thread.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator, with a note.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// No file here has more than some kilobytes, so no request may be much larger: a header that asks for more must be refused before
/// it is believed.
#[track_caller]
fn nothing_large_was_allocated() {
    assert!(LARGEST.get() <= 1 << 20, "a request for {} bytes", LARGEST.get());
}

/// A file with another header or other data.
fn edit(file: &[u8], change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let mut data = file[8 + length..].to_vec();
    change(&mut header, &mut data);
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A file with other metadata.
fn noted(file: &[u8], notes: &[(&str, &str)]) -> Vec<u8> {
    edit(file, |header, _| {
        for (key, value) in notes {
            match *value {
                "" => header["__metadata__"].as_object_mut().unwrap().shift_remove(*key),
                value => header["__metadata__"].as_object_mut().unwrap().insert((*key).into(), json!(value)),
            };
        }
    })
}

/// Files that a TTT-Linear harness must refuse, and a part of the reason.
fn bad_files() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let (good, mlp) = (Harness::new(Inner::Linear).file().to_vec(), Harness::new(Inner::Mlp).file().to_vec());
    let weights = "layers.0.fast_weights";
    let mut all = vec![
        ("empty", Vec::new(), "too few"),
        ("cut-in-header", good[..100].to_vec(), "cut short"),
        ("cut-in-data", good[..good.len() - 9].to_vec(), "cut short"),
        ("longer", [&good[..], &[0]].concat(), "the file is damaged"),
        ("long-header", [&u64::MAX.to_le_bytes()[..], &good[8..]].concat(), "cut short"),
        ("large-header", [&(1u64 << 40).to_le_bytes()[..], &good[8..]].concat(), "cut short"),
        ("no-state", noted(&good, &[("ttt_state", "")]), "no state file"),
        ("newer", noted(&good, &[("ttt_state", "2")]), "state format 2 is newer"),
        ("version", noted(&good, &[("ttt_state", "one")]), "unknown"),
        ("newer-layout", noted(&good, &[("layout", "7")]), "mini-batch 7 is newer"),
        ("mlp", mlp, "a mlp learner; this model's is linear"),
        ("other-model", noted(&good, &[("model", &"0f".repeat(32))]), "hash is 0f0f0f0f0f0f, this one's"),
        ("mini-batch", noted(&good, &[("mini_batch_size", "16"), ("phase", "6")]), "[heads, 6, row] is needed"),
        ("no-mini-batch", noted(&good, &[("mini_batch_size", "0")]), "not a number from 1"),
        ("phase", noted(&good, &[("phase", "1")]), "phase 1 is not that of 6 tokens"),
        ("phases", noted(&good, &[("phase", "3"), ("tokens", "7")]), "[heads, 3, row] is needed"),
        ("tokens", noted(&good, &[("tokens", "18446744073709551614")]), "not a number from 0"),
        ("no-tokens", noted(&good, &[("tokens", "")]), "`tokens` is missing"),
        ("learner", noted(&good, &[("learner", "mlpp")]), "none of linear, mlp, batch, linear_attention, attention, mamba"),
        ("type", edit(&good, |h, _| h[weights]["dtype"] = json!("I32")), "holds I32"),
        ("shape", edit(&good, |h, _| h[weights]["shape"] = json!([4, 10])), "has shape [4, 10]; [2, 20] is needed"),
        ("rank", edit(&good, |h, _| h[weights]["shape"] = json!([40])), "two axes"),
        (
            "tensor",
            edit(&good, |h, _| {
                h.insert("x".into(), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})).map_or((), |_| ())
            }),
            "no state has",
        ),
        (
            "name",
            edit(&good, |h, _| {
                let tensor = h.shift_remove("layers.1.open_rows").unwrap();
                h.insert("layers.1.rows".into(), tensor);
            }),
            "no tensor `layers.1.open_rows`",
        ),
        ("not-finite", edit(&good, |_, data| data[..4].copy_from_slice(&f32::NAN.to_le_bytes())), "not finite"),
        ("infinite", edit(&good, |_, data| data[400..404].copy_from_slice(&f32::INFINITY.to_le_bytes())), "not finite"),
    ];
    let pending = |id: u32| edit(&good, |_, data| data.splice(data.len() - 4.., id.to_le_bytes()).for_each(drop));
    all.push(("pending", pending(11), "pending token 11 is beyond the vocabulary of 11"));
    // Zero bytes, whatever the other axes say.
    let empty = |shape: Value| {
        edit(&good, |h, _| {
            let at = h["pending"]["data_offsets"][0].clone();
            h.insert("layers.2.fast_weights".into(), json!({"dtype": "F32", "shape": [0, 0], "data_offsets": [at, at]}));
            h.insert("layers.2.open_rows".into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [at, at]}));
        })
    };
    all.push(("no-heads", empty(json!([0, 2, 1u64 << 60])), "no tensor of this model's state"));
    all.push(("too-many", empty(json!([1u64 << 50, 2, 0])), "no tensor of this model's state"));
    all
}

#[test]
fn a_file_says_what_it_is() {
    let mut harness = Harness::new(Inner::Linear);
    let file = harness.file().to_vec();
    assert!(harness.read(&file));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    let mut states = harness.model.states(2).unwrap();
    assert_eq!(states.restore_bytes(1, &harness.model, &file[..]).unwrap().tokens, 6);
    let size = states.save(1, &harness.model, &[7], Some("bytes"), &path).unwrap();
    assert!(std::fs::read(&path).unwrap() == file && size == file.len() as u64);
    let header = StateHeader::read(&path).unwrap();
    let expected = StateHeader {
        model: harness.model.hash().to_owned(),
        learner: Learner::Linear,
        mini_batch: 4,
        tokens: 6,
        tokenizer: Some("bytes".into()),
        pending: vec![7],
        dtype: DType::F32,
        layers: 2,
    };
    assert_eq!((header.phase(), header), (2, expected));

    // Any program that knows the format reads it, and only the two open rows are there.
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let shape = |name: &str| read.tensor(name).unwrap().shape().to_vec();
    assert_eq!([shape("layers.1.fast_weights"), shape("layers.0.open_rows")], [vec![2, 20], vec![2, 2, 8]]);
    assert_eq!([shape("layers.1.pre_conv"), shape("layers.1.qk_conv"), shape("pending")], [vec![3, 8], vec![3, 8], vec![1]]);

    // The size depends on the phase, not on what was read.
    let before = states.to_bytes(1, &harness.model, &[7], Some("bytes")).unwrap();
    learn(&harness.model, &mut states, 1, &[3; 400]).unwrap();
    let after = states.to_bytes(1, &harness.model, &[7], Some("bytes")).unwrap();
    assert!(after.len().abs_diff(before.len()) <= 8, "{} and {}: more than two digits", before.len(), after.len());
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason() {
    for (name, bytes, reason) in bad_files() {
        let mut harness = Harness::new(Inner::Linear);
        assert!(!harness.read(&bytes), "{name} was restored");
        let mut states = harness.model.states(1).unwrap();
        let error = states.restore_bytes(0, &harness.model, bytes).unwrap_err().to_string();
        assert!(error.contains(reason), "{name}: no `{reason}` in: {error}");
    }
    nothing_large_was_allocated();
}

#[test]
fn models_that_differ_in_anything_are_told_apart() {
    let device = Device::cpu().unwrap();
    let config = |mini_batch_size| Config {
        vocab_size: 20,
        num_hidden_layers: 1,
        mini_batch_size,
        ..Config::preset("tiny", Inner::Linear).unwrap()
    };
    let new = |config: &Config, dtype, seed| Lm::new(config, &device, dtype, seed).unwrap();
    let mut model = new(&config(16), DType::F32, 1);
    let file = model.states(1).unwrap().to_bytes(0, &model, &[], None).unwrap();
    let refused = |model: &Lm, reason: &str| {
        let error = model.states(1).unwrap().restore_bytes(0, model, &file[..]).unwrap_err().to_string();
        assert!(error.contains(reason), "no `{reason}` in: {error}");
    };
    refused(&new(&config(8), DType::F32, 1), "mini-batches of 16; this model's have 8");
    refused(&new(&config(16), DType::F64, 1), "made in F32 and the model runs in F64");
    refused(&new(&config(16), DType::F32, 2), "another model");
    model.states(1).unwrap().restore_bytes(0, &model, &file[..]).unwrap();
    // One weight more or less.
    model.params_mut().data_mut().as_mut_slice::<f32>()[0] += 1.0;
    refused(&model, "another model");
}

#[test]
fn distances_and_equality() {
    let harness = Harness::new(Inner::Mlp);
    let model = &harness.model;
    let mut states = model.states(2).unwrap();
    let file = |states: &ttt::States, slot: usize| StateFile::from_bytes(states.to_bytes(slot, model, &[], None).unwrap()).unwrap();
    let start = file(&states, 0);
    learn(model, &mut states, 0, &[1, 2, 3]).unwrap();
    // An open mini-batch has not moved the weights.
    let open = file(&states, 0);
    assert_eq!(start.distances(&open).unwrap(), [0.0, 0.0]);
    assert!(!start.same_state(&open) && start.same_state(&file(&states, 1)));
    learn(model, &mut states, 0, &[4]).unwrap();
    let moved = file(&states, 0);
    for (layer, distance) in start.distances(&moved).unwrap().into_iter().enumerate() {
        let values = |slot: usize| {
            let all = states.layer(layer).ttt().fast.weights().to_f64_vec();
            all[slot * all.len() / 2..(slot + 1) * all.len() / 2].to_vec()
        };
        let norm = |x: Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let expected = norm(values(0).iter().zip(values(1)).map(|(a, b)| a - b).collect()) / norm(values(1));
        assert!(distance > 0.0 && (distance - expected).abs() < 1e-12, "{distance} and {expected}");
    }
    let other = StateFile::from_bytes(Harness::new(Inner::Linear).file()).unwrap();
    assert!(start.distances(&other).unwrap_err().to_string().contains("two models"));
}

#[test]
fn a_state_that_is_not_finite_is_not_saved() {
    let device = Device::cpu().unwrap();
    let config = Config { vocab_size: 20, num_hidden_layers: 1, ..Config::preset("tiny", Inner::Linear).unwrap() };
    let mut model = Lm::new(&config, &device, DType::F32, 1).unwrap();
    model.params_mut().data_mut().as_mut_slice::<f32>().fill(f32::NAN);
    let error = model.states(1).unwrap().to_bytes(0, &model, &[], None).unwrap_err().to_string();
    assert!(error.contains("layers.0.fast_weights") && error.contains("not finite"), "{error}");
}

/// What a metadata value or a number of the header may become.
const VALUES: [&str; 12] =
    ["0", "1", "-1", "2", "4", "1e9", "4294967296", "18446744073709551615", "9223372036854775807", "", "mlp", "\u{0}\"{}"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Changed bytes and cut files: restored or refused, nothing else.
    #[test]
    fn any_bytes_are_restored_or_refused(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        mlp in any::<bool>(),
    ) {
        let mut harness = Harness::new(if mlp { Inner::Mlp } else { Inner::Linear });
        let mut bytes = harness.file().to_vec();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        for (at, byte, in_header) in flips {
            let at = at.index(if in_header { header } else { bytes.len() });
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        harness.read(&bytes);
        nothing_large_was_allocated();
    }

    /// A header that is well formed and wrong.
    #[test]
    fn any_header_is_restored_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..4, prop::sample::select(VALUES.to_vec())), 1..4),
    ) {
        let mut harness = Harness::new(Inner::Linear);
        let bytes = edit(harness.file(), |header, _| {
            for (which, part, value) in edits {
                let number = value.parse::<u64>().map_or(json!(value), |n| json!(n));
                let key = header.keys().nth(which.index(header.len())).unwrap().clone();
                let entry = &mut header[&key];
                match (key.as_str(), part) {
                    ("__metadata__", _) => {
                        let notes = entry.as_object_mut().unwrap();
                        let key = notes.keys().nth(which.index(notes.len())).unwrap().clone();
                        notes.insert(key, json!(value));
                    }
                    (_, 0) => {
                        let axes = entry["shape"].as_array().unwrap().len();
                        entry["shape"][which.index(axes)] = number;
                    }
                    (_, 1) => entry["data_offsets"][which.index(2)] = number,
                    (_, 2) => entry["dtype"] = json!(["F64", "F32", "U32", "F4", "BOOL"][which.index(5)]),
                    _ => {
                        let entry = entry.clone();
                        header.insert(format!("layers.{value}.open_rows"), entry);
                    }
                }
            }
        });
        harness.read(&bytes);
        nothing_large_was_allocated();
    }
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/state")
}

/// The fuzzer's kept files: `ok-` are restored, all others refused.
#[test]
fn the_corpus_is_restored_or_refused() {
    let mut seen = [0, 0];
    for entry in std::fs::read_dir(corpus()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let inner = if name == "ok-mlp" { Inner::Mlp } else { Inner::Linear };
        let restored = Harness::new(inner).read(&std::fs::read(&path).unwrap());
        assert_eq!(restored, name.starts_with("ok-"), "{name}");
        seen[usize::from(restored)] += 1;
    }
    assert!(seen[0] >= 20 && seen[1] >= 2, "{seen:?}");
    nothing_large_was_allocated();
}

/// Writes the corpus anew, after a change of the format.
#[test]
#[ignore = "writes files into the source tree"]
fn write_the_corpus() {
    std::fs::create_dir_all(corpus()).unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(corpus().join(name), bytes).unwrap();
    write("ok-linear", Harness::new(Inner::Linear).file());
    write("ok-mlp", Harness::new(Inner::Mlp).file());
    bad_files().into_iter().for_each(|(name, bytes, _)| write(name, &bytes));
}
