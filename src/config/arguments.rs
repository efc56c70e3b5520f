//! Services that the command line requests, as a document with one line for each argument.

use serde_json::json;

use crate::config::Sources;
use crate::config_reader::Source;

/// Returns the document, and its source.
pub(super) fn document(sources: &Sources) -> (String, Source) {
    let time = sources.time.iter().map(|address| {
        let listen = json!([address]);
        (format!("--time {address}"), "time", format!("listen = {listen}"))
    });
    let files = sources.files.iter().map(|(address, path)| {
        let (listen, quoted) = (json!([address]), json!(path));
        let table = format!("listen = {listen}, path = {quoted}");
        (format!("--file {address}={path}"), "file", table)
    });
    let (mut text, mut arguments) = (String::new(), Vec::new());
    for (number, (argument, kind, table)) in time.chain(files).enumerate() {
        text += &format!("{kind}.argument-{} = {{ {table} }}\n", number + 1);
        arguments.push(argument);
    }
    // Strings of JSON are strings of TOML, if DEL is escaped, too.
    let text = text.replace('\u{7f}', "\\u007f");
    let source = Source::arguments(arguments, &text);
    (text, source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config_reader::Table;

    #[test]
    fn keeps_any_text_of_an_argument() {
        let path = "a \"b\"\\\n\t\u{7f}\u{1f600}\u{1b}";
        let files = vec![("127.0.0.1:1".to_owned(), path.to_owned())];
        let time = vec!["x\ny".to_owned()];
        let (text, source) = document(&Sources { file: None, time, files });
        let entries = source.parse(&text);
        let mut root = Table::root(&source, &entries);
        let (name, mut table) = root.tables("file").remove(0);
        let read = table.text("path", |text| Ok::<_, String>(text.to_owned()));
        assert_eq!((name, read), ("argument-2", Ok(Some(path.to_owned()))));
        let position = table.origin("path").position.to_string();
        assert_eq!(position, format!("--file 127.0.0.1:1={path}"));
        let (_, table) = root.tables("time").remove(0);
        assert_eq!(table.origin("listen").position.to_string(), "--time x\ny");
        assert_eq!(source.into_parts().0, []);
    }
}
