//! `[alert]`: the operator is told what is not well and when that is over, once each, whatever becomes
//! of the mail server and of the daemon; and no client notices anything of it.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{
    Daemon, connect, eventually, http_get, metric, read_all, says, send_and_half_close,
};
use crate::servers::Server;
use crate::smtp_server::{PASSWORD, SmtpServer};
use crate::web::{Reply, Web};

/// What the queue is kept in.
const QUEUE: &str = ".handout-alerts.json";

/// Services of a file each, a clock, metrics, and alerts over `mail.ops` with more keys.
fn config(files: &[&str], channel: &str, alert: &str) -> String {
    let services = files
        .iter()
        .map(|name| format!("[file.{name}]\nlisten = [\"127.0.0.1:0\"]\npath = \"{name}\"\n"));
    // Not the clock: what the kernel says of it differs from machine to machine.
    let on = if alert.contains("on = ") {
        ""
    } else {
        "on = [\"file-missing\", \"mirror-failed\", \"mirror-updated\", \"reload-failed\"]\n"
    };
    format!(
        "{}[time.clock]\nlisten = [\"127.0.0.1:0\"]\n[metrics]\nlisten = [\"127.0.0.1:0\"]\n\
         {channel}\n[alert]\nto = [\"mail.ops\"]\n{on}{alert}\n",
        services.collect::<String>()
    )
}

/// A folder with these files, and one for the queue.
fn folder(files: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("state")).unwrap();
    for name in files {
        fs::write(folder.path().join(name), name).unwrap();
    }
    folder
}

fn start(files: &[&str], channel: &str, alert: &str) -> Daemon {
    let config = config(files, channel, &format!("state = \"state\"\n{alert}"));
    Daemon::start_in(folder(files), &config, |_| {})
}

/// How many alerts had this outcome.
fn count(daemon: &Daemon, outcome: &str) -> u64 {
    let name = format!("handout_alerts_total{{channel=\"mail.ops\",outcome=\"{outcome}\"}}");
    whole(metric(daemon.tcp("metrics"), &name))
}

fn queued(daemon: &Daemon) -> u64 {
    whole(metric(daemon.tcp("metrics"), "handout_alerts_queued{channel=\"mail.ops\"}"))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it counts")]
fn whole(value: f64) -> u64 {
    value as u64
}

/// The subject of a mail without the host in front, which is this machine.
fn subject(mail: &Value) -> String {
    let subject = mail["headers"]["subject"].as_str().unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    subject
        .strip_prefix(&format!("{}: ", host.trim()))
        .unwrap_or_else(|| panic!("{subject}"))
        .into()
}

fn text(mail: &Value) -> &str {
    mail["text"].as_str().unwrap()
}

fn id(mail: &Value) -> &str {
    mail["headers"]["message-id"].as_str().unwrap()
}

/// What waits to be sent, as it is on the disk.
fn waiting(folder: &Path) -> Vec<Value> {
    let queue = fs::read(folder.join("state").join(QUEUE)).unwrap_or_default();
    let queue: Value = serde_json::from_slice(&queue).unwrap_or_default();
    queue["messages"].as_array().cloned().unwrap_or_default()
}

#[test]
fn a_file_that_is_removed_is_one_mail_and_one_more_when_it_is_back() {
    let smtp_server = SmtpServer::start("tls");
    let daemon = start(&["a"], &smtp_server.channel(""), "wait = \"1s\"");
    let removed = Instant::now();
    fs::remove_file(daemon.path("a")).unwrap();
    let mail = smtp_server.wait_for(0);
    assert!(removed.elapsed() >= Duration::from_secs(1), "{mail}");
    assert!(subject(&mail).starts_with("file-missing: file.a, since "), "{mail}");
    // The first line says host, what, and since when, and why.
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let line = text(&mail).lines().next().unwrap();
    assert!(line.starts_with(&format!("{}: file-missing: file.a, since ", host.trim())), "{line}");
    assert!(line.contains("No such file"), "{line}");
    assert_eq!(mail["headers"]["auto-submitted"], "auto-generated");
    assert_eq!((&mail["to"], &mail["tls"]), (&json!([["", "ops@example.org"]]), &json!(true)));

    fs::write(daemon.path("a"), "again").unwrap();
    let over = smtp_server.wait_for(1);
    assert!(subject(&over).starts_with("over: file-missing: file.a, since "), "{over}");
    assert_ne!(id(&mail), id(&over));
    eventually("the count", || count(&daemon, "sent") == 2 && queued(&daemon) == 0);
    assert_eq!(smtp_server.mails().len(), 2);
    let line = daemon.wait_for_message("alert sent over mail.ops");
    let named = line["message"].as_str().unwrap();
    assert!(named.contains(": file-missing: file.a, since "), "{line}");
    assert_eq!((&line["channel"], &line["id"]), (&json!("mail.ops"), &json!(id(&mail))));
    assert!(daemon.lines().iter().all(|line| !line.to_string().contains(PASSWORD)));
}

#[test]
fn what_happens_within_wait_is_one_mail() {
    let smtp_server = SmtpServer::start("tls");
    let files = ["a", "b", "c"];
    let daemon = start(&files, &smtp_server.channel(""), "wait = \"5s\"");
    for name in files {
        fs::remove_file(daemon.path(name)).unwrap();
    }
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).ends_with(" and 2 more"), "{mail}");
    for name in files {
        assert!(text(&mail).contains(&format!("file-missing: file.{name}, since ")), "{mail}");
    }
    eventually("the count", || count(&daemon, "sent") == 1 && queued(&daemon) == 0);
}

#[test]
fn what_lasts_is_told_again_after_repeat() {
    let smtp_server = SmtpServer::start("none");
    let daemon = start(&["a"], &smtp_server.channel(""), "wait = \"100ms\"\nrepeat = \"1s\"");
    fs::remove_file(daemon.path("a")).unwrap();
    smtp_server.wait_for(2);
    let mails = smtp_server.mails();
    assert!(subject(&mails[0]).starts_with("file-missing: file.a"), "{mails:?}");
    for again in &mails[1..] {
        assert!(subject(again).starts_with("still: file-missing: file.a"), "{mails:?}");
    }
}

#[test]
fn a_mirror_that_fails_and_recovers_is_told_with_the_files_that_it_brings() {
    let smtp_server = SmtpServer::start("tls");
    let broken = Arc::<AtomicBool>::default();
    let is_broken = Arc::clone(&broken);
    let files = Arc::new(AtomicUsize::new(1));
    let listed = Arc::clone(&files);
    let web = Web::answers(move |request| match request.target.as_str() {
        _ if is_broken.load(Ordering::SeqCst) => Reply::status(403),
        "/list.json" => {
            let names =
                (0..listed.load(Ordering::SeqCst)).map(|n| json!({ "url": format!("{n}.txt") }));
            Reply::json(&names.collect())
        }
        name => Reply::ok(name.as_bytes()),
    });
    let mirror = format!(
        "[mirror.m]\nsource = \"{}\"\nlist = \"\"\nurl = \"/url\"\ninto = \"files\"\n\
         every = \"1s\"\nretries = 0\n",
        web.url("list.json")
    );
    let channel = smtp_server.channel("max-attachment = \"10B\"") + &mirror;
    let daemon = start(&[], &channel, "wait = \"300ms\"");
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("mirror-updated: mirror.m, at "), "{mail}");
    let attachment = &mail["attachments"][0];
    let content = json!(STANDARD.encode("/0.txt"));
    assert_eq!((&attachment["filename"], &attachment["content"]), (&json!("0.txt"), &content));

    broken.store(true, Ordering::SeqCst);
    let mail = smtp_server.wait_for(1);
    assert!(subject(&mail).starts_with("mirror-failed: mirror.m, since "), "{mail}");
    assert!(text(&mail).contains("403"), "{mail}");

    broken.store(false, Ordering::SeqCst);
    let mail = smtp_server.wait_for(2);
    assert!(subject(&mail).starts_with("over: mirror-failed: mirror.m"), "{mail}");
    assert_eq!(mail["attachments"], json!([]));

    // Two more, of which one fits.
    files.store(3, Ordering::SeqCst);
    let mail = smtp_server.wait_for(3);
    assert!(subject(&mail).starts_with("mirror-updated: mirror.m, at "), "{mail}");
    assert_eq!(mail["attachments"].as_array().unwrap().len(), 1, "{mail}");
    assert!(text(&mail).contains("Not attached: ") && text(&mail).contains("max-attachment"));
    drop(daemon);
}

#[test]
fn a_reload_that_fails_is_told_and_its_end_too() {
    let smtp_server = SmtpServer::start("tls");
    let channel = smtp_server.channel("");
    let daemon = start(&["a"], &channel, "wait = \"200ms\"");
    let good = config(&["a"], &channel, "state = \"state\"\nwait = \"200ms\"");
    assert!(says(&daemon.reload(&format!("{good}\n[nonsense]\n")), "reload failed"));
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("reload-failed: configuration, since "), "{mail}");
    assert!(text(&mail).contains("nonsense"), "{mail}");
    assert!(says(&daemon.reload(&good), "reloaded: "));
    let over = smtp_server.wait_for(1);
    assert!(subject(&over).starts_with("over: reload-failed: configuration"), "{over}");
}

#[test]
fn only_what_is_wanted_is_told() {
    let smtp_server = SmtpServer::start("tls");
    let alert = "wait = \"100ms\"\non = [\"reload-failed\"]";
    let daemon = start(&["a"], &smtp_server.channel(""), alert);
    fs::remove_file(daemon.path("a")).unwrap();
    daemon.wait_for("the fault in the log", |line| {
        line["service"] == "file.a" && line["level"] != "INFO"
    });
    daemon.reload("nonsense");
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("reload-failed: "), "{mail}");
    assert!(!text(&mail).contains("file-missing"), "{mail}");
}

#[test]
fn fifty_faults_are_no_more_mails_than_max_per_hour_and_the_next_counts_the_rest() {
    let smtp_server = SmtpServer::start("tls");
    let names: Vec<_> = (0..50).map(|number| format!("f{number:02}")).collect();
    let files: Vec<_> = names.iter().map(String::as_str).collect();
    let alert = "wait = \"50ms\"\nmax-per-hour = 3";
    let daemon = start(&files, &smtp_server.channel(""), alert);
    let mut told = 0_u64;
    for group in names.chunks(5) {
        for name in group {
            fs::remove_file(daemon.path(name)).unwrap();
        }
        eventually("an alert", || {
            let now = count(&daemon, "sent") + count(&daemon, "withheld");
            let more = now > told;
            told = now;
            more
        });
    }
    assert!(told >= 10);
    assert_eq!((count(&daemon, "sent"), smtp_server.mails().len()), (3, 3));
    // There is a place again, as if an hour had passed. What is missing would be a fault of the
    // configuration.
    let alert = "state = \"state\"\nwait = \"50ms\"\nmax-per-hour = 4";
    daemon.reload(&config(&[], &smtp_server.channel(""), alert));
    let mail = smtp_server.wait_for(3);
    let said = subject(&mail) + text(&mail);
    let (before, _) = said.split_once(" messages ").unwrap();
    let number = before.rsplit([' ', '\n']).next().unwrap();
    let number: u64 = number.parse().unwrap_or_else(|error| panic!("{error}: {mail}"));
    assert!((told - 3..=count(&daemon, "withheld")).contains(&number), "{told}: {mail}");
    assert!(said.contains("withheld"), "{mail}");
    eventually("the count", || count(&daemon, "sent") == 4 && queued(&daemon) == 0);
    assert_eq!(smtp_server.mails().len(), 4);
}

#[test]
fn nothing_is_lost_while_the_mail_server_is_down() {
    let mut smtp_server = SmtpServer::down("tls");
    let daemon = start(&["a", "b"], &smtp_server.channel(""), "wait = \"100ms\"");
    fs::remove_file(daemon.path("a")).unwrap();
    eventually("a failure", || count(&daemon, "failed") > 0);
    fs::remove_file(daemon.path("b")).unwrap();
    eventually("a queue", || queued(&daemon) == 2);
    let line = daemon.wait_for_message("alert not sent over mail.ops");
    assert!(line["error"].as_str().unwrap().contains("refused"), "{line}");
    let ids: Vec<_> = waiting(daemon.folder.path()).iter().map(|one| one["id"].clone()).collect();
    assert_eq!(ids.len(), 2);
    smtp_server.up();
    let mails = [smtp_server.wait_for(0), smtp_server.wait_for(1)];
    let mut came: Vec<_> = mails.iter().map(|mail| json!(id(mail))).collect();
    came.sort_by_key(|id| ids.iter().position(|known| known == id));
    assert_eq!(came, ids);
    eventually("the count", || count(&daemon, "sent") == 2 && queued(&daemon) == 0);
    assert_eq!(smtp_server.mails().len(), 2);
    // Its own failure was told over no channel.
    assert!(mails.iter().all(|mail| text(mail).contains("file-missing")), "{mails:?}");
    assert!(waiting(daemon.folder.path()).is_empty());
}

#[test]
fn what_waits_survives_a_crash() {
    let mut smtp_server = SmtpServer::down("tls");
    let channel = smtp_server.channel("");
    let mut daemon = start(&["a"], &channel, "wait = \"100ms\"");
    fs::remove_file(daemon.path("a")).unwrap();
    eventually("a failure", || count(&daemon, "failed") > 0);
    let folder = daemon.crash();
    let [message] = &waiting(folder.path())[..] else { panic!("not one") };
    let known = message["id"].as_str().unwrap().to_owned();
    fs::write(folder.path().join("a"), "again").unwrap();
    smtp_server.up();
    let again = config(&["a"], &channel, "state = \"state\"\nwait = \"100ms\"");
    let daemon = Daemon::start_in(folder, &again, |_| {});
    let mail = smtp_server.wait_for(0);
    assert_eq!(id(&mail), known);
    assert!(subject(&mail).starts_with("file-missing: file.a, since "), "{mail}");
    eventually("the count", || count(&daemon, "sent") == 1 && queued(&daemon) == 0);
    assert_eq!(smtp_server.mails().len(), 1);
}

#[test]
fn reports_a_persisting_condition_again_after_a_restart() {
    let smtp_server = SmtpServer::start("tls");
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let web = Web::answers(move |_| match is_broken.load(Ordering::SeqCst) {
        true => Reply::status(403),
        false => Reply::json(&json!([])),
    });
    let mirror = format!(
        "[mirror.m]\nsource = \"{}\"\nlist = \"\"\nurl = \"/url\"\ninto = \"files\"\nevery = \"1s\"\n\
         retries = 0\n",
        web.url("list.json")
    );
    let channel = smtp_server.channel("") + &mirror;
    let mut daemon = start(&[], &channel, "wait = \"100ms\"");
    let fault = subject(&smtp_server.wait_for(0));
    assert!(fault.starts_with("mirror-failed: mirror.m, since "), "{fault}");
    eventually("the count", || count(&daemon, "sent") == 1 && queued(&daemon) == 0);
    eventually("the end of it on the disk", || waiting(daemon.folder.path()).is_empty());
    let folder = daemon.crash();
    let again = config(&[], &channel, "state = \"state\"\nwait = \"100ms\"");
    let daemon = Daemon::start_in(folder, &again, |_| {});
    let fault = subject(&smtp_server.wait_for(1));
    assert!(fault.starts_with("mirror-failed: mirror.m, since "), "{fault}");
    broken.store(false, Ordering::SeqCst);
    assert_eq!(subject(&smtp_server.wait_for(2)), format!("over: {fault}"));
    eventually("the count", || count(&daemon, "sent") == 2 && queued(&daemon) == 0);
    assert_eq!(smtp_server.mails().len(), 3);
}

#[test]
fn after_a_crash_between_sending_and_noting_the_same_message_comes_again() {
    let smtp_server = SmtpServer::start("tls");
    smtp_server.order("mute");
    let channel = smtp_server.channel("");
    let mut daemon = start(&["a"], &channel, "wait = \"100ms\"");
    fs::remove_file(daemon.path("a")).unwrap();
    let first = smtp_server.wait_for(0);
    let folder = daemon.crash();
    smtp_server.withdraw("mute");
    fs::write(folder.path().join("a"), "again").unwrap();
    let again = config(&["a"], &channel, "state = \"state\"\nwait = \"100ms\"");
    let daemon = Daemon::start_in(folder, &again, |_| {});
    let second = smtp_server.wait_for(1);
    assert_eq!(id(&first), id(&second));
    for field in ["subject", "date", "to"] {
        assert_eq!(first["headers"][field], second["headers"][field]);
    }
    assert_eq!(first["text"], second["text"]);
    eventually("the count", || count(&daemon, "sent") == 1 && queued(&daemon) == 0);
    assert_eq!(smtp_server.mails().len(), 2);
}

#[test]
fn a_message_that_is_taken_without_a_word_comes_again_with_the_same_id() {
    let smtp_server = SmtpServer::start("tls");
    smtp_server.order("cut");
    let daemon = start(&["a"], &smtp_server.channel(""), "wait = \"100ms\"");
    fs::remove_file(daemon.path("a")).unwrap();
    let first = smtp_server.wait_for(0);
    eventually("a failure", || count(&daemon, "failed") == 1);
    // The attempt is counted, so that the message is not repeated for ever. The metric is ahead of
    // the queue on the disk.
    eventually("the attempt in the queue", || waiting(daemon.folder.path())[0]["rejections"] == 1);
    smtp_server.withdraw("cut");
    let second = smtp_server.wait_for(1);
    assert_eq!(id(&first), id(&second));
    eventually("the count", || count(&daemon, "sent") == 1 && queued(&daemon) == 0);
}

#[test]
fn who_is_to_come_later_comes_later_and_one_who_is_refused_costs_the_others_nothing() {
    let smtp_server = SmtpServer::start("tls");
    smtp_server.order("busy");
    let daemon = start(&["a"], &smtp_server.channel(""), "wait = \"100ms\"");
    fs::remove_file(daemon.path("a")).unwrap();
    eventually("a failure", || count(&daemon, "failed") == 1);
    let line = daemon.wait_for_message("alert not sent over mail.ops");
    assert_eq!(line["error"], "451 4.3.2 not now");
    smtp_server.withdraw("busy");
    smtp_server.wait_for(0);
    // One recipient that there is not costs the others nothing. If there is no other, somebody has to
    // do something about the channel, and the alert waits for that.
    let to = |to: &str| smtp_server.channel("").replace("ops@example.org", to);
    let again = |to: &str| config(&["a"], to, "state = \"state\"\nwait = \"100ms\"");
    let back = |number| {
        fs::write(daemon.path("a"), "again").unwrap();
        smtp_server.wait_for(number);
    };
    back(1);
    daemon.reload(&again(&to("nobody@example.org\", \"x@example.org")));
    fs::remove_file(daemon.path("a")).unwrap();
    let mail = smtp_server.wait_for(2);
    assert_eq!(mail["envelope"][1], json!(["x@example.org"]));
    daemon.wait_for_message("alert not sent over mail.ops: nobody@example.org: 550 5.1.1");
    back(3);
    daemon.reload(&again(&to("nobody@example.org")));
    fs::remove_file(daemon.path("a")).unwrap();
    daemon.wait_for_message("alert not sent over mail.ops: nobody@example.org: 550 5.1.1");
    eventually("the queue", || (count(&daemon, "refused"), queued(&daemon)) == (0, 3));
    fs::write(daemon.path("a"), "again").unwrap();
    daemon.reload(&again(&smtp_server.channel("")));
    let mail = smtp_server.wait_for(4);
    assert!(subject(&mail).starts_with("file-missing: file.a"), "{mail}");
}

#[test]
fn a_dead_mail_server_costs_the_services_nothing() {
    let connected = Arc::<AtomicBool>::default();
    let seen = Arc::clone(&connected);
    let server = Server::answers(move |mut stream| {
        seen.store(true, Ordering::SeqCst);
        let _ = io::copy(&mut stream, &mut io::sink());
    });
    let channel = format!(
        "[mail.ops]\nserver = \"{}\"\nsecurity = \"none\"\nfrom = \"a@example.org\"\n\
         to = [\"b@example.org\"]\ntimeout = \"10m\"\n",
        server.address
    );
    let mut daemon = start(&["a", "b"], &channel, "wait = \"100ms\"");
    fs::remove_file(daemon.path("a")).unwrap();
    eventually("the connection", || connected.load(Ordering::SeqCst));
    for _ in 0..50 {
        assert!(!read_all(daemon.tcp("time.clock")).is_empty());
        assert!(!read_all(daemon.tcp("file.b")).is_empty());
    }
    assert_eq!(queued(&daemon), 1);
    let other = config(&["b"], &channel, "state = \"state\"\nwait = \"1h\"");
    assert!(says(&daemon.reload(&other), "reloaded: "));
    // It still waits: no attempt has come to its end in all this time.
    assert_eq!((queued(&daemon), count(&daemon, "failed")), (1, 0));
    // Nor does it hold up the end beyond an order that insists.
    daemon.signal(Signal::TERM);
    daemon.wait_for_message("stopping: ");
    // The alert and the end of its condition.
    let path = daemon.folder.path().to_owned();
    eventually("both to be queued", || waiting(&path).len() == 2);
    daemon.signal(Signal::TERM);
    assert!(daemon.wait().success());
}

#[test]
fn every_channel_is_told_and_one_that_fails_keeps_no_other_from_it() {
    let mut smtp_server = SmtpServer::down("tls");
    let provider = Web::always(Reply::json(&json!({ "code": 2, "smsid": "1" })));
    let channels = smtp_server.channel("")
        + &format!(
            "[sms.ops]\nprovider = \"ihuyi\"\nurl = \"{}\"\naccount = \"cf\"\n\
             password-file = \"{}\"\nto = [\"13800000000\"]\n",
            provider.url("sms"),
            smtp_server.password_file()
        );
    let both = config(&["a"], &channels, "state = \"state\"\nwait = \"100ms\"")
        .replace("to = [\"mail.ops\"]", "to = [\"mail.ops\", \"sms.ops\"]");
    let daemon = Daemon::start_in(folder(&["a"]), &both, |_| {});
    fs::remove_file(daemon.path("a")).unwrap();
    eventually("an SMS", || !provider.requests().is_empty());
    let body = String::from_utf8(provider.requests()[0].body.clone()).unwrap();
    assert!(body.contains("file-missing%3A+file.a%2C+since+"), "{body}");
    let sent = "handout_alerts_total{channel=\"sms.ops\",outcome=\"sent\"}";
    eventually("the count", || metric(daemon.tcp("metrics"), sent) == 1.0);
    eventually("a failure", || count(&daemon, "failed") > 0 && queued(&daemon) == 1);
    smtp_server.up();
    smtp_server.wait_for(0);
    assert_eq!(provider.requests().len(), 1);
}

#[test]
fn what_is_said_last_is_told_before_the_end() {
    let smtp_server = SmtpServer::start("tls");
    let mut daemon = start(&["a"], &smtp_server.channel(""), "wait = \"1h\"");
    daemon.reload("nonsense");
    fs::remove_file(daemon.path("a")).unwrap();
    daemon.wait_for("the fault in the log", |line| {
        line["service"] == "file.a" && line["level"] != "INFO"
    });
    assert!(daemon.stop().success());
    let mail = smtp_server.wait_for(0);
    assert!(text(&mail).contains("reload-failed: configuration"), "{mail}");
    assert!(text(&mail).contains("file-missing: file.a"), "{mail}");
    assert!(waiting(daemon.folder.path()).is_empty());
}

#[test]
fn a_channel_that_fails_is_told_over_the_others_and_not_over_itself() {
    let (smtp_server, other) = (SmtpServer::start("tls"), SmtpServer::start("tls"));
    let folder = folder(&["a"]);
    fs::write(folder.path().join("password"), "wrong\n").unwrap();
    let channels = format!(
        "{}{}",
        smtp_server.channel("").replace(&smtp_server.password_file(), "password"),
        other.channel("").replace("mail.ops", "mail.other")
    );
    let alert = "state = \"state\"\nwait = \"300ms\"\non = [\"file-missing\", \"channel-failed\"]";
    let config = config(&["a"], &channels, alert)
        .replace("[\"mail.ops\"]", "[\"mail.ops\", \"mail.other\"]");
    let daemon = Daemon::start_in(folder, &config, |_| {});
    fs::remove_file(daemon.path("a")).unwrap();
    let mail = other.wait_for(0);
    assert!(subject(&mail).starts_with("file-missing: file.a, since "), "{mail}");
    let mail = other.wait_for(1);
    assert!(subject(&mail).starts_with("channel-failed: mail.ops, since "), "{mail}");
    assert!(text(&mail).contains("the login is refused: 535"), "{mail}");
    // With the right password it has the one message that is not about itself.
    fs::write(daemon.path("password"), format!("{PASSWORD}\n")).unwrap();
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("file-missing: file.a, since "), "{mail}");
    let mail = other.wait_for(2);
    assert!(subject(&mail).starts_with("over: channel-failed: mail.ops, since "), "{mail}");
    assert_eq!(smtp_server.mails().len(), 1);
}

#[test]
fn what_lasts_is_told_to_who_wants_to_know_it_later() {
    let smtp_server = SmtpServer::start("none");
    let of = |on: &str| {
        // A mirror that nobody answers.
        let mirror =
            "[mirror.m]\nurls = [\"http://127.0.0.1:1/x\"]\ninto = \"files\"\nretries = 0\n";
        let all = config(
            &[],
            &smtp_server.channel(mirror),
            "on = [ON]\nstate = \"state\"\nwait = \"200ms\"",
        );
        match on {
            "" => all.split("[alert]").next().unwrap().to_owned(),
            on => all.replace("ON", on),
        }
    };
    let daemon = Daemon::start_in(folder(&[]), &of("\"mirror-failed\""), |_| {});
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("mirror-failed: mirror.m, since "), "{mail}");
    for (number, other) in [(1, "\"file-missing\""), (2, "")] {
        for on in [other, "\"mirror-failed\""] {
            let heeded =
                |line: &Value| says(line, "alerts to ") || says(line, "no alerts any more");
            let before = daemon.lines().iter().filter(|line| heeded(line)).count();
            let line = daemon.reload(&of(on));
            assert!(says(&line, "reloaded: "), "{line}");
            eventually("the alerts to heed it", || {
                daemon.lines().iter().filter(|line| heeded(line)).count() > before
            });
        }
        let mail = smtp_server.wait_for(number);
        assert!(subject(&mail).starts_with("mirror-failed: mirror.m, since "), "{mail}");
    }
}

#[test]
fn refuses_a_reload_that_moves_the_queue() {
    let smtp_server = SmtpServer::start("none");
    let daemon = start(&["a"], &smtp_server.channel(""), "wait = \"100ms\"");
    fs::create_dir(daemon.path("other")).unwrap();
    let moved = config(&["a"], &smtp_server.channel(""), "state = \"other\"\nwait = \"100ms\"");
    let line = daemon.reload(&moved);
    assert!(says(&line, "reload failed") && line.to_string().contains("restart"), "{line}");
    fs::remove_file(daemon.path("a")).unwrap();
    smtp_server.wait_for(0);
}

#[test]
fn two_daemons_do_not_share_a_queue() {
    let smtp_server = SmtpServer::down("none");
    let alert = "state = \"state\"\nwait = \"100ms\"";
    let first = start(&["a"], &smtp_server.channel(""), "wait = \"100ms\"");
    let state = first.path("state");
    let second = config(&["b"], &smtp_server.channel(""), alert)
        .replace("\"state\"", &format!("\"{}\"", state.display()));
    let second = Daemon::start_in(folder(&["b"]), &second, |_| {});
    second.wait_for_message("another handout has it");
    fs::remove_file(second.path("b")).unwrap();
    second.wait_for_message("alert not sent over mail.ops");
    fs::remove_file(first.path("a")).unwrap();
    first.wait_for_message("alert not sent over mail.ops");
    let kept = waiting(first.folder.path());
    assert_eq!(kept.len(), 1);
    assert!(kept[0]["text"].as_str().unwrap().contains("file.a"), "{kept:?}");
}

#[test]
fn a_mail_that_is_refused_with_its_files_is_sent_without_them() {
    let smtp_server = SmtpServer::start("none");
    smtp_server.order("small");
    let web = Web::answers(move |request| match request.target.as_str() {
        "/list.json" => Reply::json(&json!([{ "url": "x.txt" }])),
        name => Reply::ok(name.as_bytes()),
    });
    let mirror = format!(
        "[mirror.m]\nsource = \"{}\"\nlist = \"\"\nurl = \"/url\"\ninto = \"files\"\n",
        web.url("list.json")
    );
    let _daemon = start(&[], &smtp_server.channel(&mirror), "wait = \"100ms\"");
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("mirror-updated: mirror.m, at "), "{mail}");
    assert_eq!(mail["attachments"], json!([]));
    let why = "Not attached: 1 file, which the server refuses: 552 5.3.4 message size exceeds";
    assert!(text(&mail).contains(why), "{mail}");
}

#[test]
fn who_has_got_an_sms_does_not_get_it_again_after_a_stop() {
    let stalls = Arc::new(AtomicBool::new(true));
    let stalling = Arc::clone(&stalls);
    let provider = Web::answers(move |request| {
        let second = String::from_utf8_lossy(&request.body).contains("13800000002");
        if second && stalling.load(Ordering::SeqCst) {
            return Reply::ok("{").announcing(100).then_stall();
        }
        Reply::json(&json!({ "code": 2, "smsid": "1" }))
    });
    let folder = folder(&["a"]);
    fs::write(folder.path().join("password"), PASSWORD).unwrap();
    let channel = format!(
        "[daemon]\ngrace = \"1s\"\n\
         [sms.ops]\nprovider = \"ihuyi\"\nurl = \"{}\"\naccount = \"cf\"\ntimeout = \"10m\"\n\
         password-file = \"password\"\nto = [\"13800000001\", \"13800000002\", \"13800000003\"]\n",
        provider.url("sms"),
    );
    let config = config(&["a"], &channel, "state = \"state\"\nwait = \"100ms\"")
        .replace("to = [\"mail.ops\"]", "to = [\"sms.ops\"]");
    let asked = |number: &str| {
        let is_it = |body: &[u8]| String::from_utf8_lossy(body).contains(number);
        provider.requests().iter().filter(|request| is_it(&request.body)).count()
    };
    let mut daemon = Daemon::start_in(folder, &config, |_| {});
    fs::remove_file(daemon.path("a")).unwrap();
    eventually("the second to be asked for", || asked("13800000002") == 1);
    assert!(daemon.stop().success());
    fs::write(daemon.path("a"), "again").unwrap();
    stalls.store(false, Ordering::SeqCst);
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let daemon = Daemon::start_in(folder, &config, |_| {});
    let sent = "handout_alerts_total{channel=\"sms.ops\",outcome=\"sent\"}";
    eventually("both", || metric(daemon.tcp("metrics"), sent) == 2.0);
    assert_eq!(["13800000001", "13800000002", "13800000003"].map(asked), [1, 2, 1]);
}

/// As `/var/lib/handout` is one under `DynamicUser=`.
#[test]
fn links_in_configured_paths_are_followed_and_an_empty_mirror_raises_no_alarm() {
    let smtp_server = SmtpServer::start("tls");
    let release = Arc::<AtomicBool>::default();
    let held = Arc::clone(&release);
    let web = Web::answers(move |_| {
        eventually("the release", || held.load(Ordering::SeqCst));
        Reply::ok("content")
    });
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("private/state/queue")).unwrap();
    std::os::unix::fs::symlink("private/state", folder.path().join("state")).unwrap();
    fs::write(folder.path().join("private/state/one"), "one").unwrap();
    let config = format!(
        "[mirror.m]\nurls = [\"{}\"]\ninto = \"state/deep/pictures\"\n\
         [file.mirrored]\nlisten = [\"127.0.0.1:0\"]\npath = \"state/deep/pictures\"\n\
         [file.around]\nlisten = [\"127.0.0.1:0\"]\npath = \"private/state/deep\"\n\
         [file.one]\nlisten = [\"127.0.0.1:0\"]\npath = \"state/one\"\n\
         [metrics]\nlisten = [\"127.0.0.1:0\"]\n\
         {}\n[alert]\nto = [\"mail.ops\"]\non = [\"file-missing\", \"mirror-failed\", \"mirror-updated\"]\n\
         wait = \"100ms\"\nstate = \"state/queue\"\n",
        web.url("a.txt"),
        smtp_server.channel("")
    );
    let daemon = Daemon::start_in(folder, &config, |_| {});
    let list = |service| {
        let mut stream = connect(daemon.tcp(service));
        send_and_half_close(&mut stream, b"\n");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    };
    assert_eq!(list("file.mirrored"), "{\"files\":[]}\n");
    assert_eq!(list("file.around"), "{\"files\":[]}\n");
    assert!(!read_all(daemon.tcp("file.one")).is_empty());
    eventually("the first request", || !web.requests().is_empty());
    let (head, body) = http_get(daemon.tcp("metrics"), "/healthz");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head} {body}");

    release.store(true, Ordering::SeqCst);
    // The only mail is that there are files.
    let mail = smtp_server.wait_for(0);
    assert!(subject(&mail).starts_with("mirror-updated: mirror.m, at "), "{mail}");
    // A list may be half a second old.
    eventually("the file in the lists", || {
        list("file.mirrored").contains("\"a.txt\"")
            && list("file.around").contains("\"pictures/a.txt\"")
    });
    let alarm = |line: &&Value| line["level"] == "WARN" || line["level"] == "ERROR";
    assert_eq!(daemon.lines().iter().find(alarm), None);
    assert!(daemon.path("private/state/queue").join(QUEUE).exists());
}

#[test]
fn a_reload_that_adds_a_mirror_raises_no_alarm() {
    let web = Web::always(Reply::ok("content").then_stall());
    let before =
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n[metrics]\nlisten = [\"127.0.0.1:0\"]\n";
    let daemon = Daemon::start(before);
    let line = daemon.reload(&format!(
        "{before}[mirror.m]\nurls = [\"{}\"]\ninto = \"m\"\n\
         [file.m]\nlisten = [\"127.0.0.1:0\"]\npath = \"m\"\n",
        web.url("a.txt")
    ));
    assert!(says(&line, "reloaded: "), "{line}");
    eventually("the first request", || !web.requests().is_empty());
    let (head, body) = http_get(daemon.tcp("metrics"), "/healthz");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head} {body}");
    let alarm = |line: &&Value| line["level"] == "WARN" || line["level"] == "ERROR";
    assert_eq!(daemon.lines().iter().find(alarm), None);
}
