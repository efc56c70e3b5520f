//! Invalid configurations: every fault is reported with its position and remedy; exit code 78.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use tempfile::TempDir;

use crate::common::{PROGRAM, program, run};

struct Checked {
    folder: TempDir,
}

impl Checked {
    fn new(config: impl AsRef<[u8]>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("handout.toml"), config).unwrap();
        fs::write(folder.path().join("picture.jpg"), "x").unwrap();
        Self { folder }
    }

    fn run(&self, command: &str) -> Output {
        let path = self.folder.path().join("handout.toml");
        run(program().arg(command).arg("--config").arg(path).env("TZ", "UTC"))
    }

    /// The faults without the path of the file, which `check` and `serve` report alike.
    fn faults(&self) -> Vec<String> {
        let (checked, served) = (self.run("check"), self.run("serve"));
        assert_eq!(checked.status.code(), Some(78), "{checked:?}");
        assert_eq!(served.status.code(), Some(78), "{served:?}");
        assert_eq!(checked.stderr, served.stderr);
        assert!(checked.stdout.is_empty());
        let prefix = format!("handout: {}/handout.toml:", self.folder.path().display());
        let text = String::from_utf8(checked.stderr).unwrap();
        let strip =
            |line: &str| line.strip_prefix(&prefix).unwrap_or_else(|| panic!("{text}")).to_owned();
        text.lines().map(strip).collect()
    }
}

fn faults(config: &str) -> Vec<String> {
    Checked::new(config).faults()
}

/// The only fault of a configuration.
fn fault(config: &str) -> String {
    let mut faults = faults(config);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    faults.remove(0)
}

fn assert_starts(text: &str, start: &str) {
    assert!(text.starts_with(start), "{text}\nshould start with\n{start}");
}

const CLOCK: &str = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";

#[test]
fn prints_a_valid_configuration_and_touches_nothing() {
    let tried = Checked::new("[time.clock]\nlisten = [\"127.0.0.1:6789\", \"unix:clock.sock\"]");
    let output = tried.run("check");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_starts(&text, "time.clock on 127.0.0.1:6789, unix:/");
    assert!(text.ends_with("no fault found\n"));
    assert!(!tried.folder.path().join("clock.sock").exists());
}

#[test]
fn reports_every_fault_with_line_key_and_expected_value() {
    let faults = faults(
        "[log]\nlevel = \"loud\"\ncolour = true\n\n[limits]\nidle-timeout = 30\n\n\
         [time.clock]\nlisten = [\"127.0.0.1:70000\", \"udp:127.0.0.1:6789\"]\n\
         format = \"pyhton\"\ntimezone = \"Mars/Olympus\"\nnewline = \"yes\"\n\n\
         [file.picture]\nlisten = [\"udp:127.0.0.1:5566\"]\npath = \"gone.jpg\"\n\
         cache-limit = \"64\"\n\n[tyme.clock]\n",
    );
    let expected = [
        "2: log.level: \"loud\": expected error, warn, info, debug, trace, or a filter",
        "3: log.colour: unknown key; expected one of level, format",
        "6: limits.idle-timeout: expected a string, found an integer",
        "9: time.clock.listen[0]: \"127.0.0.1:70000\": expected a port from 0 to 65535",
        "10: time.clock.format: \"pyhton\": expected python, rfc3339, daytime, nist, time, unix, \
         json, or a strftime pattern with %",
        "11: time.clock.timezone: \"Mars/Olympus\": expected \"local\", \"UTC\" or the name of a zone",
        "12: time.clock.newline: expected true or false, found a string",
        "15: file.picture.listen[0]: \"udp:127.0.0.1:5566\": a file service answers no datagrams",
        "16: file.picture.path: \"gone.jpg\": cannot be opened: No such file",
        "17: file.picture.cache-limit: \"64\": expected a size with a unit",
        "19: tyme: unknown key; expected one of log, daemon, limits, mirror, time, file",
    ];
    assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    for (fault, expected) in faults.iter().zip(expected) {
        assert_starts(fault, expected);
    }
}

#[test]
fn lists_the_known_keys_for_an_unknown_key() {
    let fault = fault(&format!("{CLOCK}lisen = []"));
    assert_starts(&fault, "3: time.clock.lisen: unknown key; expected one of listen, ");
    assert!(fault.contains("format") && fault.contains("idle-timeout"), "{fault}");
}

#[test]
fn refuses_keys_of_another_kind_of_service() {
    assert_starts(&fault(&format!("{CLOCK}path = \"picture.jpg\"")), "3: time.clock.path: unknown");
}

#[test]
fn names_both_services_on_one_address() {
    let fault =
        fault("[time.a]\nlisten = [\"127.0.0.1:6789\"]\n[time.b]\nlisten = [\"0.0.0.0:6789\"]");
    assert_starts(
        &fault,
        "4: time.b.listen[0]: 0.0.0.0:6789 conflicts with 127.0.0.1:6789 of time.a",
    );
}

#[test]
fn refuses_an_address_twice_but_accepts_udp_with_tcp() {
    let text = fault("[time.a]\nlisten = [\"127.0.0.1:1\", \"127.0.0.1:1\"]");
    assert_starts(&text, "2: time.a.listen[1]: ");
    let both = Checked::new("[time.a]\nlisten = [\"127.0.0.1:1\", \"udp:127.0.0.1:1\"]");
    assert_eq!(both.run("check").status.code(), Some(0));
}

#[test]
fn refuses_two_services_on_the_default_address() {
    assert_starts(&fault("[time.a]\n[time.b]"), "2: time.b.listen: 127.0.0.1:6789 conflicts with");
}

#[test]
fn refuses_invalid_durations_sizes_and_numbers() {
    for (key, value) in [
        ("idle-timeout", "\"soon\""),
        ("idle-timeout", "\"0s\""),
        ("max-duration", "\"-1h\""),
        ("max-duration", "\"99999999h\""),
        ("max-connections", "0"),
        ("max-connections", "-1"),
        ("max-connections", "99999999999"),
        ("max-connections", "\"many\""),
        ("max-datagrams", "1.5"),
        ("max-per-client", "0"),
        ("allow", "\"10.0.0.0/8\""),
    ] {
        let text = fault(&format!("{CLOCK}{key} = {value}"));
        assert_starts(&text, &format!("3: time.clock.{key}: "));
        assert!(text.contains("expected"), "{text}");
    }
}

#[test]
fn reports_each_invalid_network() {
    let faults = faults(&format!("{CLOCK}allow = [\"10.0.0.0/8\", \"here\", \"10.1.0.0/8\"]"));
    assert_starts(&faults[0], "3: time.clock.allow[1]: \"here\": expected a network");
    assert_starts(&faults[1], "3: time.clock.allow[2]: \"10.1.0.0/8\": expected a network without");
    assert_eq!(faults.len(), 2);
}

#[test]
fn accepts_proxy_protocol_only_in_services() {
    let faults =
        faults(&format!("{CLOCK}proxy-protocol = [\"10.0.0.0/8\", \"lb\", \"10.1.0.0/8\", 7]"));
    assert_starts(&faults[0], "3: time.clock.proxy-protocol[1]: \"lb\": expected a network");
    assert_starts(
        &faults[1],
        "3: time.clock.proxy-protocol[2]: \"10.1.0.0/8\": expected a network w",
    );
    assert_starts(
        &faults[2],
        "3: time.clock.proxy-protocol[3]: expected a string, found an integer",
    );
    assert_eq!(faults.len(), 3);
    let text = fault(&format!("{CLOCK}proxy-protocol = true"));
    assert_starts(
        &text,
        "3: time.clock.proxy-protocol: expected an array of strings, found a boolean",
    );
    let text = fault(&format!("[limits]\nproxy-protocol = []\n{CLOCK}"));
    assert_starts(&text, "2: limits.proxy-protocol: unknown key; expected one of max-connections");
    let text = fault(&format!("{CLOCK}proxy_protocol = []"));
    assert_starts(&text, "3: time.clock.proxy_protocol: unknown key; expected one of listen");
}

#[test]
fn refuses_invalid_patterns() {
    for pattern in ["%", "%!", "%9999999A", "50% of %"] {
        let text = fault(&format!("{CLOCK}format = \"{pattern}\""));
        assert_starts(&text, "3: time.clock.format: ");
    }
}

#[test]
fn refuses_values_of_another_type_and_empty_lists() {
    assert_starts(&fault("[time.a]\nlisten = \"x\""), "2: time.a.listen: expected an array of");
    assert_starts(&fault("[time.a]\nlisten = []"), "2: time.a.listen: empty; expected at least");
    assert_starts(&fault("[time.a]\nlisten = [1]"), "2: time.a.listen[0]: expected a string, fou");
    assert_starts(&fault("time = 3"), "1: time: expected a table, found an integer");
    assert_starts(&fault("[time]\nclock = 3"), "2: time.clock: expected a table, found an integer");
}

#[test]
fn refuses_paths_that_cannot_be_served() {
    let file = |path: &str| format!("[file.a]\npath = \"{path}\"");
    assert_starts(
        &fault("[file.a]"),
        "1: file.a.path: missing; expected the file or the folder to hand out",
    );
    assert_starts(&fault(&file("gone")), "2: file.a.path: \"gone\": cannot be opened: No such");
    assert_starts(
        &fault(&file("/dev/null")),
        "2: file.a.path: \"/dev/null\": cannot be opened: not",
    );

    let fifo = Checked::new(file("fifo"));
    let path = fifo.folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o644.into(), 0)
        .unwrap();
    assert_starts(&fifo.faults()[0], "2: file.a.path: \"fifo\": cannot be opened: not a regular");
}

#[test]
fn accepts_folders() {
    for path in [".", ""] {
        assert_eq!(
            Checked::new(format!("[file.a]\npath = \"{path}\"")).run("check").status.code(),
            Some(0)
        );
    }
}

#[test]
fn refuses_files_without_read_permission() {
    let tried = Checked::new("[file.a]\npath = \"picture.jpg\"");
    let folder = tried.folder.path();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    let picture = folder.join("picture.jpg");
    fs::set_permissions(picture, fs::Permissions::from_mode(0o000)).unwrap();
    let mut command = program();
    if rustix::process::getuid().is_root() {
        // Root can read every file, and other users cannot enter the folder of the build.
        let program = folder.join("handout");
        fs::copy(PROGRAM, &program).unwrap();
        command = std::process::Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program);
    }
    let output = run(command.args(["check", "--config"]).arg(folder.join("handout.toml")));
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("file.a.path: \"picture.jpg\": cannot be opened: Permission"), "{text}");
}

#[test]
fn refuses_invalid_names_of_services() {
    for name in ["\"a b\"", "\"\"", "\"-a\"", "\"a.b\"", "\"\\u001b[31m\""] {
        let text = fault(&format!("[time.{name}]\nlisten = [\"127.0.0.1:0\"]"));
        assert!(text.contains("expected a name of at most 64"), "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }
}

#[test]
fn refuses_a_configuration_without_services() {
    for config in ["", "# nothing\n", "[limits]\nmax-connections = 1\n"] {
        assert_starts(&fault(config), " no service; expected a table such as [time.clock]");
    }
}

#[test]
fn reports_each_line_that_is_not_toml() {
    let faults = faults("[time.clock\nlisten = = 3\nformat = \"python\"\n[[[\n");
    assert!(faults.iter().any(|fault| fault.starts_with("1: not TOML: ")), "{faults:#?}");
    assert!(faults.iter().any(|fault| fault.starts_with("2: not TOML: ")), "{faults:#?}");
}

#[test]
fn reports_faults_of_the_lines_around_a_syntax_error() {
    let faults = faults(&format!("{CLOCK}nonsense = true\nformat = \"loud\"\n[x\n"));
    let lines: Vec<_> = faults.iter().map(|fault| fault.split(':').next().unwrap()).collect();
    assert_eq!(lines, ["3", "4", "5"], "{faults:#?}");
}

#[test]
fn reports_the_line_that_is_not_utf8() {
    let tried = Checked::new(b"[time.clock]\n# caf\xe9\n");
    assert_starts(&tried.faults()[0], "2: not UTF-8; expected a TOML file");
}

#[test]
fn refuses_files_that_are_too_large() {
    let junk = crate::common::sample(8, 10_000_000);
    assert_starts(&Checked::new(junk).faults()[0], " larger than 1024 KiB");
}

#[test]
fn survives_deep_and_wide_junk() {
    for junk in [
        "[".repeat(500_000),
        "a=[".repeat(200_000),
        format!("a = {}", "{a=".repeat(200_000)),
        format!("a{}=1", ".a".repeat(400_000)),
        format!("[a{}]", ".a".repeat(400_000)),
        "a.b".repeat(100_000),
        "\u{feff}\u{feff}".repeat(1000),
        "\0".repeat(1000),
        "x=1\n".repeat(260_000),
        (0..90_000).map(|key| format!("k{key}=1\n")).collect(),
        "=\n".repeat(500_000),
        format!("[time.a]\nlisten = [{}]", "\"127.0.0.1:0\",".repeat(70_000)),
    ] {
        let output = Checked::new(&junk).run("check");
        assert_eq!(output.status.code(), Some(78), "{:.20}", junk);
    }
}

#[test]
fn refuses_an_unreadable_local_time_zone() {
    let tried = Checked::new("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    let path = tried.folder.path().join("handout.toml");
    let broken = tried.folder.path().join("picture.jpg");
    for zone in ["Mars/Olympus", broken.to_str().unwrap()] {
        let output = run(program().args(["check", "--config"]).arg(&path).env("TZ", zone));
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(":1: time.clock.timezone: the default \"local\": "), "{text}");
        assert!(text.contains("or \"UTC\" instead"), "{text}");
    }
}

#[test]
fn reports_a_missing_configuration_file() {
    let output = run(program().args(["check", "--config", "/nowhere/handout.toml"]));
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_starts(&text, "handout: /nowhere/handout.toml: cannot be read: No such file");
}

#[test]
fn takes_the_path_of_the_configuration_from_the_environment() {
    let tried = Checked::new(CLOCK);
    let path = tried.folder.path().join("handout.toml");
    let output = run(program().arg("check").env("HANDOUT_CONFIG", path));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn names_service_address_and_cause_if_an_address_is_in_use() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let output = Checked::new(format!("[time.clock]\nlisten = [\"{address}\"]")).run("serve");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    let expected = format!("handout: time.clock: cannot listen on {address} (another program");
    assert!(text.contains(&expected), "{text}");
    assert!(text.contains("Address already in use"), "{text}");
}

#[test]
fn fails_to_start_on_an_address_of_another_machine() {
    let output = Checked::new("[time.clock]\nlisten = [\"192.0.2.1:6789\"]").run("serve");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("this machine does not have that address"), "{text}");
}

#[test]
fn exits_with_2_on_wrong_usage() {
    for arguments in [&[][..], &["serve", "--fil", "x"], &["serve", "--file", "x"], &["nonsense"]] {
        assert_eq!(run(program().args(arguments)).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn names_the_argument_of_a_fault() {
    let output = run(program().args(["serve", "--time", "nonsense", "--file", "127.0.0.1:0=gone"]));
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("handout: --time nonsense: time.argument-1.listen"), "{text}");
    assert!(text.contains("handout: --file 127.0.0.1:0=gone: file.argument-2.path"), "{text}");
}

#[test]
fn only_the_probe_stage_of_the_configuration_performs_io() {
    let src = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![src.join("net/endpoint.rs")];
    for folder in ["config", "config_reader"] {
        files.extend(fs::read_dir(src.join(folder)).unwrap().map(|entry| entry.unwrap().path()));
    }
    files.retain(|path| !path.ends_with("config/probe.rs"));
    assert!(files.len() > 8, "{files:?}");
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for module in ["std::fs", "std::net", "crate::fs"] {
            assert!(!code.contains(module), "{} uses {module}", path.display());
        }
    }
}
