//! A program behind a pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long a program may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running program and the keyboard and screen that it sees.
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Terminal {
    /// Starts a program.
    pub fn start(command: &mut Command) -> Terminal {
        let (mut outer, mut inner) = (-1, -1);
        let size = libc::winsize { ws_row: 40, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: both descriptors are written to, the others are null or point to a live value.
        let rc = unsafe {
            libc::openpty(&mut outer, &mut inner, std::ptr::null_mut(), std::ptr::null_mut(), (&raw const size).cast_mut())
        };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: `openpty` made them and nobody else owns them.
        let (outer, inner) = unsafe { (OwnedFd::from_raw_fd(outer), OwnedFd::from_raw_fd(inner)) };
        let stdio = || Stdio::from(inner.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio()).env("TERM", "xterm");
        // SAFETY: both calls are allowed between fork and exec. The terminal becomes the child's own, so that Ctrl-C reaches it.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY as _, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let mut reader = File::from(outer.try_clone().unwrap());
        let (send, screen) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Reading fails when the program has gone.
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                if send.send(bytes[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        assert!(outer.as_raw_fd() > 2);
        Terminal { child, keyboard: File::from(outer), screen, seen: Vec::new() }
    }

    /// Types keys.
    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Types a line, and waits for the next prompt; what was on the screen between the two, control sequences left out.
    pub fn line(&mut self, line: &str) -> String {
        self.press(line);
        self.press("\r");
        self.wait("\n");
        self.wait("> ")
    }

    /// Waits until the screen shows `text`; what was shown up to it and was not returned before.
    #[track_caller]
    pub fn wait(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = plain(&self.seen);
            if let Some(at) = shown.find(text) {
                let until = at + text.len();
                // Keep what comes behind: cut the raw bytes where their plain text reaches that far.
                let cut = (0..=self.seen.len()).find(|n| plain(&self.seen[..*n]).len() >= until).unwrap();
                self.seen.drain(..cut);
                return shown[..at].to_owned();
            }
            match self.screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(e) => panic!("`{text}` never came ({e}); on the screen: {shown:?}"),
            }
        }
    }

    /// Waits until the screen shows so many characters that were not returned.
    pub fn wait_for_more(&mut self, characters: usize) {
        while plain(&self.seen).chars().count() < characters {
            self.seen.extend(self.screen.recv_timeout(PATIENCE).expect("more on the screen"));
        }
    }

    /// Waits for the end of the program.
    pub fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

/// The text of terminal output: no escape sequences, no carriage returns.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                // ESC [ parameters letter, or ESC and one character.
                if chars.next() == Some('[') {
                    for c in chars.by_ref() {
                        if c.is_ascii_alphabetic() {
                            break;
                        }
                    }
                }
            }
            '\r' | '\x07' => {}
            c => out.push(c),
        }
    }
    out
}
