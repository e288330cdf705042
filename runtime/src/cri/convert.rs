//! CRI messages into plain data, checked, and back.
