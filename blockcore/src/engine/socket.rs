//! [`Socket`]: a connection whose bytes are received and sent by tasks.
//!
//! A call is tried at once, and waits in the engine only where the host would have had to wait. So what
//! is there already costs one system call, and a worker never blocks.
//!
//! Threads: any; each waits in its own worker's engine.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown};

use super::{Interest, host};
use crate::io::IoContext;
use crate::io::buffer::Segments;

/// See the module's header.
#[derive(Clone, Debug)]
pub struct Socket {
    fd: Arc<OwnedFd>,
}

impl Socket {
    /// A connected stream socket.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// Receives what is there, and waits if that is nothing. Zero is the end.
    ///
    /// # Errors
    ///
    /// The host's.
    ///
    /// # Cancellation
    ///
    /// Dropped while it waits, nothing was received.
    pub async fn receive(&self, context: &IoContext, into: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match rustix::net::recv(&*self.fd, &mut *into, RecvFlags::DONTWAIT) {
                Ok((bytes, _)) => return Ok(bytes),
                Err(Errno::AGAIN) => self.ready(context, Interest::Receive).await?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// As [`receive`](Self::receive), into segments.
    ///
    /// # Errors
    ///
    /// The host's.
    ///
    /// # Cancellation
    ///
    /// As there.
    pub async fn receive_segments(
        &self,
        context: &IoContext,
        into: &Segments,
    ) -> Result<u64, Errno> {
        loop {
            match host::receive(self.fd.as_fd(), into.list()) {
                Ok(bytes) => return Ok(bytes),
                Err(Errno::AGAIN) => self.ready(context, Interest::Receive).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends all bytes.
    ///
    /// # Errors
    ///
    /// The host's.
    ///
    /// # Cancellation
    ///
    /// Dropped while it waits, some may have been sent.
    pub async fn send(&self, context: &IoContext, mut from: Segments) -> Result<(), Errno> {
        while !from.is_empty() {
            match host::send(self.fd.as_fd(), from.list()) {
                Ok(bytes) => from.skip(bytes),
                Err(Errno::AGAIN) => self.ready(context, Interest::Send).await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends the connection in both directions: who waits for it is told, on whichever worker.
    pub fn shut_down(&self) {
        // One that is not connected any more has ended.
        let _ = rustix::net::shutdown(&*self.fd, Shutdown::Both);
    }

    /// Waits until something can be received or sent.
    ///
    /// # Errors
    ///
    /// The engine's.
    pub async fn ready(&self, context: &IoContext, interest: Interest) -> Result<(), Errno> {
        context.ready(&self.fd, interest).await
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::engine::{EngineChoice, make};

    fn pair() -> (Socket, Socket) {
        let (one, other) = UnixStream::pair().unwrap();
        (Socket::new(one.into()), Socket::new(other.into()))
    }

    #[test]
    fn more_than_the_host_keeps_arrives_whole_in_order_on_each_engine() {
        for choice in [EngineChoice::Threads, EngineChoice::Auto] {
            let context = IoContext::new(make(choice).unwrap());
            let (near, far) = pair();
            let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
            let sent = Segments::allocate(bytes.len(), 1);
            sent.copy_from(&bytes);
            let sender = std::rc::Rc::clone(&context);
            context.spawn(async move { near.send(&sender, sent).await.unwrap() });
            let receiver = std::rc::Rc::clone(&context);
            let count = bytes.len();
            let received = context.block_on(async move {
                let all = Segments::allocate(count, 1);
                let mut rest = all.slice(0, count as u64 - 1);
                while !rest.is_empty() {
                    let some = far.receive_segments(&receiver, &rest).await.unwrap();
                    assert!(some > 0);
                    rest.skip(some);
                }
                let mut last = [0];
                assert_eq!(far.receive(&receiver, &mut last).await, Ok(1));
                all.slice(count as u64 - 1, 1).copy_from(&last);
                all.to_vec()
            });
            assert!(received == bytes);
        }
    }

    #[test]
    fn who_waits_is_told_when_the_connection_is_shut_down_or_forgets_it() {
        for choice in [EngineChoice::Threads, EngineChoice::Auto] {
            let context = IoContext::new(make(choice).unwrap());
            let (near, _far) = pair();
            let (inner, other) = (std::rc::Rc::clone(&context), near.clone());
            context.spawn(async move {
                inner.delay(Duration::from_millis(5)).await;
                other.shut_down();
            });
            let inner = std::rc::Rc::clone(&context);
            let end = context.block_on(async move {
                {
                    // Dropped while it waits.
                    let mut byte = [0];
                    let given_up = std::pin::pin!(near.receive(&inner, &mut byte));
                    let soon = std::pin::pin!(inner.delay(Duration::from_millis(1)));
                    futures_util::future::select(given_up, soon).await;
                }
                near.receive(&inner, &mut [0]).await
            });
            assert_eq!(end, Ok(0));
        }
    }
}
