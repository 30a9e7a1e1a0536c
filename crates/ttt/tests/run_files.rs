//! The files around a training run: its settings, and what it writes beside its checkpoints.

use std::{fs, path::Path};

use ttt::{
    config::{Config, Inner, MAMBA_PRESETS, PRESETS},
    hub::config_json,
    train::{
        Settings,
        metrics::{self, InnerLoss, Metrics, Record, Split},
        plot,
        settings::{Recompute, TINY, Train},
        tensorboard::EventFile,
    },
};

fn configs() -> Vec<(String, Settings)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let files = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let mut paths = [files(&folder), files(&folder.join("ladder"))].concat();
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "toml"));
    paths.sort();
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), Settings::load(path).unwrap_or_else(|e| panic!("{e}")))).collect()
}

fn overridden(assignments: &[&str]) -> ttt::Result<Settings> {
    let mut settings = Settings::default();
    assignments.iter().try_for_each(|assignment| settings.apply_override(assignment))?;
    Ok(settings)
}

fn refused(assignments: &[&str]) -> String {
    overridden(assignments).and_then(|settings| settings.validate()).expect_err(&format!("{assignments:?} is accepted")).to_string()
}

#[test]
fn every_config_is_valid() {
    let configs = configs();
    assert!(configs.len() >= 25, "{} configs", configs.len());
    for (name, settings) in configs {
        settings.validate().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(Settings::from_toml(&settings.to_toml(), "its record").unwrap(), settings, "{name}");
    }
}

#[test]
fn the_paper_s_recipe() {
    let configs = configs();
    for (size, steps, warmup, peak) in [
        ("125m", 4_800, 480, 3e-3),
        ("350m", 13_500, 1_350, 1.5e-3),
        ("760m", 29_000, 2_900, 1.25e-3),
        ("1.3b", 50_000, 5_000, 1e-3),
    ] {
        for inner in [Inner::Linear, Inner::Mlp] {
            let name = format!("{size}-ttt-{}", if inner == Inner::Linear { "linear" } else { "mlp" });
            let (_, settings) = configs.iter().find(|config| config.0 == name).unwrap_or_else(|| panic!("no {name}"));
            assert_eq!((settings.steps(), settings.warmup_steps()), (steps, warmup), "{name}");
            assert_eq!((settings.train.sequence_length, settings.sequences_per_step()), (2048, 256));
            let lr = settings.learning_rate();
            assert_eq!((lr.at(0), lr.at(warmup), lr.at(steps)), (0.0, peak, 1e-5), "{name}");
            let config = settings.model_config().unwrap();
            let expected = Config { max_position_embeddings: 2048, ..Config::preset(size, inner).unwrap() };
            assert_eq!(config, expected, "{name}");
            let inner_lr = settings.inner_learning_rate(&config);
            let multipliers = [0, warmup / 2, warmup].map(|t| inner_lr.multiplier(t));
            let expected = if inner == Inner::Linear { [1.0; 3] } else { [0.1, 0.55, 1.0] };
            assert!(multipliers.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{name}: {multipliers:?}");
            let o = &settings.optimizer;
            assert_eq!((o.beta1, o.beta2, o.eps, o.weight_decay, o.clip), (0.9, 0.95, 1e-8, 0.1, 1.0));
        }
        // The baseline's recipe is the same.
        let named = |kind: &str| &configs.iter().find(|config| config.0 == format!("{size}-{kind}")).unwrap().1;
        let (ttt, transformer) = (named("ttt-linear"), named("transformer"));
        let as_ttt = Settings { model: ttt.model.clone(), ..transformer.clone() };
        let same = Settings { train: Train { checkpoint_group: ttt.train.checkpoint_group, ..as_ttt.train }, ..as_ttt };
        assert_eq!(&same, ttt, "{size}");
        let config = transformer.model_config().unwrap();
        let expected = Config { max_position_embeddings: 2048, ..Config::transformer(size).unwrap() };
        assert_eq!(config_json::fields(&config), config_json::fields(&expected), "{size}");
    }
}

#[test]
fn tiny_is_the_default_and_shows_every_key() {
    let settings = Settings::from_toml("", "nothing").unwrap();
    assert_eq!(settings, Settings::default());
    assert_eq!(settings, Settings::from_toml(TINY, "configs/tiny.toml").unwrap());
    settings.validate().unwrap();

    let (mut section, mut shown) = (String::new(), Vec::new());
    for line in TINY.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.split(']').next().unwrap().to_owned();
        } else if let Some((name, _)) = line.trim_start_matches("# ").split_once(" = ") {
            shown.push(format!("{section}.{name}"));
        }
    }
    let of_the_model = serde_json::to_value(Config::default()).unwrap();
    let is_model_field = |key: &str| key.strip_prefix("model.").is_some_and(|name| of_the_model.get(name).is_some());
    for key in Settings::keys() {
        assert!(shown.contains(&key) || is_model_field(&key), "configs/tiny.toml does not show {key}");
    }
    assert!(shown.iter().all(|key| Settings::keys().contains(key)), "{shown:?}");
}

#[test]
fn unknown_keys_are_errors_with_a_suggestion() {
    let error = |text: &str| Settings::from_toml(text, "configs/x.toml").unwrap_err().to_string();
    assert_eq!(
        error("[optimizer]\nlerning_rate = 1e-3"),
        "configuration: unknown key `optimizer.lerning_rate` in configs/x.toml: did you mean `optimizer.learning_rate`?"
    );
    assert!(error("seed = 1").ends_with("unknown key `seed` in configs/x.toml: did you mean `train.seed`?"));
    assert!(error("[optimiser]\nbeta1 = 0.9").ends_with("did you mean `optimizer.beta1`?"));
    assert!(error("[model]\nhiden_size = 64").ends_with("did you mean `model.hidden_size`?"));
    assert!(error("[model]\nttt_layer_typ = 'mlp'").contains("unknown key"));
    assert!(error("[model]\nttt_layer_type = 'mlp'").ends_with("`model.ttt_layer_type` in configs/x.toml: use `model.inner`"));
    assert!(error("[quux]\nzzzzzz = 1").ends_with("unknown key `quux.zzzzzz` in configs/x.toml: configs/tiny.toml lists all keys"));
    assert!(error("model = 3").contains("unknown key `model`"));
    assert!(error("[train\nseed = 1").contains("configs/x.toml: TOML parse error at line 1"));
    assert!(refused(&["train.tokns=1"]).ends_with("unknown key `train.tokns` in the overrides: did you mean `train.tokens`?"));
    assert!(refused(&["train.tokens"]).contains("is not of the form `section.key=value`"));
}

#[test]
fn values_of_a_wrong_type_name_their_key() {
    let error = |text: &str| Settings::from_toml(text, "x.toml").unwrap_err().to_string();
    for (text, part) in [
        ("[optimizer]\nbeta1 = 'high'", "`optimizer.beta1` in x.toml: invalid type: string \"high\""),
        ("[train]\ntokens = 'many'", "`train.tokens` in x.toml: `many` is not a count"),
        ("[train]\nsequence_length = -1", "`train.sequence_length` in x.toml: invalid value: integer `-1`"),
        (
            "[train]\nrecompute = 'all'",
            "`train.recompute` in x.toml: unknown variant `all`, expected one of `auto`, `none`, `inner`, `block`, `segment`",
        ),
        ("[model]\ninner = 'cubic'", "`model.inner` in x.toml: unknown variant `cubic`, expected `linear` or `mlp`"),
        ("[model]\nhidden_size = 'wide'", "`model.hidden_size` in x.toml: invalid type: string \"wide\""),
        ("[data]\npaths = 3", "`data.paths` in x.toml: expected a string or a list of strings"),
        ("[log.tensorboard]\nyes = 1", "`log.tensorboard` in x.toml: invalid type: map"),
    ] {
        let message = error(text);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn overrides_take_toml_and_bare_strings() {
    let settings = overridden(&[
        "train.tokens=10M",
        "train.batch_tokens = 8_192",
        "train.recompute=block",
        "optimizer.learning_rate=1e-3",
        "optimizer.clip=2",
        "optimizer.warmup_steps=7",
        "model.inner=mlp",
        "model.backbone=transformer",
        "model.mini_batch_size=8",
        "model.rope_theta=500000",
        "data.paths=a.txt",
        r#"data.validation_paths=["b.txt", "c=d/*.txt"]"#,
        "data.document_separator=",
        "data.cache=/tmp/a cache",
        "sample.prompt=1984",
        "log.tensorboard=false",
    ])
    .unwrap();
    settings.validate().unwrap();
    assert_eq!((settings.train.tokens, settings.train.batch_tokens, settings.steps()), (10_000_000, 8192, 1221));
    assert_eq!((settings.train.recompute, settings.warmup_steps()), (Recompute::Block, 7));
    assert_eq!((settings.optimizer.learning_rate, settings.optimizer.clip), (1e-3, 2.0));
    assert_eq!(settings.data.paths, ["a.txt"]);
    assert_eq!(settings.data.validation_paths, ["b.txt", "c=d/*.txt"]);
    assert_eq!((settings.data.document_separator.as_str(), settings.sample.prompt.as_str()), ("", "1984"));
    assert_eq!(settings.data.cache.as_deref(), Some(Path::new("/tmp/a cache")));
    assert!(!settings.log.tensorboard);
    let config = settings.model_config().unwrap();
    assert_eq!((config.ttt_layer_type, config.ttt_base_lr, config.use_gate, config.share_qk), (Inner::Mlp, 0.1, false, false));
    assert_eq!((config.mini_batch_size, config.rope_theta, config.hidden_size), (8, 500_000.0, 192));
    assert_eq!(settings.inner_learning_rate(&config).warmup, 7);
    assert_eq!(Settings::from_toml(&settings.to_toml(), "its record").unwrap(), settings);
    // A later layer wins, and a value cannot smuggle in a second line.
    assert_eq!(overridden(&["train.seed=1", "train.seed=2"]).unwrap().train.seed, 2);
    assert!(overridden(&["train.seed=1\nthreads = 2"]).is_err());
}

#[test]
fn impossible_runs_are_refused_in_words() {
    for (assignments, part) in [
        (
            &["train.sequence_length=8", "train.batch_tokens=64"][..],
            "sequence_length 8 is not a multiple of the mini-batch size 16; 16 is",
        ),
        (&["train.sequence_length=100"], "sequence_length 100 is not a multiple of the mini-batch size 16; 112 is"),
        (&["train.sequence_length=0"], "train.sequence_length is 0; it must be at least 1"),
        (&["train.batch_tokens=1000"], "batch_tokens 1000 is not a multiple of train.sequence_length 256; 1024 is"),
        (&["train.segment_length=0"], "train.segment_length is 0; it must be at least 1"),
        (&["train.segment_length=40"], "train.segment_length 40 is not a multiple of the mini-batch size 16; 48 is"),
        (&["train.segment_length=48"], "train.sequence_length 256 is not a multiple of train.segment_length 48"),
        (&["train.segment_length=64", "train.segments_per_step=3"], "segments_per_step 3 does not divide the 4 segments"),
        (&["train.segments_per_step=2"], "segments_per_step 2 does not divide the 1 segments of a sequence (train.segment_length)"),
        (
            &["train.segment_length=64", "train.batch_tokens=96"],
            "batch_tokens 96 is not a multiple of train.segment_length 64; 128 is",
        ),
        (
            &["train.segment_length=64", "train.segments_per_step=4", "train.batch_tokens=384"],
            "batch_tokens 384 is not a multiple of train.segments_per_step 4 times train.segment_length 64; 512 is",
        ),
        (&["train.carry=gradient"], "train.carry is gradient, but a step has no cuts; set train.segments_per_step to 2 or more"),
        (&["train.recompute=segment"], "train.recompute is segment, which is of use only with train.carry=gradient"),
        (&["train.tokens=1000"], "train.tokens 1000 is less than one step of 1024 tokens"),
        (&["train.micro_batch=0"], "train.micro_batch is 0; it must be at least 1"),
        (&["train.checkpoint_group=0"], "train.checkpoint_group is 0"),
        (&["eval.tokens=255"], "eval.tokens 255 is less than one sequence of 256 tokens"),
        (&["optimizer.learning_rate=0"], "optimizer.learning_rate is 0; it must be a positive number"),
        (&["optimizer.learning_rate=nan"], "optimizer.learning_rate is NaN; it must be a positive number"),
        (&["optimizer.learning_rate=inf"], "optimizer.learning_rate is inf"),
        (&["optimizer.end_learning_rate=1"], "optimizer.end_learning_rate is 1; it must be from 0 to learning_rate"),
        (&["optimizer.warmup_fraction=1.5"], "optimizer.warmup_"),
        (&["optimizer.warmup_steps=10000"], "optimizer.warmup_steps 10000 is more than the run's 977 steps"),
        (&["optimizer.beta2=1.0"], "optimizer.beta2 is 1; it must be from 0 to below 1"),
        (&["optimizer.clip=-1"], "optimizer.clip is -1; it must be a number from 0 up"),
        (&["data.validation_fraction=1"], "data.validation_fraction is 1; it must be from 0 to below 1"),
        (&["model.preset=huge"], "no preset is called `huge`; there are tiny"),
        (&["model.num_attention_heads=7"], "hidden_size 192 is not divisible by num_attention_heads 7"),
        (&["model.mini_batch_size=0"], "mini_batch_size is 0; it must be from 1 to 64"),
        (&["model.folder=/does/not/exist"], "/does/not/exist: No such file"),
    ] {
        let message = refused(assignments);
        assert!(message.contains(part), "{assignments:?}: {message}");
    }
}

#[test]
fn micro_batches_are_equal_parts_of_a_step() {
    for (sequences, at_most, micro_batch) in [(16, 16, 16), (16, 64, 16), (12, 8, 6), (7, 4, 1), (256, 100, 64)] {
        let batch = format!("train.batch_tokens={}", sequences * 256);
        let settings = overridden(&[&batch, &format!("train.micro_batch={at_most}")]).unwrap();
        settings.validate().unwrap();
        assert_eq!((settings.sequences_per_step(), settings.micro_batch()), (sequences, micro_batch));
    }
}

#[test]
fn a_model_folder_replaces_the_preset_and_overrides_win() {
    let folder = tempfile::tempdir().unwrap();
    let saved = Config { hidden_size: 64, num_attention_heads: 2, ..Config::preset("tiny", Inner::Mlp).unwrap() };
    fs::write(folder.path().join("config.json"), serde_json::to_string(&config_json::fields(&saved)).unwrap()).unwrap();
    let set = format!("model.folder={}", folder.path().display());
    let config = overridden(&[&set, "model.rope_theta=1e5"]).unwrap().model_config().unwrap();
    assert_eq!(config, Config { rope_theta: 1e5, max_position_embeddings: 256, ..saved });
    fs::write(folder.path().join("config.json"), "{").unwrap();
    let error = overridden(&[&set]).unwrap().model_config().unwrap_err().to_string();
    assert!(error.contains("config.json: not a JSON object: EOF"), "{error}");
}

#[test]
fn every_preset_trains_with_either_backbone_and_inner_model() {
    for preset in PRESETS {
        for inner in ["linear", "mlp"] {
            for backbone in ["transformer", "mamba"] {
                let assignments =
                    [format!("model.preset={preset}"), format!("model.inner={inner}"), format!("model.backbone={backbone}")];
                let settings = overridden(&assignments.each_ref().map(String::as_str)).unwrap();
                settings.validate().unwrap();
                assert_eq!(settings.model_config().unwrap().use_gate, backbone == "mamba");
            }
        }
    }
}

#[test]
fn every_preset_is_one_of_the_baselines_too() {
    for preset in PRESETS {
        let settings = overridden(&[&format!("model.preset={preset}"), "model.mixer=attention"]).unwrap();
        settings.validate().unwrap();
    }
    for preset in PRESETS.into_iter().chain(MAMBA_PRESETS) {
        let settings = overridden(&[&format!("model.preset={preset}"), "model.mixer=mamba"]).unwrap();
        assert!(settings.model_config().unwrap().num_hidden_layers >= 8, "{preset}");
    }
    assert!(refused(&["model.preset=130m"]).contains("no preset is called `130m`; there are tiny, 125m"));
}

/// A field that a model does not have is an error, not ignored.
#[test]
fn fields_of_other_mixers_are_refused() {
    for (assignments, field) in [
        (["model.mixer=attention", "model.mini_batch_size=8"], "model.mini_batch_size"),
        (["model.mixer=attention", "model.state_size=8"], "model.state_size"),
        (["model.mixer=ttt", "model.num_key_value_heads=2"], "model.num_key_value_heads"),
        (["model.mixer=mamba", "model.rope_theta=8.0"], "model.rope_theta"),
    ] {
        let message = refused(&assignments);
        assert!(message.contains(&format!("{field} is no field of this model, whose mixer is")), "{message}");
    }
    assert!(refused(&["model.mixer=attention", "train.only_initial_state=true"]).contains("of a TTT model alone"));
    assert!(refused(&["model.mixer=attention", "model.num_key_value_heads=3"]).contains("num_attention_heads 4 is not divisible"));
}

/// Writes the files of an interrupted and resumed run to `target/tmp/run_files`, where `ci/check_tensorboard.py` reads them with
/// TensorBoard's own reader.
#[test]
fn a_run_writes_metrics_events_and_a_plot() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("run_files");
    _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let (jsonl, events) = (folder.join("metrics.jsonl"), folder.join("events"));
    let settings = Settings::default();
    let lr = settings.learning_rate();
    let record = |split, step: u64, spoilt: f64| {
        let progress = step as f64 / settings.steps() as f64;
        let noise = ((step * 7919 % 1000) as f64 / 1000.0 - 0.5) * 0.25;
        let loss = 1.2 + 4.35 * (-5.0 * progress).exp() / (1.0 + 3.0 * progress);
        let validation = split == Split::Validation;
        let inner = InnerLoss { mse_init: 1.0 + progress, mse_step_0: 1.0 - 0.4 * progress, mse_step_1: 0.9 - 0.5 * progress };
        Record {
            bits_per_byte: validation.then_some(loss / 2f64.ln()),
            lr: (!validation).then(|| lr.at(step)),
            grad_norm: (!validation).then_some(if step == 20 { f64::INFINITY } else { 1.0 + noise }),
            tokens_per_second: (!validation).then_some(12_345.6),
            memory_bytes: Some(1 << 30),
            inner: validation.then(|| vec![inner; 4]),
            ..Record::new(split, step, step * 4096, loss + if validation { 0.08 } else { noise } + spoilt)
        }
    };
    let write = |resumed: Option<u64>, to: u64| {
        let mut metrics = match resumed {
            Some(step) => Metrics::resume(&jsonl, step).unwrap(),
            None => Metrics::create(&jsonl).unwrap(),
        };
        let mut file = EventFile::create(&events, resumed).unwrap();
        for step in resumed.map_or(0, |step| step + 1)..=to {
            let splits = [(Split::Validation, settings.eval.every), (Split::Train, 2)];
            let spoilt = if resumed.is_none() && step > 300 { 9.0 } else { 0.0 };
            for (split, _) in splits.iter().filter(|(_, every)| step % every == 0) {
                metrics.write(&record(*split, step, spoilt)).unwrap();
                file.write_record(&record(*split, step, spoilt)).unwrap();
            }
        }
    };
    // What the first part wrote after step 300 must be gone from everything.
    write(None, 350);
    write(Some(300), settings.steps());

    let records = metrics::read(&jsonl).unwrap();
    let trained: Vec<_> = records.iter().filter(|record| record.split == Split::Train).map(|record| record.step).collect();
    assert_eq!(trained, (0..=settings.steps()).step_by(2).collect::<Vec<_>>());
    let validated = records.iter().filter(|record| record.split == Split::Validation).count();
    assert_eq!(validated as u64, settings.steps() / settings.eval.every + 1);
    assert!(records.iter().all(|record| record.loss < 6.0));
    plot::write_loss_svg(folder.join("loss.svg"), &records, "tiny, TTT-Linear, 1.9M parameters").unwrap();
    assert!(fs::metadata(folder.join("loss.svg")).unwrap().len() > 10_000);
    assert_eq!(fs::read_dir(&events).unwrap().count(), 2);
}
