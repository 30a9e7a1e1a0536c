//! Checkpoints of the official JAX code: what is read, and what is refused.

mod support;

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;
use support::Golden;
use ttt::config::{Config, Inner};
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
    // The paper's baseline has the same projections and no inner model.
    let baseline = changed(|all| all.retain(|(path, _)| !path.iter().any(|name| name.starts_with("ttt_dense"))));
    refused(read_bytes(&baseline), &["Transformer"]);
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
