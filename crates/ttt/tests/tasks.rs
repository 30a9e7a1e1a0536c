//! Tasks: what the sequences say, what of them is judged, and that scores are those of the model.

mod support;

use std::sync::Arc;

use support::shaken_model;
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::data::Tokenizer;
use ttt::device::Device;
use ttt::eval::grid_svg;
use ttt::eval::tasks::{Alphabet, Copy, Example, Haystack, Needle, Recall, Task, score, write_lines};
use ttt::layer::Keep;
use ttt::tensor::DType;

fn recall(pairs: usize, length: usize) -> Task {
    Task::Recall(Recall { pairs, length, mixed: false })
}

fn needle(length: usize, depth: Option<f64>) -> Task {
    Task::Needle(Needle { length, depth, haystack: Haystack::Symbols })
}

#[test]
fn sequences_are_functions_of_seed_and_number() {
    let bytes = Alphabet::bytes();
    for task in [recall(8, 40), needle(64, None), Task::Copy(Copy { length: 30 })] {
        let examples: Vec<Example> = (0..50).map(|i| task.example(&bytes, 3, i)).collect();
        assert!((0..50).all(|i| task.example(&bytes, 3, i) == examples[i as usize]));
        assert!(examples.iter().enumerate().all(|(i, e)| !examples[..i].contains(e)), "two are the same");
        assert!((0..50).all(|i| task.example(&bytes, 4, i) != examples[i as usize]), "another seed gives the same");
        for e in &examples {
            assert!(e.judged.is_sorted() && e.judged[0] > 0 && *e.judged.last().unwrap() == e.tokens.len() - 1);
        }
    }
}

#[test]
fn alphabets_are_disjoint_and_inside_the_vocabulary() {
    for alphabet in [Alphabet::bytes(), Alphabet::ids(5), Alphabet::ids(64), Alphabet::ids(32_000)] {
        let mut all = [&alphabet.keys[..], &alphabet.values, &[alphabet.filler]].concat();
        all.sort();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(alphabet.keys.len().abs_diff(alphabet.values.len()) <= 1);
    }
    assert_eq!(Alphabet::of(Some(&Tokenizer::bytes(258)), 258), Alphabet::bytes());
    assert_eq!(Alphabet::of(None, 258), Alphabet::ids(258));
    assert_eq!(*Alphabet::ids(64).values.last().unwrap(), 63);
}

#[test]
fn recall_asks_for_what_it_said() {
    for (alphabet, pairs, length) in [(Alphabet::bytes(), 8, 32), (Alphabet::bytes(), 26, 300), (Alphabet::ids(1000), 100, 450)] {
        let task = recall(pairs, length);
        task.validate(&alphabet).unwrap();
        assert_eq!(task.chance(&alphabet), 1.0 / pairs as f64);
        let mut asked = vec![0; pairs];
        for i in 0..200 {
            let Example { tokens, judged } = task.example(&alphabet, 1, i);
            assert_eq!((tokens.len(), judged.len()), (length, pairs));
            let stated: Vec<&[u32]> = tokens[..2 * pairs].chunks(2).collect();
            for at in &judged {
                let place = stated.iter().position(|pair| pair[0] == tokens[at - 1]).expect("the key was stated");
                assert_eq!(stated[place][1], tokens[*at]);
                asked[place] += 1;
            }
            for column in 0..2 {
                let mut all: Vec<u32> = stated.iter().map(|pair| pair[column]).collect();
                all.sort();
                all.dedup();
                assert_eq!(all.len(), pairs, "keys and values are different ones");
            }
            let filler = tokens.iter().filter(|t| **t == alphabet.filler).count();
            assert_eq!(filler, length - 4 * pairs);
        }
        // Each place is asked for as often as any other: 200 times on average, with a deviation of 14.
        assert!(asked.iter().all(|n| (120..280).contains(n)), "{asked:?}");
    }
    let mixed = Task::Recall(Recall { pairs: 8, length: 33, mixed: true });
    let mut pairs = [0; 9];
    for i in 0..400 {
        let Example { tokens, judged } = mixed.example(&Alphabet::bytes(), 1, i);
        let queries = judged.len();
        let stated = (33 - 2 * queries) / 2;
        assert_eq!((tokens.len(), tokens.iter().filter(|t| **t == 32).count()), (33, 1));
        for at in judged {
            let place = tokens[..2 * stated].chunks(2).position(|pair| pair[0] == tokens[at - 1]).expect("the key was stated");
            assert_eq!(tokens[2 * place + 1], tokens[at]);
        }
        pairs[stated] += 1;
    }
    assert!(pairs[0] == 0 && pairs[1..].iter().all(|n| (25..80).contains(n)), "{pairs:?}");
    for (pairs, length, message) in [(0, 0, "1 to 26"), (27, 200, "1 to 26"), (8, 31, "at least 32")] {
        let error = recall(pairs, length).validate(&Alphabet::bytes()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn copies_repeat_and_needles_lie_where_they_should() {
    let bytes = Alphabet::bytes();
    let Example { tokens, judged } = Task::Copy(Copy { length: 30 }).example(&bytes, 0, 0);
    assert_eq!(tokens[..15], tokens[15..]);
    assert_eq!(judged, (16..30).collect::<Vec<_>>());
    assert!(Task::Copy(Copy { length: 31 }).validate(&bytes).is_err());

    for (depth, at) in [(Some(0.0), 0), (Some(0.5), 27), (Some(1.0), 54)] {
        let Example { tokens, judged } = needle(64, depth).example(&bytes, 0, 5);
        assert_eq!((tokens.len(), &judged[..]), (64, &[60, 61, 62, 63][..]));
        assert_eq!(tokens[at..at + 5], tokens[59..], "depth {depth:?}");
        let values = tokens.iter().filter(|t| bytes.values.contains(t)).count();
        assert_eq!(values, 8, "hay holds no values");
    }
    assert!(needle(64, Some(1.5)).validate(&bytes).is_err() && needle(12, None).validate(&bytes).is_err());

    let tokenizer = Arc::new(Tokenizer::bytes(256));
    let ids = Arc::new(tokenizer.encode(&"All work and no play. ".repeat(20)).unwrap());
    for length in [100, 2000] {
        let haystack = Haystack::Text { ids: ids.clone(), tokenizer: tokenizer.clone() };
        let task = Task::Needle(Needle { length, depth: Some(0.5), haystack });
        let Example { tokens, judged } = task.example(&bytes, 0, 1);
        let text = tokenizer.decode(&tokens);
        let digits = &text[text.len() - 4..];
        assert_eq!((tokens.len(), judged.len()), (length, 4));
        assert!(digits.chars().all(|c| c.is_ascii_digit()));
        let said = text.find(&format!("\nThe secret number is {digits}.\n")).unwrap();
        assert!(said.abs_diff(length / 2) < 50 && text.contains("play"), "{text}");
        assert!(text.ends_with(&format!("\nThe secret number is {digits}")));
    }
}

#[test]
fn scores_are_those_of_the_model_alone() {
    let config = Config {
        vocab_size: 128,
        hidden_size: 16,
        intermediate_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        ..Config::preset("tiny", Inner::Linear).unwrap()
    };
    let model = shaken_model(&config, &Device::cpu().unwrap(), DType::F64, 1);
    let alphabet = Alphabet::ids(128);
    // Short ones go through the model together, the long one in chunks.
    for (task, sequences) in
        [(recall(8, 32), 150), (needle(50, Some(0.5)), 30), (needle(2500, Some(0.5)), 2), (Task::Copy(Copy { length: 4200 }), 1)]
    {
        let got = score(&model, &task, &alphabet, 2, sequences).unwrap();
        let (mut right, mut nll, mut judged, mut exact) = (0, 0.0, 0, 0);
        for i in 0..sequences {
            let e = task.example(&alphabet, 2, i);
            let (hidden, _) = model.forward(&Batch::one(&e.tokens[..e.tokens.len() - 1]), None, Keep::Nothing, 1.0).unwrap();
            let rows: Vec<usize> = e.judged.iter().map(|at| at - 1).collect();
            let logits = model.logits(&hidden, &rows).unwrap().to_f64_vec();
            let mut own = 0;
            for (logits, at) in logits.chunks(128).zip(&e.judged) {
                let target = e.tokens[*at] as usize;
                own += usize::from((0..128).all(|v| logits[v] <= logits[target]));
                nll += logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[target];
            }
            (right, judged, exact) = (right + own, judged + rows.len(), exact + usize::from(own == rows.len()));
        }
        assert_eq!(got.accuracy.count(), judged as f64);
        assert!((got.accuracy.mean() - right as f64 / judged as f64).abs() < 1e-12);
        assert!((got.exact.mean() - exact as f64 / sequences as f64).abs() < 1e-12);
        assert!((got.loss.mean() - nll / judged as f64).abs() < 1e-9, "{} {}", got.loss.mean(), nll / judged as f64);
    }
}

#[test]
fn lines_join_to_the_sequences() {
    let bytes = Alphabet::bytes();
    let mixed = Task::Recall(Recall { pairs: 8, length: 33, mixed: true });
    for task in [recall(8, 48), mixed, needle(64, None), Task::Copy(Copy { length: 32 })] {
        let mut file = Vec::new();
        write_lines(&mut file, &task, &bytes, 1, 20).unwrap();
        let (mut text, mut judged) = (String::new(), Vec::new());
        for line in String::from_utf8(file).unwrap().lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            text += line["prompt"].as_str().unwrap();
            let completion = line["completion"].as_str().unwrap();
            judged.extend(text.len()..text.len() + completion.len());
            text += completion;
        }
        let examples: Vec<Example> = (0..20).map(|i| task.example(&bytes, 1, i)).collect();
        assert!(text.bytes().map(u32::from).eq(examples.iter().flat_map(|e| e.tokens.clone())));
        let n = examples[0].tokens.len();
        assert!(judged.into_iter().eq(examples.iter().enumerate().flat_map(|(i, e)| e.judged.iter().map(move |at| i * n + at))));
    }
    let error = write_lines(&mut Vec::new(), &recall(8, 32), &Alphabet::ids(1000), 0, 1).unwrap_err();
    assert!(error.to_string().contains("no ASCII"), "{error}");
}

#[test]
fn grids_are_drawn() {
    let values = [vec![0.0, 1.0], vec![0.5, 0.25], vec![1.0, 0.1]];
    let svg = grid_svg("needle", &[256, 1024, 5000], &[0.0, 1.0], &values, 0.1).unwrap();
    for label in ["256", "1k", "5000", "0 %", "100 %", "chance", "50"] {
        assert!(svg.contains(&format!("\n{label}\n")), "{label} is not in the picture");
    }
    assert!(grid_svg("", &[], &[], &[], 0.0).is_err());
}
