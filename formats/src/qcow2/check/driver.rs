//! A node whose image is opened for nothing else than a check: it has a length, and no bytes.

use std::rc::Rc;
use std::sync::Arc;

use blockcore::Error;
use blockcore::driver::{CheckReport, Driver, DriverIo, Fix, OpenRequest, Opened};
use blockcore::io::{RequestKind, Root};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::check;
use super::image::Image;

/// How many findings are told one by one.
const MAX_TOLD: u32 = 1000;

/// Opens a node to be checked. Only the header must make sense.
pub(crate) async fn open(request: OpenRequest) -> Result<Opened, Error> {
    let file = request.children[0].as_ref().expect("not optional");
    let entered = file.root.enter(RequestKind::Other, 0, 0).await;
    let image = Image::open(entered.io(), Fix::None).await;
    let image = image.map_err(|error| {
        let text = format!(
            "cannot check the image of node '{}': {error}",
            request.node_name
        );
        Error::new(error.kind(), text)
    })?;
    Ok(Opened {
        io: Arc::new(CheckIo {
            bytes: image.header.bytes,
        }),
        driver: Box::new(CheckDriver {
            node: request.node_name,
        }),
    })
}

struct CheckIo {
    bytes: u64,
}

impl DriverIo for CheckIo {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.bytes
    }
}

struct CheckDriver {
    node: String,
}

impl Driver for CheckDriver {
    fn check(
        &mut self,
        root: Rc<Root>,
        fix: Fix,
    ) -> LocalBoxFuture<'_, Result<CheckReport, Error>> {
        async move {
            let request = root.enter(RequestKind::Other, 0, 0).await;
            let mut told = 0;
            check(request.io().child(0), fix, &mut |what| {
                told += 1;
                match told {
                    ..MAX_TOLD => tracing::info!(node = self.node, "{what}"),
                    MAX_TOLD => tracing::info!(node = self.node, "and so on"),
                    _ => {}
                }
            })
            .await
        }
        .boxed_local()
    }
}
