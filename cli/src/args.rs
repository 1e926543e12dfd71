//! The arguments: what the program can be asked.
//!
//! Invariants:
//! - Every command has an example in its help; a test looks.

use clap::{Parser, Subcommand};

use crate::commands::{
    ack::AckArgs, archive::ArchiveArgs, demo::DemoArgs, dump::DumpArgs, flush::FlushArgs, format::FormatArgs,
    fsck::FsckArgs, invite::InviteArgs, join::JoinArgs, load::LoadArgs, member::MemberArgs, mount::MountArgs,
    promote::PromoteArgs, restore::RestoreArgs, serve::ServeArgs, status::StatusArgs,
    subscribe::SubscribeArgs, umount::UmountArgs, verify::VerifyArgs,
};

/// A POSIX file system over object storage that outlives its machine, its region and its account
#[derive(Parser, Debug)]
#[command(name = "murphy", version, max_term_width = 100, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print data as JSON: one document, or one line per item
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Log more to stderr; MURPHY_LOG chooses exactly
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
}

/// Each variant's help is that of its arguments.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    Demo(DemoArgs),
    Format(FormatArgs),
    Mount(MountArgs),
    Umount(UmountArgs),
    Flush(FlushArgs),
    Serve(ServeArgs),
    Status(StatusArgs),
    Invite(InviteArgs),
    Join(JoinArgs),
    Promote(PromoteArgs),
    Member(MemberArgs),
    Subscribe(SubscribeArgs),
    Archive(ArchiveArgs),
    Ack(AckArgs),
    Restore(RestoreArgs),
    Dump(DumpArgs),
    Load(LoadArgs),
    Verify(VerifyArgs),
    Fsck(FsckArgs),
}

impl Command {
    /// Whether the process goes on until it is told to end, and its messages are what an administrator reads.
    pub(crate) fn serves(&self) -> bool {
        matches!(self, Command::Mount(_) | Command::Serve(_))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_fit_together() {
        Cli::command().debug_assert();
    }

    /// Whoever reads the help of a command wants to see it used.
    #[test]
    fn the_help_of_every_command_has_an_example() {
        fn look_below(command: &mut clap::Command, of: &str) -> usize {
            // `help` itself is clap's.
            let below = command.get_subcommands_mut().filter(|command| command.get_name() != "help");
            let below = below.map(|command| {
                let (name, help) =
                    (format!("{of} {}", command.get_name()), command.render_long_help().to_string());
                assert!(help.contains("Example") && help.contains(&format!("  {name} ")), "{name}: {help}");
                let about = command.get_about().map(ToString::to_string).unwrap_or_default();
                assert!(!about.is_empty() && !about.ends_with('.'), "{name}: {about:?}");
                1 + look_below(command, &name)
            });
            below.sum()
        }
        assert!(look_below(&mut Cli::command(), "murphy") >= 25);
    }
}
