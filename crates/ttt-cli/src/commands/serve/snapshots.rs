//! States of prefixes that were read: the next prompt that begins so need not read them again.
//!
//! A state cannot be cut back to an earlier token, so states are kept where a later prompt may branch off: at multiples of
//! `--snapshot-every` tokens, at the end of a prompt, and at the end of an answer. A key is the SHA-256 of a root and all tokens
//! behind it, so the tree of prefixes is in the keys: [`Snapshots::find`] hashes a prompt once, stops at every position at which
//! its root has a state, and takes the longest. The root holds the model, the tokenizer, who asks and what the prompt goes on
//! from, so nobody's state is ever found by another key's prompt.
//!
//! Memory is bounded; the least recently used states go to files, whose sum is bounded too.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use ttt::hub::write_atomic;

use super::engine::Shared;

/// A state of fewer tokens is read again sooner than a file is worth.
const WORTH_A_FILE: u64 = 512;

/// What all prompts of one kind begin with: the same model and tokenizer, the same owner, the same start (empty: none).
pub fn root(model: &str, tokenizer: &str, owner: &str, start: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in [b"ttt snapshot 1".as_slice(), model.as_bytes(), tokenizer.as_bytes(), owner.as_bytes(), start] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// Where a state belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    root: [u8; 32],
    tokens: u64,
    prefix: [u8; 32],
}

/// Hashes a sequence as it is read.
#[derive(Clone)]
pub struct PrefixHash {
    root: [u8; 32],
    hasher: Sha256,
    tokens: usize,
}

impl PrefixHash {
    /// Nothing was read.
    pub fn new(root: [u8; 32]) -> PrefixHash {
        PrefixHash { root, hasher: Sha256::new_with_prefix(root), tokens: 0 }
    }

    /// How many tokens were hashed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The key of `tokens`, of which those that were hashed already are skipped.
    pub fn extend(&mut self, tokens: &[u32]) -> Key {
        for token in &tokens[self.tokens..] {
            self.hasher.update(token.to_le_bytes());
        }
        self.tokens = tokens.len();
        Key { root: self.root, tokens: tokens.len() as u64, prefix: self.hasher.clone().finalize().into() }
    }
}

/// The states that are kept.
pub struct Snapshots {
    entries: HashMap<Key, Entry>,
    /// Positions at which a root has states, and how many.
    positions: HashMap<[u8; 32], BTreeMap<u64, usize>>,
    /// Keys by when they were last used; those in memory and those in files.
    memory: Tier,
    disk: Tier,
    clock: u64,
    files: Option<Files>,
}

struct Entry {
    used: u64,
    bytes: usize,
    state: Option<Arc<[u8]>>,
}

#[derive(Default)]
struct Tier {
    order: BTreeMap<u64, Key>,
    bytes: usize,
    budget: usize,
}

impl Tier {
    fn add(&mut self, used: u64, key: Key, bytes: usize) {
        self.order.insert(used, key);
        self.bytes += bytes;
    }

    fn remove(&mut self, used: u64, bytes: usize) {
        if self.order.remove(&used).is_some() {
            self.bytes -= bytes;
        }
    }

    /// The least recently used key, when there is too much.
    fn excess(&self) -> Option<Key> {
        if self.bytes > self.budget { self.order.first_key_value().map(|(_, key)| *key) } else { None }
    }
}

impl Snapshots {
    /// Keeps up to `memory` bytes in memory and up to `disk` bytes in files of `folder`, and finds those that are there.
    ///
    /// # Errors
    /// A folder that cannot be made or read.
    pub fn open(memory: usize, disk: usize, folder: &Path) -> Result<Snapshots> {
        let tier = |budget| Tier { budget, ..Tier::default() };
        let mut all = Snapshots {
            entries: HashMap::new(),
            positions: HashMap::new(),
            memory: tier(memory),
            disk: tier(disk),
            clock: 0,
            files: None,
        };
        if disk > 0 {
            let (files, found) = Files::open(folder).with_context(|| format!("snapshots in {}", folder.display()))?;
            all.files = Some(files);
            for (key, bytes) in found {
                all.add(key, Entry { used: 0, bytes, state: None });
            }
            all.evict();
        }
        Ok(all)
    }

    /// The longest known prefix of `tokens` behind `root`, and its state.
    pub fn find(&mut self, root: [u8; 32], tokens: &[u32]) -> Option<(usize, Arc<[u8]>)> {
        let positions = self.positions.get(&root)?;
        let mut hash = PrefixHash::new(root);
        let keys: Vec<Key> =
            positions.range(..=tokens.len() as u64).map(|(position, _)| hash.extend(&tokens[..*position as usize])).collect();
        for key in keys.into_iter().rev() {
            let Some(entry) = self.entries.get(&key) else { continue };
            let state = match &entry.state {
                Some(state) => Some(state.clone()),
                None => self.files.as_ref().and_then(|files| files.read(&key)),
            };
            match state {
                Some(state) => {
                    let entry = self.remove(&key).expect("was found");
                    match state.len() > self.memory.budget {
                        true => self.add(key, entry),
                        false => self.insert(key, state.clone()),
                    }
                    return Some((key.tokens as usize, state));
                }
                // The file is gone.
                None => drop(self.remove(&key)),
            }
        }
        None
    }

    /// Whether there is such a state, which is then the most recently used.
    pub fn touch(&mut self, key: &Key) -> bool {
        match self.remove(key) {
            Some(entry) => {
                self.add(*key, entry);
                true
            }
            None => false,
        }
    }

    /// Keeps a state, in memory; one that is larger than all of it, in a file.
    pub fn insert(&mut self, key: Key, state: Arc<[u8]>) {
        let bytes = state.len();
        if bytes <= self.memory.budget {
            self.add(key, Entry { used: 0, bytes, state: Some(state) });
        } else if let Some(files) = self.files.as_ref().filter(|_| key.tokens >= WORTH_A_FILE && bytes <= self.disk.budget) {
            files.write(key, state);
            self.add(key, Entry { used: 0, bytes, state: None });
        }
        self.evict();
    }

    /// Whether a state of so many bytes could be kept at all.
    pub fn may_hold(&self, bytes: usize) -> bool {
        bytes <= self.memory.budget || bytes <= self.disk.budget
    }

    /// Writes what memory holds to files, as far as there is room for it, and waits for that.
    pub fn close(mut self) {
        self.memory.budget = 0;
        self.evict();
        if let Some(files) = self.files.take() {
            files.close();
        }
    }

    /// Says how much there is.
    pub fn report(&self, shared: &Shared) {
        shared.snapshots_memory.store(self.memory.order.len() as u64, Relaxed);
        shared.snapshots_memory_bytes.store(self.memory.bytes as u64, Relaxed);
        shared.snapshots_disk.store(self.disk.order.len() as u64, Relaxed);
        shared.snapshots_disk_bytes.store(self.disk.bytes as u64, Relaxed);
    }

    fn add(&mut self, key: Key, mut entry: Entry) {
        self.clock += 1;
        entry.used = self.clock;
        let tier = if entry.state.is_some() { &mut self.memory } else { &mut self.disk };
        tier.add(entry.used, key, entry.bytes);
        *self.positions.entry(key.root).or_default().entry(key.tokens).or_default() += 1;
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        let tier = if entry.state.is_some() { &mut self.memory } else { &mut self.disk };
        tier.remove(entry.used, entry.bytes);
        let positions = self.positions.get_mut(&key.root).expect("of an entry");
        let count = positions.get_mut(&key.tokens).expect("of an entry");
        *count -= 1;
        if *count == 0 {
            positions.remove(&key.tokens);
        }
        if positions.is_empty() {
            self.positions.remove(&key.root);
        }
        Some(entry)
    }

    fn evict(&mut self) {
        while let Some(key) = self.memory.excess() {
            let entry = self.remove(&key).expect("is in the order");
            if let Some(files) = self.files.as_ref().filter(|_| key.tokens >= WORTH_A_FILE && entry.bytes <= self.disk.budget) {
                files.write(key, entry.state.clone().expect("was in memory"));
                self.add(key, Entry { state: None, ..entry });
            }
        }
        while let Some(key) = self.disk.excess() {
            self.remove(&key);
            if let Some(files) = &self.files {
                files.delete(key);
            }
        }
    }
}

/// The files of a folder, which a thread of their own writes.
struct Files {
    folder: PathBuf,
    /// `None` deletes.
    jobs: Sender<(Key, Option<Arc<[u8]>>)>,
    /// States that are not written yet.
    writing: Arc<Mutex<HashMap<Key, Arc<[u8]>>>>,
    thread: JoinHandle<()>,
}

impl Files {
    /// Keys and sizes of the files that are there, the longest unused first.
    fn open(folder: &Path) -> Result<(Files, Vec<(Key, usize)>)> {
        private_folder(folder)?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if let (Some(key), Ok(meta)) = (entry.file_name().to_str().and_then(parse_name), entry.metadata()) {
                found.push((meta.modified().ok(), key, meta.len() as usize));
            }
        }
        found.sort();
        let (jobs, inbox) = channel::<(Key, Option<Arc<[u8]>>)>();
        let writing: Arc<Mutex<HashMap<Key, Arc<[u8]>>>> = Arc::default();
        let (theirs, place) = (writing.clone(), folder.to_owned());
        let work = move || {
            for (key, state) in inbox {
                let path = place.join(name(&key));
                // A cache may lose what it cannot write: whoever looks for it reads the text again.
                let _ = match state {
                    Some(state) => write_atomic(&path, |out| out.write_all(&state)).map_err(drop),
                    None => std::fs::remove_file(&path).map_err(drop),
                };
                theirs.lock().expect("no panic while it is held").remove(&key);
            }
        };
        let thread = std::thread::Builder::new().name("snapshots".into()).spawn(work)?;
        let files = Files { folder: folder.to_owned(), jobs, writing, thread };
        Ok((files, found.into_iter().map(|(_, key, bytes)| (key, bytes)).collect()))
    }

    fn write(&self, key: Key, state: Arc<[u8]>) {
        self.writing.lock().expect("no panic while it is held").insert(key, state.clone());
        let _ = self.jobs.send((key, Some(state)));
    }

    fn delete(&self, key: Key) {
        let _ = self.jobs.send((key, None));
    }

    fn read(&self, key: &Key) -> Option<Arc<[u8]>> {
        let waiting = self.writing.lock().expect("no panic while it is held").get(key).cloned();
        waiting.or_else(|| std::fs::read(self.folder.join(name(key))).ok().map(Into::into))
    }

    fn close(self) {
        drop(self.jobs);
        let _ = self.thread.join();
    }
}

/// Makes a folder that nobody else may read.
pub fn private_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

fn name(key: &Key) -> String {
    format!("{}-{}-{}.state", hex(&key.root), key.tokens, hex(&key.prefix))
}

fn parse_name(name: &str) -> Option<Key> {
    let mut parts = name.strip_suffix(".state")?.split('-');
    let key = Key { root: unhex(parts.next()?)?, tokens: parts.next()?.parse().ok()?, prefix: unhex(parts.next()?)? };
    parts.next().is_none().then_some(key)
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes of exactly `2 N` lower-case hexadecimal digits.
pub fn unhex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    let pairs = digits.as_bytes().chunks_exact(2);
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(n: u8) -> Arc<[u8]> {
        vec![n; 100].into()
    }

    fn key(root: [u8; 32], tokens: &[u32]) -> Key {
        PrefixHash::new(root).extend(tokens)
    }

    #[test]
    fn the_longest_prefix_is_found_and_nobody_elses() {
        let folder = tempfile::tempdir().unwrap();
        let mut all = Snapshots::open(1 << 20, 0, folder.path()).unwrap();
        let tokens: Vec<u32> = (0..2000).collect();
        let (mine, yours) = (root("m", "t", "me", b""), root("m", "t", "you", b""));
        for n in [10, 1000, 1500] {
            all.insert(key(mine, &tokens[..n]), state((n / 10) as u8));
        }
        let mut found = |root, tokens: &[u32]| all.find(root, tokens).map(|(n, state)| (n, state[0]));
        assert_eq!(found(mine, &tokens), Some((1500, 150)));
        assert_eq!(found(mine, &tokens[..1499]), Some((1000, 100)));
        assert_eq!(found(mine, &tokens[..9]), None);
        assert_eq!(found(yours, &tokens), None);
        // Another token anywhere is another text.
        let mut other = tokens.clone();
        other[1200] = 7;
        assert_eq!(found(mine, &other), Some((1000, 100)));
        other[3] = 7;
        assert_eq!(found(mine, &other), None);
        for roots in [["a", "b", "c"], ["ab", "", "c"], ["a", "b", ""]].map(|[m, t, o]| root(m, t, o, b"c")).windows(2) {
            assert_ne!(roots[0], roots[1]);
        }
    }

    #[test]
    fn the_least_recently_used_go_to_files_and_then_away() {
        let folder = tempfile::tempdir().unwrap();
        let mine = root("m", "t", "me", b"");
        let tokens: Vec<u32> = (0..4000).collect();
        let mut all = Snapshots::open(250, 250, folder.path()).unwrap();
        for n in [1000, 2000] {
            all.insert(key(mine, &tokens[..n]), state(n as u8));
        }
        assert_eq!(all.find(mine, &tokens[..1500]).unwrap().0, 1000);
        // 2000 is now the one that was not used for longest.
        all.insert(key(mine, &tokens[..3000]), state(3));
        assert_eq!((all.memory.order.len(), all.disk.order.len()), (2, 1));
        assert!(all.entries[&key(mine, &tokens[..2000])].state.is_none());
        assert_eq!(all.find(mine, &tokens[..2500]).unwrap(), (2000, state(2000u32 as u8)));
        all.close();
        // Another process finds all that there is room for.
        let mut all = Snapshots::open(1000, 1000, folder.path()).unwrap();
        assert_eq!(all.disk.order.len(), 2);
        assert_eq!(all.find(mine, &tokens[..2500]).unwrap(), (2000, state(2000u32 as u8)));
        // A file that is gone is a miss, or a shorter prefix.
        let count = all.entries.len();
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        assert!(all.find(mine, &tokens).is_some_and(|(n, _)| n == 2000));
        assert!(all.entries.len() < count || count == 1);
    }

    #[test]
    fn names_are_keys() {
        let k = key(root("m", "t", "o", b""), &[1, 2, 3]);
        assert_eq!(parse_name(&name(&k)), Some(k));
        for bad in ["x.state", ".ttt-1-2.tmp", "00-1-00.state", &format!("{}x", name(&k))] {
            assert_eq!(parse_name(bad), None);
        }
        assert_eq!(unhex::<2>("0aF0"), None);
        assert_eq!(unhex::<2>("0af0"), Some([10, 240]));
    }
}
