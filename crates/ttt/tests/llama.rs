//! Attention models against Hugging Face's Llama: its folders are read and computed as it does, and written back as it wrote them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ttt::batch::Batch;
use ttt::config::Mixer;
use ttt::device::{Device, Kernels};
use ttt::hub::{ModelFolder, SaveOptions, config_json, save};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::params::{ParamId, Params};
use ttt::tensor::DType;
use ttt::verify::verify;
use ttt::weights::Values;
use ttt::{Error, Storage};

/// See the README beside them.
const FIXTURES: [&str; 2] = ["grouped-tied", "all-heads"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama").join(name)
}

/// Logits, loss and the gradient of every parameter. The reference's angles are f32, which at these 37 positions is an error of
/// some 1e-6 of a turn.
#[test]
fn everything_is_as_hugging_face_computes_it() {
    let (fast, plain) = (Device::cpu().unwrap(), Device::cpu_with(2, Kernels::Reference).unwrap());
    for name in FIXTURES {
        let folder = fixture(name);
        for (device, dtype, limit) in [(&plain, DType::F64, 5e-6), (&plain, DType::F32, 2e-5), (&fast, DType::F32, 2e-5)] {
            let model = Lm::load(&folder, device, dtype).unwrap();
            let compared = verify(&model, &folder.join("reference.safetensors")).unwrap();
            assert_eq!(compared.len(), 2 + model.params().table().entries().len(), "{name}: a gradient for every parameter");
            for one in compared {
                assert!(one.relative < limit, "{name} {dtype:?} {}: {:e}", one.name, one.relative);
            }
        }
    }
}

/// Narrow weights give the logits of the numbers that they stand for, read at once and token by token.
#[test]
fn narrow_weights_are_the_numbers_that_they_stand_for() {
    let device = Device::cpu().unwrap();
    for (name, storage) in FIXTURES.into_iter().flat_map(|name| [(name, Storage::Bf16), (name, Storage::Int8)]) {
        let narrow = Lm::load(fixture(name), &device, storage).unwrap();
        let mut params = Params::zeros(narrow.weights().table(), &device, DType::F32).unwrap();
        for i in 0..params.table().entries().len() {
            narrow.weights().read(ParamId(i), 0, params.values_mut(ParamId(i)));
        }
        let wide = Lm::from_params(narrow.config(), params).unwrap();
        let tokens: Vec<u32> = (0..37).map(|i| i * i % 40).collect();
        let logits = |model: &Lm, pieces: usize| -> Vec<f64> {
            let mut states = model.states(1).unwrap();
            let read = |piece: &[u32]| {
                let (hidden, _) = model.forward(&Batch::one(piece), Some(&mut states), Keep::Nothing, 1.0).unwrap();
                model.logits(&hidden, &(0..piece.len()).collect::<Vec<_>>()).unwrap().to_f64_vec()
            };
            tokens.chunks(pieces).flat_map(read).collect()
        };
        let wanted = logits(&wide, 37);
        let scale = wanted.iter().fold(0f64, |a, x| a.max(x.abs()));
        for pieces in [37, 20, 1] {
            let error = logits(&narrow, pieces).iter().zip(&wanted).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(error < 2e-5 * scale, "{name} {storage} in pieces of {pieces}: {error:e} of {scale}");
        }
    }
}

#[test]
fn a_folder_is_written_as_hugging_face_writes_it() {
    for name in FIXTURES {
        let folder = ModelFolder::open(fixture(name)).unwrap();
        assert_eq!(folder.config().mixer, Mixer::Attention);
        let model = Lm::load(fixture(name), &Device::cpu().unwrap(), DType::F32).unwrap();
        let out = tempfile::tempdir().unwrap();
        save(out.path(), folder.config(), model.params(), SaveOptions::default()).unwrap();

        // Every field that both have is the same, and ours are what fixes the model.
        let read = |path: PathBuf| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
        let (theirs, ours) = (read(fixture(name).join("config.json")), read(out.path().join("config.json")));
        for (field, value) in ours.as_object().unwrap() {
            if let Some(wanted) = theirs.get(field) {
                assert!(value == wanted || value.as_f64() == wanted.as_f64(), "{field}: {value} and {wanted}");
            }
        }
        for field in ["architectures", "model_type", "num_key_value_heads", "rope_theta", "tie_word_embeddings", "mlp_bias"] {
            assert!(ours.get(field).is_some(), "{field}");
        }
        let tensors = |folder: &Path| -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
            let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            file.tensors().into_iter().map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec()))).collect()
        };
        assert!(tensors(out.path()) == tensors(&fixture(name)), "{name}: other tensors");
        assert_eq!(ModelFolder::open(out.path()).unwrap().config(), folder.config());
    }
}

/// Fields that would change what is computed are refused, not ignored; those that say nothing are read.
#[test]
fn what_is_not_computed_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("config.json");
    let original: Value = serde_json::from_slice(&std::fs::read(fixture("all-heads").join("config.json")).unwrap()).unwrap();
    let read = |changes: &[(&str, Value)]| {
        let mut config = original.as_object().unwrap().clone();
        for (field, value) in changes {
            config.insert((*field).into(), value.clone());
        }
        std::fs::write(&path, Value::Object(config).to_string()).unwrap();
        config_json::read(&path)
    };
    for (field, value, message) in [
        ("attention_bias", json!(true), "attention_bias is set; this program computes llama models with attention_bias false"),
        ("mlp_bias", json!(true), "mlp_bias is set"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling is {\"rope_type\":\"llama3\""),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "plain positions"),
        ("head_dim", json!(16), "head_dim is 16; it must be hidden_size / num_attention_heads, 8"),
        ("num_key_value_heads", json!(3), "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ("num_key_value_heads", json!(0), "num_key_value_heads is 0"),
        ("hidden_act", json!("gelu"), "hidden_act is `gelu`"),
    ] {
        let error = read(&[(field, value)]).unwrap_err().to_string();
        assert!(error.contains(message), "no `{message}` in: {error}");
    }
    // Newer versions put the base of the angles elsewhere.
    let plain = json!({"rope_theta": 123.0, "rope_type": "default"});
    let (config, extra) = read(&[("rope_parameters", plain), ("rope_theta", Value::Null)]).unwrap();
    assert_eq!((config.rope_theta, extra.get("rope_parameters")), (123.0, None));
    // As many heads of keys as of queries is what no number of them means.
    assert_eq!(read(&[("num_key_value_heads", json!(4))]).unwrap().0.num_key_value_heads, None);
    assert_eq!(read(&[("num_key_value_heads", json!(2))]).unwrap().0.num_key_value_heads, Some(2));
}

#[test]
fn a_gpu_says_what_it_does_not_run() {
    let config = ModelFolder::open(fixture("all-heads")).unwrap().config().clone();
    ttt::device::cuda::supports(&config).unwrap();
    let wide = ttt::config::Config { hidden_size: 1040, num_attention_heads: 4, num_key_value_heads: None, ..config };
    let error: Error = ttt::device::cuda::supports(&wide).unwrap_err();
    assert_eq!(error.to_string(), "configuration: the size of a head is 260; on a GPU it is at most 256; use --device cpu");
}
