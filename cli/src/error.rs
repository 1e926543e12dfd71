//! What a command says when it fails, and the exit codes.
//!
//! Invariants:
//! - Every error is one `Error:` line that names the thing, and at most one `Hint:` line that says what to do.
//! - Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done and found damage or danger.

use std::{fmt::Display, process::ExitCode};

use serde::{Deserialize, Serialize};

/// Why a command failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct CliError {
    pub(crate) message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    code: u8,
    #[serde(skip)]
    harm: Harm,
    /// Nothing was done, and whoever asks again in a moment meets somebody else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_passing: bool,
}

/// What an error tells of the things that it names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Harm {
    /// Nothing.
    #[default]
    None,
    /// What is there is not what belongs there: of another volume, of a later version, or beyond what others could give back.
    Wrong,
    /// Something that was whole is not any more, and others may have it.
    Damage,
}

impl CliError {
    /// What was tried and did not work.
    pub(crate) fn new(message: impl Display) -> CliError {
        CliError {
            message: message.to_string(),
            hint: None,
            code: FAILED,
            harm: Harm::None,
            is_passing: false,
        }
    }

    /// Arguments that do not fit together, or a confirmation that nobody can give.
    pub(crate) fn usage(message: impl Display) -> CliError {
        CliError { code: USAGE, ..CliError::new(message) }
    }

    /// Something that should be whole is not, and others may have it. Whoever looks for damage has found it; for everybody else it is a
    /// failure.
    #[must_use]
    pub(crate) fn damage(self) -> CliError {
        CliError { harm: Harm::Damage, ..self }
    }

    /// The same of what is not what belongs there, and cannot be fetched from anybody.
    #[must_use]
    pub(crate) fn wrong(self) -> CliError {
        CliError { harm: Harm::Wrong, ..self }
    }

    /// Nothing was done: whoever was asked is just beginning or ending. Somebody else can be asked in a moment.
    pub(crate) fn passing(message: impl Display) -> CliError {
        CliError { is_passing: true, ..CliError::new(message) }
    }

    /// Whether nothing was done, and somebody else can be asked in a moment.
    pub(crate) fn is_passing(&self) -> bool {
        self.is_passing
    }

    /// Whether something that should be whole is not, and others may have it.
    pub(crate) fn is_damage(&self) -> bool {
        self.harm == Harm::Damage
    }

    /// The same, and why it could not be mended.
    #[must_use]
    pub(crate) fn because(self, why: &CliError) -> CliError {
        CliError { message: format!("{}; {}", self.message, why.message), ..self }
    }

    /// The same, from a command that looks for damage.
    #[must_use]
    pub(crate) fn found(self) -> CliError {
        let code = if self.harm == Harm::None { self.code } else { FOUND };
        CliError { code, ..self }
    }

    /// The same with a line that says what to do.
    #[must_use]
    pub(crate) fn hint(self, hint: impl Display) -> CliError {
        CliError { hint: Some(hint.to_string()), ..self }
    }

    /// The exit code.
    pub(crate) fn code(&self) -> Code {
        match self.code {
            USAGE => Code::Usage,
            FOUND => Code::Found,
            _ => Code::Failed,
        }
    }
}

impl Display for CliError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.message.fmt(f)
    }
}

impl std::error::Error for CliError {}

/// Any error whose text is good enough for a person.
pub(crate) fn failed(error: impl Display) -> CliError {
    CliError::new(error)
}

/// An error about a path.
pub(crate) fn at(path: &std::path::Path) -> impl Fn(std::io::Error) -> CliError + '_ {
    move |error| CliError::new(format!("{}: {error}", path.display()))
}

/// How a command ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Code {
    /// Done.
    Done,
    /// Not done.
    Failed,
    /// Wrong usage.
    Usage,
    /// Done, and damage or danger was found.
    Found,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> ExitCode {
        ExitCode::from(match code {
            Code::Done => 0,
            Code::Failed => FAILED,
            Code::Usage => USAGE,
            Code::Found => FOUND,
        })
    }
}

const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
const FOUND: u8 = 3;
