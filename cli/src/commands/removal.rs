//! What the removals of an archive and of members have in common: a plan first, a word where something is given up, and who has not heard of it.
//!
//! Invariants:
//! - Nothing is changed before the plan was shown, and agreed to if it gives something up.

use serde_json::Value;

use crate::{error::CliError, output::Output};

/// How a removal is agreed to.
#[derive(clap::Args, Debug)]
pub(super) struct Agreement {
    /// Only print the plan
    #[arg(long)]
    dry_run: bool,
    /// The volume's name, instead of asking for it
    #[arg(long, value_name = "NAME")]
    confirm: Option<String>,
}

impl Agreement {
    /// Shows the plan. `None` if that was all that was wanted; else whether it gives something up, and people agreed.
    pub(super) fn to(&self, plan: &Value, effect: &str, output: &Output) -> Result<Option<bool>, CliError> {
        if self.dry_run {
            output.data(plan, |plan| plan["text"].as_str().unwrap_or_default().to_owned())?;
            return Ok(None);
        }
        output.agree(plan, self.confirm.as_deref(), effect).map(Some)
    }
}

/// Who has not heard of a removal yet; `None` if everybody has.
pub(super) fn unheard(removed: &Value) -> Option<String> {
    let names = removed["not_known_to"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let names: Vec<&str> = names.collect();
    (!names.is_empty()).then(|| names.join(", "))
}
