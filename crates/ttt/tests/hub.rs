//! Model folders: what is written is read back, official names and layouts, and clear errors for everything else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tempfile::TempDir;
use ttt::Error;
use ttt::config::{Backbone, Config, Inner};
use ttt::device::Device;
use ttt::hub::safetensors::{Dtype, File, Source, write};
use ttt::hub::{FileDType, ModelFolder, SaveOptions, config_json, model_hash, save};
use ttt::params::{ParamId, ParamTable, Params};
use ttt::tensor::DType;

const GOLDEN: [(&str, Inner, Backbone); 4] = [
    ("linear_mamba_preconv", Inner::Linear, Backbone::Mamba),
    ("linear_transformer_nopreconv", Inner::Linear, Backbone::Transformer),
    ("mlp_mamba_preconv", Inner::Mlp, Backbone::Mamba),
    ("mlp_transformer_nopreconv", Inner::Mlp, Backbone::Transformer),
];

fn golden(name: &str) -> File {
    File::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/golden/{name}.safetensors"))).unwrap()
}

/// The shape of the golden models.
fn small(inner: Inner, backbone: Backbone) -> Config {
    let config = Config {
        vocab_size: 64,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        pre_conv: backbone == Backbone::Mamba,
        ..Config::default()
    };
    config.with_inner(inner).with_backbone(backbone)
}

fn table(config: &Config) -> Arc<ParamTable> {
    Arc::new(ParamTable::new(config).0)
}

fn device() -> Device {
    Device::cpu_with(1, ttt::device::Kernels::Fast).unwrap()
}

fn init(config: &Config) -> Params {
    Params::init(&table(config), &device(), DType::F32, 3).unwrap()
}

fn load(dir: &Path) -> ttt::Result<Params> {
    let folder = ModelFolder::open(dir)?;
    folder.load_params(&table(folder.config()), &device(), DType::F32)
}

fn bits(params: &Params) -> Vec<u32> {
    params.data().as_slice::<f32>().iter().map(|x| x.to_bits()).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The message of the error, which must name `path` and contain every one of `parts`.
fn fails<T>(result: ttt::Result<T>, path: &Path, parts: &[&str]) {
    let Err(error) = result else { panic!("no error; {parts:?} was expected") };
    let at = match &error {
        Error::Io { path, .. } | Error::Format { path, .. } => path,
        other => panic!("{other:?} names no file"),
    };
    assert_eq!(at, path, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "`{part}` is not in `{error}`");
    }
}

/// A model folder of f32 tensors that a test then damages.
struct Model {
    dir: TempDir,
    config: Config,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Model {
    fn new(config: Config) -> Model {
        let params = init(&config);
        let tensors = params.table().entries().iter().enumerate();
        let tensors =
            tensors.map(|(i, e)| (e.name.clone(), (e.shape.clone(), params.values::<f32>(ParamId(i)).to_vec()))).collect();
        Model { dir: TempDir::new().unwrap(), config, tensors }
    }

    fn weights(&self) -> PathBuf {
        self.dir.path().join("model.safetensors")
    }

    /// Writes it, as another program would.
    fn store(&self) -> &Path {
        let sources = self.tensors.iter().map(|(n, (shape, x))| Source::floats(n, Dtype::F32, shape, x)).collect();
        write(self.weights(), &[], sources).unwrap();
        self.config_with(|_| ());
        self.dir.path()
    }

    fn config_with(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> PathBuf {
        let mut config = config_json::fields(&self.config);
        change(&mut config);
        let path = self.dir.path().join("config.json");
        fs::write(&path, Value::Object(config).to_string()).unwrap();
        path
    }

    fn open_with(&self, field: &str, value: Value) -> ttt::Result<ModelFolder> {
        self.config_with(|c| drop(c.insert(field.into(), value)));
        ModelFolder::open(self.dir.path())
    }
}

#[test]
fn every_kind_of_model_survives_every_kind_of_file() {
    for (inner, backbone, tied) in [Inner::Linear, Inner::Mlp]
        .into_iter()
        .flat_map(|i| [Backbone::Mamba, Backbone::Transformer].map(|b| (i, b)))
        .flat_map(|(i, b)| [true, false].map(|tied| (i, b, tied)))
    {
        let config = Config { tie_word_embeddings: tied, ..small(inner, backbone) };
        let params = init(&config);
        for dtype in [FileDType::F32, FileDType::Bf16, FileDType::F16] {
            for max_shard_bytes in [None, Some(60_000)] {
                let dir = TempDir::new().unwrap();
                save(dir.path(), &config, &params, SaveOptions { dtype, max_shard_bytes }).unwrap();
                let folder = ModelFolder::open(dir.path()).unwrap();
                assert_eq!(folder.config(), &config);
                let back = load(dir.path()).unwrap();
                let expected: Vec<u32> = match dtype {
                    FileDType::F32 => bits(&params),
                    FileDType::Bf16 => {
                        let round = |x: &f32| half::bf16::from_f32(*x).to_f32().to_bits();
                        params.data().as_slice::<f32>().iter().map(round).collect()
                    }
                    FileDType::F16 => {
                        let round = |x: &f32| half::f16::from_f32(*x).to_f32().to_bits();
                        params.data().as_slice::<f32>().iter().map(round).collect()
                    }
                };
                assert_eq!(bits(&back), expected, "{inner:?} {backbone:?} tied {tied} {dtype} {max_shard_bytes:?}");
            }
        }
    }
}

#[test]
fn shards_follow_the_hugging_face_names_and_sizes() {
    let config = small(Inner::Mlp, Backbone::Mamba);
    let params = init(&config);
    let dir = TempDir::new().unwrap();
    save(dir.path(), &config, &params, SaveOptions { dtype: FileDType::Bf16, max_shard_bytes: Some(30_000) }).unwrap();
    let index: Value = serde_json::from_slice(&fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 2 * params.table().parameters());
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), params.table().entries().len());
    let shards: Vec<String> = names(dir.path()).into_iter().filter(|n| n.ends_with(".safetensors")).collect();
    assert!(shards.len() > 2);
    for (i, name) in shards.iter().enumerate() {
        assert_eq!(*name, format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()));
        let shard = File::open(dir.path().join(name)).unwrap();
        assert_eq!(shard.metadata()["format"], "pt");
        let bytes: usize = shard.names().map(|n| shard.tensor(n).unwrap().bytes.len()).sum();
        assert!(bytes <= 30_000);
        for tensor in shard.names() {
            assert_eq!(map[tensor], *name);
        }
    }
    // One file again, into the same folder: no shard may stay behind, and the other way round.
    save(dir.path(), &config, &params, SaveOptions::default()).unwrap();
    assert_eq!(names(dir.path()), ["config.json", "generation_config.json", "model.safetensors"]);
    save(dir.path(), &config, &params, SaveOptions { max_shard_bytes: Some(30_000), ..Default::default() }).unwrap();
    assert!(!dir.path().join("model.safetensors").exists());
    assert_eq!(bits(&load(dir.path()).unwrap()), bits(&params));
    // A tensor larger than the limit has a file of its own.
    save(dir.path(), &config, &params, SaveOptions { max_shard_bytes: Some(0), ..Default::default() }).unwrap();
    let shards = names(dir.path()).iter().filter(|n| n.ends_with(".safetensors")).count();
    assert_eq!(shards, params.table().entries().len());
    assert_eq!(bits(&load(dir.path()).unwrap()), bits(&params));
}

#[test]
fn f64_models_round_through_f32_files_and_keep_f64_ones() {
    let config = small(Inner::Linear, Backbone::Mamba);
    let params = Params::init(&table(&config), &device(), DType::F64, 3).unwrap();
    let dir = TempDir::new().unwrap();
    save(dir.path(), &config, &params, SaveOptions::default()).unwrap();
    let back = ModelFolder::open(dir.path()).unwrap().load_params(params.table(), &device(), DType::F64).unwrap();
    assert_eq!(back.data().to_f64_vec(), params.data().to_f64_vec());

    let path = dir.path().join("wide.safetensors");
    let x = [1.0 + f64::EPSILON, -1e300, 1.0 / 3.0];
    write(&path, &[], vec![Source::floats("x", Dtype::F64, &[3], &x)]).unwrap();
    assert_eq!(File::open(&path).unwrap().tensor("x").unwrap().to_vec::<f64>().unwrap(), x);
}

/// Names and shapes of the official state dict, from its definition and not from our table.
fn official(inner: Inner, backbone: Backbone) -> BTreeMap<String, Vec<usize>> {
    let (v, d, i, h, hd, k, taps) = (64, 32, 48, 2, 16, 16, 4);
    let mamba = backbone == Backbone::Mamba;
    let mut all = BTreeMap::new();
    let mut put = |name: String, shape: &[usize]| assert!(all.insert(name, shape.to_vec()).is_none());
    put("model.embed_tokens.weight".into(), &[v, d]);
    put("model.norm.weight".into(), &[d]);
    for l in 0..2 {
        let mut layer = |name: &str, shape: &[usize]| put(format!("model.layers.{l}.{name}"), shape);
        layer("seq_norm.weight", &[d]);
        layer("ffn_norm.weight", &[d]);
        layer("mlp.gate_proj.weight", &[i, d]);
        layer("mlp.up_proj.weight", &[i, d]);
        layer("mlp.down_proj.weight", &[d, i]);
        if mamba {
            layer("conv.norm.weight", &[d]);
            layer("conv.conv.weight", &[d, 1, taps]);
            layer("conv.conv.bias", &[d]);
        }
        let mut ttt = |name: &str, shape: &[usize]| layer(&format!("seq_modeling_block.{name}"), shape);
        for name in ["q_proj", "v_proj", "o_proj"] {
            ttt(&format!("{name}.weight"), &[d, d]);
        }
        if mamba {
            ttt("g_proj.weight", &[d, d]);
            for name in ["conv_q", "conv_k"] {
                ttt(&format!("{name}.weight"), &[d, 1, taps]);
                ttt(&format!("{name}.bias"), &[d]);
            }
        } else {
            ttt("k_proj.weight", &[d, d]);
        }
        ttt("learnable_token_idx", &[k]);
        ttt("learnable_ttt_lr_weight", &[h, 1, d]);
        ttt("learnable_ttt_lr_bias", &[h, 1]);
        ttt("ttt_norm_weight", &[h, hd]);
        ttt("ttt_norm_bias", &[h, hd]);
        ttt("post_norm.weight", &[d]);
        ttt("post_norm.bias", &[d]);
        let wide = if inner == Inner::Mlp { 4 * hd } else { hd };
        ttt("W1", &[h, hd, wide]);
        ttt("b1", &[h, 1, wide]);
        if inner == Inner::Mlp {
            ttt("W2", &[h, 4 * hd, hd]);
            ttt("b2", &[h, 1, hd]);
        }
    }
    all
}

#[test]
fn golden_parameters_make_a_folder_with_exactly_the_official_names_and_shapes() {
    for (name, inner, backbone) in GOLDEN {
        let golden = golden(name);
        let config = small(inner, backbone);
        let dir = TempDir::new().unwrap();
        let params: Vec<&str> = golden.names().filter_map(|n| n.strip_prefix("param.")).collect();
        let values: Vec<(&str, Vec<usize>, Vec<f32>)> = params
            .iter()
            .map(|n| golden.tensor(&format!("param.{n}")).unwrap())
            .zip(&params)
            .map(|(t, n)| (*n, t.shape.to_vec(), t.to_vec().unwrap()))
            .collect();
        let sources = values.iter().map(|(n, shape, x)| Source::floats(*n, Dtype::F32, shape, x)).collect();
        write(dir.path().join("model.safetensors"), &[], sources).unwrap();
        let json = json!({"model_type": "ttt", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000,
            "use_gate": config.use_gate, "share_qk": config.share_qk, "pre_conv": config.pre_conv,
            "ttt_layer_type": config.ttt_layer_type, "ttt_base_lr": config.ttt_base_lr});
        fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
        let loaded = load(dir.path()).unwrap();
        for (n, _, x) in &values {
            assert_eq!(loaded.values::<f32>(loaded.table().find(n).unwrap()), x, "{name} {n}");
        }

        let out = TempDir::new().unwrap();
        save(out.path(), &config, &loaded, SaveOptions::default()).unwrap();
        let file = File::open(out.path().join("model.safetensors")).unwrap();
        let ours: BTreeMap<String, Vec<usize>> =
            file.names().map(|n| (n.to_owned(), file.tensor(n).unwrap().shape.to_vec())).collect();
        assert_eq!(ours, official(inner, backbone), "{name}");
        assert_eq!(ours.keys().collect::<Vec<_>>(), params, "{name}");
    }
}

#[test]
fn golden_integers_are_read() {
    let golden = golden("linear_mamba_preconv");
    let ids = golden.tensor("input_ids").unwrap();
    assert_eq!((ids.dtype, ids.shape), (Dtype::I32, &[2, 64][..]));
    assert!(ids.to_u32().unwrap().iter().all(|id| *id < 64));
    fails(ids.to_vec::<f32>(), golden.path(), &["`input_ids` holds I32", "BF16"]);
    fails(golden.tensor("loss").unwrap().to_u32(), golden.path(), &["`loss` holds F32"]);
    fails(golden.tensor("absent").map(|_| ()), golden.path(), &["no tensor `absent`"]);
}

#[test]
fn the_written_config_is_what_the_official_code_reads() {
    let config = Config { pad_token_id: Some(7), ..small(Inner::Mlp, Backbone::Mamba) };
    let dir = TempDir::new().unwrap();
    save(dir.path(), &config, &init(&config), SaveOptions { dtype: FileDType::Bf16, ..Default::default() }).unwrap();
    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(dir.path().join(name)).unwrap()).unwrap() };
    let json = read("config.json");
    for (field, value) in [
        ("architectures", json!(["TTTForCausalLM"])),
        ("model_type", json!("ttt")),
        ("torch_dtype", json!("bfloat16")),
        ("use_cache", json!(true)),
        ("ttt_layer_type", json!("mlp")),
        ("ttt_base_lr", json!(0.1)),
        ("mini_batch_size", json!(16)),
        ("tie_word_embeddings", json!(true)),
    ] {
        assert_eq!(json[field], value, "{field}");
    }
    let generation = read("generation_config.json");
    let expected = json!({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 7, "do_sample": true, "temperature": 1.0});
    assert_eq!(generation, expected);
}

#[test]
fn a_config_may_have_nulls_gaps_and_foreign_fields() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("config.json");
    fs::write(
        &path,
        r#"{"model_type": "ttt", "mini_batch_size": null, "bos_token_id": null, "auto_map": {"x": [1]}, "hidden_size": 64}"#,
    )
    .unwrap();
    let (config, extra) = config_json::read(&path).unwrap();
    assert_eq!(config, Config { bos_token_id: None, hidden_size: 64, ..Config::default() });
    assert_eq!(Value::Object(extra), json!({"auto_map": {"x": [1]}}));
}

#[test]
fn a_wrong_config_is_refused_by_field() {
    let model = Model::new(small(Inner::Linear, Backbone::Mamba));
    let path = model.config_with(|_| ());
    let cases = [
        ("model_type", json!("gpt2"), "model_type is \"gpt2\"; this program reads models of type \"ttt\", \"llama\", \"mamba\""),
        ("ttt_layer_type", json!("conv"), "ttt_layer_type is \"conv\": unknown variant `conv`, expected `linear` or `mlp`"),
        ("hidden_size", json!(-1), "hidden_size is -1"),
        ("hidden_size", json!("32"), "hidden_size is \"32\""),
        ("hidden_size", json!(33), "not divisible"),
        ("vocab_size", json!(0), "vocab_size is 0"),
        ("vocab_size", json!(1u64 << 63), "vocab_size is 9223372036854775808"),
        ("num_hidden_layers", json!(1 << 29), "layers"),
        ("conv_kernel", json!((1 << 30) + 1), "conv_kernel is 1073741825"),
        ("mini_batch_size", json!(65), "mini_batch_size is 65"),
        ("mini_batch_size", json!(2.5), "mini_batch_size is 2.5"),
        ("rms_norm_eps", json!(0), "rms_norm_eps is 0"),
        ("use_gate", json!("yes"), "use_gate is \"yes\""),
        ("hidden_act", json!("gelu"), "hidden_act is `gelu`"),
        ("eos_token_id", json!(-1), "eos_token_id is -1"),
    ];
    for (field, value, message) in cases {
        fails(model.open_with(field, value), &path, &[message]);
    }
    model.config_with(|c| drop(c.shift_remove("model_type")));
    fails(ModelFolder::open(model.dir.path()), &path, &["no model_type"]);
    let huge = [("hidden_size", 1 << 30), ("intermediate_size", 1 << 30), ("vocab_size", 1 << 30), ("num_hidden_layers", 1 << 30)];
    model.config_with(|c| huge.iter().for_each(|(k, v)| drop(c.insert((*k).into(), json!(v)))));
    fails(ModelFolder::open(model.dir.path()), &path, &["parameters"]);
    for text in ["", "{", "[1]", "{\"model_type\": \"ttt\", \"rope_theta\": 1e999}", "\u{feff}{}"] {
        fs::write(&path, text).unwrap();
        fails(ModelFolder::open(model.dir.path()), &path, &["not a JSON object"]);
    }
    fs::write(&path, [0xff, 0xfe]).unwrap();
    fails(ModelFolder::open(model.dir.path()), &path, &["not a JSON object"]);
    fs::remove_file(&path).unwrap();
    fails(ModelFolder::open(model.dir.path()), &path, &["no such file", "config.json"]);
    fs::create_dir(&path).unwrap();
    fails(ModelFolder::open(model.dir.path()), &path, &["a folder"]);
    let nowhere = model.dir.path().join("nowhere");
    fails(ModelFolder::open(&nowhere), &nowhere, &["No such file"]);
    fs::write(&nowhere, "").unwrap();
    fails(ModelFolder::open(&nowhere), &nowhere, &["this is a file"]);
}

/// A config of a terabyte beside a file of kilobytes must fail on the shapes, before memory is asked for.
#[test]
fn shapes_are_compared_before_memory_is_taken() {
    let model = Model::new(small(Inner::Linear, Backbone::Mamba));
    model.store();
    let folder = model.open_with("vocab_size", json!(1u64 << 30)).unwrap();
    let table = table(folder.config());
    let device = device();
    fails(folder.load_params(&table, &device, DType::F32), &model.weights(), &["[64, 32]", "[1073741824, 32]"]);
    assert_eq!(device.memory().usage().peak, 0);
}

#[test]
fn names_may_lack_the_prefix_and_bring_buffers() {
    let config = small(Inner::Linear, Backbone::Transformer);
    let mut model = Model::new(config.clone());
    let tensors = std::mem::take(&mut model.tensors);
    model.tensors = tensors.into_iter().map(|(n, t)| (n.strip_prefix("model.").unwrap().to_owned(), t)).collect();
    for buffer in ["layers.0.seq_modeling_block.rotary_emb.inv_freq", "layers.0.seq_modeling_block.token_idx"] {
        model.tensors.insert(buffer.into(), (vec![2], vec![1.0, 0.5]));
    }
    assert_eq!(bits(&load(model.store()).unwrap()), bits(&init(&config)));
    let norm = model.tensors["norm.weight"].clone();
    model.tensors.insert("model.norm.weight".into(), norm);
    fails(load(model.store()), &model.weights(), &["two tensors `norm.weight`"]);
}

#[test]
fn a_tied_head_may_be_there_alone_or_equal() {
    let config = small(Inner::Linear, Backbone::Mamba);
    let mut model = Model::new(config.clone());
    let embed = model.tensors["model.embed_tokens.weight"].clone();
    model.tensors.insert("lm_head.weight".into(), embed.clone());
    assert_eq!(bits(&load(model.store()).unwrap()), bits(&init(&config)));
    model.tensors.remove("model.embed_tokens.weight");
    assert_eq!(bits(&load(model.store()).unwrap()), bits(&init(&config)));
    let mut other = embed.clone();
    other.1[5] += 1.0;
    model.tensors.insert("model.embed_tokens.weight".into(), other);
    fails(load(model.store()), &model.weights(), &["`lm_head.weight` differs", "\"tie_word_embeddings\": false"]);

    let mut untied = Model::new(Config { tie_word_embeddings: false, ..config });
    untied.tensors.remove("lm_head.weight");
    fails(load(untied.store()), &untied.weights(), &["missing: `lm_head.weight`", "\"tie_word_embeddings\": true"]);
}

#[test]
fn other_tensors_than_the_configs_are_refused() {
    let mut model = Model::new(small(Inner::Linear, Backbone::Mamba));
    let norm = model.tensors.remove("model.norm.weight").unwrap();
    model.tensors.insert("model.layers.0.mlp.bias".into(), norm.clone());
    let parts = ["missing: `model.norm.weight`", "unexpected: `model.layers.0.mlp.bias`"];
    fails(load(model.store()), &model.weights(), &parts);
    model.tensors.remove("model.layers.0.mlp.bias");
    model.tensors.insert("model.norm.weight".into(), (vec![4, 8], norm.1));
    fails(load(model.store()), &model.weights(), &["`model.norm.weight` has shape [4, 8], config.json makes it [32]"]);
    model.store();
    model.config_with(|c| drop(c.insert("ttt_layer_type".into(), json!("mlp"))));
    fails(load(model.dir.path()), &model.weights(), &["missing", "seq_modeling_block.W2"]);

    fs::remove_file(model.weights()).unwrap();
    fails(load(model.dir.path()), &model.weights(), &["no such file", "index"]);
    fs::write(model.dir.path().join("pytorch_model.bin"), "x").unwrap();
    fails(load(model.dir.path()), &model.weights(), &["pytorch_model.bin", "safe_serialization=True"]);
}

#[test]
fn integer_weights_are_refused() {
    let dir = TempDir::new().unwrap();
    let config = small(Inner::Linear, Backbone::Mamba);
    let table = table(&config);
    let zeros = vec![0u32; 64 * 32];
    let sources = table.entries().iter().map(|e| Source::u32s(&e.name, &e.shape, &zeros[..e.elements()])).collect();
    write(dir.path().join("model.safetensors"), &[], sources).unwrap();
    config_json::write(&dir.path().join("config.json"), &config, &Default::default(), FileDType::F32).unwrap();
    fails(load(dir.path()), &dir.path().join("model.safetensors"), &["holds U32", "BF16"]);
}

#[test]
fn a_wrong_index_is_refused() {
    let config = small(Inner::Linear, Backbone::Mamba);
    let dir = TempDir::new().unwrap();
    save(dir.path(), &config, &init(&config), SaveOptions { max_shard_bytes: Some(40_000), ..Default::default() }).unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let damaged = |tensor: &str, file: Value| {
        let mut index = index.clone();
        index["weight_map"][tensor] = file;
        fs::write(&path, index.to_string()).unwrap();
        load(dir.path())
    };
    for file in [json!("../model.safetensors"), json!("/etc/passwd"), json!(".."), json!(""), json!(3), Value::Null] {
        fails(damaged("model.norm.weight", file), &path, &["`model.norm.weight`", "not the name of a file"]);
    }
    let first = index["weight_map"]["model.embed_tokens.weight"].clone();
    fails(damaged("model.norm.weight", first), &path, &["`model.norm.weight` should lie in", "but does not"]);
    fails(damaged("model.norm.weight", json!("no.safetensors")), &dir.path().join("no.safetensors"), &["No such file"]);
    fs::write(&path, "{}").unwrap();
    fails(load(dir.path()), &path, &["weight_map"]);
}

#[test]
fn conversion_keeps_the_model_its_foreign_fields_and_its_companions() {
    let model = Model::new(small(Inner::Mlp, Backbone::Mamba));
    model.store();
    model.config_with(|c| {
        c.insert("auto_map".into(), json!("kept"));
        c.insert("dtype".into(), json!("float32"));
        c.insert("_name_or_path".into(), json!("/elsewhere"));
    });
    fs::write(model.dir.path().join("tokenizer.json"), "{\"x\": 1}").unwrap();
    fs::write(model.dir.path().join("optimizer.safetensors"), "not the model's").unwrap();
    let out = TempDir::new().unwrap();
    let (bf16, again) = (out.path().join("bf16"), out.path().join("again"));
    let folder = ModelFolder::open(model.dir.path()).unwrap();
    folder.convert(&bf16, &device(), SaveOptions { dtype: FileDType::Bf16, max_shard_bytes: Some(20_000) }).unwrap();
    let json: Value = serde_json::from_slice(&fs::read(bf16.join("config.json")).unwrap()).unwrap();
    assert_eq!((&json["auto_map"], &json["torch_dtype"], &json["dtype"]), (&json!("kept"), &json!("bfloat16"), &Value::Null));
    assert_eq!(json.get("_name_or_path"), None);
    assert_eq!(fs::read(bf16.join("tokenizer.json")).unwrap(), b"{\"x\": 1}");
    assert!(!bf16.join("optimizer.safetensors").exists());
    // Back to one f32 file: the same numbers, so the same hash; the unrounded ones have another.
    ModelFolder::open(&bf16).unwrap().convert(&again, &device(), SaveOptions::default()).unwrap();
    let hash = |dir: &Path| model_hash(&load(dir).unwrap());
    assert_eq!(hash(&bf16), hash(&again));
    assert_ne!(hash(&bf16), hash(model.dir.path()));
    assert_eq!(hash(&bf16).len(), 64);
    fails(folder.convert(&again, &device(), SaveOptions::default()), &again, &["not empty"]);
    assert_eq!(names(out.path()), ["again", "bf16"]);
}

#[test]
fn values_beyond_half_precision_are_refused_and_nothing_is_left() {
    let mut model = Model::new(small(Inner::Linear, Backbone::Mamba));
    model.tensors.get_mut("model.norm.weight").unwrap().1[3] = 70_000.0;
    model.store();
    let out = TempDir::new().unwrap();
    let target = out.path().join("f16");
    let options = SaveOptions { dtype: FileDType::F16, ..Default::default() };
    let result = ModelFolder::open(model.dir.path()).unwrap().convert(&target, &device(), options);
    fails(result, &target.join("model.safetensors"), &["`model.norm.weight` holds 70000", "F16"]);
    assert!(names(out.path()).is_empty());
    assert!("int8".parse::<FileDType>().unwrap_err().to_string().contains("f32, bf16 and f16"));
    assert_eq!("bfloat16".parse::<FileDType>().unwrap(), FileDType::Bf16);
}
