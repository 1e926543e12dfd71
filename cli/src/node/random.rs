//! Bytes that nobody else has, for new ids.

use crate::error::CliError;

/// As many as an id takes, from the operating system.
pub(crate) fn random() -> Result<[u8; 16], CliError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| CliError::new(format!("the operating system gives no random bytes: {error}")))?;
    Ok(bytes)
}
