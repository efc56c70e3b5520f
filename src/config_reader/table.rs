//! Reads one table key by key and continues after every fault.
//!
//! A deserializer stops at its first error; an operator wants them all. Each key is requested by
//! name, each fault is reported with its line, and [`Table::finish`] reports the keys that were
//! never requested.

use std::convert::Infallible;
use std::fmt::Display;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::config_reader::probe::Question;
use crate::config_reader::source::{Origin, Reported, Source, Spanned};
use crate::config_reader::values;

/// A table that is being read.
pub struct Table<'a> {
    source: &'a Source,
    /// Its name with those of the tables around it, such as `time.clock`; empty for the root.
    path: String,
    /// Offset of the table in the text.
    offset: usize,
    entries: &'a DeTable<'a>,
    /// The keys that were requested.
    known: Vec<&'static str>,
}

/// The value of a key.
type Entry<'a> = Spanned<&'a DeValue<'a>>;

impl<'a> Table<'a> {
    /// The root of a file.
    pub(crate) fn root(source: &'a Source, entries: &'a DeTable<'a>) -> Self {
        Self { source, path: String::new(), offset: 0, entries, known: Vec::new() }
    }

    /// Returns the folder of relative paths.
    pub(crate) fn base_dir(&self) -> &'a Path {
        self.source.base_dir()
    }

    /// Reports a fault of a key, or of the table if the key is missing.
    pub(crate) fn report(&self, key: &str, message: impl Display) -> Reported {
        self.source.report(&self.origin(key), message)
    }

    /// Reports a fault of the table itself.
    pub(crate) fn report_here(&self, message: impl Display) -> Reported {
        let origin = self.source.origin(self.offset, self.path.clone(), false);
        self.source.report(&origin, message)
    }

    /// Reports an invalid name of this table.
    pub(crate) fn check_name(&self, name: &str) -> Result<(), Reported> {
        values::check_name(name).map_err(|expected| self.report_here(expected))
    }

    /// Reports a fault of a value that was read before.
    pub(crate) fn report_at(&self, origin: &Origin, message: impl Display) -> Reported {
        self.source.report(origin, message)
    }

    /// Asks the probe stage about a key, whose value is `text`.
    pub(crate) fn probe(&self, key: &str, text: &str, question: Question) {
        self.source.probe(self.origin(key), text, question);
    }

    /// Asks the probe stage about a value that was read before.
    pub(crate) fn probe_at(&self, origin: Origin, text: &str, question: Question) {
        self.source.probe(origin, text, question);
    }

    /// Returns the origin of a key, or of its default if it is missing.
    pub(crate) fn origin(&self, key: &str) -> Origin {
        let value = self.entries.get(key);
        let offset = value.map_or(self.offset, |value| value.span().start);
        self.source.origin(offset, self.path_of(key), value.is_none())
    }

    fn path_of(&self, key: &str) -> String {
        let is_bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let key = if !key.is_empty() && key.chars().all(is_bare) {
            key.to_owned()
        } else {
            // Quoted as in the file, and no control character reaches a terminal.
            format!("{key:?}")
        };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }

    fn get(&mut self, key: &'static str) -> Option<Entry<'a>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        let value = self.entries.get(key)?.get_ref();
        Some(Spanned { value, origin: self.origin(key) })
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Returns the names of the tables below `key` without reporting faults.
    pub(crate) fn names(&self, key: &str) -> Vec<&'a str> {
        let table = self.entries.get(key).and_then(|value| value.get_ref().as_table());
        table.into_iter().flatten().map(|(name, _)| &**name.get_ref()).collect()
    }

    /// Reads an optional text and converts it by `parse`, whose error names the expected value.
    pub(crate) fn text<T, E: Display>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, Reported> {
        self.get(key).map(|entry| self.parse(&entry, parse)).transpose()
    }

    /// Reads a text, or else `default`, which is written as in the file.
    pub(crate) fn text_or<T, E: Display>(
        &mut self,
        key: &'static str,
        default: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Reported> {
        match self.get(key) {
            Some(entry) => self.parse(&entry, parse),
            None => parse(default).map_err(|error| {
                self.report(key, format_args!("the default {default:?}: {error}"))
            }),
        }
    }

    /// Reads a text whose key must exist.
    pub(crate) fn required<T, E: Display>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Reported> {
        let value = self.text(key, parse)?;
        value.ok_or_else(|| self.report(key, format_args!("missing; expected {expected}")))
    }

    /// Reads a path that the probe stage checks; a relative one begins at [`Self::base_dir`].
    pub(crate) fn checked_path<T: 'static>(
        &mut self,
        key: &'static str,
        check: fn(&Path) -> Result<T, String>,
    ) -> Result<Option<PathBuf>, Reported> {
        let base_dir = self.base_dir();
        self.located_path(key, |text| base_dir.join(text), check)
    }

    /// Reads a path that `locate` derives from the text, and that the probe stage checks.
    pub(crate) fn located_path<T: 'static>(
        &mut self,
        key: &'static str,
        locate: impl FnOnce(&str) -> PathBuf,
        check: fn(&Path) -> Result<T, String>,
    ) -> Result<Option<PathBuf>, Reported> {
        let Some(text) = self.text(key, |text| Ok::<_, Infallible>(text.to_owned()))? else {
            return Ok(None);
        };
        let path = locate(&text);
        let checked = path.clone();
        let question = Question::Check(Box::new(move || check(&checked).map(drop)));
        self.probe(key, &text, question);
        Ok(Some(path))
    }

    /// Reads an optional list of texts. Each element has its own origin.
    pub(crate) fn texts<T, E: Display>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Result<Option<Vec<Spanned<T>>>, Reported> {
        let Some(list) = self.get(key) else { return Ok(None) };
        let DeValue::Array(elements) = list.value else {
            return Err(self.report_type(&list, "an array of strings"));
        };
        let parsed = elements.iter().enumerate().map(|(index, element)| {
            let key = format!("{}[{index}]", list.origin.key);
            let origin = self.source.origin(element.span().start, key, false);
            let element = Spanned { value: element.get_ref(), origin };
            let value = self.parse(&element, &parse)?;
            Ok(Spanned { value, origin: element.origin })
        });
        // Collected first to report the faults of all elements.
        parsed.collect::<Vec<_>>().into_iter().collect::<Result<_, _>>().map(Some)
    }

    /// Reads a list of texts, or else returns a list of `default` alone.
    pub(crate) fn texts_or<T, E: Display>(
        &mut self,
        key: &'static str,
        default: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Result<Vec<Spanned<T>>, Reported> {
        if let Some(list) = self.texts(key, &parse)? {
            return Ok(list);
        }
        let value = self.text_or(key, default, parse)?;
        Ok(vec![Spanned { value, origin: self.origin(key) }])
    }

    pub(crate) fn boolean_or(
        &mut self,
        key: &'static str,
        default: bool,
    ) -> Result<bool, Reported> {
        let Some(entry) = self.get(key) else { return Ok(default) };
        entry.value.as_bool().ok_or_else(|| self.report_type(&entry, "true or false"))
    }

    /// Reads an integer within `range`, or else returns `default`.
    pub(crate) fn integer_or(
        &mut self,
        key: &'static str,
        default: u32,
        range: RangeInclusive<u32>,
    ) -> Result<u32, Reported> {
        let Some(entry) = self.get(key) else { return Ok(default) };
        let Some(integer) = entry.value.as_integer() else {
            return Err(self.report_type(&entry, "an integer"));
        };
        let number = u32::from_str_radix(integer.as_str(), integer.radix()).ok();
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            let message = format_args!("expected a number from {least} to {most}");
            self.report_at(&entry.origin, message)
        })
    }

    /// Reads an integer of at least one, or else returns `default`.
    pub(crate) fn number_or(
        &mut self,
        key: &'static str,
        default: NonZeroU32,
    ) -> Result<NonZeroU32, Reported> {
        let number = self.integer_or(key, default.get(), 1..=u32::MAX)?;
        Ok(NonZeroU32::new(number).expect("the range excludes zero"))
    }

    /// Reads a table of texts whose keys the operator chooses; empty if it does not exist. The
    /// texts may be secrets, so diagnostics do not repeat them.
    pub(crate) fn entries<T, E: Display>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str, &str) -> Result<T, E>,
    ) -> Result<Vec<T>, Reported> {
        let Some(entry) = self.get(key) else { return Ok(Vec::new()) };
        let table = self.below(key, entry.value, self.offset_of(key))?;
        let parsed = table.entries.iter().map(|(key, value)| {
            let key: &str = key.get_ref();
            let Some(text) = value.get_ref().as_str() else {
                let found = type_name(value.get_ref());
                return Err(table.report(key, format_args!("expected a string, found {found}")));
            };
            parse(key, text).map_err(|error| table.report(key, error))
        });
        parsed.collect::<Vec<_>>().into_iter().collect()
    }

    /// Returns the table below `key`, if it exists.
    pub(crate) fn table(&mut self, key: &'static str) -> Option<Table<'a>> {
        let entry = self.get(key)?;
        self.below(key, entry.value, self.offset_of(key)).ok()
    }

    /// Returns the tables below `key`, whose names the operator chooses.
    pub fn tables(&mut self, key: &'static str) -> Vec<(&'a str, Table<'a>)> {
        let Some(table) = self.table(key) else { return Vec::new() };
        let below = table.entries.iter().filter_map(|(name, value)| {
            let below = table.below(name.get_ref(), value.get_ref(), name.span().start).ok()?;
            Some((&**name.get_ref(), below))
        });
        below.collect()
    }

    fn below(
        &self,
        key: &str,
        value: &'a DeValue<'a>,
        offset: usize,
    ) -> Result<Table<'a>, Reported> {
        let path = self.path_of(key);
        let DeValue::Table(entries) = value else {
            let origin = self.source.origin(offset, path, false);
            return Err(self.report_type(&Spanned { value, origin }, "a table"));
        };
        Ok(Table { source: self.source, path, offset, entries, known: Vec::new() })
    }

    fn offset_of(&self, key: &str) -> usize {
        self.entries.get(key).map_or(self.offset, |value| value.span().start)
    }

    /// Reports every key that was not requested.
    pub(crate) fn finish(self) {
        for (key, _) in self.entries {
            let name: &str = key.get_ref();
            if !self.known.contains(&name) {
                let known = self.known.join(", ");
                let message = format_args!("unknown key; expected one of {known}");
                let origin = self.source.origin(key.span().start, self.path_of(name), false);
                self.source.report(&origin, message);
            }
        }
    }

    fn parse<T, E: Display>(
        &self,
        entry: &Entry<'_>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Reported> {
        let Some(text) = entry.value.as_str() else {
            return Err(self.report_type(entry, "a string"));
        };
        parse(text)
            .map_err(|error| self.report_at(&entry.origin, format_args!("{text:?}: {error}")))
    }

    fn report_type(&self, entry: &Entry<'_>, expected: &str) -> Reported {
        let found = type_name(entry.value);
        self.report_at(&entry.origin, format_args!("expected {expected}, found {found}"))
    }
}

fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config_reader::{Diagnostic, values_of};

    /// Reads `text` by `read` and returns its value and the diagnostics.
    fn read<T>(text: &str, read: impl FnOnce(&mut Table<'_>) -> T) -> (T, Vec<Diagnostic>) {
        let source = Source::file("x.toml".to_owned(), text, "/base".into());
        let entries = source.parse(text);
        let mut table = Table::root(&source, &entries);
        let value = read(&mut table);
        table.finish();
        (value, source.into_parts().0)
    }

    fn messages(diagnostics: &[Diagnostic]) -> Vec<String> {
        diagnostics.iter().map(ToString::to_string).collect()
    }

    #[expect(clippy::unnecessary_wraps, reason = "the signature of a parser")]
    fn any(text: &str) -> Result<String, Infallible> {
        Ok(text.to_owned())
    }

    #[test]
    fn reads_values_and_defaults() {
        let text = "a = \"x\"\nb = true\nc = 0x10\nd = [\"y\", \"z\"]\n";
        let (values, diagnostics) = read(text, |table| {
            let texts = table.texts("d", any).unwrap();
            let numbers = (table.integer_or("c", 1, 0..=20), table.integer_or("n", 7, 0..=9));
            let flags = (table.boolean_or("b", false), table.boolean_or("m", true));
            (table.text_or("a", "", any), table.text_or("k", "default", any), numbers, flags, texts)
        });
        let (a, k, numbers, flags, texts) = values;
        assert_eq!((a, k), (Ok("x".to_owned()), Ok("default".to_owned())));
        assert_eq!((numbers, flags), ((Ok(16), Ok(7)), (Ok(true), Ok(true))));
        assert_eq!(values_of(texts), ["y", "z"]);
        assert!(diagnostics.is_empty(), "{diagnostics:?}");
    }

    #[test]
    fn reports_every_fault_with_its_line_and_key() {
        let text = "a = 1\n[t]\nlist = [\"x\", 2,\n3]\nnumber = 99\njunk = 0\n[t.u]\n";
        let ((), diagnostics) = read(text, |root| {
            assert!(root.text("a", any).is_err());
            let mut table = root.table("t").unwrap();
            assert!(table.texts("list", any).is_err());
            assert!(table.integer_or("number", 1, 0..=9).is_err());
            assert!(table.required("missing", "a word", any).is_err());
            assert!(table.boolean_or("u", true).is_err());
            table.finish();
        });
        assert_eq!(
            messages(&diagnostics),
            [
                "x.toml:1: a: expected a string, found an integer",
                "x.toml:3: t.list[1]: expected a string, found an integer",
                "x.toml:4: t.list[2]: expected a string, found an integer",
                "x.toml:5: t.number: expected a number from 0 to 9",
                "x.toml:2: t.missing: missing; expected a word",
                "x.toml:7: t.u: expected true or false, found a table",
                "x.toml:6: t.junk: unknown key; expected one of list, number, missing, u",
            ]
        );
        assert!(diagnostics.iter().all(|diagnostic| !diagnostic.is_transient));
    }

    #[test]
    fn never_repeats_the_texts_of_free_entries() {
        let text = "headers = { a = \"hush\", \"b c\" = 7 }\n";
        let refuse = |_: &str, _: &str| Err::<(), _>("expected another text");
        let (entries, diagnostics) = read(text, |table| table.entries("headers", refuse));
        assert_eq!(entries, Err(Reported));
        let expected = [
            "x.toml:1: headers.a: expected another text",
            "x.toml:1: headers.\"b c\": expected a string, found an integer",
        ];
        assert_eq!(messages(&diagnostics), expected);
        let (entries, diagnostics) =
            read("headers = 1\n", |table| table.entries("headers", refuse));
        assert_eq!(entries, Err(Reported));
        assert_eq!(
            messages(&diagnostics),
            ["x.toml:1: headers: expected a table, found an integer"]
        );
    }

    #[test]
    fn keeps_the_origin_of_each_value() {
        let (origins, _) = read("\n[t]\na = [\n\"x\",\n\"y\"]\n", |root| {
            let mut table = root.table("t").unwrap();
            let mut values = table.texts_or("a", "z", any).unwrap();
            values.extend(table.texts_or("b", "z", any).unwrap());
            let origins = values.into_iter().map(|value| value.origin);
            origins.map(|o| (o.position.to_string(), o.key, o.is_default)).collect::<Vec<_>>()
        });
        let origin = |line: u32, key: &str, is_default| {
            (format!("x.toml:{line}"), key.to_owned(), is_default)
        };
        let expected =
            [origin(4, "t.a[0]", false), origin(5, "t.a[1]", false), origin(2, "t.b", true)];
        assert_eq!(origins, expected);
    }

    #[test]
    fn drops_the_diagnostics_of_lines_that_are_not_toml() {
        let ((), diagnostics) = read("a = = 1\nb = 2\n", |_| {});
        let lines: Vec<_> = messages(&diagnostics);
        assert!(lines.iter().all(|line| !line.starts_with("x.toml:1: a")), "{lines:?}");
        assert!(lines.iter().any(|line| line.starts_with("x.toml:1: not TOML: ")), "{lines:?}");
        assert!(lines.iter().any(|line| line.starts_with("x.toml:2: b: unknown key")), "{lines:?}");
    }

    #[test]
    fn leaves_paths_to_the_probe_stage() {
        let source = Source::file("x.toml".to_owned(), "", "/base".into());
        let entries = source.parse("ca = \"roots.pem\"");
        let mut table = Table::root(&source, &entries);
        let refuse = |path: &Path| Err::<(), _>(format!("{} is refused", path.display()));
        let path = table.checked_path("ca", refuse).unwrap();
        assert_eq!(path, Some("/base/roots.pem".into()));
        let (diagnostics, mut probes) = source.into_parts();
        assert!(diagnostics.is_empty());
        let probe = probes.remove(0);
        assert_eq!((probe.origin.key.as_str(), probe.text.as_str()), ("ca", "roots.pem"));
        let Question::Check(check) = probe.question else { panic!() };
        assert_eq!(check(), Err("/base/roots.pem is refused".to_owned()));
    }
}
