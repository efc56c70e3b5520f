//! Checks and escapes file names that a server supplied.
//!
//! A name must not leave the folder, be hidden, or deceive on a terminal.

use std::path::PathBuf;

/// Maximum length of a file name on common file systems, in bytes.
const MAX_NAME: usize = 255;

/// The reason why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum NameError {
    #[error("it is empty")]
    Empty,
    #[error("it names the folder itself or its parent")]
    DotOrDotDot,
    #[error("it stands for standard output")]
    StandardOutput,
    #[error("it would be hidden")]
    Hidden,
    #[error("it contains a folder separator")]
    Separator,
    #[error("it contains a control character")]
    ControlCharacter,
    #[error("it contains an invisible character")]
    InvisibleCharacter,
    #[error("it is longer than {MAX_NAME} bytes")]
    TooLong,
}

/// Accepts a name of a file.
///
/// # Errors
/// The reason why the name is refused.
pub fn file_name(name: &str) -> Result<&str, NameError> {
    match name {
        "" => return Err(NameError::Empty),
        "." | ".." => return Err(NameError::DotOrDotDot),
        "-" => return Err(NameError::StandardOutput),
        _ if name.len() > MAX_NAME => return Err(NameError::TooLong),
        _ if name.starts_with('.') => return Err(NameError::Hidden),
        _ => {}
    }
    for character in name.chars() {
        match character {
            '/' | '\\' => return Err(NameError::Separator),
            _ if character.is_control() => return Err(NameError::ControlCharacter),
            _ if is_invisible(character) => return Err(NameError::InvisibleCharacter),
            _ => {}
        }
    }
    Ok(name)
}

/// Accepts a path below a folder, with `/` between its names.
///
/// # Errors
/// The reason why one of the names is refused.
pub fn relative_path(name: &str) -> Result<PathBuf, NameError> {
    name.split('/').map(file_name).collect()
}

/// Returns the last name of a path.
///
/// # Errors
/// The reason why the name is refused.
pub fn last_component(name: &str) -> Result<&str, NameError> {
    file_name(name.rsplit('/').next().expect("splitting returns at least one part"))
}

/// Escapes characters that could deceive a person or control a terminal; the result is one line.
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

/// Like [`escape`], for bytes that may not be UTF-8.
pub fn escape_bytes(bytes: &[u8]) -> String {
    let chunks = bytes.utf8_chunks();
    chunks
        .map(|chunk| escape(chunk.valid()) + &chunk.invalid().escape_ascii().to_string())
        .collect()
}

/// Returns whether a character changes the text direction (UAX #9), ends a line or has no width.
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
    fn accepts_ordinary_names_in_every_script() {
        for name in ["guido.jpg", "a b", "-rf", "汇总数据.xlsx", "résumé.pdf", "a..b", "COM1", "x."]
        {
            assert_eq!(file_name(name), Ok(name));
        }
    }

    #[test]
    fn refuses_names_that_leave_the_folder_hide_or_deceive() {
        for (name, why) in [
            ("", NameError::Empty),
            (".", NameError::DotOrDotDot),
            ("..", NameError::DotOrDotDot),
            ("-", NameError::StandardOutput),
            (".bashrc", NameError::Hidden),
            ("a/b", NameError::Separator),
            ("/etc/passwd", NameError::Separator),
            ("..\\x", NameError::Hidden),
            ("C:\\x", NameError::Separator),
            ("a\0b", NameError::ControlCharacter),
            ("a\nb", NameError::ControlCharacter),
            ("\x1b[31m", NameError::ControlCharacter),
            ("a\u{9b}b", NameError::ControlCharacter),
            ("gpj.\u{202e}exe", NameError::InvisibleCharacter),
            ("\u{2066}x", NameError::InvisibleCharacter),
            ("a\u{200b}b", NameError::InvisibleCharacter),
        ] {
            assert_eq!(file_name(name), Err(why), "{name:?}");
        }
        assert_eq!(file_name(&"x".repeat(256)), Err(NameError::TooLong));
        assert!(file_name(&"x".repeat(255)).is_ok());
    }

    #[test]
    fn refuses_paths_with_a_bad_part() {
        assert_eq!(relative_path("a/b/c.txt"), Ok(PathBuf::from("a/b/c.txt")));
        for bad in ["/a", "a/", "a//b", "a/../b", "a/.b", "..", "", "a/b\\c", "-", "a/-", "-/a"] {
            assert!(relative_path(bad).is_err(), "{bad}");
        }
    }

    /// Lists all paths below a folder.
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

    /// Harmful and harmless names.
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
        fn accepts_no_name_that_leaves_the_folder_or_hides(name in name()) {
            let around = tempfile::tempdir().unwrap();
            let folder = around.path().join("folder");
            fs::create_dir(&folder).unwrap();
            let Ok(path) = relative_path(&name) else { return Ok(()) };
            let target = folder.join(&path);
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::write(target, "").unwrap();

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
        fn accepts_no_deceptive_name(
            before in "[a-z]{1,3}",
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
        fn escapes_to_one_line_without_control_characters(bytes: Vec<u8>) {
            let escaped = escape_bytes(&bytes);
            prop_assert!(!escaped.chars().any(|c| c.is_control() || is_invisible(c)));
        }
    }
}
