//! `handout time`

use std::error::Error;
use std::process::ExitCode;

use super::args;
use super::output::{fail, print};
use super::runtime::run_until_signal;
use crate::client;

pub(super) fn run(arguments: &args::Time) -> ExitCode {
    run_until_signal(async {
        match ask(arguments).await {
            Ok(lines) => print(lines.as_bytes()),
            Err(error) => fail(&*error),
        }
    })
}

async fn ask(arguments: &args::Time) -> Result<String, Box<dyn Error>> {
    let reply = client::time::ask(arguments.request()).await?;
    let line = reply.line()?;
    if !arguments.offset {
        return Ok(line + "\n");
    }
    let offset = reply.offset(&arguments.timezone()?)?;
    Ok(format!("{line}\noffset {offset}\n"))
}
