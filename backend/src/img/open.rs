//! [`Image`]: an image that a verb has open, as a node of its own with a root.

use std::os::unix::fs::FileTypeExt;
use std::rc::Rc;

use blockcore::driver::{DriverKind, DriverType, SnapshotInfo, SnapshotRef, WriteFlags};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Node, NodeId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{Request, RequestKind, Root};
use blockcore::options::{OptionValue, Options};
use blockcore::{Error, ErrorKind, IoError};

use super::Program;
use super::cli::FormatArgs;
use super::walk::SECTOR_BYTES;
use crate::cli::CacheMode;

/// Options that show a snapshot inside of an image.
const SNAPSHOT_ID: &str = "snapshot.id";
const SNAPSHOT_NAME: &str = "snapshot.name";

/// Whether an image's format may be found out from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probing {
    /// By a verb that only looks.
    Allowed,
    /// An image without a given format is raw, and must not look like anything else. With the option
    /// that names the format, for the command that is proposed.
    Refused(&'static str),
}

/// How to open an image.
#[derive(Clone, Debug)]
pub(super) struct How {
    /// Its format; `None` to find out or to assume, as `probing` says.
    pub(super) format: Option<String>,
    /// The name is options.
    pub(super) image_opts: bool,
    pub(super) probing: Probing,
    pub(super) write: bool,
    pub(super) resize: bool,
    pub(super) cache: CacheMode,
    pub(super) force_share: bool,
    /// With the backing images that its header asks for.
    pub(super) backing: bool,
}

impl How {
    /// For reading, its backing images too.
    pub(super) fn reading(format: &FormatArgs, probing: Probing) -> Result<Self, Error> {
        format.objects.check()?;
        Ok(Self {
            format: format.format.clone(),
            image_opts: format.image_opts,
            probing,
            write: false,
            resize: false,
            cache: CacheMode::Writeback,
            force_share: false,
            backing: true,
        })
    }

    /// For making an image, in a format that has to be added.
    pub(super) fn creating() -> Self {
        Self {
            format: None,
            image_opts: false,
            probing: Probing::Refused("-f"),
            write: true,
            resize: false,
            cache: CacheMode::Writeback,
            force_share: false,
            backing: false,
        }
    }

    /// For writing.
    pub(super) fn writing(format: &FormatArgs) -> Result<Self, Error> {
        Ok(Self {
            write: true,
            ..Self::reading(format, Probing::Refused("-f"))?
        })
    }
}

/// See the module's header. Dropped without [`close`](Self::close), it is closed when the verb ends.
pub(super) struct Image {
    pub(super) control: Control,
    /// As the caller named it.
    pub(super) name: String,
    /// Its node.
    pub(super) node: NodeId,
    pub(super) root: Rc<Root>,
    stable: bool,
}

impl Program {
    /// Opens the image called `name`.
    ///
    /// # Errors
    ///
    /// What was wrong with the name or could not be opened; who holds the image.
    pub(super) async fn open(&self, name: &str, how: &How) -> Result<Image, Error> {
        let options = self.node_options(name, how).await?;
        self.open_options(name, options, how).await
    }

    /// Opens the image called `name` as it was when a snapshot inside of it was taken, for reading. `which`
    /// is its identifier or its name, or says which as the options of the image's format do:
    /// `snapshot.id=1,snapshot.name=day`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`ErrorKind::Unsupported`] if images of the format have no snapshots;
    /// [`ErrorKind::NotFound`].
    pub(super) async fn open_snapshot(
        &self,
        name: &str,
        how: &How,
        which: &str,
    ) -> Result<Image, Error> {
        let mut options = self.node_options(name, how).await?;
        let kind = self.kind_of(&options)?;
        if !kind.options.iter().any(|spec| spec.name == SNAPSHOT_ID) {
            return Err(Error::unsupported(format!(
                "images of format '{}' have no snapshots inside of them",
                kind.name
            )));
        }
        if which.starts_with("snapshot.") {
            for (key, value) in Options::parse(which, None)?.iter() {
                if key != SNAPSHOT_ID && key != SNAPSHOT_NAME {
                    return Err(Error::invalid(format!(
                        "a snapshot is named by '{SNAPSHOT_ID}' and '{SNAPSHOT_NAME}', and not by '{key}'"
                    )));
                }
                options.set_value(key, value.clone());
            }
        } else {
            let found = self.find_snapshot(options.clone(), which).await?;
            options.set(SNAPSHOT_ID, found.id);
        }
        self.open_options(name, options, how).await
    }

    /// The snapshot with this identifier or name, in an image that is not open.
    async fn find_snapshot(&self, options: Options, which: &str) -> Result<SnapshotInfo, Error> {
        let node = options.get("node-name").unwrap_or("").to_owned();
        self.control.add(options).await?;
        let listed = self.control.snapshots(&node).await;
        self.control.remove(&node).await?;
        let mut snapshots = listed?;
        let index = SnapshotRef::id_or_name(which, &snapshots).find(&snapshots);
        match index {
            Some(index) => Ok(snapshots.swap_remove(index)),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no snapshot '{which}' in the image"),
            )),
        }
    }

    /// Opens the node of the image called `name` without using it: for what control does with a node that
    /// nobody may use meanwhile. Returns the node's name.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub(super) async fn open_node(&self, name: &str, how: &How) -> Result<String, Error> {
        let options = self.node_options(name, how).await?;
        let node = options.get("node-name").unwrap_or("").to_owned();
        self.control.add(options).await?;
        Ok(node)
    }

    /// Opens an image by the options of its node, which has a name.
    pub(super) async fn open_options(
        &self,
        name: &str,
        options: Options,
        how: &How,
    ) -> Result<Image, Error> {
        let node_name = options.get("node-name").unwrap_or("").to_owned();
        let node = self.control.add(options).await?;
        let root = self.add_root(&node_name, how).await;
        match root {
            Ok(root) => Ok(Image {
                control: self.control.clone(),
                name: name.to_owned(),
                node,
                root,
                stable: how.write && how.cache.writethrough(),
            }),
            Err(error) => {
                // The first error is the one to report.
                let _ = self.control.remove(&node_name).await;
                Err(error)
            }
        }
    }

    async fn add_root(&self, node: &str, how: &How) -> Result<Rc<Root>, Error> {
        let mut spec = match how.write {
            true => RootSpec::writer("stonework img"),
            false => RootSpec::reader("stonework img"),
        };
        if how.resize {
            spec.needs |= Permissions::RESIZE;
        }
        if how.force_share {
            spec.shares = Permissions::all();
        }
        self.use_node(node, spec).await
    }

    /// The options of an image's node, with a name of ours.
    pub(super) async fn node_options(&self, name: &str, how: &How) -> Result<Options, Error> {
        let mut options = match how.image_opts {
            true => Options::parse(name, Some("driver"))?,
            false => self.options_of_name(name, how).await?,
        };
        let on_off = |on: bool| if on { "on" } else { "off" };
        options.set("node-name", self.node_name());
        options.set("read-only", on_off(!how.write));
        options.set("force-share", on_off(how.force_share));
        if options.get("discard").is_none() {
            options.set("discard", "unmap");
        }
        if options.get("cache.direct").is_none() {
            options.set("cache.direct", on_off(how.cache.direct()));
        }
        if options.get("cache.no-flush").is_none() {
            options.set("cache.no-flush", on_off(how.cache.no_flush()));
        }
        let kind = self.kind_of(&options)?;
        if kind.backing && !how.backing {
            options.set_value("backing", OptionValue::Null);
        }
        Ok(options)
    }

    fn kind_of(&self, options: &Options) -> Result<&'static DriverType, Error> {
        let driver = options.get("driver").unwrap_or("").to_owned();
        if driver.is_empty() {
            return Err(Error::invalid(
                "an image that is given by options needs option 'driver'",
            ));
        }
        self.kind(&driver)
    }

    /// The driver called `name`.
    pub(super) fn kind(&self, name: &str) -> Result<&'static DriverType, Error> {
        self.control.read(|graph| graph.driver_type(name))
    }

    /// The driver that makes and opens images of a format.
    pub(super) fn format(&self, name: &str) -> Result<&'static DriverType, Error> {
        let formats = self.control.read(|graph| {
            let kinds = graph.driver_types().iter();
            let kinds = kinds.filter(|kind| kind.kind != DriverKind::Filter);
            kinds.copied().collect::<Vec<_>>()
        });
        let found = formats.iter().find(|kind| kind.name == name);
        found.copied().ok_or_else(|| {
            let known: Vec<_> = formats.iter().map(|kind| kind.name).collect();
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "this version of stonework has no format '{name}'; it has {}",
                    known.join(", ")
                ),
            )
        })
    }

    async fn options_of_name(&self, name: &str, how: &How) -> Result<Options, Error> {
        let below = self.protocol_options(name)?;
        let driver = below.get("driver").unwrap_or("").to_owned();
        let below_kind = self.kind(&driver)?;
        let mut options = Options::default();
        let format = match &how.format {
            Some(format) => self.format(format)?,
            // A `json:` name says what format it is.
            None if below_kind.kind != DriverKind::Protocol => return Ok(below),
            None => self.find_format(name, &below, how.probing).await?,
        };
        match format.kind {
            DriverKind::Protocol => options.set_all(below),
            _ => options.set_nested("file", below),
        }
        options.set("driver", format.name);
        Ok(options)
    }

    /// The options of the protocol node of an image called `name`.
    pub(super) fn protocol_options(&self, name: &str) -> Result<Options, Error> {
        let mut options = self.control.read(|graph| graph.options_of_name(name))?;
        if options.get("driver") == Some("file") {
            let path = options.get("filename").unwrap_or("");
            let device = std::fs::metadata(path).is_ok_and(|found| {
                let kind = found.file_type();
                kind.is_block_device() || kind.is_char_device()
            });
            if device {
                options.set("driver", "host_device");
            }
        }
        Ok(options)
    }

    /// The format of an image for which none was given.
    async fn find_format(
        &self,
        name: &str,
        below: &Options,
        probing: Probing,
    ) -> Result<&'static DriverType, Error> {
        let head = self.head(below).await?;
        let kinds = self.control.read(|graph| graph.driver_types().to_vec());
        let scored = kinds.iter().filter_map(|kind| {
            let score = (kind.probe?)(&head);
            (score > 0).then_some((score, *kind))
        });
        let best = scored.max_by_key(|(score, _)| *score);
        let best = best.map(|(_, kind)| kind);
        let raw = self.kind("raw")?;
        let seems = (self.probe.seems)(&head);
        let other = best
            .map(|kind| kind.name)
            .filter(|name| *name != raw.name)
            .or(seems);
        let Some(other) = other else { return Ok(raw) };
        let known = kinds.iter().find(|kind| kind.name == other);
        let (option, known) = match (probing, known) {
            (Probing::Allowed, Some(known)) => return Ok(known),
            (Probing::Allowed, None) => ("-f", None),
            (Probing::Refused(option), known) => (option, known),
        };
        let as_image = match known {
            Some(_) => format!(
                "for the disk in it, run '{}'",
                self.command_with(option, other)
            ),
            None => format!("this version of stonework has no {other}"),
        };
        Err(Error::invalid(format!(
            "'{name}' begins like a {other} image, and no format was given: {as_image}; for its bytes \
             as they are, run '{}'",
            self.command_with(option, "raw")
        )))
    }

    /// The first bytes of what a protocol node holds. Nobody is kept out meanwhile: opening does that.
    async fn head(&self, below: &Options) -> Result<Vec<u8>, Error> {
        let node = self.node_name();
        let mut options = below.clone();
        options.set("node-name", &*node);
        options.set("read-only", "on");
        options.set("force-share", "on");
        self.control.add(options).await?;
        let mut spec = RootSpec::reader("a look at the image's format");
        spec.shares = Permissions::all();
        let root = self.use_node(&node, spec).await?;
        let id = root.id();
        let bytes = root.bytes().min(self.probe.bytes as u64);
        let into = Segments::allocate(bytes as usize, 512);
        let read = root.read(0, into.clone()).await;
        drop(root);
        self.control.remove_root(id).await?;
        self.control.remove(&node).await?;
        read.map_err(|error| {
            Error::new(
                ErrorKind::Io,
                format!("cannot read the image's first bytes to find out its format: {error}"),
            )
        })?;
        Ok(into.to_vec())
    }
}

impl Image {
    /// An image that was opened piece by piece.
    pub(super) fn of_root(
        control: &Control,
        name: &str,
        node: NodeId,
        root: Rc<Root>,
        how: &How,
    ) -> Self {
        Self {
            control: control.clone(),
            name: name.to_owned(),
            node,
            root,
            stable: how.write && how.cache.writethrough(),
        }
    }

    /// Its length in bytes, in whole sectors as a disk has it: what a file lacks of its last one reads as
    /// zeroes.
    pub(super) fn bytes(&self) -> u64 {
        self.root.bytes().next_multiple_of(SECTOR_BYTES)
    }

    /// Looks at its node.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Node) -> T) -> T {
        self.control.read(|graph| {
            let node = graph.node_by_id(self.node);
            look(node.expect("open until it is closed"))
        })
    }

    /// The word for its format.
    pub(super) fn format(&self) -> &'static str {
        self.look(Node::driver_name)
    }

    /// A request for whatever takes more than one call.
    pub(super) async fn request(&self) -> Request {
        self.root.enter(RequestKind::Other, 0, 0).await
    }

    /// Bytes in which it allocates; 0 if it does not say.
    pub(super) fn cluster_bytes(&self) -> u64 {
        self.look(|node| node.io().info().cluster_bytes)
    }

    /// How writes to it are made: as the cache mode says.
    pub(super) fn write_flags(&self) -> WriteFlags {
        match self.stable {
            true => WriteFlags::STABLE,
            false => WriteFlags::empty(),
        }
    }

    /// What became of a request, as a sentence.
    pub(super) fn failed(&self, what: &str, offset: u64, error: IoError) -> Error {
        let kind = match error {
            IoError::NoSpace => ErrorKind::NoSpace,
            IoError::ReadOnly => ErrorKind::PermissionDenied,
            IoError::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Error::new(
            kind,
            format!("cannot {what} '{}' at offset {offset}: {error}", self.name),
        )
    }

    /// Makes everything durable that was written.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn flush(&self) -> Result<(), Error> {
        let flushed = self.root.flush().await;
        flushed.map_err(|error| {
            Error::new(
                ErrorKind::Io,
                format!("cannot flush '{}': {error}", self.name),
            )
        })
    }

    /// Closes it.
    ///
    /// # Errors
    ///
    /// What could not be written back.
    pub(super) async fn close(self) -> Result<(), Error> {
        let id = self.root.id();
        let node = self.look(|node| node.name().to_owned());
        drop(self.root);
        self.control.remove_root(id).await?;
        self.control.remove(&node).await
    }
}
