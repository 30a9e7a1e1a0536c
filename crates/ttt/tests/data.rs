//! Documents, tokenizers, the token store and the sampler, through the public interface.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex},
};

use proptest::prelude::*;
use ttt::{
    Error, Result,
    data::{Document, Documents, Examples, Progress, Sampler, SourceFile, Sources, Split, Store, StoreOptions, Tokenizer, Tokens},
};

/// A folder for one test.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file; returns its path as an input.
    fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn options(&self, inputs: &[&str]) -> StoreOptions {
        let inputs: Vec<String> = inputs.iter().map(|s| s.to_string()).collect();
        StoreOptions::new(Sources::resolve(&inputs).unwrap(), self.path("cache"))
    }
}

fn bytes() -> Tokenizer {
    Tokenizer::bytes(258)
}

fn build(options: &StoreOptions, tokenizer: &Tokenizer) -> Result<Store> {
    Store::open_or_build(options, tokenizer, &|_| {})
}

fn ids(tokens: &Tokens) -> Vec<u32> {
    let mut ids = Vec::new();
    tokens.read(0..tokens.len(), &mut ids);
    ids
}

fn mask(tokens: &Tokens) -> Vec<bool> {
    let mut mask = Vec::new();
    tokens.mask(0..tokens.len(), &mut mask);
    mask
}

/// A document of bytes: BOS, text, EOS.
fn framed(text: &str) -> Vec<u32> {
    [256].into_iter().chain(text.bytes().map(u32::from)).chain([257]).collect()
}

fn documents(path: &str, separator: Option<&str>) -> Result<Vec<Document>> {
    let file = SourceFile { name: "f".into(), path: path.into() };
    Documents::open(&file, separator)?.collect()
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn zstd(text: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
}

const PROSE: &str = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, \
    it was the epoch of belief, it was the epoch of incredulity. Größe, naïve, 東京, 🦀🦀!\n\n  indented\tand  spaced\r\n";

/// A small tokenizer of the kind that `ttt tokenizer train` makes.
static BPE: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::train_bpe([PROSE].into_iter(), 320, &["<s>", "</s>"]).unwrap());

/// A tokenizer of Llama 2's kind: a space before every text, spaces as `▁`, bytes for characters that the vocabulary lacks.
static LLAMA: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut vocab = serde_json::Map::new();
    let names = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let names =
        names.chain((0..=255).map(|b| format!("<0x{b:02X}>"))).chain("▁abcdefghijklmnopqrstuvwxyz.\n".chars().map(String::from));
    for (id, name) in names.chain(["th", "the", "▁the"].map(str::to_owned)).enumerate() {
        vocab.insert(name, id.into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    let json = serde_json::json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["▁", "the"]] },
    });
    let scratch = Scratch::new();
    Tokenizer::from_file(scratch.file("tokenizer.json", json.to_string())).unwrap()
});

// Files

#[test]
fn folders_and_globs_are_sorted_and_skip_what_is_no_text() {
    let s = Scratch::new();
    for (name, contents) in [
        ("d/b.txt", &b"b"[..]),
        ("d/a/z.rs", b"z"),
        ("d/.hidden", b"h"),
        ("d/.git/x", b"g"),
        ("d/image.png", b"\x89PNG\0\0"),
        ("d/e/y.rs", b"y"),
    ] {
        s.file(name, contents);
    }
    s.file("d/c.gz", gzip(b"c"));
    s.file("d/f.gz", gzip(b"tar\0"));
    let resolve = |inputs: &[&str]| {
        let inputs: Vec<String> = inputs.iter().map(|i| s.path(i).to_str().unwrap().to_owned()).collect();
        Sources::resolve(&inputs)
    };
    let names = |sources: &Sources| sources.files.iter().map(|f| f.name.clone()).collect::<Vec<_>>();
    let folder = resolve(&["d"]).unwrap();
    assert_eq!(names(&folder), ["a/z.rs", "b.txt", "c.gz", "e/y.rs"]);
    assert_eq!(folder.skipped, [s.path("d/f.gz"), s.path("d/image.png")]);
    assert_eq!(names(&resolve(&["d/*/*.rs"]).unwrap()), ["a/z.rs", "e/y.rs"]);
    assert_eq!(names(&resolve(&["d/**/*.rs", "d/b.txt", "d"]).unwrap()), ["a/z.rs", "e/y.rs", "b.txt", "c.gz"]);
    s.file("[x].txt", "a name like a pattern");
    assert_eq!(names(&resolve(&["[x].txt"]).unwrap()), ["[x].txt"]);
    fs::create_dir(s.path("empty")).unwrap();
    for (input, message) in
        [("nothing", "does not exist"), ("no*", "matches no text"), ("empty", "holds no text"), ("a[", "not a glob")]
    {
        let error = resolve(&[input]).unwrap_err();
        assert!(matches!(&error, Error::Data(m) if m.contains(message) && m.contains(input)), "{error}");
    }
    assert!(matches!(Sources::resolve(&[]), Err(Error::Data(_))));
}

#[test]
fn packed_files_read_like_plain_ones() {
    let s = Scratch::new();
    let text = PROSE.repeat(3000);
    let expected = vec![Document { name: "f".into(), text: text.clone(), completion_from: None }];
    let half = text.len() / 2 / PROSE.len() * PROSE.len();
    // A skippable frame between two frames, as `pzstd` and seekable archives have.
    let skippable = [&0x184D_2A50u32.to_le_bytes()[..], &3u32.to_le_bytes(), b"abc"].concat();
    let (a, b) = text.as_bytes().split_at(half);
    for (name, contents) in [
        ("f.txt", text.clone().into_bytes()),
        ("bom.txt", ["\u{FEFF}", &text].concat().into_bytes()),
        ("f.gz", gzip(text.as_bytes())),
        ("two.txt.gz", [gzip(a), gzip(b)].concat()),
        ("f.zst", zstd(text.as_bytes())),
        ("two.md.zst", [zstd(a), skippable, zstd(b)].concat()),
    ] {
        assert!(documents(&s.file(name, contents), None).unwrap() == expected, "{name}");
    }
    // From the usual program, with a checksum: `printf 'abc %.0s' {1..9} | zstd -c | xxd -i`.
    let fixture = [
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x58, 0x55, 0x00, 0x00, 0x20, 0x61, 0x62, 0x63, 0x20, 0x01, 0x00, 0xe3, 0x8e, 0x08, 0x6b,
        0xdc, 0x5f, 0x6f,
    ];
    assert_eq!(documents(&s.file("abc.zst", fixture), None).unwrap()[0].text, "abc ".repeat(9));
}

#[test]
fn damaged_packed_files_are_format_errors() {
    let s = Scratch::new();
    let (gz, zst) = (gzip(PROSE.as_bytes()), zstd(PROSE.repeat(100).as_bytes()));
    for (name, contents, kind) in [
        ("cut.gz", &gz[..gz.len() - 9], "gzip"),
        ("text.gz", b"plain text", "gzip"),
        ("cut.zst", &zst[..zst.len() - 9], "Zstandard"),
        ("text.zst", b"plain text", "Zstandard"),
        ("empty.zst", b"", "Zstandard"),
    ] {
        let error = documents(&s.file(name, contents), None).unwrap_err();
        assert!(matches!(&error, Error::Format { path, message } if path.ends_with(name) && message.contains(kind)), "{error}");
    }
    let mut wrong = zst.clone();
    *wrong.last_mut().unwrap() ^= 1;
    assert!(documents(&s.file("wrong.zst", wrong), None).unwrap_err().to_string().contains("checksum"));
}

#[test]
fn text_that_is_not_utf8_is_named_by_its_byte() {
    let s = Scratch::new();
    let bad = [b"caf\xC3\xA9 caf".as_slice(), b"\xE9 x\n"].concat();
    for (name, contents, separator, message) in [
        ("a.txt", bad.clone(), None, "byte 9 is 0xe9"),
        ("b.txt.gz", gzip(&bad), None, "byte 9 is 0xe9"),
        ("c.txt", [b"one\n---\ntwo\n---\n", &bad[..]].concat(), Some("---"), "byte 25 is 0xe9"),
        ("d.jsonl", [b"{\"text\": \"a\"}\n", &bad[..]].concat(), None, "byte 23 is 0xe9 (line 2)"),
    ] {
        let error = documents(&s.file(name, contents), separator).unwrap_err();
        assert!(matches!(&error, Error::Format { path, message: m } if path.ends_with(name) && m.contains(message)), "{error}");
    }
    // Through the store too, and nothing is left behind that could be reused.
    let options = s.options(&[s.path("a.txt").to_str().unwrap()]);
    assert!(matches!(build(&options, &bytes()), Err(Error::Format { .. })));
    let left = fs::read_dir(s.path("cache")).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count();
    assert_eq!(left, 0);
}

#[test]
fn separators_and_json_lines_make_documents() {
    let s = Scratch::new();
    let text = s.file("t.txt", "one\n\n<|endofdoc|>\r\ntwo <|endofdoc|>\n<|endofdoc|>\n\n<|endofdoc|>\nfour");
    let found = documents(&text, Some("<|endofdoc|>")).unwrap();
    let found: Vec<_> = found.iter().map(|d| (d.name.as_str(), d.text.as_str())).collect();
    assert_eq!(found, [("f:1", "one\n\n"), ("f:2", "two <|endofdoc|>\n"), ("f:4", "four")]);

    let lines = "{\"text\": \"a\\u00e9\"}\n\n{\"text\": \"\"}\r\n{\"prompt\": \"q\", \"completion\": \" a\"}";
    for (name, contents) in
        [("l.jsonl", lines.as_bytes().to_vec()), ("l.jsonl.gz", gzip(lines.as_bytes())), ("l.jsonl.zst", zstd(lines.as_bytes()))]
    {
        let found = documents(&s.file(name, contents), None).unwrap();
        let found: Vec<_> = found.iter().map(|d| (d.name.as_str(), d.text.as_str(), d.completion_from)).collect();
        assert_eq!(found, [("f:1", "aé", None), ("f:4", "q a", Some(1))], "{name}");
    }
    for (line, message) in
        [("{\"text\": 1}", "line 2: field `text`"), ("oops", "line 2: not JSON"), ("{}", "line 2: needs a field")]
    {
        let path = s.file("bad.jsonl", format!("{{\"text\": \"a\"}}\n{line}\n"));
        let error = documents(&path, None).unwrap_err();
        assert!(matches!(&error, Error::Format { message: m, .. } if m.contains(message)), "{error}");
    }
}

// Tokenizers

#[test]
fn bpe_training_is_deterministic_and_round_trips() {
    let text = PROSE.repeat(2); // a pair must occur twice
    let train = || Tokenizer::train_bpe(text.lines(), 300, &["<s>", "</s>"]).unwrap();
    let tokenizer = train();
    assert_eq!(tokenizer.fingerprint(), train().fingerprint());
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (Some(0), Some(1), 300));
    let ids = tokenizer.encode(PROSE).unwrap();
    assert!(ids.len() * 10 < PROSE.len() * 8, "{} ids for {} bytes", ids.len(), PROSE.len());
    assert_eq!(tokenizer.decode(&ids), PROSE);
    let error = Tokenizer::train_bpe([PROSE].into_iter(), 257, &["<s>", "</s>"]).unwrap_err();
    assert!(matches!(&error, Error::Tokenizer(m) if m.contains("258")), "{error}");
}

#[test]
fn folders_give_tokenizers_back() {
    for tokenizer in [&bytes(), &Tokenizer::bytes(256), &BPE, &LLAMA] {
        let s = Scratch::new();
        tokenizer.save(s.path("model")).unwrap();
        let again = Tokenizer::from_folder(s.path("model")).unwrap().unwrap();
        assert_eq!(again.fingerprint(), tokenizer.fingerprint());
        assert_eq!((again.bos(), again.eos(), again.vocab_size()), (tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()));
        assert_eq!(again.encode("the Größe").unwrap(), tokenizer.encode("the Größe").unwrap());
    }
    let s = Scratch::new();
    assert!(Tokenizer::from_folder(s.0.path()).unwrap().is_none());
    s.file("tokenizer.model", "");
    assert!(matches!(Tokenizer::from_folder(s.0.path()), Err(Error::Tokenizer(_))));
}

#[test]
fn special_tokens_come_from_the_configuration() {
    let s = Scratch::new();
    BPE.save(s.0.path()).unwrap();
    let read = |config: &str| {
        s.file("tokenizer_config.json", config);
        Tokenizer::from_folder(s.0.path()).map(|t| t.map(|t| (t.bos(), t.eos())).unwrap())
    };
    assert_eq!(read("{}").unwrap(), (Some(0), Some(1)));
    assert_eq!(read(r#"{"bos_token": null, "eos_token": {"content": "<s>"}}"#).unwrap(), (None, Some(0)));
    for bad in [r#"{"bos_token": "<nope>"}"#, r#"{"eos_token": 3}"#, "[]"] {
        assert!(matches!(read(bad), Err(Error::Format { .. })), "{bad}");
    }
    // A configuration with more in it is not lost.
    s.file("tokenizer_config.json", r#"{"chat_template": "x", "bos_token": "<s>"}"#);
    Tokenizer::from_folder(s.0.path()).unwrap().unwrap().save(s.path("copy")).unwrap();
    assert!(fs::read_to_string(s.path("copy/tokenizer_config.json")).unwrap().contains("\"chat_template\": \"x\""));
    fs::remove_file(s.path("tokenizer.json")).unwrap();
    for bad in
        [r#"{"tokenizer_class": "ByteTokenizer", "bos_token_id": 7}"#, r#"{"tokenizer_class": "ByteTokenizer", "vocab_size": -1}"#]
    {
        assert!(matches!(read(bad), Err(Error::Format { .. })), "{bad}");
    }
}

#[test]
fn bad_tokenizer_files_are_errors() {
    let s = Scratch::new();
    let missing = Tokenizer::from_file(s.path("no.json")).unwrap_err();
    assert!(matches!(&missing, Error::Io { path, .. } if path.ends_with("no.json")));
    let beyond = r#"{"model": {"type": "BPE", "vocab": {"a": 4294967296}, "merges": []}}"#;
    for contents in ["", "{}", "not json", beyond] {
        let error = Tokenizer::from_file(s.file("t.json", contents)).unwrap_err();
        assert!(matches!(&error, Error::Format { path, .. } if path.ends_with("t.json")), "{error}");
    }
    assert!(matches!(Tokenizer::from_file(s.0.path()), Err(Error::Tokenizer(_))));
}

#[test]
fn truncation_of_the_file_is_switched_off() {
    assert_eq!(LLAMA.encode("the the cat").unwrap().len(), 6); // "▁the" "▁the" "▁" "c" "a" "t", of which the file would keep 4
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    pieces.push(stream.finish());
    pieces
}

proptest! {
    #[test]
    fn text_round_trips_and_streams(text in "(\\PC|[ \n\t]|the |Größe|🦀){0,40}") {
        for tokenizer in [&bytes(), &BPE] {
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids), &text);
            let pieces = streamed(tokenizer, &ids);
            prop_assert_eq!(pieces.concat(), &text[..]);
            // Nothing of a broken character was shown.
            let broken = pieces.iter().any(|p| p.contains(char::REPLACEMENT_CHARACTER));
            prop_assert!(!broken || text.contains(char::REPLACEMENT_CHARACTER));
        }
        // Llama's decoder takes one space away that its normalizer put there; `▁` itself is a space to it.
        let text = text.replace('▁', "");
        let ids = LLAMA.encode(&text).unwrap();
        let pieces = streamed(&LLAMA, &ids);
        prop_assert_eq!(pieces.concat(), LLAMA.decode(&ids));
        prop_assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn any_ids_stream_like_they_decode(ids in prop::collection::vec(0u32..330, 0..80), bad in prop::collection::vec(0x80u32..0xC0, 0..80)) {
        for tokenizer in [&bytes(), &BPE] {
            for ids in [&ids, &bad, &[&ids[..], &bad, &ids].concat()] {
                prop_assert_eq!(streamed(tokenizer, ids).concat(), tokenizer.decode(ids));
            }
        }
        prop_assert_eq!(streamed(&LLAMA, &ids).len(), ids.len() + 1); // no panic
    }
}

// The store

#[test]
fn tokens_are_framed_documents_in_order() {
    let s = Scratch::new();
    let input = s.file("l.jsonl", (0..30).map(|i| format!("{{\"text\": \"text {i}\"}}\n")).collect::<String>());
    let options = s.options(&[&input]);
    let seen = Mutex::new(Vec::new());
    let store = Store::open_or_build(&options, &bytes(), &|p| seen.lock().unwrap().push(p)).unwrap();
    let chosen = |i: &usize| crc32(format!("l.jsonl:{}", i + 1)).is_multiple_of(50);
    // No name of these thirty has such a hash, so the end is validation: 2 % is 6 of 301 tokens, the last document has 9.
    assert_eq!((0..30).filter(chosen).count(), 0);
    let all: Vec<u32> = (0..30).flat_map(|i| framed(&format!("text {i}"))).collect();
    let (train, validation) = (store.split(Split::Train), store.split(Split::Validation));
    assert_eq!([ids(train), ids(validation)].concat(), all);
    assert_eq!((train.documents(), validation.documents(), ids(validation)), (29, 1, framed("text 29")));
    assert_eq!((train.bytes_of_text(), validation.bytes_of_text()), (10 * 6 + 19 * 7, 7));
    assert_eq!(train.document(1).tokens, 8..16);
    assert_eq!((train.document(1).prompt, train.document(1).text_bytes), (1, 6));
    assert!(mask(train).iter().zip(ids(train)).all(|(&counts, id)| counts == (id != 256)));
    let size = fs::metadata(&input).unwrap().len();
    let last = Progress { bytes: size, total_bytes: size, documents: 30, tokens: all.len() as u64, waiting: false };
    assert_eq!(seen.into_inner().unwrap().last(), Some(&last));
}

/// CRC-32 as zlib has it, bit by bit.
fn crc32(text: String) -> u32 {
    !text.bytes().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

#[test]
fn the_hash_of_the_name_chooses_validation() {
    assert_eq!(crc32("123456789".into()), 0xCBF4_3926);
    let s = Scratch::new();
    for i in 0..60 {
        s.file(&format!("d/{i}.txt"), format!("text {i}"));
    }
    let mut options = s.options(&[s.path("d").to_str().unwrap()]);
    options.validation_fraction = 0.1;
    let mut names: Vec<String> = (0..60).map(|i| format!("{i}.txt")).collect();
    names.sort();
    let expect = |validation: bool| -> Vec<u32> {
        let names = names.iter().filter(|n| crc32(n.to_string()).is_multiple_of(10) == validation);
        names.flat_map(|n| framed(&format!("text {}", n.trim_end_matches(".txt")))).collect()
    };
    // Some of the first nineteen are among them: those that wait until it is clear that there are enough documents.
    assert!(names[..19].iter().any(|n| crc32(n.clone()).is_multiple_of(10)));
    let store = build(&options, &bytes()).unwrap();
    assert_eq!(ids(store.split(Split::Validation)), expect(true));
    assert_eq!(ids(store.split(Split::Train)), expect(false));
    let validation = store.split(Split::Validation);
    let total: u64 = (0..validation.documents()).map(|i| validation.document(i).text_bytes).sum();
    assert_eq!(total, validation.bytes_of_text());
    assert_eq!(validation.bytes_in(0..validation.len()), total as f64);

    options.validation_fraction = 0.0;
    let store = build(&options, &bytes()).unwrap();
    assert!(store.split(Split::Validation).is_empty() && store.split(Split::Train).documents() == 60);
    options.validation_fraction = 0.6;
    assert!(matches!(build(&options, &bytes()), Err(Error::Data(_))));
}

#[test]
fn one_document_is_cut() {
    let s = Scratch::new();
    let text = "é€🦀 and so on. ".repeat(200);
    let options = s.options(&[&s.file("a.txt", &text)]);
    for tokenizer in [&bytes(), &BPE] {
        for least in [0, 500, 999_999] {
            let options = StoreOptions { min_validation_tokens: least, ..options.clone() };
            let store = build(&options, tokenizer).unwrap();
            let (train, validation) = (store.split(Split::Train), store.split(Split::Validation));
            let all = train.len() + validation.len();
            let expected = (all.div_ceil(50)).max(least).min(all / 2);
            assert!((expected..expected + 4).contains(&validation.len()), "{} of {all}, expected {expected}", validation.len());
            assert_eq!(store.reused(), least > 0, "the least number of validation tokens only moves the cut");
            let parts = [tokenizer.decode(&ids(train)), tokenizer.decode(&ids(validation))];
            assert_eq!(parts.concat().replace('\u{FFFD}', "").len() / 10, text.len() / 10);
            assert_eq!(train.bytes_of_text() + validation.bytes_of_text(), text.len() as u64);
            assert_eq!((train.documents(), validation.documents()), (1, 1));
            assert_eq!((train.document(0).prompt, validation.document(0).prompt), (1, 0));
            assert_eq!(validation.document(0).text_bytes, validation.bytes_of_text());
            if tokenizer.is_bytes() {
                assert_eq!(parts[0].len() as u64, train.bytes_of_text());
                assert_eq!(parts.concat(), text);
                // For bytes, any range is exact: tokens without BOS and EOS.
                assert_eq!(train.bytes_in(0..101), 100.0);
                assert_eq!(validation.bytes_in(3..validation.len()), (validation.len() - 4) as f64);
            }
        }
    }
}

#[test]
fn prompts_have_no_loss() {
    let s = Scratch::new();
    let lines = "{\"prompt\": \"2+2=\", \"completion\": \"4\"}\n{\"text\": \"ab\"}\n{\"prompt\": \"é\", \"completion\": \"xyz\"}\n";
    let mut options = s.options(&[&s.file("l.jsonl", lines)]);
    options.validation_fraction = 0.0;
    let store = build(&options, &bytes()).unwrap();
    let train = store.split(Split::Train);
    assert_eq!(ids(train), [framed("2+2=4"), framed("ab"), framed("éxyz")].concat());
    let expected = "00000 11 011 1 000 1111".replace(' ', "");
    let found = |range: std::ops::Range<usize>| {
        let mut mask = vec![];
        train.mask(range, &mut mask);
        mask.iter().map(|&m| if m { '1' } else { '0' }).collect::<String>()
    };
    for from in 0..train.len() {
        for to in from..=train.len() {
            assert_eq!(found(from..to), expected[from..to], "{from}..{to}");
        }
    }
    let spans: Vec<_> = (0..3).map(|i| train.document(i)).map(|d| (d.tokens, d.prompt, d.text_bytes)).collect();
    assert_eq!(spans, [(0..7, 5, 1), (7..11, 1, 2), (11..18, 3, 3)]);
    assert_eq!((train.bytes_of_text(), train.bytes_in(0..18), train.bytes_in(5..9)), (6, 6.0, 2.0));
}

#[test]
fn the_cache_is_reused_until_something_changes() {
    let s = Scratch::new();
    let input = s.file("a.txt", PROSE);
    let options = s.options(&[&input]);
    let first = build(&options, &bytes()).unwrap();
    assert!(!first.reused());
    let again = Store::open_or_build(&options, &bytes(), &|_| panic!("nothing is to be built")).unwrap();
    assert!(again.reused());
    assert_eq!((ids(again.split(Split::Train)), again.folder()), (ids(first.split(Split::Train)), first.folder()));

    let fresh = |options: &StoreOptions, tokenizer: &Tokenizer| {
        let reused = build(options, tokenizer).unwrap().reused();
        assert!(build(options, tokenizer).unwrap().reused());
        !reused
    };
    assert!(fresh(&options, &BPE), "another tokenizer");
    assert!(fresh(&StoreOptions { separator: Some("-".into()), ..options.clone() }, &bytes()), "another separator");
    assert!(fresh(&StoreOptions { max_bytes: Some(100), ..options.clone() }, &bytes()), "another limit");
    assert!(fresh(&StoreOptions { validation_fraction: 0.1, ..options.clone() }, &bytes()), "another split");
    // Same size, other time.
    let later = fs::metadata(&input).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
    fs::File::options().append(true).open(&input).unwrap().set_modified(later).unwrap();
    assert!(fresh(&options, &bytes()), "another time");
    s.file("a.txt", [PROSE, "more"].concat());
    let changed = build(&options, &bytes()).unwrap();
    assert!(!changed.reused());
    let text = bytes().decode(&[ids(changed.split(Split::Train)), ids(changed.split(Split::Validation))].concat());
    assert!(text.ends_with("more"));

    // Damage: each file in turn is cut, or missing.
    let folder = changed.folder().to_owned();
    for name in ["train.bin", "train.idx", "meta.json", "validation.idx"] {
        let path = folder.join(name);
        let len = fs::metadata(&path).unwrap().len();
        if len > 0 {
            fs::write(&path, &fs::read(&path).unwrap()[..len as usize / 2]).unwrap();
            assert!(fresh(&options, &bytes()), "{name} cut");
        }
        fs::remove_file(&path).unwrap();
        assert!(fresh(&options, &bytes()), "{name} missing");
    }
}

#[test]
fn builds_at_once_end_well() {
    let s = Scratch::new();
    let options = s.options(&[&s.file("a.txt", PROSE.repeat(2000))]);
    let stores: Vec<Store> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| build(&options, &bytes()).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(stores.iter().filter(|s| !s.reused()).count(), 1, "one builds, the others wait");
    assert!(stores.iter().all(|s| ids(s.split(Split::Train)) == ids(stores[0].split(Split::Train))));
}

#[test]
fn killed_builds_are_cleared_away() {
    let s = Scratch::new();
    let options = s.options(&[&s.file("a.txt", PROSE)]);
    let folder = build(&options, &bytes()).unwrap().folder().to_owned();
    fs::remove_dir_all(&folder).unwrap();
    let name = folder.file_name().unwrap().to_str().unwrap();
    let (old, fresh) = (s.path(&format!("cache/.{name}-1-1")), s.path(&format!("cache/.{name}-2-2")));
    for (path, hours) in [(&old, 2), (&fresh, 0)] {
        fs::create_dir(path).unwrap();
        fs::write(path.join("few.bin"), "half of it").unwrap();
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(hours * 3600);
        for path in [path.join("few.bin"), path.clone()] {
            fs::File::open(path).unwrap().set_modified(time).unwrap();
        }
    }
    assert!(!build(&options, &bytes()).unwrap().reused(), "what is half written is not used");
    assert!(!old.exists() && fresh.exists(), "another process may still write to a fresh one");
}

#[test]
fn limits_end_the_data() {
    let s = Scratch::new();
    let (small, large) = (s.file("a.txt", "ééé"), s.file("b.txt", "x".repeat(1000)));
    let mut options = s.options(&[&small, &large]);
    options.validation_fraction = 0.0;
    let text = |options: &StoreOptions| bytes().decode(&ids(build(options, &bytes()).unwrap().split(Split::Train)));
    assert_eq!(text(&StoreOptions { max_file_bytes: Some(999), ..options.clone() }), "ééé");
    assert_eq!(text(&StoreOptions { max_bytes: Some(10), ..options.clone() }), "éééxxxx");
    assert_eq!(text(&StoreOptions { max_bytes: Some(5), ..options.clone() }), "éé");
    for options in
        [StoreOptions { max_bytes: Some(0), ..options.clone() }, StoreOptions { max_file_bytes: Some(1), ..options.clone() }]
    {
        assert!(matches!(build(&options, &bytes()), Err(Error::Data(_))));
    }
    assert!(matches!(build(&s.options(&[&s.file("c.txt", "")]), &bytes()), Err(Error::Data(m)) if m.contains("no text")));
}

#[test]
fn long_documents_encode_like_the_whole() {
    let s = Scratch::new();
    let text = PROSE.repeat(3000); // some 700 kB, cut into pieces
    let llama_text: String = (0..60_000).map(|i| ["the ", "cat ", "on. ", "é a\n"][i * i % 7 % 4]).collect::<String>().repeat(2);
    for (tokenizer, text) in [(&*BPE, &text), (&*LLAMA, &llama_text)] {
        let mut options = s.options(&[&s.file("a.txt", text)]);
        options.validation_fraction = 0.0;
        let store = build(&options, tokenizer).unwrap();
        let expected: Vec<u32> =
            tokenizer.bos().into_iter().chain(tokenizer.encode(text).unwrap()).chain(tokenizer.eos()).collect();
        assert!(text.len() > 1 << 18 && ids(store.split(Split::Train)) == expected);
    }
}

#[test]
fn wide_ids_take_four_bytes() {
    let s = Scratch::new();
    let path = s.file("a.txt", PROSE);
    for (vocab, bytes_per_id) in [(65_536, 2), (65_537, 4)] {
        let store = build(&s.options(&[&path]), &Tokenizer::bytes(vocab)).unwrap();
        let size = fs::metadata(store.folder().join("train.bin")).unwrap().len() as usize;
        assert_eq!(size, bytes_per_id * (PROSE.len() + 2));
        let all = [ids(store.split(Split::Train)), ids(store.split(Split::Validation))].concat();
        assert_eq!(all, framed(PROSE));
        assert!(store.check_vocabulary(258).is_ok());
        let error = store.check_vocabulary(257).unwrap_err();
        assert!(matches!(&error, Error::Data(m) if m.contains("id 257")), "{error}");
    }
    // A vocabulary that lacks bytes names the document.
    let error = build(&s.options(&[&path]), &Tokenizer::bytes(64)).unwrap_err();
    assert!(matches!(&error, Error::Tokenizer(m) if m.starts_with("a.txt: byte 0x49")), "{error}");
}

// The sampler

proptest! {
    #[test]
    fn every_epoch_sees_every_window_once(windows in 1usize..400, rest in 0usize..7, seed: u64, batch in 1usize..9, epoch in 0u64..5) {
        let sampler = Sampler::new(windows * 8 + 1 + rest, 8, seed).unwrap();
        prop_assert_eq!(sampler.windows_per_epoch(), windows as u64);
        let first = epoch * windows as u64;
        let mut order: Vec<usize> = (0..windows as u64).map(|i| sampler.nth(first + i)).collect();
        // Steps are consecutive parts of the same order, whatever the batch.
        let steps: Vec<usize> = (0..10).flat_map(|step| sampler.windows(step, batch)).collect();
        prop_assert!(steps.iter().enumerate().all(|(n, &w)| w == sampler.nth(n as u64)));
        order.sort();
        prop_assert!(order.into_iter().eq(0..windows));
    }
}

#[test]
fn orders_depend_on_epoch_and_seed() {
    let order = |seed, epoch| {
        let sampler = Sampler::new(100 * 8 + 1, 8, seed).unwrap();
        (0..100).map(|i| sampler.nth(epoch * 100u64 + i)).collect::<Vec<_>>()
    };
    let orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), order(2, 0)];
    for (i, a) in orders.iter().enumerate() {
        assert!(!a.is_sorted());
        for b in &orders[..i] {
            let same = a.iter().zip(b).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} of 100 in the same place; one is expected");
        }
    }
    assert_eq!(order(3, 7), order(3, 7));
}

#[test]
fn windows_are_inputs_and_targets() {
    let s = Scratch::new();
    let mut options = s.options(&[&s.file("l.jsonl", "{\"prompt\": \"ab\", \"completion\": \"cdef\"}\n{\"text\": \"ghi\"}\n")]);
    options.validation_fraction = 0.0;
    let store = build(&options, &bytes()).unwrap();
    let train = store.split(Split::Train); // BOS a b c d e f EOS BOS g h i EOS
    let sampler = Sampler::new(train.len(), 5, 0).unwrap();
    assert_eq!(sampler.windows_per_epoch(), 2);
    let mut examples = Examples::default();
    sampler.fill(train, &[1, 0], &mut examples);
    let letters =
        |ids: &[u32]| ids.iter().map(|&id| char::from_u32(if id < 256 { id } else { id - 256 + 48 }).unwrap()).collect::<String>();
    assert_eq!(
        (letters(&examples.inputs), letters(&examples.targets)),
        ("ef10gBOSab".replace("BOS", "0") + "cd", "f10ghabcde".into())
    );
    let weights: String = examples.weights.iter().map(|&w| if w { '1' } else { '0' }).collect();
    assert_eq!(weights, "1101100111");
}

#[test]
fn a_sequence_longer_than_the_data_is_an_error() {
    assert!(Sampler::new(9, 8, 0).is_ok());
    for (tokens, seq_len) in [(8, 8), (0, 1), (5, usize::MAX), (5, 0)] {
        let error = Sampler::new(tokens, seq_len, 0).unwrap_err();
        assert!(matches!(&error, Error::Data(_)), "{error}");
    }
    let message = Sampler::new(100, 128, 0).unwrap_err().to_string();
    assert!(message.contains("128") && message.contains("129") && message.contains("100"), "{message}");
}

#[test]
fn paths_may_be_relative() {
    let s = Scratch::new();
    s.file("a.txt", PROSE);
    let file = SourceFile { name: "a.txt".into(), path: Path::new(s.0.path()).join(".").join("a.txt") };
    let sources = Sources { files: vec![file], skipped: vec![] };
    assert!(build(&StoreOptions::new(sources, s.path("c/d")), &bytes()).is_ok());
}
