//! What every test needs: a daemon to talk to, front-ends to talk with.

pub mod guest;
pub mod model;
