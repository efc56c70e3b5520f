//! Datagrams: no service answers the reply of another, whatever their formats, zones and clocks, and
//! no reply goes to more than one host or to the port of a service.
//!
//! Input: four lines with format, zone, seconds since 1970 and source address, then the datagram.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use handout::internals::{
    Format, Service as _, TimeService, TimeSettings as Settings, may_be_answered,
};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use libfuzzer_sys::fuzz_target;

const NAMED: [&str; 6] = ["python", "rfc3339", "daytime", "nist", "unix", "json"];

const YEAR: i64 = 31_556_952;

/// The port of the service.
const PORT: u16 = 6789;

/// Maps the number to a time from 1973 to 2232. Until 1972, one zone had an offset with seconds,
/// which gives its replies a unique shape.
fn clock(text: &str) -> Option<Timestamp> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let fraction: i32 = fraction.parse().ok()?;
    let (seconds, micros) = (seconds.parse::<i64>().ok()?, fraction.rem_euclid(1_000_000));
    Timestamp::new((3 * YEAR) + seconds.rem_euclid(259 * YEAR), micros * 1000).ok()
}

/// Whether a reply to this address can reach only a client on a single host.
fn is_a_client(source: SocketAddr) -> bool {
    let one_host = match source.ip().to_canonical() {
        IpAddr::V4(v4) => !(v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast()),
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_multicast()),
    };
    one_host && source.port() >= 1024 && source.port() != PORT
}

fuzz_target!(|input: &[u8]| {
    let mut lines = input.splitn(5, |byte| *byte == b'\n');
    let mut line = || lines.next().and_then(|line| str::from_utf8(line).ok());
    let (Some(format), Some(zone_name), Some(now), Some(source)) = (line(), line(), line(), line())
    else {
        return;
    };
    let datagram = lines.next().unwrap_or_default();
    let (Ok(format), Ok(zone)) = (format.parse::<Format>(), TimeZone::get(zone_name)) else {
        return;
    };
    let (Some(now), Ok(source)) = (clock(now), source.parse::<SocketAddr>()) else { return };

    let settings = Settings {
        format: format.clone(),
        timezone: zone_name.to_owned(),
        zone: zone.clone(),
        newline: true,
    };
    let service = TimeService::new("time.clock".into(), settings);
    let answered = |source, datagram: &[u8]| {
        may_be_answered(source, None, &[PORT], || service.resembles_reply(datagram))
    };
    assert!(!answered(source, datagram) || is_a_client(source), "{source}");

    // The other service has any named format in either zone, or the same settings.
    let named = NAMED.map(|name| name.parse().unwrap());
    let utc = TimeZone::UTC;
    let others = named.iter().flat_map(|other| [(other, &zone), (other, &utc)]);
    for (other, zone) in others.chain([(&format, &zone)]) {
        let mut reply = Vec::new();
        // Times that the format cannot express are not sent.
        if other.write(now, zone, true, &mut reply).is_ok() {
            let said = reply.escape_ascii();
            assert!(!answered(source, &reply), "{format} answers what {other} says: {said}");
        }
    }
});
