//! Names that a server chose: `std::path` is asked whether one that is taken leaves its folder or
//! hides; and whatever is printed is one line.
#![no_main]

use std::path::{Component, Path};

use handout::internals::{escape, escape_bytes, file_name, last_component, relative_path};
use handout_fuzz::is_one_line;
use libfuzzer_sys::fuzz_target;

fn is_visible(component: Component<'_>) -> bool {
    matches!(component, Component::Normal(part) if !part.as_encoded_bytes().starts_with(b"."))
}

fuzz_target!(|bytes: &[u8]| {
    let escaped = escape_bytes(bytes);
    assert!(is_one_line(&escaped), "{escaped:?}");
    assert_eq!(escape(&escaped), escaped);
    let Ok(name) = str::from_utf8(bytes) else { return };
    assert_eq!(escape(name), escaped);

    if let Ok(taken) = file_name(name) {
        let components: Vec<_> = Path::new(taken).components().collect();
        assert_eq!(components, [Component::Normal(name.as_ref())]);
        assert!(is_visible(components[0]) && name.len() <= 255);
        assert!(is_one_line(name) && !name.contains('\\'), "{name:?}");
        assert_eq!(relative_path(name).as_deref(), Ok(Path::new(name)));
        assert_eq!(last_component(name), Ok(name));
    }
    if let Ok(path) = relative_path(name) {
        assert!(path.components().next().is_some() && path.components().all(is_visible));
        assert_eq!(path.as_os_str(), name);
        assert_eq!(last_component(name).ok(), path.file_name().and_then(|last| last.to_str()));
    }
    if let Ok(last) = last_component(name) {
        assert_eq!(file_name(last), Ok(last));
        assert!(name.ends_with(last));
    }
});
