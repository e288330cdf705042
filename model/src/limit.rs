//! Limits on requests that the edge and the code behind it have to agree on.

/// Mounts of one container, those asked for and the volumes of its image together. The kernel
/// allows 100,000 in a mount namespace (`fs.mount-max`); pods have tens.
pub const MAX_MOUNTS: usize = 1000;

/// Devices of one container, those in a directory counted one by one. A cgroup takes 1024 rules, of
/// which a few are the default ones; no real container comes near.
pub const MAX_DEVICES: usize = 1000;

/// The longest path in bytes, without its NUL: `PATH_MAX` of <linux/limits.h>.
pub const MAX_PATH_BYTES: usize = 4095;

/// The longest name in bytes of a thing or a user; Kubernetes' own have at most 253.
pub const MAX_NAME_BYTES: usize = 1024;
