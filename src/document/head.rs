//! What a document says besides its data: its keys, the limits of their values, and what they make
//! together.

use jiff::Timestamp;

use crate::document::ReadError;
use crate::document::string::hex_digit;

/// What a whole document says, besides the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// It carried a file.
    File(File),
    /// The server refused to send one.
    Refusal(Refusal),
}

/// What a document says about its file: the server's claims, and the length that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its name: any text at all, at most 4096 bytes long.
    pub filename: String,
    /// How long it should be, in bytes.
    pub size: Option<u64>,
    /// When it was last changed.
    pub modified: Option<Timestamp>,
    /// The SHA-256 digest that its data should have.
    pub sha256: Option<[u8; 32]>,
    /// How long its data was, in bytes.
    pub length: u64,
}

/// Why the server sent no file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The reason: any text at all, at most 4096 bytes long.
    pub error: String,
    /// The name that was asked for, if the server repeats it.
    pub filename: Option<String>,
}

/// A key that means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Filename,
    Filedata,
    Size,
    Modified,
    Sha256,
    Error,
}

impl Key {
    const ALL: [Self; 6] =
        [Self::Filename, Self::Filedata, Self::Size, Self::Modified, Self::Sha256, Self::Error];

    /// How much of a key must be known to tell whether it is one of these: a byte more than the
    /// longest has, so that a longer one is not taken for it.
    pub(crate) const ENOUGH: usize = "filename".len() + 1;

    /// The key that is called so, of which [`Key::ENOUGH`] is known.
    pub(crate) fn named(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|key| key.name().as_bytes() == name)
    }

    /// What it is called.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Filename => "filename",
            Self::Filedata => "filedata",
            Self::Size => "size",
            Self::Modified => "modified",
            Self::Sha256 => "sha256",
            Self::Error => "error",
        }
    }

    /// How much of its text is kept, in bytes. More of it is refused.
    pub(crate) fn limit(self) -> usize {
        match self {
            Self::Filename | Self::Error => 4096,
            Self::Modified | Self::Sha256 => 64,
            Self::Filedata | Self::Size => 0,
        }
    }

    /// The error of a value that has another type.
    pub(crate) fn wrong_type(self, at: u64) -> ReadError {
        let expected = match self {
            Self::Size => "a whole number below 2^64",
            _ => "a string",
        };
        ReadError::WrongType { key: self.name(), expected, at }
    }
}

/// The values so far.
#[derive(Debug, Default)]
pub(crate) struct Values {
    pub filename: Option<String>,
    pub size: Option<u64>,
    modified: Option<Timestamp>,
    sha256: Option<[u8; 32]>,
    error: Option<String>,
    /// The length of the file's data.
    pub length: Option<u64>,
}

impl Values {
    /// Checks that `key`, which was read up to `at`, may have a value here.
    pub(crate) fn check_new(&self, key: Key, at: u64) -> Result<(), ReadError> {
        let is_there = match key {
            Key::Filename => self.filename.is_some(),
            Key::Filedata => self.length.is_some(),
            Key::Size => self.size.is_some(),
            Key::Modified => self.modified.is_some(),
            Key::Sha256 => self.sha256.is_some(),
            Key::Error => self.error.is_some(),
        };
        if is_there {
            return Err(ReadError::Repeated { key: key.name(), at });
        }
        match key {
            Key::Filedata if self.error.is_some() => Err(ReadError::Contradiction { at }),
            Key::Error if self.length.is_some() => Err(ReadError::Contradiction { at }),
            _ => Ok(()),
        }
    }

    /// Takes the text of `key`, which was read up to `at`.
    pub(crate) fn set(&mut self, key: Key, text: String, at: u64) -> Result<(), ReadError> {
        let wrong =
            |expected, found| ReadError::WrongValue { key: key.name(), expected, found, at };
        match key {
            Key::Filename => self.filename = Some(text),
            Key::Error => self.error = Some(text),
            Key::Modified => match text.parse() {
                Ok(time) => self.modified = Some(time),
                Err(_) => return Err(wrong("a time as \"2026-11-22T05:46:01Z\"", text)),
            },
            Key::Sha256 => match digest(&text) {
                Some(digest) => self.sha256 = Some(digest),
                None => return Err(wrong("64 hexadecimal digits", text)),
            },
            Key::Filedata | Key::Size => return Err(key.wrong_type(at)),
        }
        Ok(())
    }

    /// What the values make together.
    pub(crate) fn into_head(self) -> Result<Head, ReadError> {
        let Self { filename, size, modified, sha256, error, length } = self;
        if let Some(error) = error {
            return Ok(Head::Refusal(Refusal { error, filename }));
        }
        let missing = |key: Key| ReadError::Missing { key: key.name() };
        Ok(Head::File(File {
            filename: filename.ok_or_else(|| missing(Key::Filename))?,
            size,
            modified,
            sha256,
            length: length.ok_or_else(|| missing(Key::Filedata))?,
        }))
    }
}

/// Reads 32 bytes in hexadecimal digits of either case.
fn digest(text: &str) -> Option<[u8; 32]> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let bytes: Option<Vec<u8>> =
        pairs.iter().map(|[high, low]| Some(hex_digit(*high)? << 4 | hex_digit(*low)?)).collect();
    bytes?.try_into().ok()
}
