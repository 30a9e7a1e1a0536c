//! Continuing several sequences at once is continuing each alone.

mod support;

use support::{Random, shaken_model};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::generate::{Decoder, Draw, Generator, Sampling, Sequence};
use ttt::tensor::DType;

#[test]
fn sequences_side_by_side_are_sequences_alone() {
    let device = Device::cpu().unwrap();
    for inner in [Inner::Linear, Inner::Mlp] {
        let config = Config {
            vocab_size: 60,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            ..Config::preset("tiny", inner).unwrap()
        };
        let model = shaken_model(&config, &device, DType::F32, 3);
        let prompts: Vec<Vec<u32>> = [5, 16, 1, 40].iter().map(|n| Random::new(*n).tokens(*n as usize, 60)).collect();
        let settings = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 10, 1.0), (1.2, 0, 0.9)];
        let samplings = settings.map(|(temperature, top_k, top_p)| Sampling { temperature, top_k, top_p, seed: 6 });
        let (slots, limit, ends) = ([3, 0, 4, 1], 40, [Some(7), Some(9)]);
        let alone: Vec<(Vec<u32>, u64)> = (0..4)
            .map(|i| {
                let (mut states, mut tokens) = (model.states(1).unwrap(), Vec::new());
                let mut generator = Generator::new(&model, samplings[i]).unwrap();
                generator.read(&mut states, 0, &prompts[i]).unwrap();
                let last = generator.write(&mut states, 0, limit, ends, |choice| {
                    tokens.push(choice.token);
                    Ok::<bool, ttt::Error>(true)
                });
                // What ended it, if anything did, is not among what it wrote.
                tokens.extend(last.unwrap().filter(|token| ends.contains(&Some(*token))));
                (tokens, states.position(0))
            })
            .collect();
        assert!(alone.iter().any(|(tokens, _)| tokens.len() < limit), "a sequence that ends early is wanted");

        let mut states = model.states(5).unwrap();
        let mut batch = Batch::default();
        prompts.iter().zip(slots).for_each(|(prompt, slot)| batch.push(prompt, slot));
        let last: Vec<usize> = batch.seqs.iter().map(|s| s.first_row + s.len - 1).collect();
        let hidden = model.forward_rows(&batch, &mut states, &last).unwrap();
        let logits = model.logits(&hidden, &[0, 1, 2, 3]).unwrap();
        let sequence = |i: usize| Sequence { slot: slots[i], draw: Draw::new(samplings[i], 0), ends };
        let sequences: Vec<Sequence> = (0..4).map(sequence).collect();
        let mut together = vec![Vec::new(); 4];
        let mut decoder = Decoder::new(&model);
        let mut session = decoder.start(&mut states, &sequences, &logits).unwrap();
        for step in 0..limit {
            if step > 0 {
                session.step().unwrap();
            }
            let choices = session.take().unwrap();
            choices.iter().zip(&mut together).for_each(|(choice, all)| all.extend(choice.map(|c| c.token)));
        }
        assert!(session.take().is_none());
        drop(session);
        for i in 0..4 {
            assert_eq!(together[i], alone[i].0, "{inner:?}, sequence {i}");
            assert_eq!(states.position(slots[i]), alone[i].1, "{inner:?}, position of sequence {i}");
        }
    }
}

/// Steps of whoever is there: sequences come, wait and go, and each gets the tokens that it gets alone.
#[test]
fn sequences_come_and_go_between_steps() {
    let device = Device::cpu().unwrap();
    let config = Config { vocab_size: 60, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, ..Config::default() };
    let model = shaken_model(&config, &device, DType::F32, 4);
    let prompts: Vec<Vec<u32>> = [7, 18, 2, 33].iter().map(|n| Random::new(*n).tokens(*n as usize, 60)).collect();
    let sampling = |i: usize| Sampling { temperature: [0.0, 1.0, 0.7, 1.3][i], top_k: 20, top_p: 0.95, seed: 8 + i as u64 };
    let limit = 24;
    let alone: Vec<Vec<u32>> = (0..4)
        .map(|i| {
            let (mut states, mut tokens) = (model.states(1).unwrap(), Vec::new());
            let mut generator = Generator::new(&model, sampling(i)).unwrap();
            generator.read(&mut states, 0, &prompts[i]).unwrap();
            let each = |choice: ttt::generate::Choice| {
                tokens.push(choice.token);
                Ok::<bool, ttt::Error>(true)
            };
            generator.write(&mut states, 0, limit, [None; 2], each).unwrap();
            tokens
        })
        .collect();

    let slots = [3, 0, 4, 1];
    let mut states = model.states(5).unwrap();
    for (prompt, slot) in prompts.iter().zip(slots).filter(|(prompt, _)| prompt.len() > 1) {
        ttt::generate::learn(&model, &mut states, slot, &prompt[..prompt.len() - 1]).unwrap();
    }
    let mut last: Vec<u32> = prompts.iter().map(|prompt| *prompt.last().unwrap()).collect();
    let (mut together, mut decoder, mut random) = (vec![Vec::new(); 4], Decoder::new(&model), Random::new(5));
    while together.iter().any(|tokens| tokens.len() < limit) {
        let here: Vec<usize> = (0..4).filter(|i| together[*i].len() < limit && random.below(3) > 0).collect();
        if here.is_empty() {
            continue;
        }
        let draw = |i: usize| Draw { drawn: together[i].len() as u64, ..Draw::new(sampling(i), 0) };
        let sequences: Vec<Sequence> = here.iter().map(|&i| Sequence { slot: slots[i], draw: draw(i), ends: [None; 2] }).collect();
        let tokens: Vec<u32> = here.iter().map(|i| last[*i]).collect();
        for (&i, choice) in here.iter().zip(decoder.step(&mut states, &sequences, &tokens).unwrap()) {
            last[i] = choice.token;
            together[i].push(choice.token);
        }
    }
    assert_eq!(together, alone);
    for (i, slot) in slots.into_iter().enumerate() {
        assert_eq!(states.position(slot), (prompts[i].len() + limit - 1) as u64, "position of sequence {i}");
    }
    let outside = decoder.step(&mut states, &[Sequence { slot: 0, draw: Draw::new(sampling(0), 0), ends: [None; 2] }], &[60]);
    assert!(outside.unwrap_err().to_string().contains("token id 60"), "a token outside the vocabulary");
}
