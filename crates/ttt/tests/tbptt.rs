//! Training in segments: gradients across the cuts are those of whole sequences, truncated ones those of states held fixed.

mod support;

use proptest::prelude::*;
use support::{Random, relative, shaken_model, transformer};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::layer::Keep;
use ttt::lm::{Lm, Saved};
use ttt::params::Params;
use ttt::tensor::{DType, Tensor};
use ttt::{DStates, States};

const VOCAB: usize = 11;

/// A Transformer where there is no inner model, its heads of queries with keys and values of their own or shared.
fn config_of(inner: Option<Inner>, parts: [bool; 3], mini_batch: usize, head_dim: usize) -> Config {
    match inner {
        Some(inner) => config(inner, parts, mini_batch, head_dim),
        None => transformer(config(Inner::Linear, [false; 3], mini_batch, head_dim), 1 + usize::from(parts[0])),
    }
}

/// Both learners with the parts of both backbones: gate, shared q and k, convolution before the layer.
fn config(inner: Inner, [gate, share_qk, pre_conv]: [bool; 3], mini_batch: usize, head_dim: usize) -> Config {
    let mut config = Config {
        vocab_size: VOCAB,
        hidden_size: 2 * head_dim,
        intermediate_size: 6,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        mini_batch_size: mini_batch,
        use_gate: gate,
        share_qk,
        pre_conv,
        ..Config::default()
    }
    .with_inner(inner);
    // Large, so that the inner loop matters.
    config.ttt_base_lr = 2.0;
    config
}

/// A pass over pieces of documents; `rows` says which token of which document each row of the batch is.
#[derive(Default)]
struct Piece {
    batch: Batch,
    rows: Vec<(usize, usize)>,
}

/// Documents, and passes that read them in slots: cut at multiples of the mini-batch or at a document's end.
struct Draw {
    documents: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    weights: Vec<Vec<f64>>,
    passes: Vec<Piece>,
    slots: usize,
}

impl Draw {
    fn new(random: &mut Random, k: usize, slots: usize, passes: usize) -> Draw {
        let mut draw = Draw { documents: vec![], targets: vec![], weights: vec![], passes: vec![], slots };
        // Of each slot the document it is in, and how much of it was read.
        let mut open: Vec<Option<(usize, usize)>> = vec![None; slots];
        for _ in 0..passes {
            let mut pass = Piece::default();
            let first = random.below(slots);
            for slot in (0..slots).map(|i| (first + i) % slots) {
                // Not every pass reads on in every slot.
                while random.below(5) > 0 {
                    let (document, read, starts) = match open[slot] {
                        Some((document, read)) => (document, read, false),
                        None => (draw.document(random, 3 * k + 2), 0, true),
                    };
                    let left = draw.documents[document].len() - read;
                    let cut = k * (1 + random.below(3));
                    let (n, ends) = if cut < left && random.below(4) > 0 { (cut, false) } else { (left, true) };
                    let tokens = draw.documents[document][read..read + n].to_vec();
                    match starts {
                        true => pass.batch.push_fresh(&tokens, slot),
                        false => pass.batch.push(&tokens, slot),
                    }
                    pass.rows.extend((read..read + n).map(|t| (document, t)));
                    open[slot] = if ends { None } else { Some((document, read + n)) };
                    if !ends {
                        break;
                    }
                }
            }
            draw.passes.push(pass);
        }
        // What nobody has read is not there.
        for (document, read) in open.into_iter().flatten() {
            draw.documents[document].truncate(read);
            draw.targets[document].truncate(read);
            draw.weights[document].truncate(read);
        }
        draw
    }

    fn document(&mut self, random: &mut Random, longest: usize) -> usize {
        let n = 1 + random.below(3 * longest);
        self.documents.push(random.tokens(n, VOCAB));
        self.targets.push(random.tokens(n, VOCAB));
        self.weights.push((0..n).map(|t| if t % 5 == 3 { 0.0 } else { 0.1 + random.unit().abs() }).collect());
        self.documents.len() - 1
    }

    fn targets(&self, pass: &Piece) -> Vec<u32> {
        pass.rows.iter().map(|(d, t)| self.targets[*d][*t]).collect()
    }

    fn weights(&self, pass: &Piece) -> Vec<f64> {
        pass.rows.iter().map(|(d, t)| self.weights[*d][*t]).collect()
    }
}

fn zeros(model: &Lm) -> Params {
    Params::zeros(model.params().table(), model.device(), model.dtype()).unwrap()
}

const INNER_LR: f64 = 0.7;

/// Likelihoods by document and token, and gradients, of whole documents that all start afresh in one pass.
fn whole(model: &Lm, draw: &Draw, keep: Keep) -> (Vec<Vec<f64>>, Params) {
    let mut grads = zeros(model);
    let batch = Batch::packed(&draw.documents);
    let (hidden, saved) = model.forward(&batch, None, keep, INNER_LR).unwrap();
    let (nll, dhidden) = model.loss(&hidden, &draw.targets.concat(), &draw.weights.concat(), &mut grads).unwrap();
    model.backward(&batch, saved.unwrap(), dhidden, None, &mut grads).unwrap();
    let mut rest = &nll[..];
    let nll = draw.documents.iter().map(|d| rest.split_off(..d.len()).unwrap().to_vec()).collect();
    (nll, grads)
}

/// The same in the passes of the draw; `across`: with gradient across the cuts. Returns the states at the end too.
fn segments(model: &Lm, draw: &Draw, keep: Keep, across: bool) -> (Vec<Vec<f64>>, Params, States) {
    let mut grads = zeros(model);
    let mut states = model.states(draw.slots).unwrap();
    let mut likelihoods: Vec<Vec<f64>> = draw.documents.iter().map(|d| vec![f64::NAN; d.len()]).collect();
    let mut kept: Vec<(&Piece, Saved, Tensor)> = Vec::new();
    for pass in &draw.passes {
        let (hidden, saved) = model.forward(&pass.batch, Some(&mut states), keep, INNER_LR).unwrap();
        let (nll, dhidden) = model.loss(&hidden, &draw.targets(pass), &draw.weights(pass), &mut grads).unwrap();
        pass.rows.iter().zip(nll).for_each(|((d, t), nll)| likelihoods[*d][*t] = nll);
        kept.push((pass, saved.unwrap(), dhidden));
    }
    let mut dstates = across.then(|| DStates::zeros(&states).unwrap());
    for (pass, saved, dhidden) in kept.into_iter().rev() {
        model.backward(&pass.batch, saved, dhidden, dstates.as_mut(), &mut grads).unwrap();
    }
    if let Some(dstates) = dstates {
        // Every document has started from the initial weights: they have all of the gradient, and nothing is left.
        let all = (0..2).flat_map(|i| dstates.layer(i).tensors()).flat_map(|(_, t)| t.to_f64_vec());
        assert!(all.into_iter().all(|x| x == 0.0));
    }
    (likelihoods, grads, states)
}

/// Of each parameter, the largest error relative to its largest entry; tiny gradients are compared with the largest of all.
#[track_caller]
fn close(ours: &Params, theirs: &Params, limit: f64, what: &str) {
    let (a, b) = (ours.data().to_f64_vec(), theirs.data().to_f64_vec());
    let largest = b.iter().fold(0f64, |m, x| m.max(x.abs()));
    for entry in ours.table().entries() {
        let (a, b) = (&a[entry.range()], &b[entry.range()]);
        let scale = b.iter().fold(1e-3 * largest, |m, x| m.max(x.abs()));
        let error = a.iter().zip(b).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(error <= limit * scale, "{what}, {}: {error} of {scale}", entry.name);
    }
}

fn learners() -> impl Iterator<Item = (Option<Inner>, bool)> {
    [Some(Inner::Linear), Some(Inner::Mlp), None].into_iter().flat_map(|inner| [(inner, true), (inner, false)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// However documents are cut into passes and packed, with gradient across all cuts and nothing but the blocks' inputs kept or
    /// all of it: losses, gradients and final states of whole documents.
    #[test]
    fn segments_with_gradient_across_cuts_are_the_whole(
        seed in 0u64..10_000,
        slots in 1usize..4,
        passes in 1usize..5,
        mini_batch in prop::sample::select(vec![1usize, 3, 4, 8]),
        group in 1usize..4,
        share_qk in any::<bool>(),
        pre_conv in any::<bool>(),
        f64_mode in prop::sample::select(vec![true, true, false]),
    ) {
        let device = Device::cpu().unwrap();
        let (dtype, limit) = if f64_mode { (DType::F64, 1e-9) } else { (DType::F32, 2e-3) };
        for (inner, gate) in learners() {
            let mut random = Random::new(seed);
            let draw = Draw::new(&mut random, mini_batch, slots, passes);
            if draw.documents.is_empty() {
                continue;
            }
            let head_dim = if f64_mode { 4 } else { 16 };
            let config = config_of(inner, [gate, share_qk, pre_conv], mini_batch, head_dim);
            let model = shaken_model(&config, &device, dtype, seed);
            let (nll, grads) = whole(&model, &draw, Keep::Saved { group });
            let (cut_nll, cut_grads, mut states) = segments(&model, &draw, Keep::Saved { group }, true);
            prop_assert!(relative(&cut_nll.concat(), &nll.concat()) < limit / 10.0, "{:?}", config);
            close(&cut_grads, &grads, limit, &format!("{config:?}"));

            // What is kept changes nothing, not a bit.
            for across in [true, false] {
                let (_, saved, _) = segments(&model, &draw, Keep::Saved { group }, across);
                let (_, again, _) = segments(&model, &draw, Keep::Input { group: group + 1 }, across);
                prop_assert!(saved.data().to_f64_vec() == again.data().to_f64_vec(), "{:?}", config);
            }

            // The states are those of reading for inference: both go on alike.
            let mut read = model.states(slots).unwrap();
            for pass in &draw.passes {
                model.forward(&pass.batch, Some(&mut read), Keep::Nothing, INNER_LR).unwrap();
            }
            let mut next = Batch::default();
            (0..slots).for_each(|slot| next.push(&random.tokens(mini_batch + 2, VOCAB), slot));
            let go_on = |states: &mut States| {
                let (hidden, _) = model.forward(&next, Some(states), Keep::Nothing, INNER_LR).unwrap();
                hidden.to_f64_vec()
            };
            prop_assert!((0..slots).all(|slot| read.position(slot) == states.position(slot)));
            prop_assert!(relative(&go_on(&mut states), &go_on(&mut read)) < limit / 10.0);
        }
    }
}

/// Truncated gradients are those of the loss whose segments start from states held fixed, by finite differences; and they are not
/// those of the whole.
#[test]
fn truncated_gradients_hold_the_states_fixed() {
    let device = Device::cpu().unwrap();
    let mut differ = 0;
    for seed in 0..6u64 {
        for (inner, mamba) in learners() {
            let mut random = Random::new(seed);
            let draw = Draw::new(&mut random, 4, 2, 4);
            let config = config_of(inner, [mamba, mamba, mamba ^ (seed % 2 == 1)], 4, 4);
            let mut model = shaken_model(&config, &device, DType::F64, seed);
            let (_, full, _) = segments(&model, &draw, Keep::Saved { group: 2 }, true);
            let (_, grads, _) = segments(&model, &draw, Keep::Saved { group: 2 }, false);
            let (full, grads) = (full.data().to_f64_vec(), grads.data().to_f64_vec());
            // The states that each pass starts from.
            let mut states = model.states(draw.slots).unwrap();
            let mut starts = Vec::new();
            for pass in &draw.passes {
                starts.push(states.fork().unwrap());
                model.forward(&pass.batch, Some(&mut states), Keep::Nothing, INNER_LR).unwrap();
            }
            let at = model.params().data().to_f64_vec();
            for _ in 0..4 {
                let direction: Vec<f64> = at.iter().map(|_| random.unit()).collect();
                let mut loss = |h: f64| -> f64 {
                    let moved = at.iter().zip(&direction).map(|(x, d)| x + h * d);
                    model.params_mut().data_mut().as_mut_slice::<f64>().iter_mut().zip(moved).for_each(|(x, v)| *x = v);
                    let of_pass = |(pass, start): (&Piece, &States)| {
                        let mut states = start.fork().unwrap();
                        let (hidden, _) = model.forward(&pass.batch, Some(&mut states), Keep::Nothing, INNER_LR).unwrap();
                        let nll = model.nll(hidden.view(), &draw.targets(pass)).unwrap();
                        nll.iter().zip(draw.weights(pass)).map(|(n, w)| n * w).sum::<f64>()
                    };
                    draw.passes.iter().zip(&starts).map(of_pass).sum()
                };
                // Fourth-order central difference.
                let h = 5e-6;
                let numeric = (8.0 * (loss(h) - loss(-h)) - (loss(2.0 * h) - loss(-2.0 * h))) / (12.0 * h);
                let dot = |grads: &[f64]| grads.iter().zip(&direction).map(|(g, d)| g * d).sum::<f64>();
                let analytic = dot(&grads);
                assert!((numeric - analytic).abs() < 1e-6 * analytic.abs().max(1e-2), "{config:?}: {numeric} and {analytic}");
                differ += usize::from((dot(&full) - analytic).abs() > 1e-3 * analytic.abs());
            }
            model.params_mut().data_mut().as_mut_slice::<f64>().copy_from_slice(&at);
        }
    }
    assert!(differ > 72, "across the cuts flows gradient: {differ} of 144");
}

/// A slot that was read for another model's weights is not continued at its beginning: it starts from those of now.
#[test]
fn a_slot_at_its_beginning_starts_from_the_weights_of_now() {
    let config = config(Inner::Linear, [true; 3], 4, 4);
    let device = Device::cpu().unwrap();
    let mut model = shaken_model(&config, &device, DType::F64, 1);
    let mut states = model.states(1).unwrap();
    model.params_mut().data_mut().as_mut_slice::<f64>().iter_mut().for_each(|x| *x *= 1.5);
    let batch = Batch::one(&Random::new(1).tokens(9, VOCAB));
    let keep = Keep::Saved { group: 1 };
    let (now, _) = model.forward(&batch, None, keep, 1.0).unwrap();
    let (continued, _) = model.forward(&batch, Some(&mut states), keep, 1.0).unwrap();
    assert_eq!(now.to_f64_vec(), continued.to_f64_vec());
}

#[test]
#[should_panic(expected = "a pass that is kept continues slot 0 after 2 tokens of a mini-batch")]
fn a_tail_is_not_continued_in_training() {
    let model = shaken_model(&config(Inner::Linear, [false; 3], 4, 4), &Device::cpu().unwrap(), DType::F64, 1);
    let mut states = model.states(1).unwrap();
    for tokens in [6, 4] {
        let batch = Batch::one(&Random::new(1).tokens(tokens, VOCAB));
        model.forward(&batch, Some(&mut states), Keep::Saved { group: 1 }, 1.0).unwrap();
    }
}

#[test]
#[should_panic(expected = "the batch continues slot 0 twice")]
fn a_slot_is_continued_once_in_a_batch() {
    let model = shaken_model(&config(Inner::Linear, [false; 3], 4, 4), &Device::cpu().unwrap(), DType::F64, 1);
    let mut batch = Batch::one(&[1, 2]);
    batch.push(&[3], 0);
    _ = model.forward(&batch, Some(&mut model.states(1).unwrap()), Keep::Saved { group: 1 }, 1.0);
}
