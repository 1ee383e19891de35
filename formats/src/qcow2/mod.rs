//! Driver `qcow2`: a disk in clusters of an image file, with what that allows: it grows as it is
//! written, keeps only what differs from its backing image, has snapshots, and can be compressed.
//!
//! | what | where |
//! |---|---|
//! | what lies where in an image (pure) | `layout/` |

#[expect(dead_code, reason = "the driver that uses it is being built")]
mod layout;
