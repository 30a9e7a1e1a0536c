//! Documents read piece by piece are the documents, and their ids those of the whole.

use std::io::Write;
use std::path::Path;

use ttt::data::{Document, Documents, Pieces, SourceFile, TextPiece, Tokenizer};

fn file(folder: &Path, name: &str, contents: &[u8]) -> SourceFile {
    let path = folder.join(name);
    std::fs::write(&path, contents).unwrap();
    SourceFile { name: name.into(), path }
}

/// Name, ids, prompt ids, bytes and prompt bytes of a document.
type Whole = (String, Vec<u32>, usize, usize, usize);

/// Every document.
fn read(file: &SourceFile, separator: Option<&str>, tokenizer: &Tokenizer) -> ttt::Result<Vec<Whole>> {
    let mut all: Vec<Whole> = Vec::new();
    let mut open = false;
    for piece in Pieces::open(file, separator, tokenizer)? {
        let TextPiece { begins, ids, prompt, bytes, prompt_bytes, ends } = piece?;
        assert_eq!(begins.is_some(), !open, "a document begins where the last one ended");
        assert!(bytes < 300_000 || !file.name.ends_with("txt"), "a piece of {bytes} bytes");
        if let Some(name) = begins {
            all.push((name, Vec::new(), prompt, 0, prompt_bytes));
        }
        let last = all.last_mut().unwrap();
        last.1.extend(ids);
        last.3 += bytes;
        open = !ends;
    }
    assert!(!open, "the last document does not end");
    Ok(all)
}

fn expected(file: &SourceFile, separator: Option<&str>, tokenizer: &Tokenizer) -> Vec<(String, Vec<u32>, usize, usize, usize)> {
    let documents = Documents::open(file, separator).unwrap().collect::<ttt::Result<Vec<Document>>>().unwrap();
    let of = |d: Document| {
        let (ids, prompt) = d.encode(tokenizer).unwrap();
        (d.name, ids, prompt, d.text.len(), d.completion_from.unwrap_or(0))
    };
    documents.into_iter().map(of).collect()
}

/// Words with characters of one to four bytes, so that reads and pieces end inside of some.
fn words(n: usize) -> String {
    let words = ["the", " cat,", "\n\nsat", " on", "  a", " mat.", " Straße", " €5", " 🌲", " 1234", "\n"];
    (0..n as u64).map(|i| words[(i * i % 1009 % 11) as usize]).collect()
}

#[test]
fn pieces_are_the_documents() {
    let folder = tempfile::tempdir().unwrap();
    let long = words(90_000);
    let bpe = Tokenizer::train_bpe([&long[..50_000]].into_iter(), 400, &["<s>", "</s>"]).unwrap();
    let separated = format!("%\n\n%\n{long}\n% \n{}\n%\n \n%\nend", words(90_001));
    let json = |text: &str| serde_json::json!({"text": text}).to_string();
    let lines = [json(&long), json(""), r#"{"prompt": "a b", "completion": " c"}"#.into(), json("é")].join("\n");
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(long.as_bytes()).unwrap();
    let cases = [
        (file(folder.path(), "long.txt", long.as_bytes()), None, 1),
        (file(folder.path(), "bom.txt", format!("\u{FEFF}{long}").as_bytes()), None, 1),
        (file(folder.path(), "short.txt", "é".as_bytes()), None, 1),
        (file(folder.path(), "empty.txt", b""), None, 0),
        (file(folder.path(), "separated.txt", separated.as_bytes()), Some("%"), 3),
        (file(folder.path(), "unused.txt", long.as_bytes()), Some("%"), 1),
        (file(folder.path(), "blank.txt", b"\n%\n \n"), Some("%"), 0),
        (file(folder.path(), "lines.jsonl", lines.as_bytes()), None, 3),
        (file(folder.path(), "packed.txt.gz", &gz.finish().unwrap()), None, 1),
    ];
    for (file, separator, documents) in &cases {
        for tokenizer in [&Tokenizer::bytes(258), &bpe] {
            let (ours, theirs) = (read(file, *separator, tokenizer).unwrap(), expected(file, *separator, tokenizer));
            assert_eq!(ours.len(), *documents, "{}", file.name);
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!(ours == theirs, "{}: {} is not {}, or its ids", file.name, ours.0, theirs.0);
            }
        }
    }
}

#[test]
fn errors_say_where() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::bytes(258);
    let mut bad = words(100_000).into_bytes();
    let at = bad.len();
    bad.extend(b"\xE9 and on");
    // A character that the file ends in the middle of.
    let cut = [&words(100_000).into_bytes()[..], b"\xE2\x82"].concat();
    for (name, contents) in [("bad.txt", bad), ("cut.txt", cut)] {
        let file = file(folder.path(), name, &contents);
        for separator in [None, Some("%")] {
            let error = read(&file, separator, &tokenizer).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(&format!("not UTF-8: byte {at} is 0x")), "{error}");
            let same = Documents::open(&file, separator).unwrap().collect::<ttt::Result<Vec<_>>>().unwrap_err().to_string();
            assert_eq!(error, same);
        }
    }
    let small = Tokenizer::bytes(100);
    let file = file(folder.path(), "z.txt", b"z");
    assert!(read(&file, None, &small).unwrap_err().to_string().contains("beyond the vocabulary"));
}
