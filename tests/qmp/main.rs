//! The control protocol, beside `qemu-storage-daemon`: the same calls get the same replies.

mod cli;
mod client;
mod compare;
mod disorder;
mod events;
mod guest;
mod jobs;
mod monitors;
mod peers;
mod space;
mod stream;
mod table;
mod typed;
