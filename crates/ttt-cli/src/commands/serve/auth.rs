//! Who asks: API keys, and the owner of states that a key stands for.

use std::path::Path;

use anyhow::{Context, Result, bail};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use sha2::{Digest, Sha256};

use super::snapshots::hex;

/// The keys that are accepted, as hashes.
pub struct Keys(Vec<[u8; 32]>);

/// Whose states a request may see: a name that a key determines and that tells nothing of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner(pub String);

impl Keys {
    /// The keys of a file, one a line, and that of `TTT_API_KEY`.
    ///
    /// # Errors
    /// A file that cannot be read, or holds no key.
    pub fn read(file: Option<&Path>) -> Result<Keys> {
        let mut keys: Vec<String> = std::env::var("TTT_API_KEY").ok().filter(|key| !key.is_empty()).into_iter().collect();
        if let Some(file) = file {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let before = keys.len();
            keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned));
            if keys.len() == before {
                bail!("{} holds no key", file.display());
            }
        }
        Ok(Keys::new(&keys))
    }

    fn new(keys: &[impl AsRef<str>]) -> Keys {
        Keys(keys.iter().map(|key| Sha256::digest(key.as_ref()).into()).collect())
    }

    /// Whether everybody may ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Who sends a request; nobody without one of the keys. All keys are compared, in constant time.
    pub fn owner(&self, headers: &HeaderMap) -> Option<Owner> {
        if self.is_empty() {
            return Some(Owner("open".into()));
        }
        let key = headers.get(AUTHORIZATION)?.to_str().ok()?;
        let (scheme, key) = key.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let given: [u8; 32] = Sha256::digest(key.trim()).into();
        let same = self.0.iter().fold(false, |any, known| any | constant_time_eq(known, &given));
        same.then(|| {
            let mut hasher = Sha256::new_with_prefix("ttt owner 1");
            hasher.update(given);
            Owner(hex(&hasher.finalize()[..16]))
        })
    }
}

fn constant_time_eq(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    // Without it the loop could be left at the first difference.
    std::hint::black_box(difference) == 0
}

/// Whether a browser may have been made to send a request by a page of somebody else: an origin that is neither this server nor
/// allowed, or, without keys on a loopback address, a host name that somebody pointed here.
pub fn foreign(headers: &HeaderMap, allowed: &[String], local_names_only: bool) -> Option<&'static str> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(HOST).unwrap_or_default();
    if let Some(origin) = text(ORIGIN) {
        let own = origin.split_once("://").is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(host));
        if !own && !allowed.iter().any(|a| a == "*" || a == origin) {
            return Some("pages of other origins may not use this server; --cors allows one");
        }
    }
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(host, |(name, _)| name);
    let local = ["localhost", "[::1]", ""].iter().any(|n| name.eq_ignore_ascii_case(n)) || is_loopback(name);
    (local_names_only && !local).then_some("this server answers to localhost only; set an API key to use another name")
}

fn is_loopback(name: &str) -> bool {
    name.parse::<std::net::Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_key_makes_an_owner() {
        let keys = Keys::new(&["alpha", "beta"]);
        let owner = |value: &str| keys.owner(&headers(&[("authorization", value)]));
        let (a, b) = (owner("Bearer alpha").unwrap(), owner("bearer beta").unwrap());
        assert_ne!(a, b);
        assert_eq!(a, Keys::new(&["alpha"]).owner(&headers(&[("authorization", "Bearer alpha")])).unwrap());
        assert!(!a.0.contains("alpha"));
        for wrong in ["Bearer alph", "Bearer alphaa", "alpha", "Basic alpha", "Bearer ", ""] {
            assert_eq!(owner(wrong), None);
        }
        assert_eq!(keys.owner(&HeaderMap::new()), None);
        assert!(Keys::new(&[] as &[&str]).owner(&HeaderMap::new()).is_some());
    }

    #[test]
    fn browsers_are_not_remote_controls() {
        let foreign = |pairs: &[(&'static str, &str)], allowed: &[&str]| {
            foreign(&headers(pairs), &allowed.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>(), true).is_some()
        };
        assert!(!foreign(&[("host", "localhost:8080")], &[]));
        assert!(!foreign(&[("host", "127.0.0.1:1")], &[]));
        assert!(!foreign(&[("host", "[::1]:1"), ("origin", "http://[::1]:1")], &[]));
        assert!(foreign(&[("host", "rebound.example:8080")], &[]));
        assert!(foreign(&[("host", "localhost:8080"), ("origin", "http://evil.example")], &[]));
        assert!(foreign(&[("host", "localhost:8080"), ("origin", "null")], &[]));
        assert!(!foreign(&[("host", "localhost:8080"), ("origin", "http://good.example")], &["http://good.example"]));
        assert!(!foreign(&[("host", "localhost:8080"), ("origin", "http://localhost:8080")], &[]));
    }
}
