//! The paper's ladder from linear attention to TTT-Linear (Table 1): that each of its configurations is the one before but for what
//! it is named after, that the first rungs are one model, and what a run of each leaves.

mod support;

use std::path::PathBuf;

use serde_json::{Map, Value};
use support::{Random, relative, rungs, shaken_model};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::generate::learn;
use ttt::hub::{ModelFolder, SaveOptions, save};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::params::{ParamTable, Params};
use ttt::plan;
use ttt::tensor::DType;
use ttt::train::Settings;

const RUNGS: [&str; 8] = [
    "1-linear-attention-normalised",
    "2-linear-attention",
    "3-ttt",
    "4-learnable-w0",
    "5-norm-residual",
    "6-mini-batch-16",
    "7-learnable-eta",
    "8-mamba-backbone",
];

fn settings(name: &str) -> Settings {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../configs/ladder/{name}.toml"));
    Settings::load(path).unwrap()
}

fn fields(config: &Config) -> Map<String, Value> {
    serde_json::to_value(config).unwrap().as_object().unwrap().clone()
}

/// A small model of two blocks, that the rungs are made of.
fn small() -> Config {
    Config {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        ..Config::default()
    }
}

#[test]
fn each_rung_changes_what_it_is_named_after() {
    let all = RUNGS.map(settings);
    let configs = all.each_ref().map(|s| s.model_config().unwrap());
    let changed = |i: usize| -> Vec<String> {
        let (before, after) = (fields(&configs[i - 1]), fields(&configs[i]));
        before.keys().filter(|key| before[*key] != after[*key]).cloned().collect()
    };
    assert_eq!(changed(1), ["linear_attention"]);
    // What the learner is, said in full; the first rungs have no inner model to say it of.
    let theorem = [
        "ttt_layer_norm",
        "ttt_residual",
        "ttt_bias",
        "ttt_learnable_init",
        "ttt_learnable_lr",
        "ttt_token_scale",
        "mini_batch_size",
        "linear_attention",
    ];
    let third = changed(2);
    assert!(third.len() == theorem.len() && theorem.iter().all(|name| third.iter().any(|c| c == name)), "{third:?}");
    assert_eq!(changed(3), ["ttt_bias", "ttt_learnable_init"]);
    let mut fourth = changed(4);
    fourth.sort();
    assert_eq!(fourth, ["ttt_base_lr", "ttt_layer_norm", "ttt_residual", "ttt_token_scale"]);
    assert_eq!(changed(5), ["mini_batch_size"]);
    let mut sixth = changed(6);
    sixth.sort();
    assert_eq!(sixth, ["ttt_base_lr", "ttt_learnable_lr"]);
    let mut seventh = changed(7);
    seventh.sort();
    assert_eq!(seventh, ["pre_conv", "share_qk", "use_gate"]);

    // The fixed rate is what the learned one starts as: half the base rate over the head width.
    assert_eq!(configs[5].ttt_base_lr, configs[6].ttt_base_lr / 2.0 / configs[6].head_dim() as f64);
    // The rest of a run is the same for all, and so are the sizes but for what a rung adds.
    for (settings, config) in all.iter().zip(&configs) {
        assert_eq!(Settings { model: all[0].model.clone(), ..settings.clone() }, all[0]);
        let parameters = ParamTable::new(config).0.parameters();
        assert!((26_000_000..28_000_000).contains(&parameters), "{parameters}");
        settings.validate().unwrap();
    }
    let like = Config { scan_checkpoint_group_size: configs[6].scan_checkpoint_group_size, ..configs[6].clone() };
    for (ours, config) in rungs(&like).iter().zip(&configs).take(6) {
        assert_eq!(ours, config, "the rungs that other tests use");
    }
}

/// Theorem 1 as whole models: the same parameters, logits and gradients.
#[test]
fn the_second_and_the_third_rung_are_one_model() {
    let device = Device::cpu().unwrap();
    for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        let [_, attention, ttt, ..] = rungs(&small());
        let [a, b] = [&attention, &ttt].map(|config| {
            let model = shaken_model(config, &device, dtype, 3);
            let mut random = Random::new(1);
            let batch = Batch::packed(&[random.tokens(150, 40), random.tokens(9, 40)]);
            let (targets, weights) = (random.tokens(159, 40), vec![1.0 / 159.0; 159]);
            let mut grads = Params::zeros(model.params().table(), &device, dtype).unwrap();
            let (hidden, saved) = model.forward(&batch, None, Keep::Saved { group: 4 }, 1.0).unwrap();
            let logits = model.logits(&hidden, &(0..159).collect::<Vec<_>>()).unwrap().to_f64_vec();
            let (_, dhidden) = model.loss(&hidden, &targets, &weights, &mut grads).unwrap();
            model.backward(&batch, saved.unwrap(), dhidden, None, &mut grads).unwrap();
            let names: Vec<String> = model.params().table().entries().iter().map(|e| e.name.clone()).collect();
            (names, logits, grads.data().to_f64_vec())
        });
        assert_eq!(a.0, b.0);
        assert!(relative(&a.1, &b.1) < bound, "{dtype:?} logits: {:e}", relative(&a.1, &b.1));
        assert!(relative(&a.2, &b.2) < bound, "{dtype:?} gradients: {:e}", relative(&a.2, &b.2));
    }
}

/// A mini-batch that no sequence fills is the sequence: with the same rates the fifth rung is the sixth, and stops being it with the
/// 17th token.
#[test]
fn within_a_mini_batch_the_fifth_and_the_sixth_rung_are_one_model() {
    let device = Device::cpu().unwrap();
    let [.., batch, mini_batch, _, _] = rungs(&small());
    let logits = |config: &Config, n: usize| {
        let model = shaken_model(config, &device, DType::F64, 5);
        let tokens = Random::new(2).tokens(n, 40);
        let (hidden, _) = model.forward(&Batch::one(&tokens), None, Keep::Nothing, 1.0).unwrap();
        model.logits(&hidden, &(0..n).collect::<Vec<_>>()).unwrap().to_f64_vec()
    };
    assert!(relative(&logits(&batch, 16), &logits(&mini_batch, 16)) < 1e-12);
    assert!(relative(&logits(&batch, 17), &logits(&mini_batch, 17)) > 1e-4);
}

#[test]
fn states_are_saved_and_restored_in_every_rung() {
    let device = Device::cpu().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.state");
    for config in rungs(&small()) {
        let model = Lm::new(&config, &device, DType::F32, 7).unwrap();
        let tokens = Random::new(3).tokens(100, 40);
        let mut live = model.states(1).unwrap();
        learn(&model, &mut live, 0, &tokens[..77]).unwrap();
        live.save(0, &model, &[], None, &path).unwrap();
        let mut restored = model.states(1).unwrap();
        restored.restore(0, &model, &path).unwrap();
        assert_eq!(restored.position(0), 77);
        let next = |states: &mut ttt::States| {
            let (hidden, _) = model.forward(&Batch::one(&tokens[77..]), Some(states), Keep::Nothing, 1.0).unwrap();
            model.logits(&hidden, &(0..23).collect::<Vec<_>>()).unwrap().to_f64_vec()
        };
        assert_eq!(next(&mut restored), next(&mut live), "{config:?}");
    }
    // Of another learner it is refused.
    let other = Lm::new(&rungs(&small())[1], &device, DType::F32, 7).unwrap();
    let message = other.states(1).unwrap().restore(0, &other, &path).unwrap_err().to_string();
    assert!(message.contains("learner"), "{message}");
}

#[test]
fn folders_keep_the_rung_and_official_ones_know_nothing_of_it() {
    let device = Device::cpu().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (i, config) in rungs(&small()).iter().enumerate() {
        let path = folder.path().join(i.to_string());
        let model = Lm::new(config, &device, DType::F32, 1).unwrap();
        save(&path, config, model.params(), SaveOptions::default()).unwrap();
        assert_eq!(ModelFolder::open(&path).unwrap().config(), config);
        let again = Lm::load(&path, &device, DType::F32).unwrap();
        assert_eq!(again.params().data().to_f64_vec(), model.params().data().to_f64_vec());
    }
    let json = |name: &str| -> Map<String, Value> {
        serde_json::from_slice(&std::fs::read(folder.path().join(name).join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(json("4")["mini_batch_size"], "sequence");
    let path = folder.path().join("official");
    let model = Lm::new(&small(), &device, DType::F32, 1).unwrap();
    save(&path, &small(), model.params(), SaveOptions::default()).unwrap();
    let ours = [
        "linear_attention",
        "ttt_layer_norm",
        "ttt_residual",
        "ttt_bias",
        "ttt_learnable_init",
        "ttt_learnable_lr",
        "ttt_token_scale",
    ];
    assert!(ours.iter().all(|name| !json("official").contains_key(*name)), "{:?}", json("official"));
    assert_eq!(json("official")["mini_batch_size"], 16);
}

#[test]
fn what_cannot_be_combined_is_said() {
    let refused = |change: &dyn Fn(&mut Config)| {
        let mut config = small();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    };
    assert!(refused(&|c| c.mini_batch_size = 65).contains("from 1 to 64, or `sequence`"));
    assert!(refused(&|c| c.ttt_bias = false).contains("ttt_bias is false"));
    assert!(refused(&|c| (c.mini_batch_size, c.ttt_layer_type) = (ttt::config::SEQUENCE, Inner::Mlp)).contains("`linear` alone"));
    let mut settings = Settings::default();
    settings.apply_override("model.mini_batch_size=sequence").unwrap();
    assert_eq!(settings.model_config().unwrap().mini_batch(), None);
    for wrong in ["0", "sequenze", "-1", "1.5"] {
        let message = settings.apply_override(&format!("model.mini_batch_size={wrong}")).unwrap_err().to_string();
        assert!(message.contains("model.mini_batch_size"), "{message}");
    }
}

#[test]
fn a_step_costs_what_the_plan_says() {
    for config in rungs(&small()) {
        let flops = plan::flops(&config, 512);
        assert!(flops.mixing > 0.0 && flops.training > 3.0 * flops.matmul);
        assert!(plan::Step::new(&config, &[64, 64], Keep::Saved { group: 4 }, plan::Place::Cpu).memory().total() > 0);
    }
    // A mini-batch of 16 does less than chunks of 64, a learner more than attention that only remembers.
    let [_, attention, ttt, _, _, mini_batch, ..] = rungs(&small()).map(|config| plan::flops(&config, 512).mixing);
    assert!(attention < ttt && mini_batch < ttt);
}
