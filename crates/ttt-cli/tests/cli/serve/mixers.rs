//! Models without an inner loop: a Transformer, whose states grow, and a Mamba.

use serde_json::{Value, json};

use super::{Server, text};
use crate::{Place, TINY};

/// A trained model of a mixer in `m`.
fn trained(mixer: &[&str]) -> Place {
    let place = Place::new();
    let mut line = vec!["train", "--data", "text.txt", "--threads", "2", "--out", "m", "-q"];
    let skip = |s: &&str| mixer[0].ends_with("mamba") && (s.contains("intermediate_size") || s.contains("attention_heads"));
    line.extend(TINY.iter().filter(|s| !skip(s)));
    line.extend(mixer);
    place.run(&line).ok();
    place
}

/// The greedy continuation by `ttt generate`.
fn generated(place: &Place, more: &[&str]) -> Value {
    let line = ["generate", "m", "--dtype", "f64", "--json", "--temperature", "0", "--no-eos"];
    place.run(&[&line[..], more].concat()).ok().json()["text"].clone()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// What both can do: tokens of `ttt generate` beside others, states that are kept, prefixes that are remembered, learning that is
/// watched. Returns two states that have read 300 and 600 tokens.
fn is_served(place: &Place, server: &Server) -> [Value; 2] {
    let book = String::from_utf8(place.read("text.txt")).unwrap();
    let prompts = [&book[..7], &book[100..400], &book[33..90], &book[200..420]];
    let wanted = prompts.map(|prompt| generated(place, &["-p", prompt, "-n", "30"]));
    let ask = |prompt: &str, more: Value| {
        let mut body = json!({"prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.complete(body)
    };
    let each = &ask;
    std::thread::scope(|scope| {
        for (i, (prompt, wanted)) in prompts.iter().zip(&wanted).enumerate() {
            let more = if i == 1 { json!({"n": 2, "logprobs": 1}) } else { json!({}) };
            scope.spawn(move || {
                let answer = each(prompt, more);
                for choice in answer["choices"].as_array().unwrap() {
                    assert_eq!(choice["text"], *wanted, "after {prompt:?}");
                }
            });
        }
    });
    assert_eq!(cached(&ask(prompts[1], json!({}))), 300);

    let learn = |n: usize| server.post("/v1/states", &json!({"text": book[..n], "name": "book"})).ok();
    let states = [300, 600].map(learn);
    for (n, state) in [300, 600].into_iter().zip(&states) {
        assert_eq!((state["tokens"].as_u64(), state["pending"].as_u64()), (Some(n), Some(1)));
    }
    let id = states[0]["id"].as_str().unwrap();
    let content = server.get(&format!("/v1/states/{id}/content")).body;
    place.write("book.state", content);
    let wanted = generated(place, &["--state-in", "book.state", "-p", " 7", "-n", "30"]);
    assert_eq!(text(&ask(" 7", json!({"state_id": id}))), wanted);
    let watched = server.request("POST", "/v1/states?stream=true&name=w", "text/plain", &book.as_bytes()[..500]);
    let events = watched.events();
    let read = |(kind, data): &(String, String)| (kind == "progress").then(|| serde_json::from_str::<Value>(data).unwrap());
    let progress: Vec<Value> = events.iter().filter_map(read).collect();
    assert!(progress.len() > 2 && progress.iter().all(|p| p["inner"] == json!([])), "{progress:?}");
    assert_eq!(events.last().unwrap().0, "state");
    states
}

#[test]
fn a_transformer_is_served_within_its_memory() {
    let place = trained(&["model.mixer=attention", "model.num_key_value_heads=1"]);
    // 2 layers of keys and values of 16 numbers in f64: 512 bytes a token and slot.
    let args = ["--dtype", "f64", "--slots", "3", "--cache-memory", "1536000", "--prefill-chunk", "32", "--snapshot-every", "64"];
    let mut server = place.serve(&args);
    let [short, long] = is_served(&place, &server);
    let [short, long] = [short, long].map(|state| state["bytes"].as_u64().unwrap());
    assert!(long - short > 300 * 500, "a state grows with what was read: {short} and {long} bytes");
    let model = server.get("/v1/models/m").ok();
    assert_eq!(
        [&model["context"], &model["state_bytes"], &model["state_bytes_per_token"]],
        [1000, 0, 512].map(|n| json!(n)).each_ref()
    );

    // 1,000 tokens are room for the prompt, BOS and the answer, and not for one more.
    let book = String::from_utf8(place.read("text.txt")).unwrap();
    let ask = |prompt: usize, tokens: u64| {
        server
            .post("/v1/completions", &json!({"prompt": book[..prompt], "max_tokens": tokens, "temperature": 0, "ignore_eos": true}))
    };
    assert_eq!(ask(900, 99).ok()["usage"]["total_tokens"], 1000);
    assert!(ask(900, 100).fails(400).contains("room for 1000 of a sequence (--cache-memory, --slots)"));
    assert!(ask(1200, 1).fails(400).contains("the prompt has 1201"));
    server.post("/v1/states", &json!({"text": book[..1200]})).fails(400);
    // A state from elsewhere may be as long as it likes; what goes on from it needs room.
    place.write("long.txt", &book[..1500]);
    place.run(&["read", "m", "long.txt", "--dtype", "f64", "--state-out", "long.state"]).ok();
    let body = place.read("long.state");
    let id = server.request("POST", "/v1/states/upload", "application/octet-stream", &body).ok()["id"].clone();
    let error = server.post("/v1/completions", &json!({"state_id": id, "prompt": "x", "max_tokens": 1})).fails(400);
    assert!(error.contains("the state has read 1501"), "{error}");
    // Where the request does not say how many, as many as there is room for.
    let answer = server.complete(json!({"prompt": book[..995], "temperature": 0, "ignore_eos": true}));
    assert_eq!(answer["usage"]["completion_tokens"], 4);

    // The next process finds the prefix: snapshots are at doubled positions and at the end of prompts.
    server.complete(json!({"prompt": book[50..850], "max_tokens": 1}));
    server.stop();
    let server = place.serve(&args);
    let cached = |prompt: String| cached(&server.complete(json!({"prompt": prompt, "max_tokens": 1})));
    assert_eq!([format!("{}?", &book[50..750]), format!("{}?", &book[50..850])].map(cached), [512, 800]);
    let few = ["serve", "m", "--slots", "3", "--cache-memory", "10kB"];
    place.run(&few).fails(1, &["--cache-memory 9.77 KiB has room for 13 tokens in each of 3 slots"]);
}

#[test]
fn a_mamba_is_served() {
    let place = trained(&["model.mixer=mamba"]);
    let server = place.serve(&["--dtype", "f64", "--slots", "3", "--prefill-chunk", "32", "--snapshot-every", "64"]);
    let [short, long] = is_served(&place, &server);
    assert_eq!(short["bytes"], long["bytes"], "a state is of fixed size");
    let model = server.get("/v1/models/m").ok();
    assert_eq!((&model["context"], &model["state_bytes_per_token"]), (&json!(null), &json!(0)));
}

/// A rung of the ladder whose mini-batch is the sequence.
#[test]
fn a_learner_without_mini_batches_is_served() {
    let place = trained(&["model.mini_batch_size=sequence", "model.ttt_learnable_lr=false", "model.ttt_base_lr=0.5"]);
    let server = place.serve(&["--dtype", "f64", "--slots", "3", "--prefill-chunk", "32", "--snapshot-every", "64"]);
    let [short, long] = is_served(&place, &server);
    assert_eq!(short["bytes"], long["bytes"], "a state is of fixed size");
}
