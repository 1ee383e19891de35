//! A connection's bytes: [`Stream`] sends them, [`Reader`] receives them through a buffer.
//!
//! Threads: a stream is shared; a reader has one user. Both wait in the engine of whichever worker calls.

use std::sync::Arc;

use blockcore::engine::{Errno, Socket};
use blockcore::io::IoContext;
use blockcore::io::buffer::Segments;

/// As much is received at once, so that many small messages cost one system call.
const BUFFER_BYTES: usize = 64 << 10;

/// Both directions of a connection.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
}

impl Stream {
    /// A stream of plain bytes.
    pub fn plain(socket: Socket) -> Arc<Self> {
        Arc::new(Self { socket })
    }

    /// Sends all bytes. One call at a time.
    ///
    /// # Errors
    ///
    /// The host's; some may have been sent.
    pub async fn send(&self, context: &IoContext, bytes: Segments) -> Result<(), Errno> {
        self.socket.send(context, bytes).await
    }

    /// Sends all bytes. One call at a time.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub async fn send_bytes(&self, context: &IoContext, bytes: &[u8]) -> Result<(), Errno> {
        self.send(context, copied(bytes)).await
    }

    /// Ends the connection in both directions; who waits for it is told.
    pub fn shut_down(&self) {
        self.socket.shut_down();
    }
}

/// Memory with these bytes.
pub fn copied(bytes: &[u8]) -> Segments {
    let segments = Segments::allocate(bytes.len(), 1);
    segments.copy_from(bytes);
    segments
}

/// See the module's header.
pub struct Reader {
    stream: Arc<Stream>,
    buffer: Vec<u8>,
    /// What of the buffer was received and not taken yet.
    begin: usize,
    end: usize,
}

impl Reader {
    /// A reader of what arrives from now on.
    pub fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            buffer: vec![0; BUFFER_BYTES],
            begin: 0,
            end: 0,
        }
    }

    /// The stream below.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Whether something was received that nobody has taken.
    pub fn has_more(&self) -> bool {
        self.begin < self.end
    }

    /// Receives as many bytes as there is room for.
    ///
    /// # Errors
    ///
    /// The host's; `ECONNRESET` if the other side has ended before. What was received of it is lost.
    pub async fn exact(&mut self, context: &IoContext, into: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            if self.begin == self.end {
                self.fill(context).await?;
            }
            let some = (into.len() - done).min(self.end - self.begin);
            let from = &self.buffer[self.begin..self.begin + some];
            into[done..done + some].copy_from_slice(from);
            self.begin += some;
            done += some;
        }
        Ok(())
    }

    /// As [`exact`](Self::exact), an array.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn array<const N: usize>(&mut self, context: &IoContext) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.exact(context, &mut bytes).await?;
        Ok(bytes)
    }

    /// As [`exact`](Self::exact), so many bytes, which the caller has bounded.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn vec(&mut self, context: &IoContext, bytes: usize) -> Result<Vec<u8>, Errno> {
        let mut all = Vec::new();
        // No more memory than has arrived, and a buffer.
        while all.len() < bytes {
            let begin = all.len();
            all.resize(bytes.min(begin + BUFFER_BYTES), 0);
            self.exact(context, &mut all[begin..]).await?;
        }
        Ok(all)
    }

    /// As [`exact`](Self::exact), into segments.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn segments(&mut self, context: &IoContext, into: &Segments) -> Result<(), Errno> {
        let some = (into.bytes() as usize).min(self.end - self.begin);
        into.copy_from(&self.buffer[self.begin..self.begin + some]);
        self.begin += some;
        let mut rest = into.slice(some as u64, into.bytes() - some as u64);
        while !rest.is_empty() {
            let received = self.stream.socket.receive_segments(context, &rest).await?;
            match received {
                0 => return Err(Errno::CONNRESET),
                bytes => rest.skip(bytes),
            }
        }
        Ok(())
    }

    /// Receives bytes that nobody wants.
    ///
    /// # Errors
    ///
    /// As [`exact`](Self::exact).
    pub async fn skip(&mut self, context: &IoContext, mut bytes: u64) -> Result<(), Errno> {
        while bytes > 0 {
            if self.begin == self.end {
                self.fill(context).await?;
            }
            let some = bytes.min((self.end - self.begin) as u64);
            self.begin += some as usize;
            bytes -= some;
        }
        Ok(())
    }

    async fn fill(&mut self, context: &IoContext) -> Result<(), Errno> {
        (self.begin, self.end) = (0, 0);
        let received = self
            .stream
            .socket
            .receive(context, &mut self.buffer)
            .await?;
        if received == 0 {
            return Err(Errno::CONNRESET);
        }
        self.end = received;
        Ok(())
    }
}
