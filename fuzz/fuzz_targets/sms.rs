//! Replies of SMS providers: success is read like `serde_json` reads it, and messages are short lines.
//!
//! Input: one byte each for the provider and the HTTP status, then the body.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use handout::internals::{Secrets, SmsSettings as Settings, load_part, printable};
use handout_fuzz::{folder, is_one_line};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const CHANNELS: &str = r#"
[sms.a]
provider = "ihuyi"
account = "me"
password-file = "password"
to = ["13800000000"]

[sms.b]
provider = "twilio"
account = "me"
password-file = "password"
from = "+15017122661"
to = ["+13800000000"]

[sms.c]
provider = "form"
url = "https://sms.example.org/"
to = ["13800000000"]
fields = { phone = "{to}", text = "{text}" }
success = { pointer = "/r/0/status", equals = "1" }
id = "/id"
"#;

const STATUS: [u16; 12] = [200, 201, 204, 299, 302, 400, 401, 404, 408, 429, 500, 503];

/// Maximum length of a message: 500 characters of the server, each up to ten bytes when escaped.
const MAX_MESSAGE: usize = 5100;

static PROVIDERS: LazyLock<Vec<Settings>> = LazyLock::new(|| {
    let file = folder().join("handout.toml");
    fs::write(folder().join("password"), "hush").unwrap();
    fs::write(&file, CHANNELS).unwrap();
    let read = load_part(&file, |root| {
        let tables = root.tables("sms").into_iter();
        tables.map(|(name, table)| Settings::read(name, table)).collect()
    });
    read.unwrap()
});

/// Independent check whether a reply reports success.
fn is_success(provider: usize, status: u16, reply: &[u8]) -> bool {
    let text = reply.strip_prefix("\u{feff}".as_bytes()).unwrap_or(reply);
    let Ok(json) = serde_json::from_slice::<Value>(text) else { return false };
    match provider {
        0 => status < 300 && (json["code"] == 2 || json["code"] == "2"),
        1 => matches!(status, 200 | 201) && !(json["sid"].is_null() || is_container(&json["sid"])),
        _ => {
            let found = json.pointer("/r/0/status");
            status < 300 && found.is_some_and(|found| *found == 1 || *found == "1")
        }
    }
}

fn is_container(value: &Value) -> bool {
    value.is_array() || value.is_object()
}

fuzz_target!(|input: &[u8]| {
    let [provider, status, reply @ ..] = input else { return };
    let provider = usize::from(*provider) % PROVIDERS.len();
    let status = STATUS[usize::from(*status) % STATUS.len()];
    let read = PROVIDERS[provider].read_reply(status, reply);
    assert_eq!(read.is_ok(), is_success(provider, status, reply), "{read:?}");
    let message = match read {
        Ok(id) => printable(&id),
        Err(failure) => failure.redacted(&Secrets::default()).message,
    };
    assert!(is_one_line(&message) && message.chars().count() <= MAX_MESSAGE, "{message:?}");
});
