//! The time in what a time service says: what is read, told again in any of our formats, is read as
//! the same instant.
//!
//! Input: the zone in one byte, and the reply.
#![no_main]

use std::sync::LazyLock;

use handout::internals::{Format, ParsedTime, read_rfc868, read_text};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use libfuzzer_sys::fuzz_target;

static ZONES: LazyLock<Vec<TimeZone>> = LazyLock::new(|| {
    let names = ["UTC", "Asia/Shanghai", "America/St_Johns", "Australia/Lord_Howe"];
    names.iter().map(|name| TimeZone::get(name).unwrap()).collect()
});

fn told_again(format: &str, instant: Timestamp, zone: &TimeZone) -> Vec<u8> {
    let mut reply = Vec::new();
    let format: Format = format.parse().unwrap();
    format.write(instant, zone, true, &mut reply).unwrap();
    reply
}

/// How far two instants are from each other.
fn apart(one: Timestamp, other: Timestamp) -> SignedDuration {
    one.duration_since(other).abs()
}

fuzz_target!(|input: &[u8]| {
    let Some((zone, reply)) = input.split_first() else { return };
    let zone = &ZONES[usize::from(*zone) % ZONES.len()];
    if let Some(ParsedTime { instant, .. }) = read_rfc868(reply) {
        assert_eq!(told_again("time", instant, zone), reply);
    }
    let Some(told) = str::from_utf8(reply).ok().and_then(|text| read_text(text, zone)) else {
        return;
    };
    let (earliest, latest) = told.range();
    assert!((earliest..=latest).contains(&told.instant));
    assert!(latest.duration_since(earliest) <= SignedDuration::from_secs(1));
    let instant = told.instant;
    for format in ["python", "rfc3339", "unix", "json", "daytime", "nist"] {
        // Years with other than four digits, and other centuries, are nobody's clock.
        let year = instant.to_zoned(zone.clone()).year();
        let years = if format == "nist" { 2001..=2098 } else { 1..=9998 };
        if !years.contains(&year) {
            continue;
        }
        let again = String::from_utf8(told_again(format, instant, zone)).unwrap();
        let read = read_text(&again, zone).unwrap_or_else(|| panic!("{format}: {again}"));
        let lost = read.resolution;
        // A local time that comes twice, when clocks go back, has two readings.
        let local = matches!(format, "python" | "daytime");
        let twice = local
            && zone
                .to_ambiguous_timestamp(instant.to_zoned(zone.clone()).datetime())
                .is_ambiguous();
        assert!(
            twice || apart(read.instant, instant) < lost,
            "{format}: {again}: {}",
            read.instant
        );
    }
});
