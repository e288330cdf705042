//! Plain data that the daemon and the shim share.
