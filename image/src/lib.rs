//! Images: references, registry, store, unpacking.
