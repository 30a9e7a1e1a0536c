//! `ttt chat`, in a pipe and behind a terminal.

use std::io::Write;
use std::process::Stdio;

use crate::terminal::Terminal;
use crate::{Place, Ran};

const GREEDY: [&str; 4] = ["-t", "0", "-n", "12"];

/// What the lines of a pipe give.
fn piped(place: &Place, more: &[&str], lines: &str) -> Ran {
    let args = [&["chat", "m"], &GREEDY[..], more].concat();
    let mut child = place.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    Ran::from(child.wait_with_output().unwrap())
}

fn generated(place: &Place, prompt: &str) -> String {
    let args = [&["generate", "m", "--prompt", prompt, "--json"], &GREEDY[..]].concat();
    place.run(&args).ok().json()["text"].as_str().unwrap().to_owned()
}

#[test]
fn the_model_continues_what_stands_on_the_screen() {
    let place = Place::with_model();
    let first = generated(&place, "7 green bot");
    let ran = piped(&place, &[], "7 green bot\\\n").ok();
    assert_eq!(ran.out.trim_end_matches('\n'), first.trim_end_matches('\n'));
    // A second turn goes on behind the first: its line, the model's, and the ends of both.
    let end = if first.ends_with('\n') { "" } else { "\n" };
    let second = generated(&place, &format!("7 green bot{first}{end}8 green\n"));
    let ran = piped(&place, &[], "7 green bot\\\n8 green\n").ok();
    let shown = |text: &str| format!("{}\n", text.trim_end_matches('\n'));
    assert_eq!(ran.out.replace("\n\n", "\n"), format!("{}{}", shown(&first), shown(&second)).replace("\n\n", "\n"));
}

#[test]
fn a_pipe_stops_at_a_mistake() {
    let place = Place::with_model();
    piped(&place, &[], "/undo\n").fails(1, &["no turn to take back"]);
    piped(&place, &[], "/sav x\n").fails(1, &["there is no /sav", "/help"]);
    piped(&place, &["--state", "none"], "").fails(1, &["none"]);
    piped(&place, &["--system", "Be kind"], "").fails(1, &["chat template"]);
    place.run(&["chat", "nowhere"]).fails(1, &["nowhere"]);
}

#[test]
fn a_chat_template_makes_the_text() {
    let place = Place::with_model();
    place.write("m/final/chat_template.jinja", "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a: ");
    let first = generated(&place, "u: 3 green\na: ");
    let ran = piped(&place, &[], "3 green\n").ok();
    assert_eq!(ran.out.trim_end_matches('\n'), first.trim_end_matches('\n'));
    let second = generated(&place, &format!("u: 3 green\na: {first}\nu: 4\na: "));
    let ran = piped(&place, &[], "3 green\n4\n").ok();
    assert!(ran.out.trim_end_matches('\n').ends_with(second.trim_end_matches('\n')), "{:?} does not end in {second:?}", ran.out);
    // This one forgets earlier answers, so that the conversation is read again.
    place.write("m/final/chat_template.jinja", "{% for m in messages if m.role == 'user' %}u: {{ m.content }}\n{% endfor %}a: ");
    let second = generated(&place, "u: 3 green\nu: 4\na: ");
    let ran = piped(&place, &[], "3 green\n4\n").ok();
    assert!(ran.out.trim_end_matches('\n').ends_with(second.trim_end_matches('\n')), "{:?} does not end in {second:?}", ran.out);
    // Without the template it is plain text.
    let ran = piped(&place, &["--plain"], "7 green bot\\\n").ok();
    assert_eq!(ran.out.trim_end_matches('\n'), generated(&place, "7 green bot").trim_end_matches('\n'));
}

#[test]
fn at_a_terminal() {
    let place = Place::with_model();
    let args = [&["chat", "m"], &GREEDY[..]].concat();
    let mut t = Terminal::start(place.command(&args).env("XDG_STATE_HOME", place.path("home")));
    assert!(t.wait("> ").contains("/help"));
    assert!(t.line("/help").contains("/undo"));
    assert!(t.line("/undo").contains("no turn to take back"));
    assert!(t.line("/stats").contains("no mini-batch"));

    let first = t.line("7 green bottles hanging\\");
    assert!(t.line("/save before.state").contains("before.state, "));
    let second = t.line("8 green");
    assert!(t.line("/undo").contains("back to"));
    assert_eq!(t.line("8 green"), second, "after /undo the state is that of before the turn");
    t.line("/undo");
    t.line("/save after.state");
    assert_eq!(place.read("before.state"), place.read("after.state"));

    assert!(t.line("/fork other").contains("main stays at"));
    assert!(t.line("/fork other").contains("already"));
    let elsewhere = t.line("99 red");
    assert!(t.line("/switch").contains("* other"));
    t.line("/switch main");
    t.line("/save main.state");
    assert_eq!(place.read("before.state"), place.read("main.state"), "a fork leaves the original as it was");
    assert_eq!(t.line("8 green"), second);
    t.line("/switch other");
    t.line("/undo");
    assert_eq!(t.line("99 red"), elsewhere);

    let stats = t.line("/stats");
    assert!(
        stats.contains("layer")
            && stats.contains("before")
            && stats.lines().filter(|l| l.trim_start().starts_with(['0', '1'])).count() == 2,
        "{stats}"
    );

    // Ctrl-C gives up a line; the arrow brings back the last one; a saved state goes on here as it did there.
    t.press("half a line\x03");
    t.wait("/quit ends the conversation");
    t.wait("> ");
    assert!(t.line("/load before.state").contains("before.state: "));
    t.line("8 green");
    t.line("/undo");
    t.press("\x1b[A\x1b[A\r");
    t.wait("\n");
    assert_eq!(t.wait("> "), second);
    t.press("\x04");
    assert!(t.end().success());
    assert!(String::from_utf8(place.read("home/ttt/chat_history")).unwrap().contains("8 green"));

    // Another process.
    let mut t = Terminal::start(
        place.command(&[&args[..], &["--state", "before.state"]].concat()).env("XDG_STATE_HOME", place.path("home")),
    );
    assert!(t.wait("> ").contains("before.state"));
    assert_eq!(t.line("8 green"), second);
    t.press("/quit\r");
    assert!(t.end().success());
    assert!(!first.is_empty());
}

#[test]
fn ctrl_c_stops_an_answer_but_not_the_conversation() {
    let place = Place::with_model();
    let args = ["chat", "m", "-t", "0", "-n", "100000000"];
    let mut t = Terminal::start(place.command(&args).env("XDG_STATE_HOME", place.path("home")));
    t.wait("> ");
    t.press("go\r");
    t.wait("\n");
    t.wait_for_more(100);
    t.press("\x03");
    t.wait("\n> ");
    t.press("/quit\r");
    assert!(t.end().success());
}
