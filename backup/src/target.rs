//! Where a restore goes: a moment, an LSN, or the end; and how people write moments.
//!
//! Invariants:
//! - A local time that did not exist, or existed twice, is refused, naming what it could mean: daylight saving is explicit.
//! - A moment in the future is refused.
//! - A target means the last frame end that is not after it.

use jiff::{
    Span, Timestamp, Zoned,
    civil::DateTime,
    tz::{AmbiguousOffset, Offset, TimeZone},
};
use murphy_log::{LogTime, Lsn};

/// Where a restore goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// As far as the archives go.
    Latest,
    /// The last frame end at or before this entry.
    Lsn(Lsn),
    /// The last frame end at or before this moment of log time.
    At(LogTime),
}

impl Target {
    /// The target `--at TEXT`: RFC 3339, a local time in `zone`, `@unix` seconds, or an age like `10m ago`.
    pub fn parse_at(text: &str, now: LogTime, zone: &TimeZone) -> Result<Target, TargetError> {
        let refused = || TargetError::Unreadable { text: text.to_owned(), at: readable(text) };
        let now_stamp = timestamp(now).ok_or_else(refused)?;
        let text = text.trim();
        let stamp = if let Some(seconds) = text.strip_prefix('@') {
            parse_unix(seconds).ok_or_else(refused)?
        } else if let Ok(stamp) = text.parse::<Timestamp>() {
            stamp
        } else if let Ok(zoned) = text.parse::<Zoned>() {
            zoned.timestamp()
        } else if let Ok(local) = text.parse::<DateTime>() {
            resolve_local(local, zone)?
        } else {
            let span: Span = text.parse().map_err(|_| refused())?;
            if !span.is_negative() {
                return Err(TargetError::Age { text: text.to_owned() });
            }
            now_stamp.to_zoned(zone.clone()).checked_add(span).map_err(|_| refused())?.timestamp()
        };
        if stamp > now_stamp {
            return Err(TargetError::Future { time: show(stamp, zone), now: show(now_stamp, zone) });
        }
        let nanos = u64::try_from(stamp.as_nanosecond()).map_err(|_| refused())?;
        Ok(Target::At(LogTime::from_nanos(nanos)))
    }
}

/// A moment as answers show it: local, with offset and zone.
pub fn show_time(time: LogTime, zone: &TimeZone) -> String {
    timestamp(time).map_or_else(|| format!("{time:?}"), |stamp| show(stamp, zone))
}

fn show(stamp: Timestamp, zone: &TimeZone) -> String {
    stamp.to_zoned(zone.clone()).to_string()
}

fn timestamp(time: LogTime) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::from(time.as_nanos())).ok()
}

/// Seconds since 1970, with up to nine decimals.
fn parse_unix(text: &str) -> Option<Timestamp> {
    let (seconds, decimals) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if seconds.is_empty() || !is_number(seconds) || !is_number(decimals) || decimals.len() > 9 {
        return None;
    }
    let nanos: i128 = format!("{seconds}{decimals:0<9}").parse().ok()?;
    Timestamp::from_nanosecond(nanos).ok()
}

/// How far a text that is no time reads like one: the length of its longest beginning that is one, in bytes.
fn readable(text: &str) -> usize {
    let begin = text.len() - text.trim_start().len();
    let is_time = |text: &str| match text.strip_prefix('@') {
        Some(seconds) => parse_unix(seconds).is_some(),
        None => {
            text.parse::<Timestamp>().is_ok()
                || text.parse::<Zoned>().is_ok()
                || text.parse::<DateTime>().is_ok()
                || text.parse::<Span>().is_ok()
        }
    };
    let ends = text[begin..].char_indices().map(|(at, _)| begin + at).take(TIME_CHARS_MAX);
    ends.filter(|end| is_time(&text[begin..*end])).last().unwrap_or(begin)
}

fn resolve_local(local: DateTime, zone: &TimeZone) -> Result<Timestamp, TargetError> {
    let at = |offset: Offset| offset.to_timestamp(local).map(|stamp| show(stamp, zone));
    let ambiguous = zone.to_ambiguous_timestamp(local);
    let text = local.to_string();
    match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { .. } => {
            ambiguous.unambiguous().map_err(|_| TargetError::Unreadable { at: readable(&text), text })
        }
        AmbiguousOffset::Gap { .. } => Err(TargetError::Skipped { text }),
        AmbiguousOffset::Fold { before, after } => Err(TargetError::Twice {
            first: at(before).unwrap_or_else(|_| text.clone()),
            second: at(after).unwrap_or_else(|_| text.clone()),
            text,
        }),
    }
}

/// Why a text is not a target.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TargetError {
    /// It is none of the forms.
    #[error(
        "{text:?} is not a time from byte {at} on: write 2026-03-01T12:00:00Z, a local 2026-03-01 12:00, @1772366400 or an age like 10m ago"
    )]
    Unreadable {
        /// What was given.
        text: String,
        /// How far it reads like a time, in bytes.
        at: usize,
    },
    /// A span without "ago".
    #[error("{text:?} is no moment in the past: write it with ago")]
    Age {
        /// What was given.
        text: String,
    },
    /// It has not happened yet.
    #[error("{time} is in the future, it is {now}")]
    Future {
        /// The moment.
        time: String,
        /// The wall clock.
        now: String,
    },
    /// Clocks were set forward over it.
    #[error("{text} did not exist here, clocks were set forward: give an offset")]
    Skipped {
        /// The local time.
        text: String,
    },
    /// Clocks were set back over it.
    #[error("{text} happened twice here, clocks were set back: give {first} or {second}")]
    Twice {
        /// The local time.
        text: String,
        /// What it means the first time.
        first: String,
        /// What it means the second time.
        second: String,
    },
}

/// No time is written with more characters.
const TIME_CHARS_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-01T12:00:00Z.
    const NOW: LogTime = LogTime::from_nanos(1_793_534_400_000_000_000);

    fn parse(text: &str) -> Result<u64, TargetError> {
        let zone = TimeZone::posix("EST5EDT,M3.2.0,M11.1.0").unwrap();
        Target::parse_at(text, NOW, &zone).map(|target| match target {
            Target::At(time) => time.as_nanos() / 1_000_000_000,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn all_forms_mean_the_same_moment() {
        let noon = 1_793_448_000; // 2026-10-31T12:00:00Z
        for text in [
            "2026-10-31T12:00:00Z",
            "2026-10-31T14:00:00+02:00",
            "2026-10-31 08:00",
            "2026-10-31T08:00:00",
            "@1793448000",
            "@1793448000.5",
            "24h ago",
            "1440m ago",
        ] {
            assert_eq!(parse(text), Ok(noon), "{text}");
        }
    }

    #[test]
    fn daylight_saving_is_explicit() {
        let twice = parse("2026-11-01 01:30").unwrap_err();
        assert!(matches!(&twice, TargetError::Twice { first, second, .. } if first != second), "{twice}");
        assert!(matches!(parse("2026-03-08 02:30"), Err(TargetError::Skipped { .. })));
        assert_eq!(
            parse("2026-11-01T01:30:00-04:00").unwrap() + 3600,
            parse("2026-11-01T01:30:00-05:00").unwrap()
        );
    }

    #[test]
    fn a_moment_in_the_future_is_refused() {
        assert!(matches!(parse("2026-11-01T12:00:01Z"), Err(TargetError::Future { .. })));
        assert!(matches!(parse("10m"), Err(TargetError::Age { .. })));
        for text in ["", "yesterday-ish", "@", "@1e9", "@-5", "2026-13-01"] {
            assert!(matches!(parse(text), Err(TargetError::Unreadable { .. })), "{text:?}");
        }
    }

    #[test]
    fn a_refused_time_says_how_far_it_reads() {
        for (text, wanted) in
            [("2026-10-31 08:00x", 16), ("@1e9", 2), ("  @12s", 5), ("10m agoo", 7), ("", 0), ("at noon", 0)]
        {
            match parse(text) {
                Err(TargetError::Unreadable { at, .. }) => assert_eq!(at, wanted, "{text:?}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_time_is_shown_with_its_zone() {
        let shown = show_time(NOW, &TimeZone::fixed(Offset::constant(2)));
        assert!(shown.contains("2026-11-01T14:00:00+02:00"), "{shown}");
    }
}
