//! `handout fetch`

use std::process::ExitCode;

use super::args;
use super::output::{fail, print};
use super::progress::Progress;
use super::runtime::run_until_signal;
use crate::client::fetch;
use crate::fs::filename::escape;

pub(super) fn run(arguments: &args::Fetch) -> ExitCode {
    let options = match arguments.options() {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    run_until_signal(async {
        if arguments.list {
            return list(&options).await;
        }
        let mut progress = Progress::new(arguments.quiet);
        let is_saved = fetch::fetch(&options, &mut progress).await;
        if is_saved { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

async fn list(options: &fetch::FetchOptions) -> ExitCode {
    match fetch::list(options).await {
        Ok(files) => {
            let lines = files.iter().map(|file| {
                let modified = escape(file.modified.as_deref().unwrap_or("-"));
                format!("{:>12} {modified} {}\n", file.size, escape(&file.filename))
            });
            print(lines.collect::<String>().as_bytes())
        }
        Err(error) => fail(&error),
    }
}
