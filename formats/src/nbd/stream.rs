//! A connection's bytes: [`Stream`] sends them, [`Reader`] receives them through a buffer.
//!
//! Threads: a stream is shared; a reader has one user. Both wait in the engine of whichever worker calls.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use blockcore::Error;
use blockcore::engine::{Errno, Socket};
use blockcore::io::IoContext;
use blockcore::io::buffer::Segments;
use rustls::Connection;

/// As much is received at once, so that many small messages cost one system call.
const BUFFER_BYTES: usize = 64 << 10;

/// As much is encrypted at once.
const CHUNK_BYTES: u64 = 64 << 10;
/// As much is received at once of what is to be decrypted: a record, and a little more.
const RECORD_BYTES: usize = 17 << 10;

/// Both directions of a connection.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    tls: Option<Mutex<Tls>>,
}

/// What encrypts. Its lock is held over memory operations only.
#[derive(Debug)]
struct Tls {
    connection: Connection,
    /// What was received and is not decrypted yet.
    incoming: Vec<u8>,
}

impl Tls {
    /// What is to be sent by now.
    fn outgoing(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.connection.wants_write() {
            let written = self.connection.write_tls(&mut bytes);
            written.expect("a vector takes all");
        }
        bytes
    }

    /// Decrypts something of what was received; whether there was anything.
    fn decrypt(&mut self) -> Result<bool, rustls::Error> {
        if self.incoming.is_empty() {
            return Ok(false);
        }
        let taken = self.connection.read_tls(&mut &*self.incoming);
        let taken = taken.map_err(|error| rustls::Error::General(error.to_string()))?;
        self.incoming.drain(..taken);
        self.connection.process_new_packets()?;
        Ok(taken > 0)
    }
}

impl Stream {
    /// A stream of plain bytes.
    pub fn plain(socket: Socket) -> Arc<Self> {
        Arc::new(Self { socket, tls: None })
    }

    /// An encrypted stream over the same socket, once both sides have agreed on keys. Of what the other
    /// side sent nothing was received yet.
    ///
    /// # Errors
    ///
    /// What the two do not agree on, or who the other is not.
    pub async fn encrypted(
        &self,
        context: &IoContext,
        mut connection: Connection,
    ) -> Result<Arc<Self>, Error> {
        connection.set_buffer_limit(None);
        let mut tls = Tls {
            connection,
            incoming: Vec::new(),
        };
        let lost = |errno| Error::host("TLS handshake failed: the connection is lost", errno);
        loop {
            let outgoing = tls.outgoing();
            self.send_bytes(context, &outgoing).await.map_err(lost)?;
            if !tls.connection.is_handshaking() {
                break;
            }
            let decrypted = match tls.decrypt() {
                Ok(decrypted) => decrypted,
                Err(error) => {
                    // The other side is told why.
                    let outgoing = tls.outgoing();
                    let _ = self.send_bytes(context, &outgoing).await;
                    return Err(Error::invalid(format!("TLS handshake failed: {error}")));
                }
            };
            if decrypted {
                continue;
            }
            let mut bytes = vec![0; RECORD_BYTES];
            match self
                .socket
                .receive(context, &mut bytes)
                .await
                .map_err(lost)?
            {
                0 => return Err(lost(Errno::CONNRESET)),
                received => tls.incoming.extend(&bytes[..received]),
            }
        }
        Ok(Arc::new(Self {
            socket: self.socket.clone(),
            tls: Some(Mutex::new(tls)),
        }))
    }

    /// Receives what is there, and waits if that is nothing. Zero is the end.
    async fn receive(&self, context: &IoContext, into: &mut [u8]) -> Result<usize, Errno> {
        let Some(tls) = &self.tls else {
            return self.socket.receive(context, into).await;
        };
        let wrong = |error: &dyn std::fmt::Display| {
            tracing::debug!(%error, "an encrypted connection is broken");
            Errno::PROTO
        };
        let mut bytes = Vec::new();
        loop {
            {
                let mut tls = tls.lock().expect("no panic while decrypting");
                loop {
                    match tls.connection.reader().read(into) {
                        Ok(received) => return Ok(received),
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                        // An end that the other side has not announced.
                        Err(_) => return Ok(0),
                    }
                    if !tls.decrypt().map_err(|error| wrong(&error))? {
                        break;
                    }
                }
            }
            bytes.resize(RECORD_BYTES, 0);
            let received = self.socket.receive(context, &mut bytes).await?;
            if received == 0 {
                return Ok(0);
            }
            let mut tls = tls.lock().expect("no panic while decrypting");
            tls.incoming.extend(&bytes[..received]);
        }
    }

    /// Sends all bytes. One call at a time.
    ///
    /// # Errors
    ///
    /// The host's; some may have been sent.
    pub async fn send(&self, context: &IoContext, mut bytes: Segments) -> Result<(), Errno> {
        let Some(tls) = &self.tls else {
            return self.socket.send(context, bytes).await;
        };
        while !bytes.is_empty() {
            let some = bytes.bytes().min(CHUNK_BYTES);
            let plain = bytes.slice(0, some).to_vec();
            let outgoing = {
                let mut tls = tls.lock().expect("no panic while encrypting");
                let written = tls.connection.writer().write_all(&plain);
                written.map_err(|_| Errno::PROTO)?;
                tls.outgoing()
            };
            self.socket.send(context, copied(&outgoing)).await?;
            bytes.skip(some);
        }
        Ok(())
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
        if self.stream.tls.is_some() {
            // Decrypted bytes come through the buffer.
            while !rest.is_empty() {
                self.fill(context).await?;
                let some = rest.bytes().min(self.end as u64);
                rest.copy_from(&self.buffer[..some as usize]);
                self.begin = some as usize;
                rest.skip(some);
            }
            return Ok(());
        }
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
        let received = self.stream.receive(context, &mut self.buffer).await?;
        if received == 0 {
            return Err(Errno::CONNRESET);
        }
        self.end = received;
        Ok(())
    }
}
