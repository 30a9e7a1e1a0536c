//! `ttt serve`: a running server and a client that speaks plain HTTP to it.

mod answers;
mod limits;
mod load;
mod mixers;
mod states;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Place;

/// A server, which is killed when the test is done with it.
pub struct Server {
    child: Child,
    address: String,
    key: Option<&'static str>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Place {
    /// A server of the model in `m`, whose files are all in this place.
    pub fn serve(&self, args: &[&str]) -> Server {
        self.serve_with(args, &[])
    }

    pub fn serve_with(&self, args: &[&str], variables: &[(&str, &str)]) -> Server {
        let fixed = ["serve", "m", "--port", "0", "--threads", "2", "--store", "states", "--snapshot-dir", "snapshots"];
        let mut command = self.command(&[&fixed[..], args].concat());
        let mut child = command.envs(variables.iter().copied()).spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        while !line.contains("listening on http://") {
            line.clear();
            if out.read_line(&mut line).unwrap() == 0 {
                let mut error = String::new();
                child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
                panic!("the server did not start: {error}");
            }
        }
        let address = line.trim().rsplit_once("http://").unwrap().1.to_owned();
        child.stdout = Some(out.into_inner());
        Server { child, address, key: None }
    }
}

impl Server {
    /// The same server, asked with a key.
    pub fn with_key(&mut self, key: &'static str) -> &Server {
        self.key = Some(key);
        self
    }

    /// Sends a request; the connection has not been read yet.
    pub fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let key = self.key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let kind = if kind.is_empty() { String::new() } else { format!("content-type: {kind}\r\n") };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{key}{kind}content-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that has refused the request may have closed the connection.
        let _ = stream.write_all(body);
        stream
    }

    pub fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
        read_answer(self.send(method, path, kind, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", &[])
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, "application/json", body.to_string().as_bytes())
    }

    /// A completion, which must succeed.
    #[track_caller]
    pub fn complete(&self, body: Value) -> Value {
        self.post("/v1/completions", &body).ok()
    }

    /// The value of a metric.
    pub fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(self.get("/metrics").body).unwrap();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// Waits until a metric has a value.
    #[track_caller]
    pub fn wait_for(&self, name: &str, value: f64) {
        let begun = Instant::now();
        while self.metric(name) != value {
            assert!(begun.elapsed() < Duration::from_secs(20), "{name} is {}, not {value}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[cfg(unix)]
    pub fn signal(&self, signal: i32) {
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Ends it as an administrator would.
    #[cfg(unix)]
    pub fn stop(&mut self) {
        self.signal(libc::SIGTERM);
        assert_eq!(self.wait(), Some(0));
    }

    /// Waits for the end; its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{} {}", self.status, String::from_utf8_lossy(&self.body));
        self.json()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The message of an error of this status.
    #[track_caller]
    pub fn fails(self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()["error"]["message"].as_str().unwrap().to_owned()
    }

    /// Server-sent events: kind and data.
    pub fn events(&self) -> Vec<(String, String)> {
        let text = std::str::from_utf8(&self.body).unwrap();
        let field = |block: &str, name: &str| {
            block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or_default().to_owned()
        };
        let blocks = text.split("\n\n").filter(|block| block.contains("data: "));
        blocks.map(|block| (field(block, "event"), field(block, "data"))).collect()
    }

    /// The pieces of a streamed answer, which must be complete.
    #[track_caller]
    pub fn pieces(&self) -> Vec<Value> {
        let mut data: Vec<String> = self.events().into_iter().map(|(_, data)| data).collect();
        assert_eq!(data.pop().as_deref(), Some("[DONE]"), "{}", String::from_utf8_lossy(&self.body));
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// Reads an answer to its end.
pub fn read_answer(mut stream: TcpStream) -> Answer {
    let mut all = Vec::new();
    let mut buffer = [0; 1 << 16];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => all.extend(&buffer[..n]),
            // The server has said what it had to say and did not wait for the rest of the request.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(e) => panic!("{e}"),
        }
    }
    let end =
        all.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no head in {:?}", String::from_utf8_lossy(&all)));
    let head = String::from_utf8(all[..end].to_vec()).unwrap().to_ascii_lowercase();
    let mut rest = &all[end + 4..];
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        while let Some(line) = rest.windows(2).position(|w| w == b"\r\n") {
            let length = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            rest = &rest[line + 2..];
            if length == 0 || rest.len() < length {
                break;
            }
            body.extend(&rest[..length]);
            rest = &rest[length + 2..];
        }
    } else {
        body.extend(rest);
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body }
}

/// Text of the first choice.
pub fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}"))
}
