//! Places in JSON documents: pointers (RFC 6901).

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

/// A place in a JSON document (RFC 6901): the names on the way there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pointer(Vec<String>);

impl FromStr for Pointer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let expected = "expected a JSON pointer (RFC 6901), as \"/pictures\" or \"/data/0/url\"";
        let path = text.strip_prefix('/').ok_or(expected)?;
        let name = |name: &str| {
            let mut escapes = name.split('~').skip(1);
            if escapes.all(|rest| rest.starts_with(['0', '1'])) {
                Ok(name.replace("~1", "/").replace("~0", "~"))
            } else {
                Err(format!("{expected}; \"~\" is written \"~0\""))
            }
        };
        path.split('/').map(name).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in &self.0 {
            write!(f, "/{}", name.replace('~', "~0").replace('/', "~1"))?;
        }
        Ok(())
    }
}

impl Pointer {
    /// The names on the way there.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// What is there in a document, if anything.
    pub fn find<'a>(&self, document: &'a Value) -> Option<&'a Value> {
        document.pointer(&self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pointer(text: &str) -> Pointer {
        text.parse().unwrap()
    }

    #[test]
    fn pointers_are_read_as_rfc_6901_says() {
        assert_eq!(pointer(""), Pointer(vec![]));
        assert_eq!(pointer("/"), Pointer(vec![String::new()]));
        assert_eq!(
            pointer("/a~1b/m~0n/~01"),
            Pointer(["a/b", "m~n", "~1"].map(str::to_owned).to_vec())
        );
        for bad in ["a", "a/b", "/~", "/~2", "/a~"] {
            assert!(
                bad.parse::<Pointer>().unwrap_err().starts_with("expected a JSON pointer"),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_pointer_prints_as_it_is_read(names in prop::collection::vec("[a~/0-9]{0,4}", 0..4)) {
            let pointer = Pointer(names);
            prop_assert_eq!(pointer.to_string().parse::<Pointer>().unwrap(), pointer);
        }
    }
}
