//! Making a new file for an image.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use blockcore::driver::Preallocation;
use blockcore::engine::{Errno, HostCall, HostReply, Op, OpenFile, OpenOptions};
use blockcore::io::IoContext;
use blockcore::options::{OptionKind, OptionSpec, Options};
use blockcore::{Error, ErrorKind};

use super::length::prepare_space;

/// Options of creation, under QEMU's names.
pub const CREATE_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "filename",
        kind: OptionKind::Text,
        default: None,
        reopen: false,
        changes_data: false,
        help: "path of the file to make",
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: None,
        reopen: false,
        changes_data: false,
        help: "length in bytes",
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Choice(&["off", "falloc", "full"]),
        default: Some("off"),
        reopen: false,
        changes_data: false,
        help: "off: sparse; falloc: space reserved; full: zeroes written",
    },
    OptionSpec {
        name: "nocow",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: false,
        changes_data: false,
        help: "ask a copy-on-write file system to write in place",
    },
    OptionSpec {
        name: "extent-size-hint",
        kind: OptionKind::Size,
        default: Some("1M"),
        reopen: false,
        changes_data: false,
        help: "unit in which the file system should allocate, 0 for its own choice",
    },
];

/// Makes a file that was not there, durable in its directory. A failed creation leaves no file.
pub(super) async fn create(context: Rc<IoContext>, options: Options) -> Result<(), Error> {
    options.check(&[CREATE_OPTIONS], "creation of a file")?;
    let path = PathBuf::from(options.text(CREATE_OPTIONS, "filename"));
    let bytes = options.size(CREATE_OPTIONS, "size");
    if bytes > i64::MAX as u64 {
        return Err(Error::invalid(format!(
            "cannot create '{}' with {bytes} bytes: no file can be that long",
            path.display()
        )));
    }
    let call = HostCall::Open(
        path.clone(),
        OpenOptions {
            write: true,
            direct: false,
            create: true,
        },
    );
    let file = match context.host(call).await {
        Ok(HostReply::File(file)) => file,
        Ok(reply) => unreachable!("an open answered with {reply:?}"),
        Err(error) => return Err(failed(&path, error)),
    };
    context.engine().attach(&file);
    let filled = fill(&context, &file, &options, bytes).await;
    context.engine().detach(file.id());
    let made = match filled {
        Ok(()) => sync_directory(&context, &path).await,
        Err(error) => Err(error),
    };
    if let Err(error) = made {
        // Nobody else can know this file yet.
        if let Err(second) = context.host(HostCall::Remove(path.clone())).await {
            tracing::warn!(path = %path.display(), error = %second, "cannot remove it again");
        }
        return Err(failed(&path, error));
    }
    Ok(())
}

async fn sync_directory(context: &IoContext, path: &Path) -> Result<(), Errno> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    context.host(HostCall::SyncDirectory(directory)).await?;
    Ok(())
}

fn failed(path: &Path, error: Errno) -> Error {
    match error {
        Errno::EXIST => Error::new(
            ErrorKind::Exists,
            format!(
                "cannot create '{}': it exists, and is left as it is",
                path.display()
            ),
        ),
        error => Error::host(format!("cannot create '{}'", path.display()), error),
    }
}

async fn fill(
    context: &IoContext,
    file: &Arc<OpenFile>,
    options: &Options,
    bytes: u64,
) -> Result<(), Errno> {
    // Both are wishes, and before the file has data or they have no effect.
    if options.bool(CREATE_OPTIONS, "nocow") {
        let _ = context.host(HostCall::SetNocow(Arc::clone(file))).await;
    }
    let hint = options.size(CREATE_OPTIONS, "extent-size-hint");
    if let Ok(hint @ 1..) = u32::try_from(hint) {
        let call = HostCall::SetExtentSizeHint(Arc::clone(file), hint);
        let _ = context.host(call).await;
    }
    let wanted = options.text(CREATE_OPTIONS, "preallocation");
    let mut names = Preallocation::NAMES.into_iter();
    let preallocation = names.find(|(name, _)| *name == wanted);
    let preallocation = preallocation.expect("one of the table's").1;
    prepare_space(context, file, (0, bytes), 1, preallocation).await?;
    let call = HostCall::Truncate(Arc::clone(file), bytes);
    context.host(call).await?;
    context.op(Op::Sync { file: file.id() }).await.0?;
    Ok(())
}
