//! `handout check`

use std::process::ExitCode;

use super::args;
use super::output::{fail, print, reject};
use crate::config::{Config, Sources};
use crate::fs::filename::escape;

pub(super) fn run(arguments: args::Check) -> ExitCode {
    let sources = Sources::from(arguments.config);
    let config = match Config::load(&sources) {
        Ok(config) => config,
        // The configuration may be right once the file system answers.
        Err(faults) if faults.is_transient() => return fail(&faults),
        Err(faults) => return reject(&faults),
    };
    let printed = print(summary(&config).as_bytes());
    if arguments.connect { connect(config) } else { printed }
}

fn summary(config: &Config) -> String {
    let services = config.services.iter().map(|service| {
        let listen: Vec<_> = service.listen.iter().map(ToString::to_string).collect();
        format!("{} on {}\n", service.name, listen.join(", "))
    });
    let mirrors = config.mirrors.iter().map(|mirror| {
        format!("mirror.{} into {}\n", mirror.name(), escape(&mirror.folder().to_string_lossy()))
    });
    let channels = config.alerts.lines().map(|line| line + "\n");
    services.chain(mirrors).chain(channels).chain(["no fault found\n".to_owned()]).collect()
}

/// Connects to the server of every channel.
#[cfg(feature = "gateway")]
fn connect(config: Config) -> ExitCode {
    super::runtime::run_until_signal(async move {
        let mut code = ExitCode::SUCCESS;
        if config.alerts.channels.is_empty() {
            code = print(b"no channel to connect to\n");
        }
        for channel in &config.alerts.channels {
            let name = channel.name();
            match channel.check().await {
                Ok(done) => {
                    let _ = print(format!("{name}: {done}\n").as_bytes());
                }
                Err(failure) => {
                    super::output::complain(&format!("{name}: {failure}"));
                    code = ExitCode::FAILURE;
                }
            }
        }
        code
    })
}

#[cfg(not(feature = "gateway"))]
fn connect(_: Config) -> ExitCode {
    super::output::missing_feature("channels")
}
