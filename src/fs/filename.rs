//! Names that a server chose: which of them become names of files here, and how they are printed.
//!
//! A name must not leave the folder, hide, or look like something else on a terminal.

use std::fmt::Write as _;
use std::path::PathBuf;

/// The longest name of a file, in bytes, on the file systems that people have.
const MAX_NAME: usize = 255;

/// Why a name is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is none.
    #[error("it is empty")]
    Empty,
    /// `.` or `..`.
    #[error("it is a folder's own name for itself or for the one above")]
    Dots,
    /// `-`, which stands for standard output.
    #[error("it stands for standard output")]
    StandardOutput,
    /// It begins with a dot.
    #[error("it would be hidden")]
    Hidden,
    /// It has `/` or `\` in it.
    #[error("it has a separator of folders in it")]
    Separator,
    /// It has a control character in it, NUL and line ends among them.
    #[error("it has a control character in it")]
    Control,
    /// It has a character in it that changes the direction of the text or cannot be seen.
    #[error("it has an invisible character in it")]
    Invisible,
    /// It is longer than a file's name can be.
    #[error("it is longer than {MAX_NAME} bytes")]
    Long,
}

/// Takes a name for that of a file in a folder.
///
/// # Errors
/// Why it is not taken.
pub fn file_name(name: &str) -> Result<&str, NameError> {
    match name {
        "" => return Err(NameError::Empty),
        "." | ".." => return Err(NameError::Dots),
        "-" => return Err(NameError::StandardOutput),
        _ if name.len() > MAX_NAME => return Err(NameError::Long),
        _ if name.starts_with('.') => return Err(NameError::Hidden),
        _ => {}
    }
    for character in name.chars() {
        match character {
            '/' | '\\' => return Err(NameError::Separator),
            _ if character.is_control() => return Err(NameError::Control),
            _ if is_invisible(character) => return Err(NameError::Invisible),
            _ => {}
        }
    }
    Ok(name)
}

/// Takes a name with `/` between sub-folders for a path below a folder.
///
/// # Errors
/// Why it, or a part of it, is not taken.
pub fn relative_path(name: &str) -> Result<PathBuf, NameError> {
    name.split('/').map(file_name).collect()
}

/// Takes the last part of a name with `/` between sub-folders.
///
/// # Errors
/// Why it is not taken.
pub fn last_component(name: &str) -> Result<&str, NameError> {
    file_name(name.rsplit('/').next().unwrap_or(name))
}

/// A text that came from elsewhere, as one line that no terminal obeys.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() || is_invisible(character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// The same for bytes that may be no text.
pub fn escape_bytes(bytes: &[u8]) -> String {
    let mut escaped = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        escaped.push_str(&escape(chunk.valid()));
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(escaped, "\\x{byte:02x}");
        }
    }
    escaped
}

/// Characters that change the direction of the text (UAX #9), end a line of it, or have no width.
fn is_invisible(character: char) -> bool {
    matches!(character,
        '\u{00ad}' | '\u{061c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::path::Path;

    #[test]
    fn ordinary_names_are_taken_in_every_script() {
        for name in ["guido.jpg", "a b", "-rf", "汇总数据.xlsx", "résumé.pdf", "a..b", "COM1", "x."]
        {
            assert_eq!(file_name(name), Ok(name));
        }
    }

    #[test]
    fn names_that_leave_hide_or_deceive_are_refused() {
        for (name, why) in [
            ("", NameError::Empty),
            (".", NameError::Dots),
            ("..", NameError::Dots),
            ("-", NameError::StandardOutput),
            (".bashrc", NameError::Hidden),
            ("a/b", NameError::Separator),
            ("/etc/passwd", NameError::Separator),
            ("..\\x", NameError::Hidden),
            ("C:\\x", NameError::Separator),
            ("a\0b", NameError::Control),
            ("a\nb", NameError::Control),
            ("\x1b[31m", NameError::Control),
            ("a\u{9b}b", NameError::Control),
            ("gpj.\u{202e}exe", NameError::Invisible),
            ("\u{2066}x", NameError::Invisible),
            ("a\u{200b}b", NameError::Invisible),
        ] {
            assert_eq!(file_name(name), Err(why), "{name:?}");
        }
        assert_eq!(file_name(&"x".repeat(256)), Err(NameError::Long));
        assert!(file_name(&"x".repeat(255)).is_ok());
    }

    #[test]
    fn a_path_is_refused_for_any_of_its_parts() {
        assert_eq!(relative_path("a/b/c.txt"), Ok(PathBuf::from("a/b/c.txt")));
        for bad in ["/a", "a/", "a//b", "a/../b", "a/.b", "..", "", "a/b\\c", "-", "a/-", "-/a"] {
            assert!(relative_path(bad).is_err(), "{bad}");
        }
    }

    /// Everything below a folder, by its path from there.
    fn everything_below(folder: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                found.push(path.strip_prefix(folder).unwrap().to_owned());
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// Names that a server may choose to do harm, and others.
    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            ".{0,20}",
            "[./\\\\a\0]{0,8}",
            "[a.]{0,2}[\\p{Cc}\\p{Cf}\\p{Zl}\\p{Zp}./\\\\]{0,2}[a-z]{1,3}(/[a-z]{1,2}){0,2}",
            "[a-z]{250,260}",
        ]
    }

    proptest! {
        #[test]
        fn no_name_that_is_taken_leaves_the_folder_or_hides(name in name()) {
            // On a file system, where it shows.
            let around = tempfile::tempdir().unwrap();
            let folder = around.path().join("folder");
            fs::create_dir(&folder).unwrap();
            let Ok(path) = relative_path(&name) else { return Ok(()) };
            let place = folder.join(&path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(place, "").unwrap();

            let mut expected: Vec<_> = path.ancestors().map(|path| Path::new("folder").join(path)).collect();
            expected.sort();
            let made = everything_below(around.path());
            prop_assert_eq!(made.len(), expected.len());
            for (made, expected) in made.iter().zip(&expected) {
                prop_assert_eq!(made, &expected.components().collect::<PathBuf>());
                prop_assert!(!made.file_name().unwrap().to_str().unwrap().starts_with('.'));
            }
            prop_assert_eq!(file_name(&name).is_ok(), path.components().count() == 1);
            prop_assert_eq!(Some(last_component(&name).unwrap()), name.rsplit('/').next());
        }

        #[test]
        fn no_name_that_is_taken_looks_like_something_else(
            before in "[a-z]{1,3}",
            // Controls, what changes the direction of text, and what ends a line of it.
            harmful in "[\\p{Cc}\\p{Bidi_Control}\\p{Zl}\\p{Zp}]",
            after in "[a-z]{1,3}",
        ) {
            let name = format!("{before}{harmful}{after}");
            let below = format!("a/{name}");
            prop_assert!(file_name(&name).is_err());
            prop_assert!(relative_path(&below).is_err());
            prop_assert!(last_component(&below).is_err());
            prop_assert!(!escape(&name).contains(&harmful));
        }

        #[test]
        fn what_is_escaped_is_one_line_without_control_characters(bytes: Vec<u8>) {
            let escaped = escape_bytes(&bytes);
            prop_assert!(!escaped.chars().any(|c| c.is_control() || is_invisible(c)));
        }
    }
}
