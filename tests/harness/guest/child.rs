#![expect(
    unsafe_code,
    reason = "a child is told between fork and exec to die with its parent"
)]
//! Processes that do not outlive the test that started them.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Child, Command},
};

use rustix::process::{Signal, set_parent_process_death_signal};

/// Starts `command`; the kernel kills it when the thread that called this ends, however it ends.
///
/// A test that is aborted, or killed for taking too long, runs no destructors.
///
/// # Panics
///
/// If it does not start.
pub(super) fn spawn(command: &mut Command) -> Child {
    let die_with_parent = || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec of a process that may have other threads, the closure makes one
    // system call; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(die_with_parent) };
    match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("{command:?} does not start: {error}"),
    }
}
