//! The document reader must agree with src/document/oracle.rs, however its input is split. Input: one byte that selects how the rest is
//! split, then the bytes of a server.
#![no_main]

use handout::internals::{File, Head, ReadError, Reader, Refusal};
use handout_fuzz::{is_one_line, pieces};
use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "the tests of the crate use all of it")]
#[path = "../../src/document/oracle.rs"]
mod oracle;

use oracle::{LIMIT, Verdict, verdict};

/// The head, the data, and how much was taken.
type Reading = Result<(Head, Vec<u8>, usize), ReadError>;

fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Reading {
    let mut reader = Reader::new(LIMIT);
    let (mut data, mut taken) = (Vec::new(), 0);
    for piece in pieces {
        taken += reader.feed(piece, &mut data)?;
    }
    Ok((reader.finish()?, data, taken))
}

fuzz_target!(|input: &[u8]| {
    let Some((how, input)) = input.split_first() else { return };
    let reading = read([input]);
    assert_eq!(reading, read(pieces(*how, input)));
    match verdict(input) {
        Verdict::Accept(head, data, taken) => assert_eq!(reading, Ok((head, data, taken))),
        Verdict::Refuse => assert!(reading.is_err(), "{reading:?}"),
        Verdict::HasForm(has_form) => assert!(has_form || reading.is_err(), "{reading:?}"),
    }
    if let Err(error) = reading {
        assert!(is_one_line(&error.to_string()), "{error:?}");
    }
});
