//! The whole model: gradients against finite differences, and the same function however the input is cut or packed.

mod support;

use proptest::prelude::*;
use support::{Random, relative, rungs, shaken_model, transformer};
use ttt::batch::Batch;
use ttt::config::{Config, Inner, Mixer};
use ttt::device::{Device, Kernels};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::params::Params;
use ttt::state::States;
use ttt::tensor::DType;

/// Every combination of learner, gate, shared q and k, convolution before the layer, and tied head.
fn all_configs() -> Vec<Config> {
    let mut all = Vec::new();
    for bits in 0..32 {
        let flag = |i: usize| bits >> i & 1 == 1;
        let inner = if flag(0) { Inner::Mlp } else { Inner::Linear };
        all.push(
            Config {
                vocab_size: 11,
                hidden_size: 8,
                intermediate_size: 6,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                mini_batch_size: 4,
                use_gate: flag(1),
                share_qk: flag(2),
                pre_conv: flag(3),
                tie_word_embeddings: flag(4),
                ..Config::default()
            }
            .with_learner(inner),
        );
        // Heads of queries that share keys and values or do not, tied head or not.
        if bits < 4 {
            let like = Config { tie_word_embeddings: flag(1), ..all[0].clone() };
            all.push(transformer(like, 1 + bits % 2));
        }
    }
    // Both backbones.
    let ladder = [0, 14].map(|bits| all.iter().filter(|c| c.mixer == Mixer::Ttt).nth(bits).expect("32 of them").clone());
    all.extend(ladder.iter().flat_map(rungs));
    all
}

trait WithLearner {
    fn with_learner(self, inner: Inner) -> Config;
}

impl WithLearner for Config {
    /// `with_inner`, and a large base learning rate so that the inner loop matters.
    fn with_learner(self, inner: Inner) -> Config {
        let mut config = self.with_inner(inner);
        config.ttt_base_lr = 2.0;
        config
    }
}

fn gradient(model: &Lm, batch: &Batch, targets: &[u32], weights: &[f64], keep: Keep) -> (f64, Params) {
    let mut grads = Params::zeros(model.params().table(), model.device(), model.dtype()).unwrap();
    let (hidden, saved) = model.forward(batch, None, keep, 0.7).unwrap();
    let (nll, dhidden) = model.loss(&hidden, targets, weights, &mut grads).unwrap();
    model.backward(batch, saved.unwrap(), dhidden, None, &mut grads).unwrap();
    (nll.iter().zip(weights).map(|(n, w)| n * w).sum(), grads)
}

fn loss(model: &Lm, batch: &Batch, targets: &[u32], weights: &[f64]) -> f64 {
    let (hidden, _) = model.forward(batch, None, Keep::Nothing, 0.7).unwrap();
    model.nll(hidden.view(), targets).unwrap().iter().zip(weights).map(|(n, w)| n * w).sum()
}

#[test]
fn gradients_are_finite_differences_in_every_configuration() {
    let device = Device::cpu().unwrap();
    for (i, config) in all_configs().into_iter().enumerate() {
        let mut random = Random::new(i as u64);
        let mut model = shaken_model(&config, &device, DType::F64, i as u64);
        // Whole mini-batches, tails, and a sequence shorter than one mini-batch.
        let lens = [11, 3, 8];
        let batch = Batch::packed(&lens.map(|n| random.tokens(n, config.vocab_size)));
        let targets = random.tokens(22, config.vocab_size);
        let weights: Vec<f64> = (0..22).map(|t| if t % 7 == 3 { 0.0 } else { 0.1 + random.unit().abs() }).collect();
        let (_, grads) = gradient(&model, &batch, &targets, &weights, Keep::Saved { group: 2 });
        let grads = grads.data().to_f64_vec();
        let start = model.params().data().to_f64_vec();
        for _ in 0..8 {
            let direction: Vec<f64> = (0..start.len()).map(|_| random.unit()).collect();
            let mut at = |h: f64| {
                let moved = start.iter().zip(&direction).map(|(x, d)| x + h * d);
                model.params_mut().data_mut().as_mut_slice::<f64>().iter_mut().zip(moved).for_each(|(x, v)| *x = v);
                loss(&model, &batch, &targets, &weights)
            };
            // Sixth-order central difference.
            let h = 2e-5;
            let mut difference = |step: f64| at(step * h) - at(-step * h);
            let numeric = (45.0 * difference(1.0) - 9.0 * difference(2.0) + difference(3.0)) / (60.0 * h);
            let analytic: f64 = grads.iter().zip(&direction).map(|(g, d)| g * d).sum();
            assert!((numeric - analytic).abs() < 1e-6 * analytic.abs().max(1e-2), "{config:?}: {numeric} and {analytic}");
        }
        model.params_mut().data_mut().as_mut_slice::<f64>().copy_from_slice(&start);
    }
}

/// What is kept decides memory and time, never the result.
#[test]
fn gradients_are_bit_identical_whatever_is_kept() {
    let device = Device::cpu().unwrap();
    for config in tiny() {
        let config = Config { num_hidden_layers: 2, vocab_size: 50, ..config };
        let model = shaken_model(&config, &device, DType::F32, 3);
        let mut random = Random::new(5);
        let batch = Batch::packed(&[random.tokens(133, 50), random.tokens(64, 50)]);
        let targets = random.tokens(197, 50);
        let weights = vec![1.0 / 197.0; 197];
        let (loss, whole) = gradient(&model, &batch, &targets, &weights, Keep::Saved { group: 1 });
        for keep in [
            Keep::Saved { group: 3 },
            Keep::Saved { group: 100 },
            Keep::Start { group: 2 },
            Keep::Input { group: 1 },
            Keep::Input { group: 4 },
        ] {
            let (again, grads) = gradient(&model, &batch, &targets, &weights, keep);
            assert_eq!(loss.to_bits(), again.to_bits(), "{keep:?}");
            assert!(whole.data().as_slice::<f32>() == grads.data().as_slice::<f32>(), "{config:?} {keep:?}");
        }
    }
}

/// The tiny preset of every mixer and learner.
fn tiny() -> Vec<Config> {
    let ttt = |inner| Config::preset("tiny", inner).unwrap();
    let mut all = vec![ttt(Inner::Linear), ttt(Inner::Mlp), Config::transformer("tiny").unwrap()];
    all.extend(rungs(&all[0]));
    all
}

fn logits(model: &Lm, tokens: &[u32]) -> Vec<f64> {
    let (hidden, _) = model.forward(&Batch::one(tokens), None, Keep::Nothing, 1.0).unwrap();
    model.logits(&hidden, &(0..tokens.len()).collect::<Vec<_>>()).unwrap().to_f64_vec()
}

/// Reads pieces one after the other into slot `slot` of states with other sequences in them.
fn in_pieces(model: &Lm, states: &mut States, slot: usize, pieces: &[&[u32]]) -> Vec<f64> {
    let mut all = Vec::new();
    for piece in pieces {
        let mut batch = Batch::default();
        batch.push(piece, slot);
        let (hidden, _) = model.forward(&batch, Some(states), Keep::Nothing, 1.0).unwrap();
        all.extend(model.logits(&hidden, &(0..piece.len()).collect::<Vec<_>>()).unwrap().to_f64_vec());
    }
    all
}

/// Rows of an open mini-batch are compared through the logits that follow.
fn state_values(model: &Lm, states: &States, slot: usize) -> Vec<f64> {
    support::state_values(model, states, slot, false).concat()
}

/// Inner model and backbone of a TTT model, or a Transformer whose heads share keys and values or do not.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Ttt(Inner, bool),
    Transformer(bool),
    /// A rung of the ladder, with the Mamba backbone or without.
    Rung(usize, bool),
}

const KINDS: [Kind; 18] = [
    Kind::Ttt(Inner::Linear, true),
    Kind::Ttt(Inner::Mlp, true),
    Kind::Ttt(Inner::Linear, false),
    Kind::Ttt(Inner::Mlp, false),
    Kind::Transformer(true),
    Kind::Transformer(false),
    Kind::Rung(0, false),
    Kind::Rung(1, false),
    Kind::Rung(2, false),
    Kind::Rung(3, false),
    Kind::Rung(4, false),
    Kind::Rung(5, false),
    Kind::Rung(6, false),
    Kind::Rung(7, false),
    Kind::Rung(0, true),
    Kind::Rung(2, true),
    Kind::Rung(4, true),
    Kind::Rung(6, true),
];

/// Two blocks of a shape whose head size the fast kernels cover.
fn small(kind: Kind, mini_batch_size: usize) -> Config {
    let (inner, mamba) = match kind {
        Kind::Ttt(inner, mamba) => (inner, mamba),
        Kind::Transformer(shared) => return transformer(small(KINDS[0], mini_batch_size), 1 + usize::from(shared)),
        Kind::Rung(rung, mamba) => {
            let mut like = small(Kind::Ttt(Inner::Linear, mamba), mini_batch_size);
            like.ttt_base_lr = 1.0;
            return rungs(&like)[rung].clone();
        }
    };
    Config {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        mini_batch_size,
        use_gate: mamba,
        share_qk: mamba,
        pre_conv: mamba,
        ..Config::default()
    }
    .with_learner(inner)
}

fn split<'t>(tokens: &'t [u32], cuts: &[usize]) -> Vec<&'t [u32]> {
    let mut at: Vec<usize> = cuts.iter().map(|c| c % (tokens.len() + 1)).collect();
    at.extend([0, tokens.len()]);
    at.sort_unstable();
    at.windows(2).map(|w| &tokens[w[0]..w[1]]).filter(|piece| !piece.is_empty()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any cutting of a sequence into calls, with other sequences in other slots, gives the logits and the state of one call.
    #[test]
    fn any_cut_and_any_packing_is_the_whole(
        seed in 0u64..1000,
        len in 1usize..90,
        other in 1usize..40,
        cuts in prop::collection::vec(0usize..1000, 0..12),
        kind in prop::sample::select(&KINDS),
        mini_batch in prop::sample::select(vec![1usize, 5, 8, 16, 33]),
        f64_mode in any::<bool>(),
    ) {
        let config = small(kind, mini_batch);
        let device = Device::cpu().unwrap();
        let dtype = if f64_mode { DType::F64 } else { DType::F32 };
        let limit = if f64_mode { 1e-10 } else { 2e-5 };
        let model = shaken_model(&config, &device, dtype, seed);
        let mut random = Random::new(seed);
        let (a, b) = (random.tokens(len, 40), random.tokens(other, 40));
        let (whole_a, whole_b) = (logits(&model, &a), logits(&model, &b));

        // One call for both, slots exchanged.
        let mut packed = Batch::default();
        packed.push(&a, 2);
        packed.push(&b, 0);
        let mut one = model.states(3).unwrap();
        let (hidden, _) = model.forward(&packed, Some(&mut one), Keep::Nothing, 1.0).unwrap();
        let both = model.logits(&hidden, &(0..len + other).collect::<Vec<_>>()).unwrap().to_f64_vec();
        prop_assert!(relative(&both[..len * 40], &whole_a) < limit);
        prop_assert!(relative(&both[len * 40..], &whole_b) < limit);

        // Pieces.
        let mut cut = model.states(2).unwrap();
        let pieces = in_pieces(&model, &mut cut, 1, &split(&a, &cuts));
        prop_assert!(relative(&pieces, &whole_a) < limit, "{}", relative(&pieces, &whole_a));
        prop_assert_eq!(cut.position(1), len as u64);
        prop_assert!(relative(&state_values(&model, &cut, 1), &state_values(&model, &one, 2)) < limit);

        // Both go on alike, which tests the open rows too; so does a fork, while the original stays where it is.
        let mut fork = cut.fork().unwrap();
        let next = in_pieces(&model, &mut cut, 1, &[&b]);
        prop_assert!(relative(&next, &in_pieces(&model, &mut one, 2, &[&b])) < limit);
        prop_assert_eq!(next, in_pieces(&model, &mut fork, 1, &[&b]));
    }
}

#[test]
fn every_prefix_and_no_look_ahead() {
    let device = Device::cpu().unwrap();
    for kind in KINDS {
        let model = shaken_model(&small(kind, 16), &device, DType::F64, 9);
        let tokens = Random::new(9).tokens(40, 40);
        let whole = logits(&model, &tokens);
        for n in 1..40 {
            assert!(relative(&logits(&model, &tokens[..n]), &whole[..n * 40]) < 1e-11, "{kind:?} prefix {n}");
        }
        let mut changed = tokens.clone();
        changed[21] = (changed[21] + 1) % 40;
        let other = logits(&model, &changed);
        assert!(relative(&other[..21 * 40], &whole[..21 * 40]) < 1e-13, "a later token changed an earlier prediction");
        assert!(relative(&other[21 * 40..], &whole[21 * 40..]) > 1e-6, "a token changed nothing");
    }
}

#[test]
fn a_reset_slot_is_a_new_one() {
    for kind in KINDS {
        a_reset_slot_is_new(kind);
    }
}

fn a_reset_slot_is_new(kind: Kind) {
    let device = Device::cpu().unwrap();
    let model = shaken_model(&small(kind, 8), &device, DType::F32, 1);
    let tokens = Random::new(1).tokens(21, 40);
    let mut states = model.states(2).unwrap();
    let first = in_pieces(&model, &mut states, 0, &[&tokens]);
    in_pieces(&model, &mut states, 1, &[&tokens[3..9]]);
    states.reset(&model, 1);
    assert_eq!(in_pieces(&model, &mut states, 1, &[&tokens]), first);
    states.copy_slot(0, 1);
    assert_eq!(states.position(1), 21);
    let next = Random::new(2).tokens(5, 40);
    assert_eq!(in_pieces(&model, &mut states, 1, &[&next]), in_pieces(&model, &mut states, 0, &[&next]));
}

#[test]
fn fast_and_reference_kernels_agree() {
    let (fast, plain) = (Device::cpu().unwrap(), Device::cpu_with(1, Kernels::Reference).unwrap());
    for config in tiny() {
        let config = Config { vocab_size: 70, num_hidden_layers: 2, ..config };
        let mut random = Random::new(4);
        let batch = Batch::packed(&[random.tokens(75, 70), random.tokens(16, 70)]);
        let targets = random.tokens(91, 70);
        let weights = vec![1.0 / 91.0; 91];
        let run = |device: &Device| {
            let model = shaken_model(&config, device, DType::F32, 8);
            let (loss, grads) = gradient(&model, &batch, &targets, &weights, Keep::Saved { group: 4 });
            (loss, grads.data().to_f64_vec(), model.params().table().clone())
        };
        let ((loss, ours, table), (reference_loss, reference, _)) = (run(&fast), run(&plain));
        assert!((loss - reference_loss).abs() < 1e-5 * reference_loss);
        for entry in table.entries() {
            let error = relative(&ours[entry.range()], &reference[entry.range()]);
            assert!(error < 1e-3, "{config:?} {}: {error}", entry.name);
        }
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_a_readable_error() {
    let model = Lm::new(&small(KINDS[0], 16), &Device::cpu().unwrap(), DType::F32, 0).unwrap();
    let error = model.forward(&Batch::one(&[1, 40]), None, Keep::Nothing, 1.0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "token id 40 is outside the model's vocabulary of 40 ids: the text was made with another tokenizer"
    );
}

/// Wanting some rows only changes what is computed, not the rows or the states.
#[test]
fn wanted_rows_are_those_of_the_whole() {
    let device = Device::cpu().unwrap();
    for kind in KINDS {
        for (dtype, limit) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
            let model = shaken_model(&small(kind, 8), &device, dtype, 6);
            let mut random = Random::new(6);
            let (a, b) = (random.tokens(21, 40), random.tokens(6, 40));
            let mut batch = Batch::default();
            batch.push(&a, 1);
            batch.push(&b, 0);
            let rows = [20, 3, 26];
            let (mut whole, mut some) = (model.states(2).unwrap(), model.states(2).unwrap());
            let (hidden, _) = model.forward(&batch, Some(&mut whole), Keep::Nothing, 1.0).unwrap();
            let theirs = model.logits(&hidden, &rows).unwrap().to_f64_vec();
            let hidden = model.forward_rows(&batch, &mut some, &rows).unwrap();
            let ours = model.logits(&hidden, &[0, 1, 2]).unwrap().to_f64_vec();
            assert!(relative(&ours, &theirs) < limit, "{kind:?} {dtype:?}");
            for slot in 0..2 {
                assert!(relative(&state_values(&model, &some, slot), &state_values(&model, &whole, slot)) < limit);
                let next = in_pieces(&model, &mut whole, slot, &[&b]);
                assert!(relative(&in_pieces(&model, &mut some, slot, &[&b]), &next) < limit);
            }
        }
    }
}
