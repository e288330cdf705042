//! Messages between the daemon and a shim.
