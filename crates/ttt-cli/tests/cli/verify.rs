//! `ttt verify` on the official implementation's results.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::{Place, Ran};

const GOLDEN: [&str; 4] =
    ["linear_mamba_preconv", "mlp_mamba_preconv", "linear_transformer_nopreconv", "mlp_transformer_nopreconv"];

/// A tensor of a golden file.
struct Array {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl safetensors::View for &Array {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        (&self.bytes).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn file<'a>(tensors: impl Iterator<Item = (&'a str, &'a Array)>) -> Vec<u8> {
    safetensors::serialize(tensors, None).unwrap()
}

/// Writes the golden file's model to `NAME/` and what it should compute to `NAME.safetensors`.
fn unpack(place: &Place, name: &str) -> HashMap<String, Array> {
    let path = format!("{}/../ttt/tests/fixtures/golden/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::Map::new();
    for (key, value) in header.metadata().clone().unwrap() {
        let value = match value.as_str() {
            "True" => json!(true),
            "False" => json!(false),
            text => text.parse::<u64>().map(|n| json!(n)).or_else(|_| text.parse::<f64>().map(|x| json!(x))).unwrap_or(json!(text)),
        };
        config.insert(key, value);
    }
    config.insert("model_type".into(), json!("ttt"));
    let own = |t: TensorView<'_>| Array { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() };
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: HashMap<String, Array> = all.tensors().into_iter().map(|(name, t)| (name, own(t))).collect();
    let parameters = tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix("param.")?, t)));
    place.write(&format!("{name}/config.json"), json!(config).to_string());
    place.write(&format!("{name}/model.safetensors"), file(parameters));
    let reference = tensors.iter().filter(|(name, _)| !name.starts_with("param.")).map(|(name, t)| (name.as_str(), t));
    place.write(&format!("{name}.safetensors"), file(reference));
    tensors
}

#[test]
fn the_official_results() {
    let place = Place::new();
    for name in GOLDEN {
        unpack(&place, name);
        let reference = format!("{name}.safetensors");
        for kind in [&["--dtype", "f32"][..], &["--dtype", "f64"], &["--device", "reference"]] {
            let ran = place.run(&[&["verify", name, &reference][..], kind].concat()).ok();
            // Logits, loss and every gradient.
            let gradients = ran.out.lines().filter(|l| l.starts_with("grad.model.")).count();
            assert!(gradients > 20, "{}", ran.out);
            ran.says(&["logits ", "loss ", "within 1e-4"]);
        }
        place
            .run(&["verify", name, &reference, "--tolerance", "1e-12"])
            .fails(1, &["logits", "more of", "exceed the tolerance of 1e-12"]);
    }
}

/// A mask may be of any type, and without targets it is about the next inputs.
#[test]
fn masks_of_every_type() {
    let place = Place::new();
    let mut tensors = unpack(&place, GOLDEN[0]);
    tensors.retain(|name, _| !name.starts_with("grad."));
    let floats: Vec<f32> = tensors["loss_mask"].bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert!(floats.contains(&0.0) && floats.contains(&1.0));
    let verify = |tensors: &HashMap<String, Array>| {
        place.write("changed.safetensors", file(tensors.iter().map(|(name, t)| (name.as_str(), t))));
        place.run(&["verify", GOLDEN[0], "changed.safetensors"])
    };
    let integers = |f: &dyn Fn(u8) -> Vec<u8>| floats.iter().flat_map(|m| f(*m as u8)).collect::<Vec<u8>>();
    for (dtype, bytes) in [
        (Dtype::BOOL, integers(&|m| vec![m])),
        (Dtype::U8, integers(&|m| vec![m])),
        (Dtype::I32, integers(&|m| i32::from(m).to_le_bytes().to_vec())),
        (Dtype::I64, integers(&|m| i64::from(m).to_le_bytes().to_vec())),
    ] {
        let mask = tensors.get_mut("loss_mask").unwrap();
        (mask.dtype, mask.bytes) = (dtype, bytes);
        verify(&tensors).ok().says(&["loss "]);
        let mask = tensors.get_mut("loss_mask").unwrap();
        let one = mask.bytes.iter().position(|b| *b == 1).unwrap();
        mask.bytes[one] = 0;
        verify(&tensors).fails(1, &["loss"]);
    }
    let mask = tensors.get_mut("loss_mask").unwrap();
    (mask.dtype, mask.bytes) = (Dtype::F32, floats.iter().flat_map(|_| (-1f32).to_le_bytes()).collect());
    verify(&tensors).fails(1, &["loss_mask", "-1", "a number from 0 up"]);

    // The same loss without targets: one only counts where it is the next input, and never at the end.
    let Array { shape, bytes, dtype } = &tensors["input_ids"];
    let (b, t) = (shape[0], shape[1]);
    let width = bytes.len() / (b * t);
    let ends = |i: usize| (i + 1).is_multiple_of(t);
    let next: Vec<u8> = (0..b * t).flat_map(|i| bytes[(if ends(i) { i } else { i + 1 }) * width..][..width].to_vec()).collect();
    let targets = Array { dtype: *dtype, shape: shape.clone(), bytes: next };
    let mask = |last: u8| Array {
        dtype: Dtype::U8,
        shape: vec![b, t],
        bytes: (0..b * t).map(|i| if ends(i) { last } else { u8::from(!i.is_multiple_of(3)) }).collect(),
    };
    tensors.insert("targets".into(), targets);
    tensors.insert("loss_mask".into(), mask(0));
    let loss = |ran: &Ran| ran.out.lines().find(|line| line.starts_with("loss ")).map(str::to_owned);
    let with_targets = loss(&verify(&tensors));
    tensors.remove("targets");
    assert_eq!(loss(&verify(&tensors)), with_targets);
    tensors.insert("loss_mask".into(), mask(1));
    assert_eq!(loss(&verify(&tensors)), with_targets, "there is nothing to say after the last input");
    tensors.remove("loss_mask");
    assert_ne!(loss(&verify(&tensors)), with_targets);
}

#[test]
fn wrong_references() {
    let place = Place::new();
    let mut tensors = unpack(&place, GOLDEN[0]);
    let verify = |tensors: &HashMap<String, Array>| {
        place.write("changed.safetensors", file(tensors.iter().map(|(name, t)| (name.as_str(), t))));
        place.run(&["verify", GOLDEN[0], "changed.safetensors"])
    };
    verify(&tensors).ok();
    // One wrong logit; then one that is not a number.
    let logits = tensors["logits"].bytes.clone();
    tensors.get_mut("logits").unwrap().bytes[40..44].copy_from_slice(&9f32.to_le_bytes());
    verify(&tensors).fails(1, &["logits of", "exceed"]).says(&["exceeds"]);
    tensors.get_mut("logits").unwrap().bytes[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    verify(&tensors).fails(1, &["logits of", "exceed"]);
    tensors.get_mut("logits").unwrap().bytes = logits;
    tensors.remove("input_ids");
    verify(&tensors).fails(1, &["changed.safetensors", "no `input_ids`"]);
    place.run(&["verify", GOLDEN[0], "absent.safetensors"]).fails(1, &["absent.safetensors"]);
    place.run(&["verify", GOLDEN[0], "changed.safetensors", "--tolerance=-1"]).fails(2, &["--tolerance"]);
}
