//! [`NbdDriver`]: the global-state half.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockcore::driver::{Driver, Limits, OpenRequest, Opened, Reopened};
use blockcore::graph::permission::Permissions;
use blockcore::io::{IoContext, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::connect::{Address, Asked};
use super::io::{self, Client};
use super::{OPTIONS, name};
use crate::nbd::codec::ExportFlags;
use crate::nbd::tls::Credentials;

/// What `base:allocation` tells is what block status is, unless an operator wants another.
const ALLOCATION: &str = "base:allocation";
/// Longest range that is zeroed or trimmed at once: a server has other clients.
const MAX_RANGE_BYTES: u64 = 1 << 30;

/// See the module's header.
struct NbdDriver {
    client: Arc<Client>,
    name: Option<String>,
    export: String,
}

/// Opens a node.
pub(super) async fn open(request: OpenRequest) -> Result<Opened, Error> {
    let options = &request.options;
    let text = |name| options.text(OPTIONS, name);
    let (address, name) = address(options)?;
    let bitmap = text("x-dirty-bitmap");
    let is_plain = bitmap.is_empty();
    let tls = match text("tls-creds") {
        "" => None,
        id => {
            let credentials = request.credentials.get::<Credentials>(id)?;
            let host = match (options.get("tls-hostname"), &address) {
                (Some(name), _) => name.to_owned(),
                (None, Address::Inet(host, _)) => host.clone(),
                (None, Address::Unix(_)) => {
                    return Err(Error::invalid(
                        "a server at a path proves its name, which is for 'tls-hostname' to say",
                    ));
                }
            };
            // That they are a client's is said now.
            credentials.connect(&host)?;
            Some((credentials, host))
        }
    };
    let is_nameable = is_plain && tls.is_none();
    let asked = Asked {
        tls,
        address,
        export: text("export").to_owned(),
        context: if is_plain { ALLOCATION } else { bitmap }.to_owned(),
    };
    let seconds = |name| Duration::from_secs(options.size(OPTIONS, name).min(1 << 32));
    let link = io::open(&request.context, &asked, seconds("open-timeout")).await?;
    let (agreed, export) = (link.agreed, asked.export.clone());
    let client = Client::new(asked, link, seconds("reconnect-delay"));
    let refused = if !is_plain && agreed.context.is_none() {
        Some(Error::new(
            ErrorKind::NotFound,
            format!("requested x-dirty-bitmap {bitmap} not found"),
        ))
    } else if !request.modes.read_only && !request.modes.auto_read_only {
        check_writes(&client, &export).err()
    } else {
        None
    };
    if let Some(error) = refused {
        client.end(&request.context).await;
        return Err(error);
    }
    Ok(Opened {
        driver: Box::new(NbdDriver {
            client: Arc::clone(&client),
            // No name says that what is told is something else, or encrypted.
            name: Some(name).filter(|_| is_nameable),
            export,
        }),
        io: client,
    })
}

/// Where the server is, and how the disk is called there.
fn address(options: &Options) -> Result<(Address, String), Error> {
    let text = |name| options.text(OPTIONS, name);
    let needs = |name: &str| match options.get(name) {
        Some(value) => Ok(value.to_owned()),
        None => Err(Error::invalid(format!("Parameter '{name}' is missing"))),
    };
    let refuse = |names: &[&str]| {
        let given = names.iter().find(|name| options.get(name).is_some());
        given.map_or(Ok(()), |name| {
            Err(Error::invalid(format!("Parameter '{name}' is unexpected")))
        })
    };
    let export = text("export");
    if text("server.type") == "unix" {
        refuse(&["server.host", "server.port"])?;
        let path = needs("server.path")?;
        let name = name::of_unix(&path, export);
        return Ok((Address::Unix(path), name));
    }
    refuse(&["server.path"])?;
    let (host, port) = (needs("server.host")?, needs("server.port")?);
    let number = port
        .parse()
        .map_err(|_| Error::invalid(format!("'{port}' is not the number of a port")))?;
    let name = name::of_inet(&host, &port, export);
    Ok((Address::Inet(host, number), name))
}

/// Whether the server lets anybody write.
fn check_writes(client: &Client, export: &str) -> Result<(), Error> {
    if !client.agreed().flags.contains(ExportFlags::READ_ONLY) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::PermissionDenied,
        format!("request on denied for read-only export '{export}': open it read-only"),
    ))
}

impl Driver for NbdDriver {
    fn close(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            self.client.end(root.context()).await;
            Ok(())
        }
        .boxed_local()
    }

    fn limits(&self, _children: &[Option<Limits>]) -> Limits {
        let agreed = self.client.agreed();
        let block = agreed.minimum.max(512);
        Limits {
            request_alignment: agreed.minimum,
            max_transfer_bytes: u64::from(agreed.maximum),
            max_zero_bytes: MAX_RANGE_BYTES,
            max_discard_bytes: MAX_RANGE_BYTES,
            logical_block_bytes: block,
            physical_block_bytes: block,
            optimal_io_bytes: match agreed.preferred > agreed.minimum {
                true => agreed.preferred,
                false => 0,
            },
            ..Limits::default()
        }
    }

    fn prepare_permissions(
        &mut self,
        _context: Rc<IoContext>,
        needs: Permissions,
        _shares: Permissions,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        let writes = needs.intersects(Permissions::WRITE | Permissions::WRITE_UNCHANGED);
        let checked = match writes {
            true => check_writes(&self.client, &self.export),
            false => Ok(()),
        };
        async move { checked.map(|()| Reopened::default()) }.boxed_local()
    }

    fn exact_name(&self) -> Option<String> {
        self.name.clone()
    }
}
