//! `nybl completions` and `nybl man`: what a package installs beside the program, made from the same
//! description as `--help`.

use crate::{Cli, Failure};
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::PathBuf;

/// Arguments of `nybl completions`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl completions bash > /etc/bash_completion.d/nybl
  nybl completions zsh > ~/.zfunc/_nybl")]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Arguments of `nybl man`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl man | man -l -
  nybl man --dir /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// Write nybl.1, nybl-run.1, ... into this folder, which is there.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

/// Prints a completion script.
pub(crate) fn completions(args: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "nybl", &mut script);
    std::io::Write::write_all(&mut std::io::stdout(), &script)?;
    Ok(())
}

/// Prints or writes manual pages.
pub(crate) fn man(args: &Man) -> Result<(), Failure> {
    match &args.dir {
        None => clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?,
        Some(dir) => clap_mangen::generate_to(Cli::command(), dir)
            .map_err(|error| nybl::Error::io(dir.display().to_string(), &error))?,
    }
    Ok(())
}
