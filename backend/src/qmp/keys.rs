//! Objects `tls-creds-x509`: keys and certificates in a directory, for encrypted connections.

use std::path::Path;

use crate::nbd::{Credentials, Endpoint};
use crate::qapi::QmpError;
use crate::{qapi_enum, qapi_struct};

qapi_enum! {
    /// Whose keys they are.
    pub enum TlsEndpoint {
        /// Of who connects.
        Client = "client",
        /// Of who is connected to.
        Server = "server",
    }
}

qapi_struct! {
    /// Keys and certificates in a directory.
    pub struct TlsCredsX509Properties {
        /// Whether a server takes clients only whose certificates are signed; it does by default. A client
        /// always looks at the server's.
        verify_peer: Option<bool> = "verify-peer",
        /// Where they are.
        dir: Option<String> = "dir",
        /// Whose they are; a client's by default.
        endpoint: Option<TlsEndpoint> = "endpoint",
        /// Which ciphers are to be had; not in this version.
        priority: Option<String> = "priority",
        /// Whether certificates are looked at at once; they are when connections are made in any case.
        sanity_check: Option<bool> = "sanity-check",
        /// The secret that the key is encrypted with; not in this version.
        passwordid: Option<String> = "passwordid",
    }
}

impl TlsCredsX509Properties {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// What is not there, is not what it should be, or is not in this version.
    pub(super) fn load(&self) -> Result<Credentials, QmpError> {
        let later = [
            ("priority", self.priority.is_some()),
            ("passwordid", self.passwordid.is_some()),
        ];
        if let Some((name, _)) = later.iter().find(|(_, given)| *given) {
            return Err(QmpError::generic(format!(
                "option '{name}' of tls-creds-x509 is not in this version of stonework"
            )));
        }
        let Some(dir) = &self.dir else {
            return Err(QmpError::generic("Missing 'dir' property value"));
        };
        let endpoint = match self.endpoint {
            Some(TlsEndpoint::Server) => Endpoint::Server,
            Some(TlsEndpoint::Client) | None => Endpoint::Client,
        };
        let verify_peer = self.verify_peer.unwrap_or(true);
        Ok(Credentials::load(Path::new(dir), endpoint, verify_peer)?)
    }
}
