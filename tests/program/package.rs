//! The file list of the Debian package.

use std::fs;
use std::path::Path;

#[test]
fn packages_only_existing_or_generated_files() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path| fs::read_to_string(project.join(path)).unwrap();
    let makers = read("packaging/deb").replace("$shell", "SHELL") + &read("examples/man.rs");
    let manifest = read("Cargo.toml");
    let (_, assets) = manifest.split_once("\nassets = [\n").unwrap();
    let (assets, _) = assets.split_once("\n]").unwrap();
    for asset in assets.lines() {
        // A row is also valid JSON.
        let [source, ..]: [String; 3] =
            serde_json::from_str(asset.trim().trim_end_matches(',')).unwrap();
        if let Some(name) = source.strip_prefix("target/package/") {
            let name = [".bash", ".zsh", ".fish"]
                .iter()
                .fold(name.to_owned(), |name, shell| name.replace(shell, ".SHELL"));
            let is_made =
                ["/", "\""].iter().any(|before| makers.contains(&format!("{before}{name}\"")));
            assert!(is_made, "{source}");
        } else if !source.starts_with("target/") {
            // Up to the first pattern character.
            let (folder, name) =
                source.split('*').next().unwrap().rsplit_once('/').unwrap_or((".", &source));
            let mut files = fs::read_dir(project.join(folder)).unwrap();
            let is_named =
                |file: fs::DirEntry| file.file_name().to_str().unwrap().starts_with(name);
            assert!(files.any(|file| is_named(file.unwrap())), "{source}");
        }
    }
}
