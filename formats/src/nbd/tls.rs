//! Keys and certificates for encrypted connections, as QEMU's `tls-creds-x509` has them in a directory.

use std::path::Path;
use std::sync::Arc;

use blockcore::{Error, ErrorKind};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
};

/// Whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Of who connects.
    Client,
    /// Of who is connected to.
    Server,
}

/// What one end needs.
#[derive(Debug)]
pub enum Credentials {
    /// Of who connects.
    Client(Arc<ClientConfig>),
    /// Of who is connected to.
    Server(Arc<ServerConfig>),
}

impl Credentials {
    /// Reads a directory: `ca-cert.pem`, `ca-crl.pem` if it is there, and `server-cert.pem` with
    /// `server-key.pem` or, for a client, which may do without, `client-cert.pem` with `client-key.pem`.
    ///
    /// With `verify_peer` a server takes clients only whose certificates the authority has signed; a client
    /// always looks at the server's.
    ///
    /// # Errors
    ///
    /// What is not there, or is not what it should be.
    pub fn load(directory: &Path, endpoint: Endpoint, verify_peer: bool) -> Result<Self, Error> {
        let provider = Arc::new(ring::default_provider());
        let at = |name: &str| directory.join(name);
        match endpoint {
            Endpoint::Client => {
                if !verify_peer {
                    return Err(Error::unsupported(
                        "verify-peer=off of a client's tls-creds-x509 is not in this version of stonework",
                    ));
                }
                let verifier = WebPkiServerVerifier::builder_with_provider(
                    Arc::new(authorities(&at("ca-cert.pem"))?),
                    Arc::clone(&provider),
                )
                .with_crls(revoked(&at("ca-crl.pem"))?)
                .build()
                .map_err(|error| wrong(directory, &error))?;
                let config = versions(ClientConfig::builder_with_provider(provider))?
                    .with_webpki_verifier(verifier);
                let own = own(&at("client-cert.pem"), &at("client-key.pem"), true)?;
                let config = match own {
                    None => Ok(config.with_no_client_auth()),
                    Some((chain, key)) => config.with_client_auth_cert(chain, key),
                };
                let config = config.map_err(|error| wrong(directory, &error))?;
                Ok(Self::Client(Arc::new(config)))
            }
            Endpoint::Server => {
                let config = versions(ServerConfig::builder_with_provider(Arc::clone(&provider)))?;
                let config = match verify_peer {
                    false => config.with_no_client_auth(),
                    true => {
                        let verifier = WebPkiClientVerifier::builder_with_provider(
                            Arc::new(authorities(&at("ca-cert.pem"))?),
                            provider,
                        )
                        .with_crls(revoked(&at("ca-crl.pem"))?)
                        .build()
                        .map_err(|error| wrong(directory, &error))?;
                        config.with_client_cert_verifier(verifier)
                    }
                };
                let own = own(&at("server-cert.pem"), &at("server-key.pem"), false)?;
                let (chain, key) = own.expect("what may not be missing is there");
                let config = config.with_single_cert(chain, key);
                let config = config.map_err(|error| wrong(directory, &error))?;
                Ok(Self::Server(Arc::new(config)))
            }
        }
    }

    /// A server's end of a new connection.
    ///
    /// # Errors
    ///
    /// They are a client's.
    pub fn accept(&self) -> Result<Connection, Error> {
        let Self::Server(config) = self else {
            return Err(Error::invalid(
                "Expecting TLS credentials with a server endpoint",
            ));
        };
        let connection = ServerConnection::new(Arc::clone(config));
        connection
            .map(Connection::Server)
            .map_err(|error| failed(&error))
    }

    /// A client's end of a new connection to the server that has this name, which its certificate proves.
    ///
    /// # Errors
    ///
    /// They are a server's, or that is no name.
    pub fn connect(&self, name: &str) -> Result<Connection, Error> {
        let Self::Client(config) = self else {
            return Err(Error::invalid(
                "Expecting TLS credentials with a client endpoint",
            ));
        };
        let name = ServerName::try_from(name.to_owned()).map_err(|_| {
            Error::invalid(format!(
                "'{name}' is no name that a server could prove to have: tls-hostname gives another"
            ))
        })?;
        let connection = ClientConnection::new(Arc::clone(config), name);
        connection
            .map(Connection::Client)
            .map_err(|error| failed(&error))
    }
}

/// The versions that QEMU has, too: TLS 1.2 and 1.3.
fn versions<S: rustls::ConfigSide>(
    builder: rustls::ConfigBuilder<S, rustls::WantsVersions>,
) -> Result<rustls::ConfigBuilder<S, rustls::WantsVerifier>, Error> {
    builder
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&error))
}

fn authorities(path: &Path) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store
            .add(certificate)
            .map_err(|error| wrong(path, &error))?;
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let all: Vec<_> = all.map_err(|error| wrong(path, &error))?;
    match all.is_empty() {
        false => Ok(all),
        true => Err(wrong(path, &"it has no certificate")),
    }
}

/// Certificates that mean nothing any more, if there is such a list.
fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, Error> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let all = CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect);
    all.map_err(|error| wrong(path, &error))
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// One's own certificate and key; none at all only where that is `optional`.
fn own(certificate: &Path, key: &Path, optional: bool) -> Result<Option<Own>, Error> {
    if optional && !certificate.exists() && !key.exists() {
        return Ok(None);
    }
    let chain = certificates(certificate)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, &error))?;
    Ok(Some((chain, key)))
}

fn wrong(path: &Path, error: &dyn std::fmt::Display) -> Error {
    let text = format!("Unable to access credentials {}: {error}", path.display());
    Error::new(ErrorKind::Invalid, text)
}

fn failed(error: &rustls::Error) -> Error {
    Error::new(ErrorKind::Invalid, format!("TLS: {error}"))
}
