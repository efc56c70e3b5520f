//! The PROXY header of a balancer: what is taken is what another implementation takes, and however the
//! bytes are split, it is the same; nobody waits for more than the longest header.
#![no_main]

use handout::internals::{Beginning, MAX_HEADER};
use libfuzzer_sys::fuzz_target;
use proxy_header::{ParseConfig, ProxyHeader};

fuzz_target!(|input: &[u8]| {
    let whole = Beginning::of(input);
    let known = (0..=input.len()).find_map(|length| {
        let beginning = Beginning::of(&input[..length]);
        (beginning != Beginning::Incomplete).then_some((beginning, length))
    });
    match (known, &whole) {
        (None, _) => assert!(input.len() < MAX_HEADER),
        (Some((found, known)), _) => {
            assert_eq!(found, whole);
            if let Beginning::Header { length, .. } = found {
                assert!(length == known && length <= MAX_HEADER);
            }
        }
    }
    if let Beginning::Header { client: Some(client), length } = whole {
        let (header, taken) = ProxyHeader::parse(input, ParseConfig::default()).unwrap();
        let source = header.proxied_address().unwrap().source;
        assert_eq!((source.ip().to_canonical(), source.port()), (client.ip(), client.port()));
        assert_eq!(taken, length);
    }
});
