//! Integration tests' fixtures.
