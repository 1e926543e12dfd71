//! Every entry as it happens, for other programs: one JSON object per line.
//!
//! Invariants:
//! - Only durable, verified frames are told, in order and without a gap; whoever resumes with the LSN after the last line misses nothing.
//! - A line is stable: fields are added, never renamed or removed; bytes that are no text are hexadecimal.

mod remote;

use murphy_fs::{EntryKind, Table};
use murphy_log::{DecodeError, Entry, Frame, LogTime};
use serde::Serialize;

pub use remote::{ObserveError, Observer};

/// One entry, as a line of JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EntryLine {
    /// Its place in the history.
    pub lsn: u64,
    /// The number of its epoch.
    pub epoch: u32,
    /// When it was decided: RFC 3339, UTC, nanoseconds.
    pub time: String,
    /// What was done, by the word of [`EntryKind::word`], or `kind-N` for one that this version does not know.
    pub kind: String,
    /// Who asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<CallerLine>,
    /// The forwarded request that it answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestLine>,
    /// The names that the operation spoke of.
    pub names: Vec<Text>,
    /// The rows that it wrote, in order.
    pub changes: Vec<ChangeLine>,
}

/// The process that asked for an operation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CallerLine {
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its process id; 0 if unknown.
    pub pid: u32,
}

/// A request that a mirror forwarded.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RequestLine {
    /// The session, as 16 hexadecimal digits.
    pub session: String,
    /// Its running number.
    pub sequence: u64,
}

/// One row that was written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ChangeLine {
    /// The table: `inode`, `dentry`, ..., or `table-N` for one that this version does not know.
    pub table: String,
    /// The key within its table, hexadecimal.
    pub key: String,
    /// The row after the change, hexadecimal; null if it was removed.
    pub value: Option<String>,
}

/// A name: text if it is UTF-8, else an object with its bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum Text {
    /// UTF-8.
    Utf8(String),
    /// Anything else.
    Bytes {
        /// The bytes, hexadecimal.
        hex: String,
    },
}

impl EntryLine {
    /// The line of an entry in an epoch of this number.
    pub fn new(entry: &Entry, epoch: u32) -> EntryLine {
        EntryLine {
            lsn: entry.lsn.get(),
            epoch,
            time: rfc3339(entry.time),
            kind: match EntryKind::from_number(entry.kind) {
                Some(kind) => kind.word().to_owned(),
                None => format!("kind-{}", entry.kind),
            },
            caller: entry.caller.map(|caller| CallerLine {
                uid: caller.uid,
                gid: caller.gid,
                pid: caller.pid,
            }),
            request: entry.request.map(|request| RequestLine {
                session: format!("{:016x}", request.session),
                sequence: request.sequence,
            }),
            names: entry.names.iter().map(|name| Text::new(name)).collect(),
            changes: entry.changes.iter().map(ChangeLine::new).collect(),
        }
    }

    /// The lines of a frame's entries.
    pub fn of_frame(frame: &Frame) -> Result<Vec<EntryLine>, DecodeError> {
        frame.iter().map(|entry| Ok(EntryLine::new(&entry?, frame.epoch().number))).collect()
    }

    /// The JSON text, without a line break.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }
}

impl ChangeLine {
    fn new(change: &murphy_log::Change) -> ChangeLine {
        ChangeLine {
            table: match Table::from_number(change.table) {
                Some(table) => format!("{table:?}").to_lowercase(),
                None => format!("table-{}", change.table),
            },
            key: hex(&change.key),
            value: change.value.as_deref().map(hex),
        }
    }
}

impl Text {
    fn new(bytes: &[u8]) -> Text {
        match str::from_utf8(bytes) {
            Ok(text) => Text::Utf8(text.to_owned()),
            Err(_) => Text::Bytes { hex: hex(bytes) },
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        write!(text, "{byte:02x}").unwrap_or_default();
        text
    })
}

/// The UTC form of a time. The calendar is the one of Howard Hinnant's `civil_from_days`.
fn rfc3339(time: LogTime) -> String {
    let (seconds, nanos) = (time.as_nanos() / 1_000_000_000, time.as_nanos() % 1_000_000_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use murphy_log::{Change, ForwardedRequest, Lsn, Requester};

    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (4_102_444_799, "2099-12-31T23:59:59.000000000Z"),
            (1_790_000_000, "2026-09-21T14:13:20.000000000Z"),
        ] {
            assert_eq!(rfc3339(LogTime::from_nanos(seconds * 1_000_000_000)), text);
        }
    }

    /// Other programs parse this: it may grow, but what is there stays.
    #[test]
    fn a_line_keeps_its_form() {
        let mut entry = Entry::tick(Lsn::new(12), LogTime::from_nanos(1_000_000_007));
        assert_eq!(
            EntryLine::new(&entry, 3).to_json().unwrap(),
            r#"{"lsn":12,"epoch":3,"time":"1970-01-01T00:00:01.000000007Z","kind":"tick","names":[],"changes":[]}"#
        );
        entry.kind = 250;
        entry.caller = Some(Requester { uid: 1, gid: 2, pid: 3 });
        entry.request = Some(ForwardedRequest { session: 0xab, sequence: 4 });
        entry.names = vec![Bytes::from_static(b"a\"b"), Bytes::from_static(b"\xff\n")];
        let change =
            |table, value| Change { table, key: Bytes::from_static(&[0, 0, 0, 0, 0, 0, 0, 1]), value };
        entry.changes = vec![change(1, Some(Bytes::from_static(b"\x01\x02"))), change(99, None)];
        let expected = concat!(
            r#"{"lsn":12,"epoch":3,"time":"1970-01-01T00:00:01.000000007Z","kind":"kind-250","#,
            r#""caller":{"uid":1,"gid":2,"pid":3},"request":{"session":"00000000000000ab","sequence":4},"#,
            r#""names":["a\"b",{"hex":"ff0a"}],"changes":[{"table":"inode","key":"0000000000000001","value":"0102"},"#,
            r#"{"table":"table-99","key":"0000000000000001","value":null}]}"#
        );
        assert_eq!(EntryLine::new(&entry, 3).to_json().unwrap(), expected);
    }
}
