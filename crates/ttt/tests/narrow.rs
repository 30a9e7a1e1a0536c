//! Models with bf16 and int8 matrices: what is stored, what is computed from it, and their folders.

mod support;

use std::fs;
use std::path::Path;

use half::bf16;
use serde_json::Value;
use support::{Random, relative, shaken_model};
use tempfile::TempDir;
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::view::{Mat, View};
use ttt::device::{Device, Kernels, WeightView};
use ttt::hub::safetensors::{Dtype, File, Source, write};
use ttt::hub::{FileDType, ModelFolder, SaveOptions, model_hash, save};
use ttt::layer::Keep;
use ttt::ops::{cross_entropy, embedding, linear};
use ttt::params::ParamId;
use ttt::tensor::Tensor;
use ttt::weights::Values;
use ttt::{DType, Lm, Result, Storage, Weights, plan};

const NARROW: [Storage; 2] = [Storage::Bf16, Storage::Int8];

fn device(kernels: Kernels) -> Device {
    Device::cpu_with(2, kernels).unwrap()
}

fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| random.unit() as f32).collect()
}

fn tiny(inner: Inner) -> Config {
    Config {
        num_hidden_layers: 2,
        hidden_size: 96,
        intermediate_size: 200,
        num_attention_heads: 4,
        ..Config::preset("tiny", inner).unwrap()
    }
}

/// A matrix in each storage, with numbers and scales that differ from row to row.
struct Matrix {
    shape: [usize; 2],
    float: Vec<f32>,
    half: Vec<bf16>,
    int8: Vec<i8>,
    scales: Vec<f32>,
}

impl Matrix {
    fn new(rows: usize, cols: usize) -> Matrix {
        let float = numbers(rows as u64, rows * cols);
        let half = float.iter().map(|x| bf16::from_f32(*x)).collect();
        let int8 = float.iter().map(|x| (127.0 * x) as i8).collect();
        Matrix { shape: [rows, cols], float, half, int8, scales: numbers(7, rows).iter().map(|x| x.abs() / 127.0).collect() }
    }

    fn views<'a>(&'a self, device: &'a Device) -> [WeightView<'a>; 3] {
        let [rows, cols] = self.shape;
        [
            View::new(Mat::new(&self.float, rows, cols), device).into(),
            WeightView::Bf16 { rows: Mat::new(&self.half, rows, cols), device },
            WeightView::Int8 { rows: Mat::new(&self.int8, rows, cols), scales: &self.scales, device },
        ]
    }
}

#[track_caller]
fn close(found: &Tensor, exact: &[f64], limit: f64, what: &str) {
    let error = relative(&found.to_f64_vec(), exact);
    assert!(error < limit, "{what}: {error:e}");
}

/// `x wᵀ` summed in f64.
fn exact_product(x: &[f32], w: &[f32], cols: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
    x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w))).collect()
}

#[test]
fn fast_products_are_the_reference_in_every_storage() {
    let (fast, slow) = (device(Kernels::Fast), device(Kernels::Reference));
    for [o, i] in [[1, 1], [3, 7], [25, 16], [64, 259], [515, 131], [300, 4099]] {
        let matrix = Matrix::new(o, i);
        for n in [1, 2, 3, 4, 5, 7, 17, 64, 65, 130] {
            let data = numbers(n as u64 + 100, n * i);
            let [x, y] = [&fast, &slow].map(|device| Tensor::from_slice(device, &[n, i], &data).unwrap());
            for (kind, (w, v)) in matrix.views(&fast).into_iter().zip(matrix.views(&slow)).enumerate() {
                let (a, b) = (linear::forward(x.view(), w).unwrap(), linear::forward(y.view(), v).unwrap());
                let (exact, what) = (exact_product(&data, &w.widened::<f32>(), i), format!("storage {kind}, {n} rows, [{o}, {i}]"));
                close(&a, &exact, 3e-6, &format!("fast, {what}"));
                // One f32 sum after another of up to 4099 products: it is the reference that errs more.
                close(&b, &exact, 5e-6, &format!("reference, {what}"));
            }
        }
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let device = device(Kernels::Fast);
    let matrix = Matrix::new(1030, 259);
    let x = Tensor::from_slice(&device, &[64, 259], &numbers(1, 64 * 259)).unwrap();
    for w in matrix.views(&device) {
        let all = linear::forward(x.view(), w).unwrap();
        for rows in [0..1, 1..3, 3..6, 6..10, 10..17, 17..64] {
            let some = linear::forward(x.view().row_range(rows.clone()), w).unwrap();
            assert_eq!(some.as_slice::<f32>(), &all.as_slice::<f32>()[rows.start * 1030..rows.end * 1030], "rows {rows:?}");
        }
    }
}

#[test]
fn losses_and_embeddings_are_those_of_the_widened_matrix() {
    for kernels in [Kernels::Fast, Kernels::Reference] {
        let device = device(kernels);
        let matrix = Matrix::new(301, 37);
        let x = Tensor::from_slice(&device, &[9, 37], &numbers(5, 9 * 37)).unwrap();
        let targets: Vec<u32> = (0..9).map(|i| i * 33).collect();
        for w in matrix.views(&device) {
            let wide = w.widened::<f32>();
            let plain = View::new(Mat::new(&wide, 301, 37), &device);
            let (a, b) = (cross_entropy::forward(x.view(), w, &targets), cross_entropy::forward(x.view(), plain, &targets));
            assert!(relative(&a.unwrap(), &b.unwrap()) < 1e-6);
            let (a, b) = (embedding::forward(&targets, w).unwrap(), embedding::forward(&targets, plain).unwrap());
            assert_eq!(a.as_slice::<f32>(), b.as_slice::<f32>());
        }
    }
}

/// A model of which one matrix has the given first rows.
fn with_rows(rows: &[&[f32]]) -> (Lm, ParamId) {
    let mut model = Lm::new(&tiny(Inner::Linear), &device(Kernels::Fast), DType::F32, 1).unwrap();
    let id = model.params().table().find("model.layers.1.mlp.down_proj.weight").unwrap();
    let cols = model.params().table().entry(id).shape[1];
    let values = model.params_mut().values_mut::<f32>(id);
    for (i, row) in rows.iter().enumerate() {
        values[i * cols..][..cols].fill(0.0);
        values[i * cols..][..row.len()].copy_from_slice(row);
    }
    (model, id)
}

fn read(weights: &Weights, id: ParamId, n: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; n];
    weights.read(id, 0, &mut values);
    values
}

#[test]
fn rows_come_back_within_half_a_step() {
    let tiniest = f32::from_bits(1);
    let rows: [&[f32]; 5] = [&[], &[f32::MAX, -f32::MAX, 1.0], &[1e-30, -5e-31], &[tiniest, -tiniest], &[-127.0, 63.5, 1.0, 0.4]];
    let (model, id) = with_rows(&rows);
    let cols = model.params().table().entry(id).shape[1];
    let float = model.params().values::<f32>(id).to_vec();
    let int8 = model.narrowed(Storage::Int8).unwrap();
    let narrow = read(int8.weights(), id, float.len());
    for (i, (narrow, float)) in narrow.chunks(cols).zip(float.chunks(cols)).enumerate() {
        let step = float.iter().fold(0f32, |m, x| m.max(x.abs())) as f64 / 127.0;
        for (a, b) in narrow.iter().zip(float) {
            assert!(a.is_finite());
            // Magnitudes without a 127th part become zero.
            let allowed = (0.5 + 1e-4) * step + 127.0 * tiniest as f64;
            assert!((*a as f64 - *b as f64).abs() <= allowed, "row {i}: {b:e} became {a:e}");
        }
    }
    assert_eq!(&narrow[..cols], &vec![0.0; cols]);
    assert_eq!(&narrow[4 * cols..4 * cols + 4], [-127.0, 64.0, 1.0, 0.0]);

    let (model, id) = with_rows(&rows[2..]);
    let float = model.params().values::<f32>(id).to_vec();
    let half = read(model.narrowed(Storage::Bf16).unwrap().weights(), id, float.len());
    assert_eq!(half, float.iter().map(|x| bf16::from_f32(*x).to_f32()).collect::<Vec<_>>());
}

#[test]
fn numbers_that_cannot_be_stored_are_refused() {
    for (value, which) in [(f32::NAN, &NARROW[..]), (f32::NEG_INFINITY, &NARROW[..]), (f32::MAX, &NARROW[..1])] {
        let (model, _) = with_rows(&[&[1.0, value]]);
        for storage in which {
            let error = model.narrowed(*storage).unwrap_err().to_string();
            assert!(error.contains("`model.layers.1.mlp.down_proj.weight` holds") && error.contains("finite"), "{error}");
        }
    }
}

#[test]
fn the_large_matrices_are_narrow_and_nothing_else() {
    for inner in [Inner::Linear, Inner::Mlp] {
        let config = Config { tie_word_embeddings: false, ..tiny(inner) };
        let model = Lm::new(&config, &device(Kernels::Fast), DType::F32, 1).unwrap();
        for entry in model.params().table().entries() {
            let projection = entry.name.ends_with("_proj.weight");
            let large = projection || entry.name == "model.embed_tokens.weight" || entry.name == "lm_head.weight";
            assert_eq!(entry.is_matrix(), large, "{}", entry.name);
        }
        for storage in NARROW {
            let bytes = model.narrowed(storage).unwrap().weights().bytes();
            let planned = plan::weight_bytes(&config, storage);
            assert!(bytes >= planned && bytes < planned + planned / 20, "{bytes} bytes, planned {planned}");
        }
        let ratio = |storage| plan::weight_bytes(&config, Storage::F32) as f64 / plan::weight_bytes(&config, storage) as f64;
        assert!(ratio(Storage::Bf16) > 1.7 && ratio(Storage::Int8) > 2.5);
    }
}

fn logits(model: &Lm, batch: &Batch) -> Vec<f64> {
    let (hidden, _) = model.forward(batch, None, Keep::Nothing, 1.0).unwrap();
    model.logits(&hidden, &(0..batch.tokens.len()).collect::<Vec<_>>()).unwrap().to_f64_vec()
}

/// What a model of narrow matrices computes is what the model of their values computes, and near what the original does.
#[test]
fn logits_stay_near() {
    let mut random = Random::new(3);
    for inner in [Inner::Linear, Inner::Mlp] {
        let config = tiny(inner);
        let model = Lm::new(&config, &device(Kernels::Fast), DType::F32, 1).unwrap();
        let batch = Batch::one(&random.tokens(100, config.vocab_size));
        let exact = logits(&model, &batch);
        for (storage, limit) in [(Storage::Bf16, 0.01), (Storage::Int8, 0.02)] {
            let narrow = model.narrowed(storage).unwrap();
            let mut values = Lm::new(&config, &device(Kernels::Fast), DType::F32, 2).unwrap();
            for id in (0..model.params().table().entries().len()).map(ParamId) {
                narrow.weights().read(id, 0, values.params_mut().values_mut::<f32>(id));
            }
            assert_eq!(model_hash(narrow.weights()), model_hash(values.params()));
            let ours = logits(&narrow, &batch);
            let distance = relative(&ours, &logits(&values, &batch));
            assert!(distance < 2e-5, "{inner:?} {storage}: {distance:e} from the model of the same values");
            let distance = relative(&ours, &exact);
            assert!(distance > 0.0 && distance < limit, "{inner:?} {storage}: {distance:e} from f32");
        }
    }
}

#[test]
fn decoding_is_prefill_and_a_batch_changes_nothing() {
    let mut random = Random::new(4);
    for (inner, storage) in [Inner::Linear, Inner::Mlp].into_iter().flat_map(|inner| NARROW.map(|s| (inner, s))) {
        let config = tiny(inner);
        let model = shaken_model(&config, &device(Kernels::Fast), DType::F32, 5).narrowed(storage).unwrap();
        let tokens: Vec<Vec<u32>> = (0..3).map(|_| random.tokens(90, config.vocab_size)).collect();
        let whole = logits(&model, &Batch::one(&tokens[0]));
        let mut alone = model.states(1).unwrap();
        let mut together = model.states(3).unwrap();
        let mut stepped = Vec::new();
        for t in 0..90 {
            let (hidden, _) = model.forward(&Batch::one(&tokens[0][t..t + 1]), Some(&mut alone), Keep::Nothing, 1.0).unwrap();
            let one = model.logits(&hidden, &[0]).unwrap().to_f64_vec();
            let rows: Vec<&[u32]> = tokens.iter().map(|tokens| &tokens[t..t + 1]).collect();
            let (hidden, _) = model.forward(&Batch::packed(&rows), Some(&mut together), Keep::Nothing, 1.0).unwrap();
            assert_eq!(one, model.logits(&hidden, &[0]).unwrap().to_f64_vec(), "{inner:?} {storage}, token {t}");
            stepped.extend(one);
        }
        let distance = relative(&stepped, &whole);
        assert!(distance < 2e-5, "{inner:?} {storage}: {distance:e}");
    }
}

fn loaded(dir: &Path, storage: Storage) -> Result<Lm> {
    Lm::load(dir, &device(Kernels::Fast), storage)
}

fn saved(config: &Config, dir: &Path) -> Lm {
    let model = shaken_model(config, &device(Kernels::Fast), DType::F32, 6);
    save(dir, config, model.params(), SaveOptions { max_shard_bytes: Some(200_000), ..Default::default() }).unwrap();
    model
}

#[test]
fn folders_hold_what_was_quantised() {
    for tie_word_embeddings in [true, false] {
        let config = Config { tie_word_embeddings, ..tiny(Inner::Linear) };
        let place = TempDir::new().unwrap();
        let [wide, bf16, int8, back] = ["wide", "bf16", "int8", "back"].map(|name| place.path().join(name));
        let model = saved(&config, &wide);
        fs::write(wide.join("tokenizer.json"), "{}").unwrap();
        let folder = ModelFolder::open(&wide).unwrap();
        let hash = |storage| model_hash(model.narrowed(storage).unwrap().weights());
        for (storage, out, limit) in [(Storage::Bf16, &bf16, 2.0_f64.powi(-8)), (Storage::Int8, &int8, 0.01)] {
            let done = folder.quantize(out, &device(Kernels::Fast), storage).unwrap();
            assert!(done.worst_error > 0.0 && done.worst_error < limit, "{done:?}");
            assert!(done.worst_matrix.ends_with(".weight") && done.bytes < done.bytes_before);
            assert!(out.join("tokenizer.json").exists());
            assert_eq!(ModelFolder::open(out).unwrap().storage().unwrap(), storage);
            // Quantised on loading, saved and loaded, or saved and widened: the same model.
            for (dir, storage) in [(&wide, storage), (out, storage), (out, Storage::F32), (out, Storage::F64)] {
                let model = loaded(dir, storage).unwrap();
                assert_eq!(model.weights().storage(), storage);
                assert_eq!(model_hash(model.weights()), hash(ModelFolder::open(out).unwrap().storage().unwrap()), "{dir:?}");
            }
            assert!(folder.quantize(out, &device(Kernels::Fast), storage).unwrap_err().to_string().contains("not empty"));
        }
        // Official names and types; the tied head is left out.
        let file = File::open(bf16.join("model.safetensors")).unwrap();
        for entry in model.params().table().entries() {
            let tensor = file.tensor(&entry.name).unwrap();
            assert_eq!(tensor.dtype, if entry.is_matrix() { Dtype::BF16 } else { Dtype::F32 }, "{}", entry.name);
        }
        let json = |dir: &Path| -> Value { serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap() };
        assert_eq!(json(&bf16)["torch_dtype"], "bfloat16");
        assert_eq!(
            (json(&bf16).get("quantization_config"), &json(&int8)["quantization_config"]["quant_method"]),
            (None, &"ttt-int8".into())
        );

        // Into f32 again; the mark of integers stays behind. Integers as bf16 are rounded once more.
        let folder = ModelFolder::open(&int8).unwrap();
        folder.convert(&back, &device(Kernels::Fast), SaveOptions { dtype: FileDType::F32, ..Default::default() }).unwrap();
        assert_eq!(ModelFolder::open(&back).unwrap().storage().unwrap(), Storage::F32);
        assert_eq!(model_hash(loaded(&back, Storage::F32).unwrap().weights()), hash(Storage::Int8));
        assert_ne!(model_hash(loaded(&int8, Storage::Bf16).unwrap().weights()), hash(Storage::Int8));
        assert!(folder.check_trainable().unwrap_err().to_string().contains("int8"));
        ModelFolder::open(&bf16).unwrap().check_trainable().unwrap();
        let error = folder.quantize(place.path().join("x"), &device(Kernels::Fast), Storage::F32).unwrap_err().to_string();
        assert!(error.contains("bf16 and int8"), "{error}");
    }
}

/// Loading asks for about as much memory as the model has, never for an f32 copy of it.
#[test]
fn narrow_models_are_never_wide_in_memory() {
    let config = Config { vocab_size: 4000, ..tiny(Inner::Linear) };
    let place = TempDir::new().unwrap();
    saved(&config, place.path());
    for storage in NARROW {
        let device = device(Kernels::Fast);
        let model = Lm::load(place.path(), &device, storage).unwrap();
        let (peak, bytes) = (device.memory().usage().peak, model.weights().bytes());
        assert!(peak <= bytes + bytes / 8 + 10_000, "{peak} bytes at most for {bytes}");
    }
}

#[test]
fn hostile_folders_are_refused() {
    let place = TempDir::new().unwrap();
    let (wide, int8) = (place.path().join("wide"), place.path().join("int8"));
    saved(&tiny(Inner::Linear), &wide);
    ModelFolder::open(&wide).unwrap().quantize(&int8, &device(Kernels::Fast), Storage::Int8).unwrap();
    let path = int8.join("model.safetensors");
    let (name, scale) = ("model.layers.0.mlp.up_proj.weight_int8", "model.layers.0.mlp.up_proj.weight_scale");
    let good = fs::read(&path).unwrap();
    type Change<'a> = (&'a str, Option<(Dtype, Vec<usize>, Vec<u8>)>, &'a str);
    let scales = |x: f32| (Dtype::F32, vec![200], [x; 200].iter().flat_map(|x| x.to_le_bytes()).collect());
    let changes: [Change; 9] = [
        (scale, None, "missing"),
        (name, None, "missing"),
        (scale, Some(scales(f32::NAN)), "no scale"),
        (scale, Some(scales(-1.0)), "no scale"),
        (scale, Some(scales(3e38)), "no scale"),
        (scale, Some((Dtype::F32, vec![1], vec![0; 4])), "[200]"),
        (scale, Some((Dtype::F64, vec![200], vec![0; 1600])), "F32"),
        (name, Some((Dtype::I8, vec![200, 96], vec![0x80; 200 * 96])), "-128"),
        (name, Some((Dtype::U8, vec![200, 96], vec![0; 200 * 96])), "I8"),
    ];
    for (changed, tensor, message) in changes {
        fs::write(&path, &good).unwrap();
        let file = File::open(&path).unwrap();
        let mut sources = Vec::new();
        for name in file.names() {
            let own = file.tensor(name).unwrap();
            let (dtype, shape, bytes) = match (&tensor, name == changed) {
                (None, true) => continue,
                (Some((dtype, shape, bytes)), true) => (*dtype, shape.clone(), bytes.clone()),
                _ => (own.dtype, own.shape.to_vec(), own.bytes.to_vec()),
            };
            sources.push(Source::new(name, dtype, &shape, move |w| w.write_all(&bytes)));
        }
        write(int8.join("changed"), &[], sources).unwrap();
        drop(file);
        fs::rename(int8.join("changed"), &path).unwrap();
        for storage in [Storage::Int8, Storage::F32] {
            let error = loaded(&int8, storage).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("up_proj"), "{changed}: {error}");
        }
    }
    // Integers that config.json does not announce, and a method of another program.
    fs::write(&path, &good).unwrap();
    loaded(&int8, Storage::Int8).unwrap();
    let config = fs::read_to_string(int8.join("config.json")).unwrap();
    fs::write(int8.join("config.json"), config.replace("quantization_config", "other")).unwrap();
    assert!(loaded(&int8, Storage::Int8).unwrap_err().to_string().contains("unexpected"));
    fs::write(int8.join("config.json"), config.replace("ttt-int8", "bitsandbytes")).unwrap();
    let error = loaded(&int8, Storage::F32).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("bitsandbytes"), "{error}");
}
