//! Checkpoints of the official JAX code: what is read, and what is refused.

mod support;

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;
use support::Golden;
use ttt::config::{Config, Inner, Mixer};
use ttt::device::Device;
use ttt::import;
use ttt::params::{ParamId, Params};
use ttt::{Error, Result};

const GOLDEN: &str = "linear_mamba_preconv";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jax/streaming_params")
}

fn read(path: &Path) -> Result<(Config, Params)> {
    import::read(path, &[], &Device::cpu().unwrap())
}

/// What reading these bytes gives.
fn read_bytes(bytes: &[u8]) -> Result<(Config, Params)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("streaming_params");
    std::fs::write(&path, bytes).unwrap();
    read(&path)
}

#[track_caller]
fn refused(result: Result<(Config, Params)>, words: &[&str]) {
    let Err(error) = result else { panic!("read without an error") };
    let message = error.to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

/// The entries of a stream: path and packed array.
fn entries(mut bytes: &[u8]) -> Vec<(Vec<String>, Vec<u8>)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(rmp::decode::read_array_len(&mut bytes).unwrap(), 2);
        let names = rmp::decode::read_array_len(&mut bytes).unwrap();
        let path = (0..names).map(|_| {
            let (name, rest) = rmp::decode::read_str_from_slice(bytes).unwrap();
            bytes = rest;
            name.to_owned()
        });
        let path = path.collect();
        let len = rmp::decode::read_bin_len(&mut bytes).unwrap() as usize;
        all.push((path, bytes[..len].to_vec()));
        bytes = &bytes[len..];
    }
    all
}

fn packed(entries: &[(Vec<String>, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, array) in entries {
        rmp::encode::write_array_len(&mut out, 2).unwrap();
        rmp::encode::write_array_len(&mut out, path.len() as u32).unwrap();
        for name in path {
            rmp::encode::write_str(&mut out, name).unwrap();
        }
        rmp::encode::write_bin(&mut out, array).unwrap();
    }
    out
}

/// An array as flax packs it.
fn array(shape: &[u64], kind: &str, elements: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    rmp::encode::write_array_len(&mut body, 3).unwrap();
    rmp::encode::write_array_len(&mut body, shape.len() as u32).unwrap();
    for n in shape {
        rmp::encode::write_uint(&mut body, *n).unwrap();
    }
    rmp::encode::write_str(&mut body, kind).unwrap();
    rmp::encode::write_bin(&mut body, elements).unwrap();
    let mut out = Vec::new();
    rmp::encode::write_ext_meta(&mut out, body.len() as u32, 1).unwrap();
    out.extend(body);
    out
}

fn changed(change: impl FnOnce(&mut Vec<(Vec<String>, Vec<u8>)>)) -> Vec<u8> {
    let mut all = entries(&std::fs::read(fixture()).unwrap());
    change(&mut all);
    packed(&all)
}

fn at<'e>(all: &'e mut [(Vec<String>, Vec<u8>)], name: &str) -> &'e mut Vec<u8> {
    &mut all.iter_mut().find(|(path, _)| path.join("/") == name).unwrap_or_else(|| panic!("no {name}")).1
}

#[test]
fn every_parameter_and_the_configuration() {
    let golden = Golden::load(GOLDEN);
    let (config, params) = read(&fixture()).unwrap();
    let wanted = Config { scan_checkpoint_group_size: 4, bos_token_id: Some(1), eos_token_id: Some(2), ..golden.config.clone() };
    assert_eq!(config, Config { max_position_embeddings: golden.config.max_position_embeddings, ..wanted });
    let device = Device::cpu().unwrap();
    let model = golden.model(&device, ttt::DType::F32);
    for (i, entry) in params.table().entries().iter().enumerate() {
        let id = ParamId(i);
        assert_eq!(params.values::<f32>(id), model.params().values::<f32>(id), "{}", entry.name);
    }
}

#[test]
fn a_training_state_of_which_the_optimizer_is_passed_over() {
    let bytes = changed(|all| {
        let moments: Vec<_> =
            all.iter().map(|(path, _)| (["opt_state", "0", "mu"].map(String::from).to_vec(), path.clone())).collect();
        for (path, _) in all.iter_mut() {
            path.splice(0..0, ["params", "params"].map(String::from));
        }
        for (mut path, rest) in moments {
            path.extend(rest);
            all.push((path, b"whatever the optimizer keeps".to_vec()));
        }
        all.insert(0, (vec!["step".into()], vec![0x07]));
    });
    let (_, params) = read_bytes(&bytes).unwrap();
    assert_eq!(params.data().to_f64_vec(), read(&fixture()).unwrap().1.data().to_f64_vec());
}

#[test]
fn what_the_file_does_not_tell_can_be_given() {
    let device = Device::cpu().unwrap();
    let read = |key: &str, value| import::read(&fixture(), &[(key.to_owned(), value)], &device);
    let (config, _) = read("rope_theta", json!(500_000.0)).unwrap();
    assert_eq!((config.rope_theta, config.ttt_layer_type), (500_000.0, Inner::Linear));
    refused(read("rope_teta", json!(1.0)), &["rope_teta", "did you mean `rope_theta`"]);
    refused(read("rope_theta", json!("many")), &["rope_theta is \"many\""]);
    refused(read("num_hidden_layers", json!(3)), &["missing", "model.layers.2."]);
    refused(read("num_hidden_layers", json!(1)), &["another model", "model.layers.1."]);
    refused(read("intermediate_size", json!(49)), &["mlp.gate_proj.weight` has shape [32, 48] and should become [49, 32]"]);
}

const D: usize = 16;
const HEADS: usize = 2;
const WIDE: usize = 12;
const VOCAB: usize = 7;

/// Numbers of the baseline's arrays: name and shape, as the official JAX code has them.
fn baseline_arrays() -> Vec<(String, Vec<usize>)> {
    let block = |name: &str, shape: &[usize]| (format!("model/h/0/{name}"), shape.to_vec());
    let mut all = vec![("model/wte/embedding".into(), vec![VOCAB, D]), ("model/ln_f/kernel".into(), vec![D])];
    all.extend([block("seq_norm/kernel", &[D]), block("ffn_norm/kernel", &[D])]);
    all.extend(["wq", "wk", "wv", "wo"].map(|w| block(&format!("seq_modeling_block/{w}/kernel"), &[D, D])));
    all.extend(
        [("w1", [D, WIDE]), ("w3", [D, WIDE]), ("w2", [WIDE, D])].map(|(w, s)| block(&format!("feed_forward/{w}/kernel"), &s)),
    );
    all
}

fn numbers_of(index: usize, shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product()).map(|i| (0.37 + 1.7 * i as f32 + 3.1 * index as f32).sin() * 0.6).collect()
}

/// A file of a Transformer (`self_attention`).
fn baseline() -> Vec<u8> {
    let entry = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let bytes: Vec<u8> = numbers_of(i, &shape).iter().flat_map(|x| x.to_le_bytes()).collect();
        let sizes: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        (name.split('/').map(String::from).collect(), array(&sizes, "float32", &bytes))
    };
    packed(&baseline_arrays().into_iter().enumerate().map(entry).collect::<Vec<_>>())
}

/// The baseline as the JAX code computes it, in plain loops on its own arrays: neighbours turn, kernels are `[in, out]`.
fn baseline_logits(ids: &[u32], theta: f64) -> Vec<f64> {
    let arrays: Vec<(String, Vec<usize>, Vec<f32>)> =
        baseline_arrays().into_iter().enumerate().map(|(i, (name, shape))| (name, shape.clone(), numbers_of(i, &shape))).collect();
    let get = |end: &str| arrays.iter().find(|(name, ..)| name.ends_with(end)).unwrap();
    let times = |x: &[f64], end: &str| -> Vec<f64> {
        let (_, shape, w) = get(end);
        (0..shape[1]).map(|o| (0..shape[0]).map(|i| x[i] * w[i * shape[1] + o] as f64).sum()).collect()
    };
    let norm = |x: &[f64], end: &str| -> Vec<f64> {
        let scale = (x.iter().map(|x| x * x).sum::<f64>() / D as f64 + 1e-6).sqrt();
        x.iter().zip(&get(end).2).map(|(x, w)| x / scale * *w as f64).collect()
    };
    let d = D / HEADS;
    let turned = |x: Vec<f64>, t: usize| -> Vec<f64> {
        let pair = |i: usize| {
            let angle = t as f64 * theta.powf(-((2 * (i % (d / 2))) as f64) / d as f64);
            let (a, b) = (x[2 * i], x[2 * i + 1]);
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        };
        (0..D / 2).flat_map(pair).collect()
    };
    let (embedding, mut keys, mut values, mut all) = (&get("embedding").2, vec![], vec![], vec![]);
    for (t, id) in ids.iter().enumerate() {
        let x: Vec<f64> = embedding[*id as usize * D..][..D].iter().map(|x| *x as f64).collect();
        let y = norm(&x, "seq_norm/kernel");
        let q = turned(times(&y, "wq/kernel"), t);
        keys.push(turned(times(&y, "wk/kernel"), t));
        values.push(times(&y, "wv/kernel"));
        let mut o = vec![0.0; D];
        for head in 0..HEADS {
            let of = head * d..(head + 1) * d;
            let score = |k: &Vec<f64>| {
                (q[of.clone()].iter().zip(&k[of.clone()]).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = keys.iter().map(score).collect();
            let sum: f64 = weights.iter().sum();
            for (w, v) in weights.iter().zip(&values) {
                of.clone().for_each(|c| o[c] += w / sum * v[c]);
            }
        }
        let x: Vec<f64> = x.iter().zip(times(&o, "wo/kernel")).map(|(a, b)| a + b).collect();
        let y = norm(&x, "ffn_norm/kernel");
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let hidden: Vec<f64> = times(&y, "w1/kernel").into_iter().zip(times(&y, "w3/kernel")).map(|(a, b)| silu(a) * b).collect();
        let x: Vec<f64> = x.iter().zip(times(&hidden, "w2/kernel")).map(|(a, b)| a + b).collect();
        let y = norm(&x, "ln_f/kernel");
        all.extend(embedding.chunks(D).map(|e| e.iter().zip(&y).map(|(a, b)| *a as f64 * b).sum::<f64>()));
    }
    all
}

/// The baseline's heads turn neighbours, ours halves: an imported one computes what the JAX code does all the same.
#[test]
fn the_transformer_baseline_computes_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("streaming_params");
    std::fs::write(&path, baseline()).unwrap();
    let overrides = [("num_attention_heads".to_owned(), json!(HEADS)), ("rope_theta".to_owned(), json!(100.0))];
    let device = Device::cpu().unwrap();
    let (config, params) = import::read(&path, &overrides, &device).unwrap();
    assert_eq!((config.mixer, config.tie_word_embeddings, config.num_hidden_layers), (Mixer::Attention, true, 1));
    let model = ttt::Lm::from_params(&config, params).unwrap();
    let ids = [3, 1, 4, 1, 5, 2, 6, 5];
    let (hidden, _) = model.forward(&ttt::Batch::one(&ids), None, ttt::layer::Keep::Nothing, 1.0).unwrap();
    let ours = model.logits(&hidden, &(0..8).collect::<Vec<_>>()).unwrap().to_f64_vec();
    let error = support::relative(&ours, &baseline_logits(&ids, 100.0));
    assert!(error < 1e-5, "{error}");
    // Fields of other mixers are none of a Transformer's.
    refused(import::read(&path, &[("mini_batch_size".to_owned(), json!(4))], &device), &["no field `mini_batch_size`"]);
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    refused(read_bytes(b""), &["no parameter"]);
    refused(read_bytes(b"{\"model_type\": \"ttt\"}"), &["no checkpoint of the official JAX code"]);
    let whole = std::fs::read(fixture()).unwrap();
    refused(read_bytes(&whole[..whole.len() - 1]), &["cut off", "incomplete"]);
    refused(read_bytes(&whole[..whole.len() / 2]), &["cut off", "incomplete"]);
    let norm = "model/ln_f/kernel";
    refused(read_bytes(&changed(|all| all.retain(|(path, _)| path.join("/") != norm))), &["missing", "model.norm.weight"]);
    refused(read_bytes(&changed(|all| all.push(all[0].clone()))), &["there are two arrays"]);
    refused(read_bytes(&changed(|all| all.push((vec!["model".into(), "extra".into()], vec![])))), &["no TTT model", "model/extra"]);
    let infinite = [f32::INFINITY; 32].map(f32::to_le_bytes).concat();
    refused(
        read_bytes(&changed(|all| *at(all, norm) = array(&[32], "float32", &infinite))),
        &["element 0", "model.norm.weight", "inf"],
    );
    refused(read_bytes(&changed(|all| *at(all, norm) = array(&[32], "int32", &infinite))), &[norm, "holds int32"]);
    refused(read_bytes(&changed(|all| *at(all, norm) = array(&[31], "float32", &infinite))), &[norm, "[31]", "128 bytes"]);
    refused(read_bytes(&changed(|all| *at(all, norm) = array(&[u64::MAX, u64::MAX], "float32", &infinite))), &[norm, "128 bytes"]);
    refused(read_bytes(&changed(|all| *at(all, norm) = vec![0xc0])), &[norm, "no array"]);
    let headless = changed(|all| all.retain(|(path, _)| !path.iter().any(|name| name.starts_with("ttt_dense"))));
    refused(read_bytes(&headless), &["missing", "W1"]);
    // The paper's baseline has four projections and nothing else that mixes tokens.
    refused(read_bytes(&baseline()), &["how many heads", "num_attention_heads=N"]);
    refused(read(Path::new(env!("CARGO_MANIFEST_DIR"))), &["a file is needed"]);
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(import::locate(folder.path()), Err(Error::Io { .. })));
    std::fs::write(folder.path().join("streaming_train_state"), b"").unwrap();
    assert_eq!(import::locate(folder.path()).unwrap(), folder.path().join("streaming_train_state"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Damaged files give an error or other numbers, never a panic or memory that the file does not pay for.
    #[test]
    fn damage_is_survived(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), keep in any::<prop::sample::Index>(), cut: bool) {
        let mut bytes = std::fs::read(fixture()).unwrap();
        // Most bytes are elements; the first kilobyte of an entry has the structure.
        for (place, value) in flips {
            let starts = place.index(bytes.len());
            let near = if value % 2 == 0 { starts % 400 } else { starts };
            bytes[near] ^= value;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        let _ = read_bytes(&bytes);
    }
}
