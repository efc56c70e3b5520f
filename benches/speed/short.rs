//! Short connections, datagrams and a picture, beside bare loops, nginx and Python.

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

use crate::clients::{BURST, asker, browser, reader};
use crate::contenders::{Handout, LOGGED, QUIET, floor, nginx, python};
use crate::floors::Floor;
use crate::rounds::{Contender, compare};
use crate::table::{Row, Unit};
use crate::{Result, Run, pseudo_random};

/// Reply of the floor, as long as that of the time service.
const TIME: &[u8] = b"2026-11-22 13:46:01.123456\n";

/// Size of the picture, in bytes.
const PICTURE: usize = 186_068;

const UNLOGGED: &str = "handout, no line in the log";
const LINE: &str = "handout, a line in the log";
const NGINX: &str = "nginx";
const PYTHON: &str = "Python, a thread per client";

pub fn time(run: &Run) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let reply = folder.path().join("reply");
    fs::write(&reply, TIME)?;
    let client = |address| Ok(reader(address, TIME.len()));
    let service = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
    let handout = |level| Handout::start(run, level, service)?.contend("time.clock");
    let mut group = vec![
        Contender::new("bare epoll loop", floor(run, Floor::Write, &reply)?, client),
        Contender::new(UNLOGGED, handout(QUIET)?, client),
        Contender::new(LINE, handout(LOGGED)?, client),
    ];
    // nginx has no fraction of the second; the spaces make the reply as long as ours.
    let serve = "load_module modules/ngx_stream_module.so; events {}
        stream { server { listen ADDRESS; return \"$time_iso8601 \\n\"; } }";
    let nginx = nginx(run, folder.path(), serve)?;
    let nginx = nginx.map(|nginx| add(&mut group, Contender::new(NGINX, nginx, client)));
    let python = python(run, None);
    let python = python.map(|python| add(&mut group, Contender::new(PYTHON, python, client)));
    let costs = compare(run, "the time over TCP", group)?;

    let what = "time over TCP, no line in the log";
    let floor = ("bare epoll loop", costs[0]);
    let mut rows = vec![
        row(what, costs[1], floor, 1.15),
        row("time over TCP, a line in the log", costs[2], floor, 1.5),
    ];
    if let Some(nginx) = nginx {
        rows.insert(1, row(what, costs[1], ("nginx, return", costs[nginx]), 1.05));
        rows.push(peer("nginx, return: time over TCP", costs[nginx], floor));
    }
    rows.extend(
        python
            .map(|python| peer("Python, a thread per client: time over TCP", costs[python], floor)),
    );
    Ok(rows)
}

pub fn datagram(run: &Run) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let reply = folder.path().join("reply");
    fs::write(&reply, TIME)?;
    // Rates are counted but not exceeded.
    let service = "[time.clock]\nlisten = [\"udp:127.0.0.1:0\"]\n\
        max-datagrams = 1000000000\nmax-datagrams-per-client = 1000000000\n";
    let mut rows = Vec::new();
    for (burst, what) in [(BURST, "time over UDP, in bursts"), (1, "time over UDP, one by one")] {
        let client = move |address| asker(address, burst, TIME.len());
        let handout = Handout::start(run, QUIET, service)?.contend("time.clock")?;
        let group = vec![
            Contender::new("bare loop", floor(run, Floor::Datagram, &reply)?, client),
            Contender::new("handout", handout, client),
        ];
        let costs = compare(run, what, group)?;
        rows.push(row(what, costs[1], ("bare recvfrom-sendto loop", costs[0]), 1.3));
    }
    Ok(rows)
}

pub fn picture(run: &Run) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let (file, reply) = (folder.path().join("picture"), folder.path().join("data"));
    let data = pseudo_random(PICTURE);
    fs::write(&file, &data)?;
    let encoded = STANDARD.encode(&data);
    let document = format!("{{\"filename\":\"picture\",\"filedata\":\"{encoded}\"}}\n");
    fs::write(&reply, &document)?;
    let length = document.len();
    let client = move |address| Ok(reader(address, length));
    let service =
        format!("[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"{}\"\n", file.display());
    let handout = |level| Handout::start(run, level, &service)?.contend("file.picture");
    let mut group = vec![
        Contender::new("bare loop, write", floor(run, Floor::Write, &reply)?, client),
        Contender::new("bare loop, sendfile", floor(run, Floor::Sendfile, &reply)?, client),
        Contender::new(UNLOGGED, handout(QUIET)?, client),
        Contender::new(LINE, handout(LOGGED)?, client),
    ];
    let path = folder.path().display();
    let serve = format!(
        "events {{}} http {{
            access_log off; sendfile on; tcp_nopush on;
            client_body_temp_path {path}/1; proxy_temp_path {path}/2; fastcgi_temp_path {path}/3;
            uwsgi_temp_path {path}/4; scgi_temp_path {path}/5;
            open_file_cache max=10;
            server {{ listen ADDRESS; root {path}; }}
        }}"
    );
    let nginx = nginx(run, folder.path(), &serve)?;
    let browser = move |address| Ok(browser(address, length));
    let nginx = nginx.map(|nginx| add(&mut group, Contender::new(NGINX, nginx, browser)));
    let python = python(run, Some(&file));
    let python = python.map(|python| add(&mut group, Contender::new(PYTHON, python, client)));
    let costs = compare(run, "a picture of 186 kB", group)?;

    let what = "picture of 186 kB";
    let floor = if costs[0] <= costs[1] {
        ("bare epoll loop, write", costs[0])
    } else {
        ("bare epoll loop, sendfile", costs[1])
    };
    let mut rows = vec![row(what, costs[2], floor, 1.1)];
    if let Some(nginx) = nginx {
        rows.push(row(what, costs[2], ("nginx, static file", costs[nginx]), 1.0));
        rows.push(peer("nginx, static file: picture of 186 kB", costs[nginx], floor));
    }
    rows.extend(python.map(|python| {
        peer("Python, a thread per client: picture of 186 kB", costs[python], floor)
    }));
    Ok(rows)
}

/// Adds an optional contender and returns its index.
fn add(group: &mut Vec<Contender>, contender: Contender) -> usize {
    group.push(contender);
    group.len() - 1
}

fn row(what: &str, cost: f64, beside: (&str, f64), target: f64) -> Row {
    Row::new(what, Unit::Microseconds, cost, beside, target)
}

fn peer(what: &str, cost: f64, beside: (&str, f64)) -> Row {
    Row::peer(what, Unit::Microseconds, cost, beside)
}
