//! Reading one table key by key, going on after every fault.
//!
//! A deserializer stops at its first error; an operator wants them all. So each key is asked for
//! by name, what is wrong with it is noted with its line, and at the end whatever nobody asked for
//! is a fault too.

#![allow(clippy::missing_errors_doc, reason = "`Noted` is always the same: a fault was noted")]

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::Display;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;

use toml::de::{DeTable, DeValue};

use crate::config_reader::diagnostic::{Fault, Place};

/// A fault was noted; there is nothing more to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noted;

/// Where tables come from, and where their faults are noted.
#[derive(Debug)]
pub struct Source {
    origin: Origin,
    faults: RefCell<Vec<Fault>>,
}

#[derive(Debug)]
enum Origin {
    File {
        name: String,
        /// Where its lines end, in bytes.
        line_ends: Vec<usize>,
    },
    Argument(String),
}

impl Source {
    /// A file with its text.
    pub fn file(name: String, text: &str) -> Self {
        let line_ends = text.match_indices('\n').map(|(end, _)| end).collect();
        Self { origin: Origin::File { name, line_ends }, faults: RefCell::default() }
    }

    /// An argument of the command line.
    pub fn argument(argument: String) -> Self {
        Self { origin: Origin::Argument(argument), faults: RefCell::default() }
    }

    /// Notes a fault at a byte of the text.
    pub fn fault(&self, offset: usize, key: String, problem: impl Display) -> Noted {
        let place = match &self.origin {
            Origin::File { name, line_ends } => {
                Place::Line(name.clone(), 1 + line_ends.partition_point(|end| *end < offset))
            }
            Origin::Argument(argument) => Place::Argument(argument.clone()),
        };
        self.faults.borrow_mut().push(Fault { place, key, problem: problem.to_string() });
        Noted
    }

    /// The faults noted so far, in the order of their lines.
    pub fn into_faults(self) -> Vec<Fault> {
        let mut faults = self.faults.into_inner();
        // What a line that is not TOML seems to say is not worth a fault of its own.
        let broken = |fault: &&Fault| fault.key.is_empty();
        let broken: HashSet<_> =
            faults.iter().filter(broken).map(|fault| fault.place.clone()).collect();
        faults.retain(|fault| fault.key.is_empty() || !broken.contains(&fault.place));
        faults.sort();
        faults.dedup();
        faults
    }
}

/// A table that is being read.
#[derive(Debug)]
pub struct Table<'a> {
    source: &'a Source,
    /// The names of the tables around it and its own, as `time.clock`.
    path: String,
    /// Where it begins in the text.
    offset: usize,
    entries: &'a DeTable<'a>,
    asked: Vec<&'static str>,
}

/// A value with its key and its place, to which a fault can be noted later.
#[derive(Debug, Clone)]
pub struct Located<'a, T> {
    /// The value.
    pub value: T,
    source: &'a Source,
    key: String,
    offset: usize,
}

impl<'a, T> Located<'a, T> {
    /// Notes a fault of this value.
    pub fn fault(&self, problem: impl Display) -> Noted {
        self.source.fault(self.offset, self.key.clone(), problem)
    }

    /// Every value of a list of them, each with the same place.
    pub fn each<U: Clone>(&self) -> Vec<Located<'a, U>>
    where
        T: AsRef<[U]>,
    {
        self.value.as_ref().iter().map(|value| self.with(value.clone())).collect()
    }

    /// The same place with another value.
    fn with<U>(&self, value: U) -> Located<'a, U> {
        Located { value, source: self.source, key: self.key.clone(), offset: self.offset }
    }
}

impl<'a> Located<'a, &'a DeValue<'a>> {
    /// The value as text, through `parse`, whose error says what was expected.
    fn parse<T, E: Display>(&self, parse: impl FnOnce(&str) -> Result<T, E>) -> Result<T, Noted> {
        match self.value.as_str() {
            None => Err(self.wrong_type("a string")),
            Some(text) => {
                parse(text).map_err(|error| self.fault(format_args!("{text:?}: {error}")))
            }
        }
    }

    fn wrong_type(&self, expected: &str) -> Noted {
        self.fault(format_args!("expected {expected}, found {}", a_type(self.value)))
    }
}

fn a_type(value: &DeValue<'_>) -> &'static str {
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

impl<'a> Table<'a> {
    /// The outermost table.
    pub fn root(source: &'a Source, entries: &'a DeTable<'a>) -> Self {
        Self { source, path: String::new(), offset: 0, entries, asked: Vec::new() }
    }

    /// A table by its path.
    pub fn named(source: &'a Source, path: String, entries: &'a DeTable<'a>) -> Self {
        Self { source, path, offset: 0, entries, asked: Vec::new() }
    }

    fn key(&self, name: &str) -> String {
        let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        // Quoted as in the file, and so that no control character reaches a terminal.
        let is_bare = !name.is_empty() && name.chars().all(bare);
        let name = if is_bare { name.to_owned() } else { format!("{name:?}") };
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    /// Notes a fault of one of its keys, or of the table if it does not have that key.
    pub fn fault(&self, name: &str, problem: impl Display) -> Noted {
        self.place(name).fault(problem)
    }

    /// The place of one of its keys, or of the table if it does not have that key.
    pub fn place(&self, name: &str) -> Located<'a, ()> {
        let offset =
            self.entries.get_key_value(name).map_or(self.offset, |(_, value)| value.span().start);
        Located { value: (), source: self.source, key: self.key(name), offset }
    }

    /// Notes a fault of the table itself.
    pub fn fault_here(&self, problem: impl Display) -> Noted {
        self.source.fault(self.offset, self.path.clone(), problem)
    }

    fn ask(&mut self, name: &'static str) -> Option<Located<'a, &'a DeValue<'a>>> {
        if !self.asked.contains(&name) {
            self.asked.push(name);
        }
        let value = self.entries.get(name)?;
        Some(Located {
            value: value.get_ref(),
            source: self.source,
            key: self.key(name),
            offset: value.span().start,
        })
    }

    /// Whether a key is there.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The names of the tables below `name`; nothing is said of what is no table.
    pub fn names(&self, name: &str) -> Vec<&'a str> {
        let table = self.entries.get(name).map(toml::Spanned::get_ref);
        let table = table.and_then(DeValue::as_table);
        table.into_iter().flatten().map(|(key, _)| &**key.get_ref()).collect()
    }

    /// A text, if the key is there, through `parse`.
    pub fn text<T, E: Display>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, Noted> {
        self.ask(name).map(|value| value.parse(parse)).transpose()
    }

    /// A text, or else `default`, which is written as a user would write it.
    pub fn text_or<T, E: Display>(
        &mut self,
        name: &'static str,
        default: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Noted> {
        match self.ask(name) {
            Some(value) => value.parse(parse),
            None => parse(default).map_err(|error| {
                self.fault(name, format_args!("the default {default:?}: {error}"))
            }),
        }
    }

    /// A text that must be there.
    pub fn required<T, E: Display>(
        &mut self,
        name: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Noted> {
        match self.text(name, parse)? {
            Some(value) => Ok(value),
            None => Err(self.fault(name, format_args!("missing; expected {expected}"))),
        }
    }

    /// A list of texts, or else a list of `default` alone; every element keeps its place.
    pub fn texts_or<T, E: Display>(
        &mut self,
        name: &'static str,
        default: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Result<Vec<Located<'a, T>>, Noted> {
        if let Some(list) = self.texts(name, &parse)? {
            return Ok(list);
        }
        let value = self.text_or(name, default, parse)?;
        let (source, key) = (self.source, self.key(name));
        Ok(vec![Located { value, source, key, offset: self.offset }])
    }

    /// A list of texts, if the key is there; every element keeps its place.
    pub fn texts<T, E: Display>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Result<Option<Vec<Located<'a, T>>>, Noted> {
        let Some(list) = self.ask(name) else { return Ok(None) };
        let DeValue::Array(elements) = list.value else {
            return Err(list.wrong_type("an array of strings"));
        };
        let parsed = elements.iter().enumerate().map(|(index, element)| {
            let element = Located {
                value: element.get_ref(),
                source: self.source,
                key: format!("{}[{index}]", list.key),
                offset: element.span().start,
            };
            element.parse(&parse).map(|value| element.with(value))
        });
        // All of them first, so that every fault is noted.
        parsed.collect::<Vec<_>>().into_iter().collect::<Result<_, _>>().map(Some)
    }

    /// A truth value, or else `default`.
    pub fn boolean_or(&mut self, name: &'static str, default: bool) -> Result<bool, Noted> {
        match self.ask(name) {
            None => Ok(default),
            Some(value) => value.value.as_bool().ok_or_else(|| value.wrong_type("true or false")),
        }
    }

    /// A number of at least one, or else `default`.
    pub fn number_or(
        &mut self,
        name: &'static str,
        default: NonZeroU32,
    ) -> Result<NonZeroU32, Noted> {
        let Some(value) = self.ask(name) else { return Ok(default) };
        let Some(integer) = value.value.as_integer() else {
            return Err(value.wrong_type("an integer"));
        };
        u32::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(NonZeroU32::new)
            .ok_or_else(|| value.fault(format_args!("expected a number from 1 to {}", u32::MAX)))
    }

    /// A number within `range`, or else `default`.
    pub fn integer_or(
        &mut self,
        name: &'static str,
        default: u32,
        range: RangeInclusive<u32>,
    ) -> Result<u32, Noted> {
        let Some(value) = self.ask(name) else { return Ok(default) };
        let Some(integer) = value.value.as_integer() else {
            return Err(value.wrong_type("an integer"));
        };
        let number = u32::from_str_radix(integer.as_str(), integer.radix()).ok();
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            value.fault(format_args!("expected a number from {least} to {most}"))
        })
    }

    /// A table below this one of keys of the operator's with texts, which may be secrets and are
    /// not told in faults; nothing if it is not there.
    pub fn entries<T, E: Display>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str, &str) -> Result<T, E>,
    ) -> Result<Vec<T>, Noted> {
        let Some(table) = self.table(name) else {
            // That it is no table was noted.
            return if self.entries.contains_key(name) { Err(Noted) } else { Ok(Vec::new()) };
        };
        let parsed = table.entries.iter().map(|(key, value)| {
            let key: &str = key.get_ref();
            match value.get_ref().as_str() {
                None => {
                    let found = a_type(value.get_ref());
                    Err(table.fault(key, format_args!("expected a string, found {found}")))
                }
                Some(text) => parse(key, text).map_err(|error| table.fault(key, error)),
            }
        });
        parsed.collect::<Vec<_>>().into_iter().collect()
    }

    /// A table below this one, if it is there.
    pub fn table(&mut self, name: &'static str) -> Option<Table<'a>> {
        let value = self.ask(name)?;
        self.below(name, value.value, value.offset)
    }

    /// The tables below `name`, each with a name of the operator's.
    pub fn tables(&mut self, name: &'static str) -> Vec<(&'a str, Table<'a>)> {
        let Some(table) = self.table(name) else { return Vec::new() };
        let below = table.entries.iter().filter_map(|(key, value)| {
            let name: &'a str = key.get_ref();
            let table = table.below(name, value.get_ref(), key.span().start)?;
            Some((name, table))
        });
        below.collect()
    }

    fn below(&self, name: &str, value: &'a DeValue<'a>, offset: usize) -> Option<Table<'a>> {
        let path = self.key(name);
        let DeValue::Table(entries) = value else {
            let value = Located { value, source: self.source, key: path, offset };
            value.wrong_type("a table");
            return None;
        };
        Some(Table { source: self.source, path, offset, entries, asked: Vec::new() })
    }

    /// Notes every key that nobody asked for. Every table must end with this.
    pub fn finish(self) {
        for (key, _) in self.entries {
            let name: &str = key.get_ref();
            if !self.asked.contains(&name) {
                let known = self.asked.join(", ");
                let problem = format_args!("unknown key; expected one of {known}");
                self.source.fault(key.span().start, self.key(name), problem);
            }
        }
    }
}
