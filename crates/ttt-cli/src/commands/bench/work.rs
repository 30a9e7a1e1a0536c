//! What a model does: train, read, write.

use anyhow::{Result, bail};
use ttt::Storage;
use ttt::batch::Batch;
use ttt::config::{Config, Mixer};
use ttt::device::Device;
use ttt::generate::{Decoder, Draw, Sampling, Sequence, learn};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::adamw;
use ttt::params::Params;
use ttt::plan::{Place, Step, flops};
use ttt::tensor::DType;
use ttt::train::Settings;
use ttt::train::settings::recompute::{Recompute, advice, filled};
use ttt::train::step::{MicroBatch, Optimizer, StepSettings};

use super::{Measured, measure};
use crate::args::Bench;

/// Tokens read before decoding is measured, unless --after says otherwise.
const DECODE_AFTER: u64 = 64;
/// Tokens decoded for one measurement.
const DECODED: usize = 16;
const DECODED_ON_GPU: usize = 256;
/// Seed of the weights.
const SEED: u64 = 0;

/// The model, with random weights.
pub fn model(config: &Config, device: &Device, dtype: Option<Storage>) -> Result<Lm> {
    if device.as_cuda().is_some() {
        let dtype = match dtype.unwrap_or(Storage::Bf16) {
            Storage::Bf16 => DType::Bf16,
            Storage::Int8 => bail!("int8 weights need a CPU; use --device cpu"),
            wide => wide.dtype(),
        };
        return Ok(Lm::new(config, device, dtype, SEED)?);
    }
    Ok(match dtype.unwrap_or(Storage::F32) {
        narrow if narrow.is_narrow() => Lm::new(config, device, DType::F32, SEED)?.narrowed(narrow)?,
        wide => Lm::new(config, device, wide.dtype(), SEED)?,
    })
}

/// Ids without meaning, spread over the vocabulary.
pub fn ids(n: usize, vocab_size: usize) -> Vec<u32> {
    let mut x = 1u64;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((x >> 33) % vocab_size as u64) as u32
    };
    (0..n).map(|_| next()).collect()
}

fn batch(args: &Bench, config: &Config) -> Batch {
    let (sequences, length) = (args.batch as usize, args.length as usize);
    let ids = ids(sequences * length, config.vocab_size);
    Batch::packed(&ids.chunks(length).collect::<Vec<_>>())
}

/// A training step as it is measured.
fn planned<'c>(args: &Bench, config: &'c Config, device: &Device, dtype: DType) -> Step<'c> {
    let mut settings = Settings::default();
    settings.train.checkpoint_group = config.checkpoint_group();
    settings.train.recompute = args.recompute.map_or(Recompute::None, Recompute::from);
    let place = Place::of(device, dtype);
    let lens = vec![args.length as usize; args.batch as usize];
    let only_initial_state = args.only_initial_state;
    let step = Step { lens, only_initial_state, ..settings.planned_step(config, place) };
    match device.memory().room() {
        Some(room) if settings.train.recompute == Recompute::Auto => Step { keep: step.keep_within(filled(room)), ..step },
        _ => step,
    }
}

/// Steps of training, whole or without the optimizer.
pub fn train(args: &Bench, config: &Config, device: &Device) -> Result<Measured> {
    train_here(args, config, device).map_err(|e| match e.downcast::<ttt::Error>() {
        Ok(ttt::Error::OutOfGpuMemory { wanted, in_use, free, total, .. }) => {
            let advice = advice(&planned(args, config, device, DType::Bf16), in_use + free, "--batch ");
            ttt::Error::OutOfGpuMemory { wanted, in_use, free, total, advice }.into()
        }
        Ok(other) => other.into(),
        Err(e) => e,
    })
}

fn train_here(args: &Bench, config: &Config, device: &Device) -> Result<Measured> {
    let mut lm = model(config, device, None)?;
    let batch = batch(args, config);
    let n = batch.tokens.len();
    let length = args.length as usize;
    // Every token's target is the next one; the last of a sequence has none.
    let targets: Vec<u32> = batch.tokens.iter().skip(1).chain(&batch.tokens[..1]).copied().collect();
    let mask: Vec<f64> = (1..=n).map(|i| if i.is_multiple_of(length) { 0.0 } else { 1.0 }).collect();
    let step = planned(args, config, device, lm.dtype());
    let keep = step.keep;
    let parameters = lm.params().table().parameters() as f64;
    let shape = format!("{} x {length}", args.batch);
    if args.no_optimizer {
        let mut grads = Params::zeros(lm.params().table(), device, DType::F32)?;
        let counted = mask.iter().sum::<f64>().max(1.0);
        let weights: Vec<f64> = mask.iter().map(|m| m / counted).collect();
        // Weights are read forward and backward, gradients read and written.
        let cost = [flops(config, length).training, 16.0 * parameters / n as f64];
        return measure(format!("train {shape}, no optimizer"), device, args.repeat, n as f64, cost, || {
            device.install(|| grads.data_mut().fill_zero());
            let (hidden, saved) = lm.forward(&batch, None, keep, 1.0)?;
            let (_, dhidden) = lm.loss(&hidden, &targets, &weights, &mut grads)?;
            drop(hidden);
            Ok(lm.backward(&batch, saved.expect("the pass keeps something"), dhidden, None, &mut grads)?)
        });
    }
    let (mut optimizer, training, what) = match args.only_initial_state {
        true => (Optimizer::of_initial_state(&lm)?, flops(config, length).training_initial_state(), "train W0"),
        false => (Optimizer::new(&lm)?, flops(config, length).training, "train"),
    };
    let micro_batches = [MicroBatch { batch, targets, mask }];
    let adamw = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let step = StepSettings { lr: 1e-3, inner_lr: 1.0, clip: 1.0, adamw, keep };
    // As above, then the norm reads gradients, and AdamW reads four numbers and writes three, of what is learned.
    let learned = optimizer.m.table().parameters() as f64;
    let cost = [training, (8.0 * parameters + (8.0 + 4.0 + 28.0) * learned) / n as f64];
    measure(format!("{what} {shape}"), device, args.repeat, n as f64, cost, || {
        optimizer.step(&mut lm, &micro_batches, &step)?;
        Ok(())
    })
}

/// Reading a prompt.
pub fn prefill(args: &Bench, config: &Config, device: &Device) -> Result<Measured> {
    let lm = model(config, device, args.dtype)?;
    let batch = batch(args, config);
    let n = batch.tokens.len();
    let mut states = lm.states(batch.slots())?;
    let last: Vec<usize> = batch.seqs.iter().map(|s| s.first_row + s.len - 1).collect();
    let rows: Vec<usize> = if args.all_logits { (0..n).collect() } else { last };
    // Head, and gate or queries, output and feed-forward of the last block, are computed for the wanted rows alone.
    let (d, i) = (config.hidden_size, config.intermediate_size);
    let last_block = match config.mixer {
        Mixer::Ttt => (1 + usize::from(config.use_gate)) * d + 3 * i,
        Mixer::Attention => 2 * d + 3 * i,
        Mixer::Mamba => config.inner_size(),
    };
    let of_rows = 2.0 * (d * (config.vocab_size + last_block)) as f64;
    let arithmetic = flops(config, args.length as usize).forward() - of_rows * (1.0 - rows.len() as f64 / n as f64);
    let cost = [arithmetic, lm.weights().bytes() as f64 / n as f64];
    let logits = if args.all_logits { "all logits" } else { "last logits" };
    measure(format!("prefill {} x {}, {logits}", args.batch, args.length), device, args.repeat, n as f64, cost, || {
        for slot in 0..states.slots() {
            states.reset(&lm, slot);
        }
        let hidden = lm.forward_rows(&batch, &mut states, &rows)?;
        lm.logits(&hidden, &(0..rows.len()).collect::<Vec<_>>())?;
        Ok(())
    })
}

/// Writing token by token in every slot at once, after each number of tokens that is wanted. On a GPU a token is chosen, read by the
/// next step and taken by the host meanwhile, as generation does; on a CPU the same token is read again and again, and nothing is
/// chosen.
pub fn decode(args: &Bench, config: &Config, device: &Device) -> Result<Vec<Measured>> {
    let lm = model(config, device, args.dtype)?;
    let slots = args.batch as usize;
    let mut wanted = if args.after.is_empty() { vec![DECODE_AFTER] } else { args.after.clone() };
    wanted.sort_unstable();
    wanted.dedup();
    let one: Vec<[u32; 1]> = ids(slots, config.vocab_size).into_iter().map(|id| [id]).collect();
    let (step, rows) = (Batch::packed(&one), (0..slots).collect::<Vec<_>>());
    // In bf16 those that products read.
    let weights = lm.weights().bytes() as f64 * if lm.dtype() == DType::Bf16 { 0.5 } else { 1.0 };
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: SEED };
    let sequence = |slot: &usize| Sequence { slot: *slot, draw: Draw::new(sampling, *slot as u64), ends: [None; 2] };
    let sequences: Vec<Sequence> = rows.iter().map(sequence).collect();
    let mut decoder = Decoder::new(&lm);
    let mut states = lm.states(slots)?;
    let mut all = Vec::new();
    for after in wanted {
        // What was decoded before has been read too.
        let read = states.position(0);
        learn(&lm, &mut states, 0, &ids(after.saturating_sub(read) as usize, config.vocab_size))?;
        (1..slots).for_each(|slot| states.copy_slot(0, slot));
        // All weights once a step; each slot's state once a token.
        let cost = [flops(config, after as usize + DECODED).forward(), (weights + states.bytes() as f64) / slots as f64];
        let name = format!("decode {slots}, after {after} tokens");
        let mut measured = match device.as_cuda() {
            Some(_) => {
                let (hidden, _) = lm.forward(&step, Some(&mut states), Keep::Nothing, 1.0)?;
                let logits = lm.logits(&hidden, &rows)?;
                let mut session = decoder.start(&mut states, &sequences, &logits)?;
                measure(name, device, args.repeat, (slots * DECODED_ON_GPU) as f64, cost, || {
                    for _ in 0..DECODED_ON_GPU {
                        session.step()?;
                        session.take();
                    }
                    Ok(())
                })?
            }
            None => measure(name, device, args.repeat, (slots * DECODED) as f64, cost, || {
                for _ in 0..DECODED {
                    let (hidden, _) = lm.forward(&step, Some(&mut states), Keep::Nothing, 1.0)?;
                    lm.logits(&hidden, &rows)?;
                }
                Ok(())
            })?,
        };
        measured.decoded = Some([after, states.bytes() as u64]);
        all.push(measured);
    }
    Ok(all)
}
