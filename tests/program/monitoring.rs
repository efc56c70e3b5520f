//! The alert rules and the dashboard ask for what the program tells, and are understood.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{Daemon, connect, run};
use crate::web::{Reply, Web};

/// What `/metrics` says of a daemon with a service of each kind, a mirror that has run, and alerts.
fn exposition() -> String {
    let web = Web::always(Reply::ok("picture"));
    let config = format!(
        "[metrics]\nlisten = [\"127.0.0.1:0\"]\n[time.clock]\nlisten = [\"127.0.0.1:0\"]\n\
         [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n\
         [mirror.files]\nurls = [\"{}\"]\ninto = \"files\"\n\
         [mail.ops]\nserver = \"127.0.0.1:1\"\nsecurity = \"none\"\n\
         from = \"a@example.org\"\nto = [\"b@example.org\"]\n\
         [alert]\nto = [\"mail.ops\"]\nwait = \"1h\"",
        web.url("a.txt")
    );
    let daemon = Daemon::start_with(&config, &[("picture.jpg", b"picture")], |_| {});
    daemon.wait_for_message("mirror.files: mirrored: 1 new");
    let mut stream = connect(daemon.tcp("metrics"));
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut exposition = String::new();
    stream.read_to_string(&mut exposition).unwrap();
    exposition
}

/// Every name under which something can be asked for, as OpenMetrics forms it from the family's.
fn exported(exposition: &str) -> BTreeSet<String> {
    let families = exposition.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names = families.flat_map(|family| {
        let (name, kind) = family.split_once(' ').unwrap();
        let suffix = match kind {
            "counter" => "_total",
            "gauge" => "",
            // What quantiles are calculated from.
            "histogram" => "_bucket",
            other => panic!("{name} is a {other}"),
        };
        name.starts_with("handout_").then(|| format!("{name}{suffix}"))
    });
    names.collect()
}

/// Every name of a metric of ours in a text.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("handout_")).map(str::to_owned).collect()
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/monitoring").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(shipped(name)).unwrap()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("grafana.json")).unwrap()
}

/// Every query of the dashboard's panels.
fn queries(dashboard: &Value) -> Vec<&str> {
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap()).collect()
}

#[test]
fn the_alert_rules_and_the_dashboard_ask_for_metrics_that_there_are() {
    let exported = exported(&exposition());
    for file in ["alerts.yml", "alerts.test.yml", "grafana.json"] {
        let names = names_in(&read(file));
        assert!(!names.is_empty(), "{file}");
        assert!(names.is_subset(&exported), "{file}: {:?}", names.difference(&exported));
    }
}

#[test]
fn the_dashboard_shows_every_metric() {
    let dashboard = dashboard();
    let shown = names_in(&queries(&dashboard).join(" "));
    assert_eq!(shown, exported(&exposition()));
}

#[test]
fn the_dashboard_can_be_imported_for_any_source_job_and_instance() {
    let dashboard = dashboard();
    assert_eq!(dashboard["uid"], "handout");
    // Grafana 10.0's; newer ones bring it to their own.
    assert_eq!(dashboard["schemaVersion"], 38);
    // Only an id of the installation itself is a number, and there is none before the import.
    assert_eq!(dashboard["id"], Value::Null);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|variable| &variable["name"]).collect();
    assert_eq!(names, ["datasource", "job", "instance"]);
    each_datasource(&dashboard, &|source| assert_eq!(source["uid"], "${datasource}"));

    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    for query in queries(&dashboard) {
        let asked = query.matches("handout_").count();
        let chosen = query.matches("{job=~\"$job\", instance=~\"$instance\"}").count();
        assert!(asked >= 1 && asked == chosen, "{query}");
    }
}

fn each_datasource(value: &Value, check: &impl Fn(&Value)) {
    match value {
        Value::Object(object) => {
            object.get("datasource").into_iter().for_each(check);
            object.values().for_each(|value| each_datasource(value, check));
        }
        Value::Array(array) => array.iter().for_each(|value| each_datasource(value, check)),
        _ => {}
    }
}

/// Runs promtool, if there is one: the package that has it is too large to be asked of everybody.
fn promtool(arguments: &[&str], file: &Path) {
    let mut command = Command::new("promtool");
    if Command::new("promtool").arg("--version").output().is_err() {
        println!("NOT CHECKED: there is no promtool (Debian's package prometheus has it)");
        return;
    }
    let output = run(command.args(arguments).arg(file));
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn prometheus_takes_the_alert_rules_and_they_fire_when_they_should() {
    promtool(&["check", "rules"], &shipped("alerts.yml"));
    promtool(&["test", "rules"], &shipped("alerts.test.yml"));
}

#[test]
fn prometheus_takes_the_queries_of_the_dashboard() {
    let dashboard = dashboard();
    let rules = queries(&dashboard).into_iter().enumerate().map(|(number, query)| {
        // As Grafana fills it in.
        let query = query.replace("$__rate_interval", "1m");
        json!({ "record": format!("query:{number}"), "expr": query })
    });
    let rules = json!({ "groups": [{ "name": "queries", "rules": rules.collect::<Vec<_>>() }] });
    let file = tempfile::NamedTempFile::new().unwrap();
    // JSON is YAML.
    fs::write(file.path(), rules.to_string()).unwrap();
    promtool(&["check", "rules"], file.path());
}
