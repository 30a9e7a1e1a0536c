//! Evaluation: sums over a text are what one pass over it gives, in chunks, after a prompt, and with a bounded context.

mod support;

use support::{Random, shaken_model};
use ttt::batch::Batch;
use ttt::config::{Backbone, Config, Inner};
use ttt::device::Device;
use ttt::eval::{Clusters, Judge, Judged, Report, evaluate_text, report_svg};
use ttt::layer::Keep;
use ttt::tensor::DType;

#[test]
fn chunks_prompts_and_contexts_add_up() {
    let config = Config {
        vocab_size: 20,
        hidden_size: 16,
        intermediate_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        ..Config::preset("tiny", Inner::Linear).unwrap()
    };
    let model = shaken_model(&config, &Device::cpu().unwrap(), DType::F64, 1);
    // More than one chunk of 2048.
    let tokens = Random::new(1).tokens(2500, 20);
    let (hidden, _) = model.forward(&Batch::one(&tokens[..2499]), None, Keep::Nothing, 1.0).unwrap();
    let nll = model.nll(hidden.view(), &tokens[1..]).unwrap();
    let close = |ours: f64, theirs: f64| assert!((ours - theirs).abs() < 1e-9 * theirs, "{ours} is not {theirs}");

    let whole = evaluate_text(&model, &tokens, 0, None, 2500.0).unwrap();
    close(whole.nll, nll.iter().sum());
    assert_eq!((whole.tokens, whole.bytes), (2499, 2500.0));
    close(whole.bits_per_byte(), whole.nll / std::f64::consts::LN_2 / 2500.0);
    for from in [1, 2, 700, 2047, 2048, 2049, 2050, 2499] {
        let after = evaluate_text(&model, &tokens, from, None, 1.0).unwrap();
        close(after.nll, nll[from - 1..].iter().sum());
        assert_eq!(after.tokens, 2500 - from as u64);
    }
    let short = evaluate_text(&model, &tokens, 0, Some(1000), 1.0).unwrap();
    let parts = [&tokens[..1001], &tokens[1000..2001], &tokens[2000..]];
    close(short.nll, parts.iter().map(|part| evaluate_text(&model, part, 0, None, 1.0).unwrap().nll).sum());
    assert!(evaluate_text(&model, &tokens, 2500, None, 1.0).is_err());
}

fn small(inner: Inner, backbone: Backbone) -> Config {
    Config {
        vocab_size: 20,
        hidden_size: 16,
        intermediate_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        ..Config::preset("tiny", inner).unwrap().with_backbone(backbone)
    }
}

/// The loss of every judged token, pushed in the given pieces, with its position.
fn losses(judge: &mut Judge<'_>, pieces: &[&[u32]]) -> Vec<(u64, f64)> {
    let mut all = Vec::new();
    let mut sink = |judged: &Judged<'_>| {
        all.extend(judged.nll.iter().enumerate().map(|(i, nll)| (judged.position + i as u64, *nll)));
    };
    for piece in pieces {
        judge.push(piece, &mut sink).unwrap();
    }
    judge.finish(&mut sink).unwrap();
    all
}

/// Every loss is that of a model which has read nothing but the tokens before, inside and at the ends of mini-batches (16) and chunks
/// (2048), however the text arrives; and no later token changes it, not by a bit.
#[test]
fn every_token_is_predicted_before_it_is_learned_from() {
    let device = Device::cpu().unwrap();
    for (i, (inner, backbone)) in [(Inner::Linear, Backbone::Mamba), (Inner::Mlp, Backbone::Transformer)].into_iter().enumerate() {
        let model = shaken_model(&small(inner, backbone), &device, DType::F64, 3 + i as u64);
        let mut random = Random::new(7 + i as u64);
        let tokens = random.tokens(2200, 20);
        for measure in [false, true] {
            let mut judge = Judge::new(&model, None, measure).unwrap();
            judge.start(0);
            let mut cuts = vec![0, 1, 5, 2049];
            cuts.extend((0..6).map(|_| random.below(2200)));
            cuts.push(2200);
            cuts.sort();
            let pieces: Vec<&[u32]> = cuts.windows(2).map(|c| &tokens[c[0]..c[1]]).collect();
            let ours = losses(&mut judge, &pieces);
            assert!(ours.iter().map(|l| l.0).eq(1..2200), "positions");

            let mut at = vec![1, 15, 16, 17, 31, 32, 33, 2047, 2048, 2049, 2063, 2064, 2065, 2199];
            at.extend((0..4).map(|_| 1 + random.below(2199)));
            for t in at {
                let (hidden, _) = model.forward(&Batch::one(&tokens[..t]), None, Keep::Nothing, 1.0).unwrap();
                let nll = model.nll(hidden.view().row_range(t - 1..t), &tokens[t..t + 1]).unwrap()[0];
                let error = (ours[t - 1].1 - nll).abs();
                assert!(error < 1e-10, "{inner:?}, measured {measure}, token {t}: off by {error}");
            }
        }
    }
    for dtype in [DType::F32, DType::F64] {
        let model = shaken_model(&small(Inner::Linear, Backbone::Mamba), &device, dtype, 5);
        let mut random = Random::new(9);
        let tokens = random.tokens(2200, 20);
        let judge = |tokens: &[u32]| {
            let mut judge = Judge::new(&model, None, true).unwrap();
            judge.start(0);
            losses(&mut judge, &[tokens])
        };
        let ours = judge(&tokens);
        for t in [1, 15, 16, 17, 40, 2047, 2048, 2049, 2198] {
            let mut changed = tokens.clone();
            changed[t + 1..].iter_mut().for_each(|token| *token = (*token + 1 + random.below(18) as u32) % 20);
            let theirs = judge(&changed);
            assert!(ours[..t] == theirs[..t], "{dtype:?}: what follows token {t} changes a loss before it");
            assert_ne!(ours[t], theirs[t], "{dtype:?}: the token after {t} is another, and its loss the same");
        }
    }
}

/// The inner models' errors are those of one pass over the whole text, also where a state is continued inside a mini-batch.
#[test]
fn inner_errors_do_not_depend_on_how_the_text_is_read() {
    let device = Device::cpu().unwrap();
    for inner in [Inner::Linear, Inner::Mlp] {
        let model = shaken_model(&small(inner, Backbone::Mamba), &device, DType::F64, 11);
        let tokens = Random::new(3).tokens(2600, 20);
        let expected = model.inner_statistics(&Batch::one(&tokens)).unwrap();
        let measured = |judge: &mut Judge<'_>, tokens: &[u32]| {
            let mut all = vec![Vec::new(); 2];
            let mut first = None;
            let mut sink = |judged: &Judged<'_>| {
                for (all, errors) in all.iter_mut().zip(judged.inner) {
                    first.get_or_insert(judged.inner_position);
                    all.extend(errors.iter().copied());
                }
            };
            judge.push(tokens, &mut sink).unwrap();
            judge.finish(&mut sink).unwrap();
            (first.unwrap(), all)
        };
        let check = |from: usize, layers: &[Vec<[f64; 3]>]| {
            for (ours, theirs) in layers.iter().zip(&expected) {
                // The last token is held back.
                assert_eq!(ours.len(), 2599 / 16 - from);
                for (m, ours) in ours.iter().enumerate() {
                    let theirs = [theirs.initial[from + m], theirs.before[from + m], theirs.after[from + m]];
                    let error = support::relative(ours, &theirs);
                    assert!(error < 1e-10, "{inner:?}, mini-batch {}: {ours:?} is not {theirs:?}", from + m);
                }
            }
        };
        let mut judge = Judge::new(&model, None, true).unwrap();
        judge.start(0);
        let (first, layers) = measured(&mut judge, &tokens);
        assert_eq!(first, 0);
        check(0, &layers);

        let mut judge = Judge::new(&model, None, false).unwrap();
        judge.start(0);
        judge.push(&tokens[..700], &mut |_| ()).unwrap();
        judge.finish(&mut |_| ()).unwrap();
        let (states, pending) = judge.into_parts();
        assert_eq!((states.position(0), &pending[..]), (699, &tokens[699..700]));
        let mut judge = Judge::new(&model, None, true).unwrap();
        judge.start_from(&states, 0).unwrap();
        let (first, layers) = measured(&mut judge, &[&pending, &tokens[700..]].concat());
        assert_eq!(first, 704);
        check(44, &layers);
    }
}

#[test]
fn reports_add_up() {
    let device = Device::cpu().unwrap();
    let model = shaken_model(&small(Inner::Linear, Backbone::Mamba), &device, DType::F32, 1);
    let mut random = Random::new(2);
    let documents: Vec<Vec<u32>> = [40, 2, 1, 300, 17, 200, 130, 33, 90, 1000].map(|n| random.tokens(n, 20)).into();
    for (per_octave, context) in [(1, None), (4, None), (2, Some(50))] {
        let mut report = Report::new(16, per_octave);
        let mut judge = Judge::new(&model, context, true).unwrap();
        let (mut nll, mut tokens, mut own_tokens) = (0.0, 0, 0);
        for document in &documents {
            judge.start(0);
            let mut sink = |judged: &Judged<'_>| report.add(judged);
            judge.push(document, &mut sink).unwrap();
            judge.finish(&mut sink).unwrap();
            own_tokens += report.end_document(document.len() as f64).tokens;
            if document.len() > 1 {
                let whole = evaluate_text(&model, document, 0, context.map(|n| n as usize), 0.0).unwrap();
                (nll, tokens) = (nll + whole.nll, tokens + whole.tokens);
            }
        }
        let (total, rows) = (*report.total(), report.loss_by_position());
        assert_eq!((total.tokens, own_tokens, total.bytes), (tokens, tokens, 1813.0));
        assert!((total.nll - nll).abs() < 1e-3 * nll, "{} is not {nll}", total.nll);
        assert_eq!(rows.iter().map(|r| r.tokens).sum::<u64>(), tokens);
        let sum: f64 = rows.iter().map(|r| r.loss * r.tokens as f64).sum();
        assert!((sum - total.nll).abs() < 1e-9 * nll);
        assert!((report.overall().loss - total.loss()).abs() < 1e-12 && report.overall().margin.unwrap() > 0.0);
        // Buckets lie one behind the other, between powers of two; few documents are long.
        assert!(rows.windows(2).all(|pair| pair[0].to <= pair[1].from) && rows[0].from == 1 && rows[0].to == 2);
        assert!(per_octave > 1 || rows.iter().all(|r| r.from.is_power_of_two() && r.to == 2 * r.from));
        assert_eq!(rows[1].clusters, Clusters::Documents);
        let last = rows[rows.len() - 1];
        assert_eq!(last.clusters, Clusters::Parts);
        assert_eq!(last.from > 50, context.is_none(), "positions are those in the context: {last:?}");
        let of = |d: &Vec<u32>| in_windows(d.len() as u64 - 1, context.unwrap_or(u64::MAX));
        let mini_batches: u64 = documents.iter().map(of).sum();
        assert_eq!(report.inner().iter().map(|r| r.mini_batches).collect::<Vec<_>>(), [mini_batches; 2]);
        for (all, by) in report.inner().iter().zip(report.inner_by_position()) {
            let mean = by.iter().map(|r| r.before * r.mini_batches as f64).sum::<f64>() / mini_batches as f64;
            assert!((all.before - mean).abs() < 1e-12 * mean);
            assert!(by[0].from <= 15 && 15 < by[0].to, "{by:?}");
            assert_eq!(by[0].initial, by[0].before, "before the first update the weights are the initial ones");
        }
        let svg = report_svg(&report, "a & b").unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("a &amp; b") && svg.contains("layer 1") && svg.contains("<polygon"));
    }
    assert!(report_svg(&Report::new(16, 1), "").is_err());
}

/// Full mini-batches of windows of `context` tokens.
fn in_windows(inputs: u64, context: u64) -> u64 {
    inputs / context * (context / 16) + inputs % context / 16
}
