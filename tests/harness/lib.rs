//! What every test needs: a daemon to talk to, front-ends to talk with.

pub mod driver;
pub mod libblkio;
pub mod model;
pub mod peer;
pub mod random;
