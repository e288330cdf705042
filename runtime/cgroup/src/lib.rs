//! Cgroups, v1 and v2, cgroupfs driver.
