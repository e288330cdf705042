//! Plans by specs.
