//! PROXY headers: accepts only headers that `proxy-header` accepts, with the same result however the
//! bytes are split, and never waits for more than the maximum length.
#![no_main]

use handout::internals::{MAX_HEADER, ParsedHeader};
use libfuzzer_sys::fuzz_target;
use proxy_header::{ParseConfig, ProxyHeader};

fuzz_target!(|input: &[u8]| {
    let whole = ParsedHeader::parse(input);
    let known = (0..=input.len()).find_map(|length| {
        let parsed = ParsedHeader::parse(&input[..length]);
        (parsed != ParsedHeader::Incomplete).then_some((parsed, length))
    });
    match (known, &whole) {
        (None, _) => assert!(input.len() < MAX_HEADER),
        (Some((found, known)), _) => {
            assert_eq!(found, whole);
            if let ParsedHeader::Header { length, .. } = found {
                assert!(length == known && length <= MAX_HEADER);
            }
        }
    }
    if let ParsedHeader::Header { client: Some(client), length } = whole {
        let (header, taken) = ProxyHeader::parse(input, ParseConfig::default()).unwrap();
        let source = header.proxied_address().unwrap().source;
        assert_eq!((source.ip().to_canonical(), source.port()), (client.ip(), client.port()));
        assert_eq!(taken, length);
    }
});
