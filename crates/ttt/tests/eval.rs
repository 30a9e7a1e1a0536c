//! Evaluation: sums over a text are what one pass over it gives, in chunks, after a prompt, and with a bounded context.

mod support;

use support::{Random, shaken_model};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::eval::evaluate_text;
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
