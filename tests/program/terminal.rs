//! Progress bars on a terminal, as a person sees them.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::common::{DEADLINE, PROGRAM, eventually, sample, wait_for_exit};
use crate::servers::{Place, Server};

const ROWS: u16 = 24;

/// A command on a pseudo-terminal with this many columns.
struct Terminal {
    child: Child,
    keyboard: ChildStdin,
    parser: Arc<Mutex<vt100::Parser>>,
    reading: JoinHandle<()>,
}

impl Terminal {
    fn start(columns: u16, place: &Place, arguments: &str) -> Self {
        let line = format!("stty cols {columns} rows {ROWS}; exec {PROGRAM} {arguments}");
        let mut command = Command::new("script");
        command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        command.current_dir(place.path("")).env("TERM", "xterm");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let parser = Arc::new(Mutex::new(vt100::Parser::new(ROWS, columns, 1000)));
        let (screen, mut output) = (Arc::clone(&parser), child.stdout.take().unwrap());
        let reading = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                screen.lock().unwrap().process(&buffer[..length]);
            }
        });
        Self { keyboard: child.stdin.take().unwrap(), child, parser, reading }
    }

    /// The lines that are not blank.
    fn lines(&self) -> Vec<String> {
        let contents = self.parser.lock().unwrap().screen().contents();
        contents.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
    }

    /// Lines that left the screen at its top.
    fn scrolled_off(&self) -> usize {
        let mut parser = self.parser.lock().unwrap();
        parser.screen_mut().set_scrollback(usize::MAX);
        parser.screen().scrollback()
    }

    fn press_ctrl_c(&mut self) {
        self.keyboard.write_all(b"\x03").unwrap();
        self.keyboard.flush().unwrap();
    }

    /// Waits for the end; returns the exit code and what is left on the screen.
    fn finish(mut self) -> (Option<i32>, Vec<String>) {
        let code = wait_for_exit(&mut self.child).code();
        let reading = std::mem::replace(&mut self.reading, thread::spawn(|| ()));
        reading.join().unwrap();
        (code, self.lines())
    }
}

/// A document with its size, so that a bar can be drawn.
fn document_with_size(name: &str, data: &[u8]) -> Vec<u8> {
    let (size, data) = (data.len(), STANDARD.encode(data));
    format!("{{\"filename\":\"{name}\",\"size\":{size},\"filedata\":\"{data}\"}}\n").into_bytes()
}

/// A server that answers a line with the next piece whenever the test asks for it.
fn sends_pieces(pieces: Vec<Vec<u8>>) -> (Server, mpsc::Sender<()>) {
    let (next, wanted) = mpsc::channel::<()>();
    let wanted = Mutex::new(wanted);
    let server = Server::answers(move |mut stream| {
        let wanted = wanted.lock().unwrap();
        for piece in &pieces {
            if wanted.recv_timeout(DEADLINE).is_err() || stream.write_all(piece).is_err() {
                return;
            }
        }
        let _ = io::copy(&mut stream, &mut io::sink());
    });
    (server, next)
}

#[test]
fn bars_with_wide_names_are_redrawn_in_their_place() {
    const PIECES: usize = 12;
    for columns in [80, 40, 23] {
        let name = format!("{}.jpg", "很长的中文名字".repeat(4));
        let document = document_with_size(&name, &sample(7, 120_000));
        let pieces = document.chunks(document.len().div_ceil(PIECES)).map(<[u8]>::to_vec);
        let (server, next) = sends_pieces(pieces.collect());
        let place = Place::new();
        let terminal =
            Terminal::start(columns, &place, &format!("fetch {} {name}", server.address));
        let mut last = Vec::new();
        for _ in 1..PIECES {
            next.send(()).unwrap();
            eventually("another bar", || {
                let lines = terminal.lines();
                std::mem::replace(&mut last, lines.clone()) != lines
                    && lines.concat().contains("/s")
            });
            let text = terminal.lines().concat();
            assert!(text.matches("很长的中文名字").count() <= 4, "{columns}: {text}");
        }
        next.send(()).unwrap();
        assert_eq!(terminal.scrolled_off(), 0);
        let (code, lines) = terminal.finish();
        assert_eq!(code, Some(0), "{lines:?}");
        let text = lines.concat();
        assert!(text.starts_with(&name) && text.contains(".jpg: 117.19 KiB in "), "{text}");
        assert_eq!(text.matches("KiB").count(), 1, "{text}");
        assert_eq!(place.names(), [name]);
    }
}

#[test]
fn ctrl_c_removes_the_bars() {
    let document = document_with_size("图片.jpg", &sample(8, 100_000));
    let half = document[..document.len() / 2].to_vec();
    let server = Server::stalls_after(half);
    let mut commands = vec![format!("fetch {}", server.address)];
    let mut reply = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n".to_vec();
    reply.extend(sample(9, 50_000));
    let web = Server::stalls_after(reply);
    if cfg!(feature = "gateway") {
        let urls = ["a.bin", "%E5%9B%BE%E7%89%87.jpg"];
        let urls = urls.map(|name| format!("http://{}/{name}", web.address));
        commands.push(format!("download {}", urls.join(" ")));
    }
    for command in commands {
        for columns in [80, 40] {
            let place = Place::new();
            let mut terminal = Terminal::start(columns, &place, &command);
            eventually("a bar", || terminal.lines().concat().contains("KiB/"));
            terminal.press_ctrl_c();
            let (code, lines) = terminal.finish();
            let text = lines.concat();
            assert_eq!(code, Some(1), "{text}");
            assert!(text.ends_with("handout: interrupted"), "{command}: {text}");
            assert!(!text.contains("KiB/") && !text.contains("^C"), "{command}: {text}");
            assert!(!text.contains('░'), "{command}: {text}");
        }
    }
}
