//! What the server refuses, and how it ends.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{read_answer, text};
use crate::Place;

#[test]
fn bad_requests_get_their_status_and_the_server_lives() {
    let place = Place::with_model();
    let server = place.serve(&["--max-body", "20000", "--max-prompt", "1000", "--max-tokens", "50", "--slots", "4"]);
    let json = "application/json";
    let long = format!("{{\"prompt\": \"{}\"}}", "x".repeat(1000));
    let large = vec![b' '; 20_001];
    // Method, address, type and body; status and a part of the message.
    type Case<'a> = (&'a str, &'a str, &'a str, &'a [u8], u16, &'a str);
    let cases: &[Case<'_>] = &[
        ("POST", "/v1/completions", json, b"{", 400, "EOF"),
        ("POST", "/v1/completions", json, b"[]", 400, ""),
        ("POST", "/v1/completions", json, b"\xff\xfe", 400, ""),
        ("POST", "/v1/completions", "text/plain", b"{}", 415, "application/json"),
        ("POST", "/v1/completions", "", b"{}", 415, ""),
        ("POST", "/v1/completions", json, b"{\"prompt\": 7}", 400, "prompt"),
        ("POST", "/v1/completions", json, b"{\"prompt\": [\"a\", 7]}", 400, "prompt"),
        ("POST", "/v1/completions", json, b"{\"prompt\": []}", 400, ""),
        ("POST", "/v1/completions", json, b"{\"prompt\": [[]]}", 400, "nothing to continue"),
        ("POST", "/v1/completions", json, b"{\"prompt\": [300]}", 400, "vocabulary"),
        ("POST", "/v1/completions", json, b"{\"prompt\": [-1]}", 400, "prompt"),
        ("POST", "/v1/completions", json, b"{\"max_tokens\": \"many\"}", 400, "max_tokens"),
        ("POST", "/v1/completions", json, b"{\"max_tokens\": 51}", 400, "allows 50"),
        ("POST", "/v1/completions", json, b"{\"max_tokens\": 99999999999999999999}", 400, "max_tokens"),
        ("POST", "/v1/completions", json, b"{\"temperature\": -1}", 400, "temperature"),
        ("POST", "/v1/completions", json, b"{\"top_p\": 0}", 400, "top-p"),
        ("POST", "/v1/completions", json, b"{\"n\": 5}", 400, "1 to 4"),
        ("POST", "/v1/completions", json, b"{\"n\": 0}", 400, "1 to 4"),
        ("POST", "/v1/completions", json, b"{\"prompt\": [\"a\", \"b\", \"c\"], \"n\": 2}", 400, "1 to 4"),
        ("POST", "/v1/completions", json, b"{\"stop\": [\"\"]}", 400, "stop"),
        ("POST", "/v1/completions", json, b"{\"logprobs\": 21}", 400, "logprobs"),
        ("POST", "/v1/completions", json, b"{\"temprature\": 1}", 400, "temprature"),
        ("POST", "/v1/completions", json, b"{\"presence_penalty\": 1}", 400, "not supported"),
        ("POST", "/v1/completions", json, b"{\"best_of\": 2}", 400, "not supported"),
        ("POST", "/v1/completions", json, b"{\"model\": \"gpt-4\"}", 404, "gpt-4"),
        ("POST", "/v1/completions", json, b"{\"state_id\": \"../../etc/passwd\"}", 404, "no state"),
        ("POST", "/v1/completions", json, b"{\"state\": \"AAAA\"}", 400, "state"),
        ("POST", "/v1/completions", json, b"{\"state\": \"*\"}", 400, "base64"),
        ("POST", "/v1/completions", json, long.as_bytes(), 400, "allows 1000"),
        ("POST", "/v1/completions", json, &large, 413, "20000"),
        ("POST", "/v1/chat/completions", json, b"{\"messages\": [{\"role\": \"robot\", \"content\": \"\"}]}", 400, "role"),
        ("GET", "/v1/completions", "", b"", 405, ""),
        ("GET", "/v2", "", b"", 404, ""),
        ("GET", "/v1/states/x", "", b"", 404, ""),
        ("GET", "/v1/states/..%2f..%2fm/content", "", b"", 404, ""),
        ("DELETE", "/v1/states/%00", "", b"", 404, ""),
        ("POST", "/v1/states", "text/plain", b"caf\xe9", 400, "byte 3"),
        ("POST", "/v1/states", "image/png", b"x", 415, "text/plain"),
        ("POST", "/v1/states?name=%0a", "text/plain", b"x", 400, "name"),
        ("POST", "/v1/states?nmae=x", "text/plain", b"x", 400, ""),
        ("POST", "/v1/states/upload", "text/plain", b"x", 415, ""),
        ("POST", "/v1/states/upload", "application/octet-stream", b"", 400, ""),
    ];
    for (method, path, kind, body, status, part) in cases {
        let answer = server.request(method, path, kind, body);
        let shown = format!("{method} {path} {}", String::from_utf8_lossy(&body[..body.len().min(60)]));
        assert_eq!(answer.status, *status, "{shown}: {}", String::from_utf8_lossy(&answer.body));
        if path.starts_with("/v1") && *status != 400 || *kind == json {
            let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains(part), "{shown}: {message}");
        }
    }
    // No request at all.
    for noise in
        [&b"\x16\x03\x01\x02\x00"[..], b"GET / HTTP/9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\n\r\n{"]
    {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(noise).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    // A page of somebody else, and a name that somebody pointed here.
    for header in ["origin: http://evil.example", "host: evil.example"] {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let host = if header.starts_with("host") { String::new() } else { format!("host: {}\r\n", server.address) };
        write!(stream, "GET /v1/models HTTP/1.1\r\n{host}{header}\r\nconnection: close\r\n\r\n").unwrap();
        read_answer(stream).fails(403);
    }
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(text(&server.complete(json!({"prompt": "a", "max_tokens": 0, "echo": true}))), "a");
    assert_eq!(server.metric("ttt_slots_in_use"), 0.0);
}

#[test]
fn a_full_queue_says_when_to_come_back_and_who_goes_makes_room() {
    let place = Place::with_model();
    let server = place.serve(&["--slots", "1", "--queue", "1"]);
    let endless = json!({"prompt": "a", "max_tokens": 60_000, "ignore_eos": true, "stream": true}).to_string();
    let first = |stream: &mut TcpStream| stream.read_exact(&mut [0; 600]).unwrap();
    let start = || server.send("POST", "/v1/completions", "application/json", endless.as_bytes());
    let mut running = start();
    first(&mut running);
    let mut waiting = start();
    server.wait_for("ttt_queue_length", 1.0);
    let refused = server.post("/v1/completions", &json!({"prompt": "b"}));
    assert!(refused.head.contains("retry-after: "), "{}", refused.head);
    assert!(refused.fails(429).contains("try again in"));
    // Within one step of its leaving.
    drop(running);
    first(&mut waiting);
    assert_eq!(server.metric("ttt_jobs_cancelled_total"), 1.0);
    // A client that does not read costs nothing but memory for its text.
    server.wait_for("ttt_slots_in_use", 1.0);
    drop(waiting);
    server.wait_for("ttt_slots_in_use", 0.0);
    server.complete(json!({"prompt": "b"}));
}

#[test]
fn time_is_limited() {
    let place = Place::with_model();
    let server = place.serve(&["--timeout", "1", "--slots", "1"]);
    let endless = json!({"prompt": "a", "max_tokens": 60_000, "ignore_eos": true});
    assert!(server.post("/v1/completions", &endless).fails(504).contains("--timeout"));
    let mut streamed = endless.clone();
    streamed["stream"] = true.into();
    let pieces = server.post("/v1/completions", &streamed).pieces();
    assert_eq!(pieces.last().unwrap()["error"]["code"], 504);
    server.complete(json!({"prompt": "b"}));
}

#[cfg(unix)]
#[test]
fn stopping_finishes_what_runs() {
    let place = Place::with_model();
    let mut server = place.serve(&["--slots", "2"]);
    let body = json!({"prompt": "a", "max_tokens": 2000, "ignore_eos": true, "stream": true, "temperature": 0}).to_string();
    let mut running = server.send("POST", "/v1/completions", "application/json", body.as_bytes());
    let mut head = vec![0; 600];
    running.read_exact(&mut head).unwrap();
    server.signal(libc::SIGTERM);
    let begun = Instant::now();
    while TcpStream::connect(&server.address).is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it still listens");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.wait(), Some(0));

    // Without grace it ends with what there is, and keeps the state that was asked for.
    let mut server = place.serve(&["--grace", "0"]);
    let body = json!({"prompt": "a", "max_tokens": 60_000, "ignore_eos": true, "stream": true, "save_state": "cut"}).to_string();
    let mut running = server.send("POST", "/v1/completions", "application/json", body.as_bytes());
    running.read_exact(&mut head).unwrap();
    server.signal(libc::SIGINT);
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"state_id\":\"state-") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.wait(), Some(0));
    let server = place.serve(&[]);
    assert_eq!(server.get("/v1/states").ok()["data"][0]["name"], "cut");
}

#[test]
fn wrong_starts_are_explained() {
    let place = Place::with_model();
    place.run(&["serve", "m", "--host", "0.0.0.0", "--port", "0"]).fails(2, &["TTT_API_KEY", "--no-api-key"]);
    place.write("keys", "# none\n");
    place.run(&["serve", "m", "--api-keys", "keys", "--port", "0"]).fails(1, &["keys holds no key"]);
    place.write("file", "");
    place.run(&["serve", "m", "--store", "file", "--port", "0"]).fails(1, &["cannot keep states in file"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let args = ["serve", "m", "--port", &port, "--store", "s", "--snapshot-dir", "d"];
    place.run(&args).fails(1, &["cannot listen on 127.0.0.1", &port]);
}
