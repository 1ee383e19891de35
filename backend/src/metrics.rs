//! What exports and workers do, in the text form that Prometheus reads, at a socket of its own.
//!
//! `GET /metrics` gives it; anything else is an error. One request a connection, and one connection at a time:
//! whoever scrapes comes every few seconds. A client that is slow is given up after two seconds.
//!
//! Threads: one of its own, which asks the control thread for numbers and waits; the control thread never
//! waits for it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

#[cfg(test)]
use blockcore::io::account::{Account, AccountOptions};
use blockcore::io::account::{AccountSum, Kind};
use blockcore::{Error, ErrorKind};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::daemon::{ControlHandle, Daemon};
use crate::vhost_user::listener::Socket;

/// Before the next client is looked for after one that failed.
const PAUSE: Duration = Duration::from_millis(10);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// How long a client may take to ask, and to read.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than a request has that asks for numbers.
const MAX_REQUEST_BYTES: usize = 8192;

/// Where metrics can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// At a Unix socket.
    Path(PathBuf),
    /// At a port of this host alone.
    Loopback(SocketAddr),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Ok(address) => Err(format!(
                "{address} is not of this host alone, and anybody could read there: use 127.0.0.1, [::1] or the \
                 path of a Unix socket, and a proxy that asks who it is"
            )),
            Err(_) if text.starts_with('/') || text.starts_with('.') => Ok(Self::Path(text.into())),
            Err(_) => Err("an address is 127.0.0.1:PORT, or the path of a Unix socket".to_owned()),
        }
    }
}

/// The socket, which is gone when this is dropped; its thread ends with the process.
pub struct Metrics {
    _socket: Option<Socket>,
}

impl Metrics {
    /// Answers at `address` from now on.
    ///
    /// # Errors
    ///
    /// The host's refusal of the socket or a thread.
    pub fn start(address: &MetricsAddress, control: ControlHandle) -> Result<Self, Error> {
        let failed =
            |error: io::Error| Error::new(ErrorKind::Io, format!("cannot offer metrics: {error}"));
        match address {
            MetricsAddress::Path(path) => {
                let socket = Socket::bind(path)?;
                let listener = socket.listener().map_err(failed)?;
                listener.set_nonblocking(false).map_err(failed)?;
                serve(control, move || listener.accept().map(|(stream, _)| stream))?;
                Ok(Self {
                    _socket: Some(socket),
                })
            }
            MetricsAddress::Loopback(address) => {
                let listener = TcpListener::bind(address).map_err(failed)?;
                serve(control, move || listener.accept().map(|(stream, _)| stream))?;
                Ok(Self { _socket: None })
            }
        }
    }
}

/// Answers those whom `accept` lets in, one after the other, on a thread.
#[expect(clippy::disallowed_methods, reason = "a socket needs a real thread")]
fn serve<S: Read + Write + AsFd>(
    control: ControlHandle,
    mut accept: impl FnMut() -> io::Result<S> + Send + 'static,
) -> Result<(), Error> {
    let answer_all = move || {
        loop {
            // A client that goes away half way has no answer to want.
            let answered = accept().and_then(|mut stream| {
                set_socket_timeout(&stream, Timeout::Recv, Some(PATIENCE))?;
                set_socket_timeout(&stream, Timeout::Send, Some(PATIENCE))?;
                answer(&mut stream, &control)
            });
            match answered {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::debug!(%error, "metrics were not read");
                    // Out of descriptors, perhaps: not again at once.
                    std::thread::sleep(PAUSE);
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("metrics".to_owned());
    let started = thread.spawn(answer_all);
    started
        .map(drop)
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a thread: {error}")))
}

/// Answers one request; says whether the daemon is still there.
fn answer(stream: &mut (impl Read + Write), control: &ControlHandle) -> io::Result<bool> {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let read = stream.read(&mut part)?;
        if read == 0 || request.len() + read > MAX_REQUEST_BYTES {
            return Ok(true);
        }
        request.extend_from_slice(&part[..read]);
    }
    let line = request.split(|byte| *byte == b'\r').next();
    let line = String::from_utf8_lossy(line.unwrap_or_default()).into_owned();
    let mut words = line.split(' ');
    let (status, kind, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/metrics")) => {
            let Some(samples) = control.call(|daemon| async move { samples(&daemon).await }) else {
                return Ok(false);
            };
            ("200 OK", CONTENT_TYPE, render(&samples))
        }
        (Some("GET"), _) => (
            "404 Not Found",
            "text/plain",
            "metrics are at /metrics\n".to_owned(),
        ),
        _ => (
            "405 Method Not Allowed",
            "text/plain",
            "GET /metrics\n".to_owned(),
        ),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    stream.flush()?;
    Ok(true)
}

/// The numbers of one export.
struct Sample {
    export: String,
    counted: AccountSum,
    is_connected: bool,
    held: usize,
    in_flight: usize,
    /// The age of the request that has been in flight longest.
    oldest: Duration,
}

async fn samples(daemon: &Rc<Daemon>) -> Vec<Sample> {
    let mut all = Vec::new();
    for view in daemon.exports() {
        let export = &view.export;
        let in_flight = export.in_flight().await;
        let held = export.held().await.len();
        let now = daemon.control().context().engine().now();
        let ages = in_flight
            .iter()
            .map(|(_, request)| now.saturating_sub(request.since));
        all.push(Sample {
            export: export.config().id.clone(),
            counted: export.account(),
            is_connected: view.is_connected,
            held,
            in_flight: in_flight.len(),
            oldest: ages.max().unwrap_or_default(),
        });
    }
    all
}

type Labels = Vec<(&'static str, String)>;
type Counts = Family<Labels, Counter<f64, AtomicU64>>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

/// The text of a scrape. Pure.
fn render(samples: &[Sample]) -> String {
    const KINDS: [(Kind, &str); 5] = [
        (Kind::Read, "read"),
        (Kind::Write, "write"),
        (Kind::Flush, "flush"),
        (Kind::Discard, "discard"),
        (Kind::WriteZeroes, "write_zeroes"),
    ];
    let counts: [Counts; 5] = Default::default();
    let gauges: [Gauges; 4] = Default::default();
    for sample in samples {
        let export = || ("export", sample.export.clone());
        for (kind, word) in KINDS {
            let sum = sample.counted.kind(kind);
            let numbers = [
                sum.operations as f64,
                sum.bytes as f64,
                sum.time_ns as f64 / 1e9,
                sum.failed as f64,
                sum.invalid as f64,
            ];
            for (family, number) in counts.iter().zip(numbers) {
                let labels = vec![export(), ("kind", word.to_owned())];
                family.get_or_create(&labels).inc_by(number);
            }
        }
        let numbers = [
            sample.in_flight as f64,
            sample.held as f64,
            sample.oldest.as_secs_f64(),
            f64::from(u8::from(sample.is_connected)),
        ];
        for (family, number) in gauges.iter().zip(numbers) {
            family.get_or_create(&vec![export()]).set(number);
        }
    }
    let mut registry = Registry::with_prefix("stonework");
    let [operations, bytes, seconds, failed, invalid] = counts;
    registry.register("requests", "Requests that ended well", operations);
    registry.register(
        "transferred_bytes",
        "Bytes of requests that ended well",
        bytes,
    );
    registry.register(
        "request_seconds",
        "Time that requests took, together",
        seconds,
    );
    registry.register("failed_requests", "Requests that failed", failed);
    registry.register("invalid_requests", "Requests that made no sense", invalid);
    let [in_flight, held, oldest, connected] = gauges;
    registry.register("in_flight_requests", "Requests under way now", in_flight);
    registry.register(
        "held_requests",
        "Requests that failed and wait to be resumed",
        held,
    );
    registry.register(
        "oldest_request_seconds",
        "Age of the request under way longest",
        oldest,
    );
    registry.register(
        "frontend_connected",
        "Whether a front-end is connected",
        connected,
    );
    let mut text = String::new();
    encode(&mut text, &registry).expect("text can be written to a string");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_let_in() {
        let parse = |text: &str| text.parse::<MetricsAddress>();
        assert!(matches!(
            parse("127.0.0.1:9100"),
            Ok(MetricsAddress::Loopback(_))
        ));
        assert!(matches!(
            parse("[::1]:9100"),
            Ok(MetricsAddress::Loopback(_))
        ));
        assert!(matches!(parse("/run/m.sock"), Ok(MetricsAddress::Path(_))));
        assert!(
            parse("0.0.0.0:9100")
                .unwrap_err()
                .contains("this host alone")
        );
        assert!(parse("9100").is_err());
    }

    #[test]
    fn numbers_are_text_that_prometheus_reads() {
        let now = Duration::from_secs(9);
        let (account, recorder) = Account::open(AccountOptions::default(), now).unwrap();
        recorder.done(Kind::Read, 4096, now, now + Duration::from_millis(500));
        let mut counted = AccountSum::new(now);
        counted.add(&account);
        let text = render(&[Sample {
            export: "vd\"a".into(),
            counted,
            is_connected: true,
            held: 2,
            in_flight: 1,
            oldest: Duration::from_millis(1500),
        }]);
        for line in [
            "stonework_requests_total{export=\"vd\\\"a\",kind=\"read\"} 1.0",
            "stonework_transferred_bytes_total{export=\"vd\\\"a\",kind=\"read\"} 4096.0",
            "stonework_request_seconds_total{export=\"vd\\\"a\",kind=\"read\"} 0.5",
            "stonework_oldest_request_seconds{export=\"vd\\\"a\"} 1.5",
            "stonework_held_requests{export=\"vd\\\"a\"} 2.0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
