//! Training of the learners on a GPU: the loop's steps, memory.

use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::adamw;
use ttt::plan::{Place, Step};
use ttt::tensor::DType;
use ttt::train::step::{MicroBatch, Optimizer, StepSettings};

use crate::gpu;
use crate::learners::small_of;
use crate::models::{moved, precision_does_not_matter, trains_and_goes_back};
use crate::support::Random;

#[test]
fn training_follows_the_cpu_and_the_model_goes_back() {
    for inner in [Inner::Linear, Inner::Mlp] {
        let name = format!("{inner:?}");
        if let Some(losses) = trains_and_goes_back(&name, &small_of(inner, 0b1111), 1e-3, [20, 300]) {
            precision_does_not_matter(&name, losses);
        }
    }
}

/// A step of a training loop is queued and looked at while the next one runs: same losses, same weights. What is not finite is named
/// for the step that it came from, and nothing queued behind that is made.
#[test]
fn steps_are_looked_at_a_step_late() {
    let Some(gpu) = gpu() else { return };
    let config = small_of(Inner::Linear, 0b1111);
    let adamw = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let settings = StepSettings { lr: 1e-3, inner_lr: 1.0, clip: 0.1, adamw, keep: Keep::Saved { group: 4 } };
    let micro = |seed: u64| {
        let tokens = Random::new(seed).tokens(129, 300);
        let mask = (0..128).map(|i| f64::from(u8::from(i % 5 != 0))).collect();
        MicroBatch { batch: Batch::one(&tokens[..128]), targets: tokens[1..].to_vec(), mask }
    };
    let weights = |model: &Lm| model.params().data().to_f64_vec();
    let [mut at_once, mut late] = [0; 2].map(|_| Lm::new(&config, gpu, DType::Bf16, 5).unwrap());
    let [mut one, mut two] = [&at_once, &late].map(|model| Optimizer::new(model).unwrap());
    let mut reports = Vec::new();
    let want: Vec<_> = (0..5).map(|i| one.step(&mut at_once, &[micro(i), micro(9 + i)], &settings).unwrap()).collect();
    for i in 0..5 {
        two.queue(&mut late, &[micro(i), micro(9 + i)], &settings).unwrap();
        if two.unsettled() > 1 {
            reports.extend(two.settle(&late, None).unwrap());
        }
    }
    reports.extend(two.settle(&late, None).unwrap());
    assert_eq!((reports, two.settle(&late, None).unwrap()), (want.clone(), None));
    assert_eq!(weights(&late), weights(&at_once));

    // The same sums as on the CPU, where the host makes them.
    let mut host = moved(&Lm::new(&config, gpu, DType::F32, 5).unwrap(), &gpu.cpu_beside(), DType::F32);
    let report = Optimizer::new(&host).unwrap().step(&mut host, &[micro(0), micro(9)], &settings).unwrap();
    for (ours, theirs) in [(want[0].loss, report.loss), (want[0].nll, report.nll), (want[0].grad_norm, report.grad_norm)] {
        assert!((ours / theirs - 1.0).abs() < 2e-2, "{:?} and {report:?}", want[0]);
    }
    assert_eq!(want[0].counted, report.counted);

    // Of three steps the second is not finite.
    let before = two.step;
    two.queue(&mut late, &[micro(1)], &settings).unwrap();
    two.settle(&late, None).unwrap();
    let made = weights(&late);
    let infinite = StepSettings { inner_lr: f64::INFINITY, ..settings };
    two.queue(&mut late, &[micro(2)], &infinite).unwrap();
    two.queue(&mut late, &[micro(3)], &settings).unwrap();
    let error = two.settle(&late, None).unwrap_err();
    assert!(
        matches!(&error, ttt::Error::NotFinite { step, tensor, .. } if *step == before + 1 && tensor.contains("layers.0")),
        "{error}"
    );
    assert!(weights(&late) == made && two.step == before + 1 && two.unsettled() == 0, "an update was made");
    // After that training goes on.
    assert!(two.step(&mut late, &[micro(3)], &settings).unwrap().loss.is_finite() && weights(&late) != made);
}

/// As on a CPU (`tests/train.rs`), at the width of the 125M model.
#[test]
fn planned_memory_is_within_a_tenth_of_the_measured_peak() {
    let Some(gpu) = gpu() else { return };
    let adamw = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    for (inner, dtype, lens) in [
        (Inner::Linear, DType::Bf16, &[1024; 16][..]),
        (Inner::Mlp, DType::Bf16, &[1024; 16]),
        (Inner::Linear, DType::Bf16, &[16384]),
        (Inner::Mlp, DType::F32, &[128; 8]),
    ] {
        let config = Config { num_hidden_layers: 4, vocab_size: 16_000, ..Config::preset("125m", inner).unwrap() };
        let mut model = Lm::new(&config, gpu, dtype, 1).unwrap();
        let mut optimizer = Optimizer::new(&model).unwrap();
        let sequences: Vec<Vec<u32>> = lens.iter().map(|n| Random::new(*n as u64).tokens(*n, 16_000)).collect();
        let batch = Batch::packed(&sequences.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let (targets, mask) = (batch.tokens.clone(), vec![1.0; batch.tokens.len()]);
        let micro = MicroBatch { batch, targets, mask };
        let mut peaks = Vec::new();
        for keep in [Keep::Saved { group: 16 }, Keep::Start { group: 16 }, Keep::Input { group: 16 }] {
            gpu.memory().trim();
            gpu.memory().reset_peak();
            let settings = StepSettings { lr: 1e-3, inner_lr: 1.0, clip: 1.0, adamw, keep };
            optimizer.step(&mut model, std::slice::from_ref(&micro), &settings).unwrap();
            let measured = gpu.memory().usage().peak;
            let planned = Step::new(&config, lens, keep, Place::of(gpu, dtype)).memory();
            let total = (planned.total() - planned.libraries) as f64;
            eprintln!(
                "{inner:?} {dtype:?} {keep:?}: planned {:.0} MiB, measured {:.0}",
                total / 1048576.0,
                measured as f64 / 1048576.0
            );
            assert!((total / measured as f64 - 1.0).abs() < 0.1, "{inner:?} {keep:?}: planned {planned:?}, measured {measured}");
            peaks.push(measured);
        }
        assert!(peaks.is_sorted_by(|a, b| a > b), "{peaks:?}");
    }
}
