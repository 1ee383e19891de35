//! What every test needs: a daemon to talk to, front-ends to talk with.

pub mod daemon;
pub mod frontend;
pub mod load;
pub mod random;
