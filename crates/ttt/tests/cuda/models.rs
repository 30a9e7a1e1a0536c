//! What whole models of every kind must do on a GPU; what they are is with each kind.

use ttt::batch::Batch;
use ttt::config::Config;
use ttt::device::{Device, Kernels};
use ttt::dstates::DStates;
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::adamw;
use ttt::params::Params;
use ttt::state::States;
use ttt::tensor::DType;
use ttt::train::step::{MicroBatch, Optimizer, StepSettings};

use crate::gpu;
use crate::support::{Random, relative};

/// Token ids of the models.
pub const VOCAB: usize = 300;

/// The same weights on another device.
pub fn moved(model: &Lm, device: &Device, dtype: DType) -> Lm {
    Lm::from_params(model.config(), model.params().to(device, dtype).unwrap()).unwrap()
}

/// Logits of sequences of these lengths, and the gradient of their loss.
pub fn logits_and_gradient(model: &Lm, lens: &[usize], keep: Keep) -> [Vec<f64>; 2] {
    let mut random = Random::new(9);
    let batch = Batch::packed(&lens.iter().map(|n| random.tokens(*n, VOCAB)).collect::<Vec<_>>());
    let n = lens.iter().sum::<usize>();
    let targets = random.tokens(n, VOCAB);
    let weights: Vec<f64> = (0..n).map(|t| if t % 7 == 3 { 0.0 } else { 1.0 / n as f64 }).collect();
    let mut grads = Params::zeros(model.params().table(), model.device(), model.params().data().dtype()).unwrap();
    let (hidden, saved) = model.forward(&batch, None, keep, 0.7).unwrap();
    let logits = model.logits(&hidden, &(0..n).collect::<Vec<_>>()).unwrap().to_f64_vec();
    let (_, dhidden) = model.loss(&hidden, &targets, &weights, &mut grads).unwrap();
    model.backward(&batch, saved.unwrap(), dhidden, None, &mut grads).unwrap();
    [logits, grads.data().to_f64_vec()]
}

/// Logits and gradient are those of the definition in f64, the same bits whatever is kept and whenever they are computed.
pub fn is_the_definition(name: &str, host: &Lm, lens: &[usize], ways: &[Keep]) {
    let Some(gpu) = gpu() else { return };
    let check = moved(host, &Device::cpu_with(0, Kernels::Reference).unwrap(), DType::F64);
    let want = logits_and_gradient(&check, lens, Keep::Saved { group: 2 });
    for (dtype, ratio, gradient_ratio) in [(DType::F32, 1e-4, 5e-4), (DType::Bf16, 4e-2, 1e-1)] {
        let model = moved(host, gpu, dtype);
        let first = logits_and_gradient(&model, lens, ways[0]);
        let errors = [0, 1].map(|i| relative(&first[i], &want[i]));
        eprintln!("{name} {dtype:?}: logits {:.1e}, gradient {:.1e}", errors[0], errors[1]);
        assert!(errors[0] < ratio && errors[1] < gradient_ratio, "{name} {dtype:?}: {errors:?}");
        for keep in ways {
            assert_eq!(logits_and_gradient(&model, lens, *keep), first, "{name} {dtype:?} {keep:?}: another result");
        }
    }
}

/// Logits of what follows `tokens` in a slot.
pub fn read(model: &Lm, states: &mut States, tokens: &[u32], slot: usize) -> Vec<f64> {
    let mut batch = Batch::default();
    batch.push(tokens, slot);
    let hidden = model.forward_rows(&batch, states, &[tokens.len() - 1]).unwrap();
    model.logits(&hidden, &[0]).unwrap().to_f64_vec()
}

/// Chunks of these lengths (39 tokens at one cut) are the whole, in a copied slot, a fork and a slot that was reset too.
pub fn reads_in_chunks(name: &str, host: &Lm, chunks: &[usize], ratio: f64) {
    let Some(gpu) = gpu() else { return };
    for (dtype, ratio) in [(DType::F32, ratio), (DType::Bf16, 3e-2)] {
        let model = moved(host, gpu, dtype);
        let tokens = Random::new(3).tokens(chunks.iter().sum(), VOCAB);
        let mut states = model.states(3).unwrap();
        let want = read(&model, &mut states, &tokens, 2);
        let (mut at, mut last) = (0, Vec::new());
        for len in chunks {
            last = read(&model, &mut states, &tokens[at..at + len], 0);
            at += len;
            if at == 39 {
                states.copy_slot(0, 1);
            }
        }
        assert!(relative(&last, &want) < ratio, "{name} {dtype:?}: {}", relative(&last, &want));
        let mut fork = states.fork().unwrap();
        assert!(relative(&read(&model, &mut fork, &tokens[39..], 1), &want) < ratio, "{name} {dtype:?}: a copied slot");
        states.reset(&model, 0);
        assert!(relative(&read(&model, &mut states, &tokens, 0), &want) < ratio, "{name} {dtype:?}: a slot that was reset");
    }
}

/// Gradient of two segments of the same sequences, carried across the cut.
fn gradient_in_segments(model: &Lm, lens: [usize; 2]) -> Vec<f64> {
    let mut random = Random::new(21);
    let mut states = model.states(2).unwrap();
    let mut grads = Params::zeros(model.params().table(), model.device(), model.params().data().dtype()).unwrap();
    let mut passes = Vec::new();
    for len in lens {
        let batch = Batch::packed(&[random.tokens(len, VOCAB), random.tokens(len, VOCAB)]);
        let targets = random.tokens(2 * len, VOCAB);
        let (hidden, saved) = model.forward(&batch, Some(&mut states), Keep::Saved { group: 2 }, 1.0).unwrap();
        let (_, dhidden) = model.loss(&hidden, &targets, &vec![0.01; 2 * len], &mut grads).unwrap();
        passes.push((batch, saved.unwrap(), dhidden));
    }
    let mut dstates = DStates::zeros(&states).unwrap();
    for (batch, saved, dhidden) in passes.into_iter().rev() {
        model.backward(&batch, saved, dhidden, Some(&mut dstates), &mut grads).unwrap();
    }
    grads.data().to_f64_vec()
}

/// Gradients cross a cut as on the CPU; what was saved on the GPU is restored there, bit for bit, and on the CPU.
pub fn carries_and_saves(name: &str, host: &Lm, lens: [usize; 2]) {
    let Some(gpu) = gpu() else { return };
    let want = gradient_in_segments(host, lens);
    for (dtype, ratio) in [(DType::F32, 5e-4), (DType::Bf16, 1e-1)] {
        let model = moved(host, gpu, dtype);
        let error = relative(&gradient_in_segments(&model, lens), &want);
        assert!(error < ratio, "{name} {dtype:?}: {error}");

        let mut states = model.states(1).unwrap();
        read(&model, &mut states, &Random::new(3).tokens(37, VOCAB), 0);
        let bytes = states.to_bytes(0, &model, &[], None).unwrap();
        let logits = read(&model, &mut states, &[5, 6, 7], 0);
        for (model, ratio) in [(&model, 0.0), (host, if dtype == DType::F32 { 1e-4 } else { 4e-2 })] {
            let mut restored = model.states(1).unwrap();
            restored.restore_bytes(0, model, bytes.clone()).unwrap();
            let error = relative(&read(model, &mut restored, &[5, 6, 7], 0), &logits);
            assert!(error <= ratio, "{name} {dtype:?} restored on {:?}: {error}", model.device());
        }
    }
}

/// Losses of a small model on text that can be learned.
pub fn losses(model: &mut Lm, lr: f64, steps: usize) -> Vec<f64> {
    let mut optimizer = Optimizer::new(model).unwrap();
    let adamw = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut random = Random::new(1);
    let mut step = || {
        let sequences: Vec<Vec<u32>> = (0..4)
            .map(|_| {
                let (start, stride) = (random.below(200), 1 + random.below(5));
                (0..129).map(|i| ((start + i * stride + i * i / 7) % VOCAB) as u32).collect()
            })
            .collect();
        let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s[..128]).collect();
        let targets = sequences.iter().flat_map(|s| s[1..].to_vec()).collect();
        let micro = MicroBatch { batch: Batch::packed(&inputs), targets, mask: vec![1.0; 512] };
        let settings = StepSettings { lr, inner_lr: 1.0, clip: 1.0, adamw, keep: Keep::Saved { group: 4 } };
        optimizer.step(model, &[micro], &settings).unwrap().loss
    };
    (0..steps).map(|_| step()).collect()
}

/// The first losses are the CPU's, and what was trained is saved and read there and here. Returns the losses in f32 and in mixed
/// precision.
pub fn trains_and_goes_back(name: &str, config: &Config, lr: f64, [first, steps]: [usize; 2]) -> Option<[Vec<f64>; 2]> {
    let gpu = gpu()?;
    let cpu = gpu.cpu_beside();
    let want = losses(&mut Lm::new(config, &cpu, DType::F32, 5).unwrap(), lr, first);
    Some([(DType::F32, 1e-3), (DType::Bf16, 2e-2)].map(|(dtype, ratio)| {
        let mut model = Lm::new(config, gpu, dtype, 5).unwrap();
        let ours = losses(&mut model, lr, steps);
        let (error, last) = (relative(&ours[..first], &want), ours[steps - 1]);
        eprintln!("{name} {dtype:?}: {first} losses within {error:.1e} of the CPU's, from {:.3} to {last:.3}", ours[0]);
        assert!(error < ratio && last < ours[0], "{name} {dtype:?}: {ours:?} and not {want:?}");

        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("model");
        ttt::hub::save(&folder, config, model.params(), ttt::hub::SaveOptions::default()).unwrap();
        let back = Lm::load(&folder, &cpu, DType::F32).unwrap();
        let again = Lm::load(&folder, gpu, dtype).unwrap();
        assert_eq!(ttt::hub::model_hash(back.params()), ttt::hub::model_hash(model.params()));
        let logits = |m| logits_and_gradient(m, &[70, 33, 5], Keep::Saved { group: 4 })[0].clone();
        let [here, again, back] = [&model, &again, &back].map(logits);
        assert_eq!(here, again, "{name} {dtype:?}: saved and loaded");
        let limit = if dtype == DType::F32 { 1e-4 } else { 4e-2 };
        assert!(relative(&here, &back) < limit, "{name} {dtype:?}: logits on the CPU differ by {}", relative(&here, &back));
        ours
    }))
}

/// The mean of the last 50 of 300 losses is the same in f32 and in mixed precision.
pub fn precision_does_not_matter(name: &str, losses: [Vec<f64>; 2]) {
    let means = losses.map(|losses| losses[250..].iter().sum::<f64>() / 50.0);
    let difference = (means[0] / means[1] - 1.0).abs();
    assert!(difference < 0.01, "{name}: the last 50 of 300 losses in f32 and in mixed precision: {means:?}");
}
