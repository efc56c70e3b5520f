//! `handout time`.
