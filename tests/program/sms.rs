//! `handout sms`, and `[sms.NAME]`: providers as their documents describe them, over TLS.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::run;
use crate::servers::{Outcome, bounded, nobody};
use crate::web::{Nginx, Reply, Request, Web};

/// A password with characters that are special in forms and templates.
const PASSWORD: &str = "geheim&a=b{to}%41+ü";

/// A provider behind nginx, which has the certificate, and a folder with a configuration of it.
struct Provider {
    web: Web,
    nginx: Nginx,
    folder: TempDir,
}

impl Provider {
    fn answers(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let web = Web::answers(answer);
        let address = web.address();
        let nginx = Nginx::start_with(&format!(
            "location / {{ proxy_pass http://{address}; proxy_buffering off; }}"
        ));
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("sms.password"), format!("{PASSWORD}\n")).unwrap();
        Self { web, nginx, folder }
    }

    fn always(reply: Reply) -> Self {
        Self::answers(move |_| reply.clone())
    }

    /// The same for everything, in JSON.
    fn says(status: u16, said: &Value) -> Self {
        Self::always(Reply::status(status).with_body(said.to_string()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Says how it is used: the table `sms.ops` with this provider, and more keys.
    fn used_as(&self, provider: &str, more: &str) -> &Self {
        let url = self.nginx.url(match provider {
            "ihuyi" => "webservice/sms.php?method=Submit",
            "twilio" => "2010-04-01/Accounts/AC7/Messages.json",
            _ => "send",
        });
        let to = if provider == "twilio" { "+8613800000000" } else { "13800000000" };
        let account = if provider == "twilio" { "AC7" } else { "cf_account" };
        let own = match provider {
            "twilio" => "from = \"+15017122661\"",
            "form" => {
                "fields = { user = \"{account}\", key = \"{password}\", phone = \"{to}\", \
                 text = \"{text}\" }\n\
                 success = { pointer = \"/status\", equals = \"ok\" }\nid = \"/message/id\""
            }
            _ => "",
        };
        let own = if more.contains("fields = ") { "" } else { own };
        let config = format!(
            "[sms.ops]\nprovider = \"{provider}\"\nurl = \"{url}\"\naccount = \"{account}\"\n\
             password-file = \"sms.password\"\nto = [\"{to}\"]\nca-file = \"{}\"\n{own}\n{more}\n",
            self.nginx.authority()
        );
        fs::write(self.path("handout.toml"), config).unwrap();
        self
    }

    /// `handout` with these arguments; the password is in nothing that it says.
    fn handout(&self, arguments: &[&str]) -> Outcome {
        let mut command = bounded();
        command.args(arguments).args(["--config", "handout.toml"]).current_dir(&self.folder);
        tells_no_secret(Outcome::of(run(&mut command)))
    }

    fn send(&self, text: &str) -> Outcome {
        self.handout(&["sms", "ops", text])
    }

    /// The only request so far, and its fields.
    fn asked(&self) -> (Request, Vec<(String, String)>) {
        let requests = self.web.requests();
        assert_eq!(requests.len(), 1, "{requests:?}");
        let request = requests.into_iter().next().unwrap();
        let fields = fields(&request);
        (request, fields)
    }
}

fn tells_no_secret(outcome: Outcome) -> Outcome {
    let said = format!("{}{}", outcome.text(), outcome.stderr);
    let login = STANDARD.encode(format!("AC7:{PASSWORD}"));
    for secret in [PASSWORD, &login, "geheim"] {
        assert!(!said.contains(secret), "{secret} in {said}");
    }
    outcome
}

/// Decodes a form by the rules of HTML: `+` is a space, `%XX` a byte.
fn fields(request: &Request) -> Vec<(String, String)> {
    assert_eq!(request.method, "POST");
    assert_eq!(request.header("content-type"), Some("application/x-www-form-urlencoded"));
    let read = |text: &str| {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    u8::from_str_radix(str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                byte => byte,
            });
        }
        String::from_utf8(bytes).unwrap()
    };
    let body = str::from_utf8(&request.body).unwrap();
    let pairs = body.split('&').map(|pair| pair.split_once('=').unwrap());
    pairs.map(|(name, value)| (read(name), read(value))).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn ihuyi_takes_a_form_and_reports_success_by_its_code() {
    let reply = json!({ "code": 2, "msg": "提交成功", "smsid": "16236585251627369" });
    let provider = Provider::says(200, &reply);
    let text = "您的验证码是：1234。100% a&b={to}+";
    let outcome = provider.used_as("ihuyi", "").send(text);
    assert_eq!(outcome.succeeded().text(), "16236585251627369\n");
    let (request, fields) = provider.asked();
    assert_eq!(request.target, "/webservice/sms.php?method=Submit");
    let expected = [
        ("account", "cf_account"),
        ("password", PASSWORD),
        ("mobile", "13800000000"),
        ("content", text),
        ("format", "json"),
    ];
    assert_eq!(fields, pairs(&expected));
}

#[test]
fn ihuyi_refuses_by_its_code_with_http_200() {
    for (code, text) in [
        (json!(405), "API ID 或 API KEY 不正确"),
        (json!("4051"), "剩余条数不足"),
        (json!(4085), "同一手机号验证码短信发送超出5条"),
        (json!(407), "内容含有敏感字符"),
    ] {
        let reply = json!({ "code": code, "msg": text, "smsid": "0" });
        let provider = Provider::says(200, &reply);
        let outcome = provider.used_as("ihuyi", "").send("text");
        let code = code.to_string().replace('"', "");
        outcome.failed_with(&[&format!("13800000000: {code} {text}")]);
        assert_eq!(outcome.text(), "");
        assert_eq!(provider.web.requests().len(), 1);
    }
}

#[test]
fn twilio_takes_basic_authentication_and_returns_a_sid() {
    for status in [200, 201] {
        let reply = json!({ "sid": "SM123", "status": "queued", "error_code": null });
        let provider = Provider::says(status, &reply);
        let outcome = provider.used_as("twilio", "").send("Grüße & {to}");
        assert_eq!(outcome.succeeded().text(), "SM123\n");
        let (request, fields) = provider.asked();
        assert_eq!(request.target, "/2010-04-01/Accounts/AC7/Messages.json");
        let login = format!("Basic {}", STANDARD.encode(format!("AC7:{PASSWORD}")));
        assert_eq!(request.header("authorization"), Some(login.as_str()));
        let expected =
            [("To", "+8613800000000"), ("From", "+15017122661"), ("Body", "Grüße & {to}")];
        assert_eq!(fields, pairs(&expected));
    }
}

#[test]
fn twilio_refuses_with_its_own_code_and_text() {
    for (status, code, text) in [
        (400, 21211, "The 'To' number is not a valid phone number."),
        (401, 20003, "Authenticate"),
        (429, 20429, "Too Many Requests"),
    ] {
        let reply = json!({ "code": code, "message": text, "status": status });
        let provider = Provider::says(status, &reply);
        let outcome = provider.used_as("twilio", "").send("text");
        outcome.failed_with(&[&format!("+8613800000000: {code} {text}")]);
    }
    // With a sid, but not with a status that means that it is sent.
    let provider = Provider::says(202, &json!({ "sid": "SM123" }));
    provider.used_as("twilio", "").send("text").failed_with(&["HTTP 202"]);
    let provider = Provider::says(201, &json!({ "status": "queued" }));
    provider.used_as("twilio", "").send("text").failed_with(&["HTTP 201"]);
}

#[test]
fn fills_each_placeholder_of_a_form_once() {
    let reply = json!({ "status": "ok", "message": { "id": 42 } });
    let provider = Provider::says(200, &reply);
    let more = "fields = { \"a&b\" = \"{{{account}}}\", key = \"{password}\", \
                phone = \"+{to}\", \"text=\" = \"「{text}」100% & =\" }\n\
                success = { pointer = \"/status\", equals = \"ok\" }\nid = \"/message/id\"";
    let text = "{password} {to} & = % %26 + 汇总\n{{x}}";
    let outcome = provider.used_as("form", more).send(text);
    assert_eq!(outcome.succeeded().text(), "42\n");
    let (request, mut fields) = provider.asked();
    assert_eq!(request.target, "/send");
    fields.sort();
    let text = format!("「{text}」100% & =");
    let expected = [
        ("a&b", "{cf_account}"),
        ("key", PASSWORD),
        ("phone", "+13800000000"),
        ("text=", text.as_str()),
    ];
    assert_eq!(fields, pairs(&expected));
}

#[test]
fn reads_success_of_a_form_from_its_pointer() {
    for (sent, reply) in [
        (true, json!({ "status": "ok", "message": { "id": "a-1" } })),
        (false, json!({ "status": "error", "reason": "no money" })),
        (false, json!({ "ok": "ok" })),
        (false, json!("ok")),
        (false, json!({ "status": ["ok"] })),
    ] {
        let provider = Provider::says(200, &reply);
        let outcome = provider.used_as("form", "").send("text");
        if sent {
            assert_eq!(outcome.succeeded().text(), "a-1\n");
        } else {
            outcome.failed_with(&["13800000000: HTTP 200"]);
            let shown = reply["reason"].as_str().unwrap_or_default();
            assert!(outcome.stderr.contains(shown) && outcome.text().is_empty(), "{outcome:?}");
        }
    }
}

#[test]
fn reports_unknown_replies() {
    for provider in ["ihuyi", "twilio", "form"] {
        for (reply, words) in [
            (Reply::ok("<html>Log in to the hotel's network</html>"), &["HTTP 200", "<html>"][..]),
            (Reply::ok(""), &["HTTP 200"]),
            (Reply::status(500).with_body("oops\u{1b}[2J"), &["HTTP 500", "oops\\u{1b}[2J"]),
            (Reply::status(503), &["HTTP 503"]),
            (Reply::redirect("https://example.com/"), &["HTTP 302"]),
            (Reply::ok(vec![b'x'; 100_000]), &["HTTP 200 with more than 64 KiB"]),
        ] {
            let simulated = Provider::always(reply);
            let outcome = simulated.used_as(provider, "").send("text");
            outcome.failed_with(words);
            assert_eq!(outcome.text(), "");
            assert_eq!(simulated.web.requests().len(), 1);
        }
    }
}

#[test]
fn gives_up_on_stalled_and_endless_replies() {
    let stalls = Reply::ok("{\"code\": 2").announcing(1000).then_stall();
    let provider = Provider::always(stalls);
    let start = Instant::now();
    let outcome = provider.used_as("ihuyi", "timeout = \"500ms\"").send("text");
    outcome.failed_with(&["13800000000: not done within 0.5 s (timeout)"]);
    assert!(start.elapsed() >= Duration::from_millis(500));
    let endless = Reply::ok("").unannounced().then_repeat(b" ".repeat(1000));
    let provider = Provider::always(endless);
    provider.used_as("ihuyi", "").send("text").failed_with(&["more than 64 KiB"]);
}

#[test]
fn sends_one_request_per_number_and_names_rejected_ones() {
    let provider = Provider::answers(|request| {
        let fields = fields(request);
        let refused = fields.contains(&("mobile".to_owned(), "13800000002".to_owned()));
        Reply::json(&if refused {
            json!({ "code": 406, "msg": "手机号格式不正确", "smsid": "0" })
        } else {
            json!({ "code": 2, "msg": "提交成功", "smsid": format!("id{}", request.turn) })
        })
    });
    provider.used_as("ihuyi", "");
    let outcome = provider.handout(&[
        "sms",
        "ops",
        "--to",
        "13800000001",
        "--to",
        "13800000002",
        "--to",
        "13800000003",
        "text",
    ]);
    assert_eq!(outcome.text(), "id0\nid2\n");
    assert_eq!(outcome.failed_with(&[]).stderr, "handout: 13800000002: 406 手机号格式不正确\n");
}

#[test]
fn withholds_a_password_that_a_provider_repeats() {
    let provider = Provider::answers(|request| {
        let body = String::from_utf8(request.body.clone()).unwrap();
        Reply::ok(format!("{body} {PASSWORD}"))
    });
    for kind in ["ihuyi", "form"] {
        provider.used_as(kind, "").send("text").failed_with(&["(withheld"]);
    }
    let provider = Provider::says(400, &json!({ "code": 1, "message": PASSWORD }));
    provider.used_as("twilio", "").send("text").failed_with(&["(withheld"]);
    let provider = Provider::answers(|request| {
        let message = request.header("authorization").unwrap().to_owned();
        Reply::status(400).with_body(json!({ "code": 1, "message": message }).to_string())
    });
    provider.used_as("twilio", "");
    provider.send("text").failed_with(&["(withheld"]);
    // Where the text is cut.
    let said = format!("{}{PASSWORD}", "x".repeat(494));
    Provider::always(Reply::ok(said)).used_as("form", "").send("text").failed_with(&["(withheld"]);
}

#[test]
fn a_dry_run_shows_the_request_without_the_password() {
    let provider = Provider::always(Reply::ok(""));
    for (kind, shown) in [
        ("ihuyi", "mobile = \"13800000000\""),
        ("twilio", "To = \"+8613800000000\""),
        ("form", "phone = \"13800000000\""),
    ] {
        let outcome = provider.used_as(kind, "").handout(&["sms", "ops", "--dry-run", "Grüße"]);
        let printed = outcome.succeeded().text();
        assert!(printed.contains(shown) && printed.contains("\"Grüße\""), "{printed}");
    }
    // What is written in the configuration itself may be a secret, although it should not be.
    let fields = "fields = { key = \"geheim\", phone = \"{to}\", text = \"{text}\" }\n\
                  success = { pointer = \"/status\", equals = \"ok\" }";
    let outcome = provider.used_as("form", fields).handout(&["sms", "ops", "--dry-run", "Grüße"]);
    let printed = outcome.succeeded().text();
    assert!(printed.contains("key = \"…\"") && printed.contains("\"Grüße\""), "{printed}");
    assert!(provider.web.requests().is_empty());
}

#[test]
fn reads_the_text_from_standard_input() {
    let provider = Provider::says(200, &json!({ "code": 2, "smsid": "1" }));
    provider.used_as("ihuyi", "");
    let mut command = bounded();
    command.args(["sms", "ops", "--config", "handout.toml"]).current_dir(&provider.folder);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all("load 0.1\nup 3 days\n".as_bytes()).unwrap();
    Outcome::of(child.wait_with_output().unwrap()).succeeded();
    assert_eq!(provider.asked().1[3].1, "load 0.1\nup 3 days");
}

#[test]
fn refuses_long_texts_and_invalid_numbers_before_connecting() {
    let provider = Provider::always(Reply::ok(""));
    provider.used_as("ihuyi", "max-segments = 1");
    provider.send(&"a".repeat(161)).failed_with(&["2 segments of 153 characters", "max-segments"]);
    provider.send(&"汇".repeat(71)).failed_with(&["2 segments of 67 characters", "max-segments"]);
    provider.send("").failed_with(&["the text is empty"]);
    for number in ["1380000000", "138000000000", "23800000000", "x", "138\r\n00000000", "+1"] {
        let outcome = provider.handout(&["sms", "ops", "--to", number, "text"]);
        assert_eq!(outcome.code, Some(2), "{outcome:?}");
    }
    assert!(provider.web.requests().is_empty());
    // What just fits is asked for.
    provider.send(&"a".repeat(160)).failed_with(&["HTTP 200"]);
    provider.send(&"汇".repeat(70)).failed_with(&["HTTP 200"]);
    assert_eq!(provider.web.requests().len(), 2);
}

#[test]
fn sends_nothing_to_a_provider_with_an_untrusted_certificate() {
    let provider = Provider::says(200, &json!({ "code": 2, "smsid": "1" }));
    provider.used_as("ihuyi", "");
    let config = fs::read_to_string(provider.path("handout.toml")).unwrap();
    let ca_file = format!("ca-file = \"{}\"\n", provider.nginx.authority());
    fs::write(provider.path("handout.toml"), config.replace(&ca_file, "")).unwrap();
    provider.send("text").failed_with(&["ertificate"]);
    provider.handout(&["check", "--connect"]).failed_with(&["sms.ops: ", "ertificate"]);
    assert!(provider.web.requests().is_empty());
}

#[test]
fn reports_an_unreachable_provider() {
    let provider = Provider::always(Reply::ok(""));
    provider.used_as("ihuyi", "");
    let config = fs::read_to_string(provider.path("handout.toml")).unwrap();
    let config = config.replace(&provider.nginx.address.to_string(), &nobody().to_string());
    fs::write(provider.path("handout.toml"), config).unwrap();
    provider.send("text").failed_with(&["refused"]);
    provider.handout(&["check", "--connect"]).failed_with(&["sms.ops: ", "refused"]);
}

#[test]
fn check_connect_sends_neither_a_text_nor_the_login() {
    for (kind, reply) in [
        ("ihuyi", Reply::status(200)),
        ("twilio", Reply::status(401)),
        ("form", Reply::status(405)),
    ] {
        let provider = Provider::always(reply);
        let outcome = provider.used_as(kind, "").handout(&["check", "--connect"]);
        let printed = outcome.succeeded().text();
        assert!(
            printed.contains("encrypted, HTTP ") && printed.contains("the login is tested"),
            "{printed}"
        );
        for request in provider.web.requests() {
            assert_eq!((request.method.as_str(), request.body.len()), ("GET", 0));
            assert_eq!(request.header("authorization"), None);
        }
    }
}
