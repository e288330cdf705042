//! The CRI v1 wire types and services.
