//! Numbers with units, as people write and read them.
//!
//! Invariants:
//! - What cannot be read is refused, with an example of what can.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo, Unit};

/// A duration like `500ms`, `5s`, `1h`, `30d`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let span: Span =
        text.parse().map_err(|_| format!("{text:?} is not a duration like 500ms, 5s, 1h or 30d"))?;
    let nanos = span
        .total((Unit::Nanosecond, SpanRelativeTo::days_are_24_hours()))
        .map_err(|_| format!("{text:?} has no fixed length; use days, hours, minutes or seconds"))?;
    if !(0.0..=DURATION_NANOS_MAX).contains(&nanos) {
        return Err(format!("{text:?} is out of range"));
    }
    Ok(Duration::from_nanos(nanos as u64))
}

/// A size like `512M`, `10GiB`, `1048576`; the units are powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size like 512M or 10G");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// How long something took: `1.3 s`.
pub(crate) fn took_text(took: Duration) -> String {
    match took.as_secs() {
        0..120 => format!("{:.1} s", took.as_secs_f64()),
        _ => span_text(took),
    }
}

/// A size for people.
pub(crate) fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A span of time for people, in its largest unit.
pub(crate) fn span_text(span: Duration) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second")];
    let seconds = span.as_secs();
    let unit = UNITS.into_iter().find(|(length, _)| seconds >= 2 * length);
    let (length, unit) = unit.unwrap_or((1, "second"));
    let count = seconds / length;
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// Clocks that are further apart than this are worth a word.
pub(crate) const APART_MAX: Duration = Duration::from_secs(60);
/// A century: longer than any option means.
const DURATION_NANOS_MAX: f64 = 100.0 * 366.0 * 86_400.0 * 1e9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_told_in_a_unit_that_says_enough() {
        let told =
            [(0, "0 seconds"), (1, "1 second"), (119, "119 seconds"), (150, "2 minutes"), (7_300, "2 hours")];
        for (seconds, text) in told.into_iter().chain([(172_800, "2 days"), (31_536_000, "365 days")]) {
            assert_eq!(span_text(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("30d"), Ok(Duration::from_secs(30 * 86_400)));
        for bad in ["", "5", "x", "-5s", "1y", "9999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("1048576"), Ok(1 << 20));
        assert_eq!(parse_bytes("10GiB"), Ok(10 << 30));
        assert_eq!(parse_bytes("512m"), Ok(512 << 20));
        for bad in ["", "G", "1x", "-1", "99999999999999T"] {
            assert!(parse_bytes(bad).is_err(), "{bad:?}");
        }
        assert_eq!(bytes_text(1536), "1.5 KiB");
    }
}
