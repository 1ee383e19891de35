//! Names of disks that NBD servers offer, as options and back. Pure.

use blockcore::Error;
use blockcore::options::Options;

use crate::nbd::codec::DEFAULT_PORT;

/// Turns `nbd://HOST[:PORT][/EXPORT]`, `nbd+unix:///[EXPORT]?socket=PATH`, or one of the forms from before
/// there were such names, into options.
pub(super) fn parse(name: &str) -> Result<Options, Error> {
    let refuse = |why: &str| Error::invalid(format!("'{name}' is no name of an NBD export: {why}"));
    let (scheme, rest) = name.split_once(':').ok_or_else(|| refuse("no colon"))?;
    if scheme.starts_with("nbds") {
        return Err(Error::unsupported(format!(
            "'{name}': a name has no keys (nbds); options have, with tls-creds"
        )));
    }
    let mut options = Options::default();
    let Some(rest) = rest.strip_prefix("//") else {
        return parse_old(name, rest);
    };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, export) = match rest.split_once('/') {
        Some((authority, export)) => (authority, decode(export).ok_or_else(|| refuse("%"))?),
        None => (rest, String::new()),
    };
    if scheme == "nbd+unix" {
        let path = query.and_then(|query| query.strip_prefix("socket="));
        let path = path.ok_or_else(|| refuse("it needs '?socket=PATH'"))?;
        if !authority.is_empty() {
            return Err(refuse("a socket is on no host"));
        }
        let path = decode(path).ok_or_else(|| refuse("%"))?;
        options.set("server.type", "unix");
        options.set("server.path", path);
    } else {
        if query.is_some() {
            return Err(refuse("a '?' goes with nbd+unix"));
        }
        let (host, port) = split_host(authority).ok_or_else(|| refuse("its port"))?;
        if host.is_empty() {
            return Err(refuse("it names no host"));
        }
        options.set("server.type", "inet");
        options.set("server.host", host);
        options.set("server.port", port.unwrap_or(&DEFAULT_PORT.to_string()));
    }
    if !export.is_empty() {
        options.set("export", export);
    }
    Ok(options)
}

/// `nbd:unix:PATH[:exportname=NAME]` and `nbd:HOST:PORT[:exportname=NAME]`.
fn parse_old(name: &str, rest: &str) -> Result<Options, Error> {
    let mut options = Options::default();
    let (rest, export) = match rest.split_once(":exportname=") {
        Some((rest, export)) => (rest, Some(export)),
        None => (rest, None),
    };
    if let Some(path) = rest.strip_prefix("unix:") {
        options.set("server.type", "unix");
        options.set("server.path", path);
    } else {
        let Some((host, Some(port))) = split_host(rest) else {
            return Err(Error::invalid(format!(
                "'{name}' is no name of an NBD export: it needs HOST:PORT or unix:PATH"
            )));
        };
        options.set("server.type", "inet");
        options.set("server.host", host);
        options.set("server.port", port);
    }
    if let Some(export) = export {
        options.set("export", export);
    }
    Ok(options)
}

/// A host and its port, if there is one; a number of IPv6 stands in brackets.
fn split_host(text: &str) -> Option<(&str, Option<&str>)> {
    let (host, rest) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    match rest.strip_prefix(':') {
        Some(port) => Some((host, Some(port))),
        None if rest.is_empty() => Some((host, None)),
        None => None,
    }
}

/// Text whose `%41` are letters again.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if *first != b'%' {
            bytes.push(*first);
            rest = after;
            continue;
        }
        let (digits, after) = after.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

/// Text with what means something else in names as `%41`.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~:@".contains(&byte) {
            encoded.push(byte as char);
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// The name of an export at a path.
pub(super) fn of_unix(path: &str, export: &str) -> String {
    format!("nbd+unix:///{}?socket={}", encode(export), encode(path))
}

/// The name of an export at a host's port.
pub(super) fn of_inet(host: &str, port: &str, export: &str) -> String {
    let host = match host.contains(':') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    };
    match export {
        "" => format!("nbd://{host}:{port}"),
        export => format!("nbd://{host}:{port}/{}", encode(export)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str) -> String {
        parse(name).unwrap().to_text()
    }

    #[test]
    fn names_are_read_as_qemu_reads_them() {
        for (name, text) in [
            (
                "nbd://h",
                "server.host=h,server.port=10809,server.type=inet",
            ),
            (
                "nbd://h:7/a/b%20c",
                "export=a/b c,server.host=h,server.port=7,server.type=inet",
            ),
            (
                "nbd://[::1]:7/",
                "server.host=::1,server.port=7,server.type=inet",
            ),
            (
                "nbd+unix:///?socket=/a%2Cb",
                "server.path=/a,,b,server.type=unix",
            ),
            (
                "nbd+unix:///x?socket=s",
                "export=x,server.path=s,server.type=unix",
            ),
            (
                "nbd:unix:/p:exportname=e",
                "export=e,server.path=/p,server.type=unix",
            ),
            ("nbd:h:7", "server.host=h,server.port=7,server.type=inet"),
        ] {
            assert_eq!(parsed(name), text, "{name}");
        }
        for name in [
            "nbd://",
            "nbd:h",
            "nbd+unix:///x",
            "nbd://h?socket=s",
            "nbd://h/%4",
            "nbd://h/%ff",
            "nbds://h",
        ] {
            assert!(parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_name_that_was_made_is_read_as_what_it_was_made_of() {
        let export = "a/b ?#%ä";
        for name in [
            of_unix("/run/x y", export),
            of_inet("::1", "7", export),
            of_inet("host", "7", ""),
        ] {
            let options = parse(&name).unwrap();
            let expected = if name.ends_with(":7") {
                None
            } else {
                Some(export)
            };
            assert_eq!(options.get("export"), expected, "{name}");
        }
    }
}
