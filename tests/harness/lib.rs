//! What every test needs: a daemon to talk to, front-ends to talk with.

pub mod daemon;
pub mod driver;
pub mod frontend;
pub mod guest;
pub mod history;
pub mod host;
pub mod libblkio;
pub mod load;
pub mod model;
pub mod overlay;
pub mod pass;
pub mod peer;
pub mod random;
pub mod seeds;
