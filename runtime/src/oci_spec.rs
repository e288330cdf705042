//! The OCI runtime spec of a container, from what was asked for and what the image says.
