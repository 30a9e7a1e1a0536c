//! States as resources.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::{Server, text};
use crate::Place;

const FILE: &str = "application/octet-stream";

fn id(state: &Value) -> &str {
    state["id"].as_str().unwrap_or_else(|| panic!("{state}"))
}

#[test]
fn states_live_and_die() {
    let place = Place::with_model();
    let server = place.serve(&["--dtype", "f64", "--max-states", "4"]);
    let book = &String::from_utf8(place.read("text.txt")).unwrap()[..1000];
    place.write("book.txt", book);
    // Learned from the body, from JSON and by the program: one state.
    let learned = server.request("POST", "/v1/states?name=book.txt", "text/plain; charset=utf-8", book.as_bytes());
    assert_eq!(learned.status, 201);
    let learned = learned.json();
    assert_eq!((&learned["name"], &learned["tokens"], &learned["pending"]), (&json!("book.txt"), &json!(1000), &json!(1)));
    let content = |id: &str| server.get(&format!("/v1/states/{id}/content")).body;
    place.write("learned.state", content(id(&learned)));
    place.run(&["read", "m", "book.txt", "--dtype", "f64", "--state-out", "read.state"]).ok();
    let diff = place.run(&["state", "diff", "learned.state", "read.state", "--json"]).ok().json();
    assert!(diff["distance"].as_array().unwrap().iter().all(|d| d.as_f64().unwrap() < 1e-9), "{diff}");
    let from_json = server.post("/v1/states", &json!({"text": book, "name": "same"})).ok();
    assert_eq!(from_json["sha256"], learned["sha256"]);
    assert_eq!(server.get(&format!("/v1/states/{}", id(&learned))).ok(), learned);

    // The program goes on from a downloaded state as the server does from its own, and the other way round.
    let go_on = json!({"state_id": id(&learned), "prompt": " 7", "max_tokens": 20, "temperature": 0});
    let wanted = ["generate", "m", "--dtype", "f64", "--json", "--temperature", "0", "-n", "20", "-p", " 7", "--state-in"];
    let generated = |file: &str| place.run(&[&wanted[..], &[file]].concat()).ok().json()["text"].clone();
    assert_eq!(text(&server.complete(go_on.clone())), generated("learned.state"));
    let uploaded = server.request("POST", "/v1/states/upload?name=up", FILE, &place.read("read.state")).ok();
    let mut from_upload = go_on.clone();
    from_upload["state_id"] = uploaded["id"].clone();
    assert_eq!(text(&server.complete(from_upload)), generated("read.state"));

    // A fork is another state; a name is only a name.
    let fork = server.post(&format!("/v1/states/{}/fork", id(&learned)), &json!({"name": "../fork"})).ok();
    assert_eq!((&fork["parent"], &fork["sha256"]), (&learned["id"], &learned["sha256"]));
    assert!(server.post("/v1/states", &json!({"text": "x"})).fails(409).contains("--max-states"));
    let path = format!("/v1/states/{}", id(&fork));
    let renamed = server.request("PATCH", &path, "application/json", b"{\"name\": \"second\"}").ok();
    assert_eq!((&renamed["name"], &renamed["id"]), (&json!("second"), &fork["id"]));
    assert_eq!(server.request("DELETE", &format!("/v1/states/{}", id(&learned)), "", &[]).ok()["deleted"], true);
    server.get(&format!("/v1/states/{}", id(&learned))).fails(404);
    server.post("/v1/completions", &go_on).fails(404);
    assert_eq!(content(id(&fork)), place.read("learned.state"));
    let names = server.get("/v1/states").ok();
    let mut names: Vec<&str> = names["data"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["same", "second", "up"]);
    assert!(place.files().iter().all(|f| !f.contains("fork") && !f.contains(id(&fork))), "ids and names are no file names");
    drop(server);

    let server = place.serve(&["--read-only", "--dtype", "f64"]);
    assert_eq!(server.get("/v1/states").ok()["data"].as_array().unwrap().len(), 3);
    let refused = [("POST", "/v1/states"), ("POST", "/v1/states/upload"), ("DELETE", &path), ("PATCH", &path)];
    for (method, path) in refused {
        server.request(method, path, FILE, b"x").fails(403);
    }
    server.post(&format!("{path}/fork"), &json!({})).fails(403);
    server.post("/v1/completions", &json!({"prompt": "a", "save_state": true})).fails(403);
    server.complete(json!({"state_id": id(&fork), "prompt": "a", "return_state": true}));
}

#[test]
fn going_on_from_a_kept_state_is_not_having_stopped() {
    let place = Place::with_model();
    let server = place.serve(&["--dtype", "f64"]);
    let body = |n: usize| json!({"prompt": "30 green", "max_tokens": n, "temperature": 0, "ignore_eos": true});
    let whole = server.complete(body(40));
    let mut first = body(25);
    first["save_state"] = "half".into();
    first["return_state"] = true.into();
    let first = server.complete(first);
    let rest = json!({"prompt": "", "max_tokens": 15, "temperature": 0, "ignore_eos": true});
    let mut by_id = rest.clone();
    by_id["state_id"] = first["choices"][0]["state_id"].clone();
    let mut carried = rest.clone();
    carried["state"] = first["choices"][0]["state"].clone();
    for body in [by_id, carried.clone()] {
        assert_eq!(format!("{}{}", text(&first), text(&server.complete(body))), text(&whole));
    }
    // Nothing was kept for what was carried.
    assert_eq!(server.get("/v1/states").ok()["data"].as_array().unwrap().len(), 1);
    // Choices part: each has its own state.
    let forked = json!({"prompt": "30 green", "max_tokens": 9, "n": 2, "seed": 1, "save_state": true, "ignore_eos": true});
    let forked = server.complete(forked);
    let ids: Vec<&Value> = forked["choices"].as_array().unwrap().iter().map(|c| &c["state_id"]).collect();
    assert_ne!(ids[0], ids[1]);
    // Both at once is a mistake.
    carried["state_id"] = ids[0].clone();
    server.post("/v1/completions", &carried).fails(400);
}

#[test]
fn learning_can_be_watched() {
    let place = Place::with_model();
    let server = place.serve(&["--prefill-chunk", "64"]);
    let book = place.read("text.txt");
    let events = server.request("POST", "/v1/states?name=book&stream=true", "text/plain", &book[..3000]).events();
    let (last, progress) = events.split_last().unwrap();
    assert_eq!(last.0, "state");
    let state: Value = serde_json::from_str(&last.1).unwrap();
    assert_eq!(state["tokens"], 3000);
    let progress: Vec<Value> = progress
        .iter()
        .map(|(kind, data)| {
            assert_eq!(kind, "progress");
            serde_json::from_str(data).unwrap()
        })
        .collect();
    assert!(progress.len() > 5);
    assert_eq!((&progress[0]["tokens"], &progress.last().unwrap()["tokens"]), (&json!(0), &json!(3000)));
    let watched: Vec<&Value> = progress.iter().filter(|p| !p["inner"].as_array().unwrap().is_empty()).collect();
    assert!(watched.len() > 5);
    for point in watched {
        let layers = point["inner"].as_array().unwrap();
        assert_eq!(layers.len(), 2);
        // An update makes the inner model better at what it was made on.
        for layer in layers {
            let [_, before, after] = [0, 1, 2].map(|i| layer[i].as_f64().unwrap());
            assert!(after < before, "{point}");
        }
    }
    // Watched or not, the state is the same.
    let same = server.request("POST", "/v1/states", "text/plain", &book[..3000]).ok();
    let go_on = |id: &Value| {
        let answer = server.complete(json!({"state_id": id, "prompt": "a", "max_tokens": 10, "temperature": 0}));
        text(&answer).to_owned()
    };
    assert_eq!(go_on(&state["id"]), go_on(&same["id"]));
    let failed = server.request("POST", "/v1/states?state_id=none", "text/plain", b"x");
    failed.fails(404);
}

#[test]
fn hostile_uploads_are_refused() {
    let place = Place::with_model();
    let server = place.serve(&[]);
    place.train(&["--out", "other", "-q", "--seed", "9"]).ok();
    let made = |model: &str| {
        place.run(&["generate", model, "-p", "green", "-n", "9", "--state-out", "x.state"]).ok();
        place.read("x.state")
    };
    let (good, other) = (made("m"), made("other"));
    let upload = |bytes: &[u8]| server.request("POST", "/v1/states/upload", FILE, bytes);
    assert!(upload(&other).fails(400).contains("another model"));
    for length in [0, 1, 8, 100, good.len() / 2, good.len() - 1] {
        upload(&good[..length]).fails(400);
    }
    let mut longer = good.clone();
    longer.extend([0; 8]);
    upload(&longer).fails(400);
    // A length that would fill the memory, if it were believed.
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    upload(&huge).fails(400);
    let mut nan = good.clone();
    let at = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize + 400;
    nan[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(upload(&nan).fails(400).contains("finite"));
    let inline = json!({"prompt": "a", "state": BASE64_STANDARD.encode(&other)});
    assert!(server.post("/v1/completions", &inline).fails(400).contains("another model"));
    // Another tokenizer's ids mean other texts.
    place.run(&["tokenizer", "train", "--data", "text.txt", "--vocab-size", "258", "--out", "tok"]).ok();
    let another = place.serve(&["--tokenizer", "tok"]);
    assert!(another.request("POST", "/v1/states/upload", FILE, &good).fails(400).contains("another tokenizer"));
    assert!(server.get("/v1/states").ok()["data"].as_array().unwrap().is_empty());
    upload(&good).ok();
}

#[test]
fn two_servers_continue_one_conversation() {
    let place = Place::with_model();
    // In f32: on one machine the same calls give the same numbers.
    let servers = [place.serve(&[]), place.serve(&[])];
    let turn = |server: &Server, state: Option<&Value>, said: &str| {
        let mut body = json!({"prompt": said, "max_tokens": 12, "temperature": 0, "ignore_eos": true, "save_state": true});
        if let Some(state) = state {
            body["state_id"] = state.clone();
        }
        let answer = server.complete(body);
        (text(&answer).to_owned(), answer["choices"][0]["state_id"].clone())
    };
    let said = ["1 green", " bottles", " on the wall\n2", " green"];
    let conversation = |who: &dyn Fn(usize) -> usize| {
        let (mut all, mut state) = (String::new(), None);
        for (i, said) in said.iter().enumerate() {
            let (text, next) = turn(&servers[who(i)], state.as_ref(), said);
            all += &format!("{said}[{text}]");
            state = Some(next);
        }
        all
    };
    let alone = conversation(&|_| 0);
    assert_eq!(conversation(&|i| i % 2), alone);
    assert_eq!(servers[0].get("/v1/states").ok(), servers[1].get("/v1/states").ok());
}

#[cfg(unix)]
#[test]
fn a_killed_server_leaves_whole_states() {
    let place = Place::with_model();
    let mut known: Vec<Value> = Vec::new();
    for round in 0..4u64 {
        let mut server = place.serve(&[]);
        for state in &known {
            assert_eq!(server.get(&format!("/v1/states/{}", id(state))).ok()["sha256"], state["sha256"], "lost");
        }
        let listed = server.get("/v1/states").ok()["data"].as_array().unwrap().clone();
        for state in &listed {
            let content = server.get(&format!("/v1/states/{}/content", id(state)));
            assert_eq!((content.status, content.body.len() as u64), (200, state["bytes"].as_u64().unwrap()));
            server.complete(json!({"state_id": id(state), "prompt": "a", "max_tokens": 1}));
        }
        // Several writers, and a death in the middle of it.
        let shared = &server;
        let written = &AtomicUsize::new(0);
        let answered = thread::scope(|scope| {
            let writer = || {
                let mut answered = Vec::new();
                // A request without an answer may or may not have been done.
                while let Ok(state) = std::panic::catch_unwind(|| shared.post("/v1/states", &json!({"text": "x"})).ok()) {
                    answered.push(state);
                    written.fetch_add(1, Ordering::Relaxed);
                }
                answered
            };
            let writers: Vec<_> = (0..3).map(|_| scope.spawn(writer)).collect();
            // However busy the machine is, not before something is written.
            while written.load(Ordering::Relaxed) == 0 && writers.iter().any(|w| !w.is_finished()) {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_millis(20 + 37 * round));
            shared.signal(libc::SIGKILL);
            writers.into_iter().flat_map(|w| w.join().unwrap()).collect::<Vec<_>>()
        });
        server.wait();
        assert!(!answered.is_empty());
        known.extend(answered);
    }
}

#[test]
fn bytes_that_nothing_names_are_swept_at_the_start() {
    let place = Place::with_model();
    let day = Duration::from_secs(24 * 3600);
    let left = |name: &str, age: Duration| {
        let path = format!("states/open/{name}");
        place.write(&path, "bytes");
        let file = std::fs::File::options().write(true).open(place.path(&path)).unwrap();
        file.set_modified(std::time::SystemTime::now() - age).unwrap();
        place.path(&path)
    };
    let [old, young] = ["ab", "cd"].map(|digits| format!("{}.state", digits.repeat(16)));
    let [old, young] = [left(&old, 2 * day), left(&young, day / 2)];
    drop(place.serve(&["--read-only"]));
    assert!(old.exists());
    let server = place.serve(&[]);
    let begun = std::time::Instant::now();
    while old.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20), "nothing was swept");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(young.exists());
    assert_eq!(server.get("/v1/states").ok()["data"], json!([]));
}
