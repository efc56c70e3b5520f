//! A request to the metrics listener: one whole reply, or none to what is no whole request, however it
//! is cut; and nothing but GET and HEAD of what is there is answered with 200.
//!
//! Input: how it is cut, in one byte, and what a client sends.
#![no_main]

use std::sync::{Arc, LazyLock};

use handout::internals::{MetricsService, Monitor};
use handout_fuzz::{answered, pieces};
use libfuzzer_sys::fuzz_target;

static SERVICE: LazyLock<MetricsService> =
    LazyLock::new(|| MetricsService::new(Arc::<Monitor>::default()));

fn reply<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let heard = answered(pieces, async |connection| SERVICE.answer(connection).await);
    String::from_utf8(heard).unwrap()
}

fuzz_target!(|input: &[u8]| {
    let Some((how, request)) = input.split_first() else { return };
    let reply_to_whole = reply([request]);
    // One that is too long is refused for that or for its first fault, whichever is seen first.
    if request.len() <= 16 << 10 {
        assert_eq!(reply_to_whole, reply(pieces(*how, request)));
    }
    if reply_to_whole.is_empty() {
        return;
    }
    let (head, body) = reply_to_whole.split_once("\r\n\r\n").unwrap();
    let (status, fields) = head.split_once("\r\n").unwrap();
    let length = fields.lines().find_map(|field| field.strip_prefix("Content-Length: "));
    let length: usize = length.unwrap().parse().unwrap();
    assert!(fields.contains("Connection: close"), "{head}");
    let request = request.trim_ascii_start();
    // What is no request is none for the head alone, whatever it begins with.
    let is_head = request.starts_with(b"HEAD ");
    assert!(body.len() == length || is_head && body.is_empty(), "{reply_to_whole}");
    match status {
        "HTTP/1.1 200 OK" => {
            let target = request.strip_prefix(b"GET ").or(request.strip_prefix(b"HEAD ")).unwrap();
            let target = target.split(|byte| *byte == b' ').next().unwrap();
            let path = target.split(|byte| *byte == b'?').next().unwrap();
            assert!(path.ends_with(b"/metrics") || path.ends_with(b"/healthz"));
            assert!(path.starts_with(b"/") || path.starts_with(b"http://"));
        }
        "HTTP/1.1 400 Bad Request"
        | "HTTP/1.1 404 Not Found"
        | "HTTP/1.1 405 Method Not Allowed"
        | "HTTP/1.1 431 Request Header Fields Too Large" => {}
        other => panic!("{other}"),
    }
});
