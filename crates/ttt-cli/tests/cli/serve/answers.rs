//! What the API answers.

use serde_json::{Value, json};

use super::text;
use crate::Place;

/// What `ttt generate` says after a prompt.
fn generated(place: &Place, args: &[&str]) -> Value {
    place.run(&[&["generate", "m", "--json", "--dtype", "f64"][..], args].concat()).ok().json()
}

#[test]
fn completions_are_those_of_generate() {
    let place = Place::with_model();
    let server = place.serve(&["--dtype", "f64", "--prefill-chunk", "16"]);
    let long: String = String::from_utf8(place.read("text.txt")).unwrap()[..700].into();
    for prompt in ["7 green", "é", &long] {
        let greedy = server.complete(json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2}));
        let wanted = generated(&place, &["-p", prompt, "-n", "24", "--temperature", "0"]);
        assert_eq!(text(&greedy), wanted["text"]);
        let close = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-6;
        let logprobs = greedy["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
        assert!(logprobs.iter().zip(wanted["logprobs"].as_array().unwrap()).all(|(a, b)| close(a, b)));
        let sampled = ["-p", prompt, "-n", "24", "--temperature", "0.9", "--top-p", "0.95", "--seed"];
        let choices = json!({"prompt": prompt, "max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 5, "n": 3});
        let choices = server.complete(choices);
        for (i, seed) in ["5", "6", "7"].iter().enumerate() {
            let wanted = generated(&place, &[&sampled[..], &[seed]].concat());
            assert_eq!(choices["choices"][i]["text"], wanted["text"], "choice {i}");
        }
        // One reading for three choices.
        assert_eq!(choices["usage"]["prompt_tokens"].as_u64().unwrap() as usize, prompt.len() + 1);
    }
}

#[test]
fn streams_say_what_whole_answers_say() {
    let place = Place::with_model();
    let server = place.serve(&["--dtype", "f64"]);
    let body = |stream: bool| {
        json!({
            "prompt": ["7 green", "8 "], "max_tokens": 20, "temperature": 0.8, "seed": 3, "n": 2, "logprobs": 3, "echo": true,
            "stop": ["tles"], "stream": stream, "stream_options": {"include_usage": true}, "model": "m",
        })
    };
    let whole = server.complete(body(false));
    let answer = server.post("/v1/completions", &body(true));
    assert!(answer.head.contains("text/event-stream"), "{}", answer.head);
    let pieces = answer.pieces();
    let (last, pieces) = pieces.split_last().unwrap();
    assert_eq!(last["usage"], whole["usage"]);
    for choice in whole["choices"].as_array().unwrap() {
        let mine: Vec<&Value> = pieces.iter().map(|p| &p["choices"][0]).filter(|c| c["index"] == choice["index"]).collect();
        let joined: String = mine.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(joined, choice["text"]);
        assert!(!joined.contains("tles"));
        assert_eq!(mine.last().unwrap()["finish_reason"], choice["finish_reason"]);
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let joined: Vec<&Value> = mine.iter().flat_map(|c| c["logprobs"][list].as_array().unwrap()).collect();
            assert_eq!(joined, choice["logprobs"][list].as_array().unwrap().iter().collect::<Vec<_>>(), "{list}");
        }
        // Every token stands where its offset says.
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        for (token, offset) in tokens.iter().zip(choice["logprobs"]["text_offset"].as_array().unwrap()).skip(1) {
            let rest: String = joined.chars().skip(offset.as_u64().unwrap() as usize).collect();
            let token = token.as_str().unwrap();
            // That bytes make no character shows with the next token.
            let rest = rest.trim_start_matches('\u{FFFD}');
            assert!(rest.starts_with(token) || token.starts_with("bytes:"), "{token} at {offset} of {joined}");
        }
    }
    assert_eq!(whole["choices"][0]["text"].as_str().unwrap()[..7], *"7 green");
    assert_eq!(whole["choices"][2]["text"].as_str().unwrap()[..2], *"8 ");
}

#[test]
fn echo_scores_a_given_text() {
    let place = Place::with_model();
    let server = place.serve(&["--dtype", "f64", "--prefill-chunk", "16"]);
    let ids: Vec<u32> = "12 green bottles hanging".bytes().map(u32::from).collect();
    let written = server.complete(json!({"prompt": ids, "max_tokens": 30, "temperature": 0, "logprobs": 1}));
    let all: Vec<u32> = ids.iter().copied().chain(text(&written).bytes().map(u32::from)).collect();
    // What lm_eval asks for.
    let scored =
        server.complete(json!({"prompt": [all], "max_tokens": 1, "logprobs": 1, "echo": true, "seed": 1, "temperature": 0}));
    let [written, scored] = [&written, &scored].map(|a| &a["choices"][0]["logprobs"]);
    assert!(scored["token_logprobs"][0].is_null());
    let list = |value: &Value| value.as_array().unwrap().clone();
    let scored_logprobs = list(&scored["token_logprobs"]);
    assert_eq!(scored_logprobs.len(), ids.len() + 30 + 1);
    for (a, b) in list(&written["token_logprobs"]).iter().zip(&scored_logprobs[ids.len()..]) {
        assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-6, "{a} {b}");
    }
    for (token, top) in list(&scored["tokens"]).iter().zip(list(&scored["top_logprobs"])).skip(ids.len()) {
        assert!(top.as_object().unwrap().contains_key(token.as_str().unwrap()), "greedy tokens are the likeliest");
    }
}

#[test]
fn conversations_need_a_template_and_use_it() {
    let place = Place::with_model();
    let server = place.serve(&[]);
    let messages = json!([{"role": "system", "content": "4"}, {"role": "user", "content": [{"type": "text", "text": "2 gr"}]}]);
    let body = json!({"messages": messages, "max_tokens": 12, "temperature": 0});
    let message = server.post("/v1/chat/completions", &body).fails(400);
    assert!(message.contains("no chat template") && message.contains("/v1/completions"), "{message}");
    drop(server);

    let path = "m/final/tokenizer_config.json";
    let mut config: Value = serde_json::from_slice(&place.read(path)).unwrap();
    let template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('who?') }}{% endif %}{{ m.content.strip() }}{% endfor %}";
    config["chat_template"] = template.into();
    place.write(path, config.to_string());
    let server = place.serve(&["--dtype", "f64"]);
    let answer = server.post("/v1/chat/completions", &body).ok();
    let same = server.complete(json!({"prompt": [52, 50, 32, 103, 114], "max_tokens": 12, "temperature": 0}));
    assert_eq!(answer["choices"][0]["message"]["content"], same["choices"][0]["text"]);
    assert_eq!((&answer["object"], &answer["choices"][0]["message"]["role"]), (&json!("chat.completion"), &json!("assistant")));
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["logprobs"] = true.into();
    streamed["top_logprobs"] = 2.into();
    let pieces = server.post("/v1/chat/completions", &streamed).pieces();
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    let joined: String = pieces.iter().filter_map(|p| p["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(joined, answer["choices"][0]["message"]["content"].as_str().unwrap());
    let tops = pieces.iter().filter_map(|p| p["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(tops.filter(|t| t["top_logprobs"].as_array().unwrap().len() == 2).count(), 12);
    let wrong = json!({"messages": [{"role": "assistant", "content": "x"}]});
    assert!(server.post("/v1/chat/completions", &wrong).fails(400).contains("who?"));
}

#[test]
fn the_rest_of_the_addresses() {
    let place = Place::with_model();
    let server = place.serve(&["--name", "small"]);
    assert_eq!(server.get("/health").ok()["status"], "ok");
    let models = server.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], "small");
    assert_eq!(server.get("/v1/models/small").ok(), models["data"][0]);
    server.get("/v1/models/large").fails(404);
    assert_eq!(models["data"][0]["hash"], place.run(&["info", "m", "--json"]).ok().json()["hash"]);
    server.complete(json!({"prompt": "a", "max_tokens": 3, "ignore_eos": true}));
    for (metric, value) in [("ttt_generated_tokens_total", 3.0), ("ttt_prompt_tokens_total", 2.0), ("ttt_jobs_finished_total", 1.0)]
    {
        assert_eq!(server.metric(metric), value, "{metric}");
    }
    assert_eq!(server.metric("ttt_first_token_seconds_count"), 1.0);
    assert!(server.metric("process_resident_memory_bytes") > 1e6);
    let document = server.get("/openapi.json").ok();
    assert!(document["paths"]["/v1/states/{id}/fork"]["post"].is_object());
    // The page, and nothing that it would load from elsewhere.
    for (path, kind) in [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")] {
        let file = server.get(path);
        assert!(file.head.contains(kind) && file.head.contains("default-src 'none'"), "{}", file.head);
        let text = String::from_utf8(file.body).unwrap();
        assert!(text.len() > 1000 && !text.contains("https://"), "{path}");
    }
}
