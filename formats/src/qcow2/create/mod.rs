//! Making images.
//!
//! What an image is to be (`spec`) decides where everything in it lies (`plan`, pure). All of that
//! is written and made durable before the header's first sector: until then the file is no image, and
//! afterwards it is a whole one.
//!
//! An image is made in files that are made with it, from options alone ([`create`]), or on nodes that
//! there are ([`create_on`]).

mod measure;
mod plan;
mod spec;
mod target;

use std::path::PathBuf;
use std::rc::Rc;

use blockcore::Error;
use blockcore::engine::{HostCall, HostReply, OpenOptions};
use blockcore::io::{IoContext, RequestKind, Root};
use blockcore::options::{ChildOption, Options};

pub(super) use self::measure::measure;
use self::plan::Plan;
pub use self::spec::CREATE_OPTIONS;
use self::spec::Spec;
pub(super) use self::spec::{option, refcount_order};
use self::target::Target;
use crate::file;

/// Makes an image in a new file, whose options are under `file.`; its external data file, if it is to
/// have one, is another new file with options under `data-file.`, and the image names it as they do.
///
/// # Errors
///
/// [`blockcore::ErrorKind::Invalid`] for options that exclude each other or make no image; what the host answered.
/// Files that were made have been removed.
pub async fn create(context: Rc<IoContext>, mut options: Options) -> Result<(), Error> {
    let file = new_file(&mut options, "file")?;
    let file = file.ok_or_else(|| {
        Error::invalid("creation of a qcow2 image needs the options of its file: file.filename=...")
    })?;
    let data_file = new_file(&mut options, "data-file")?;
    let name = data_file.as_ref().and_then(|data| data.get("filename"));
    let spec = Spec::parse(&options, name)?;
    let plan = Plan::new(&spec)?;
    let (image, _) = NewFile::make(&context, file, 0).await?;
    let data = match data_file {
        None => None,
        Some(options) => match NewFile::make(&context, options, spec.bytes).await {
            Ok((data, is_sized)) => Some((data, is_sized)),
            Err(error) => {
                image.remove(&context).await;
                return Err(error);
            }
        },
    };
    let filled = fill_files(&context, &spec, &plan, &image, data.as_ref()).await;
    if filled.is_err() {
        // Nobody else can know these files yet.
        image.remove(&context).await;
        if let Some((data, _)) = data {
            data.remove(&context).await;
        }
    }
    filled
}

/// Makes an image on `file`, in place of whatever is there, with its data in `data_file` if that is
/// given, under the name by which the image is to know it. What that has stays, and is made longer where
/// it is too short. The roots must be allowed to write and to
/// resize. The options are those of [`CREATE_OPTIONS`].
///
/// # Errors
///
/// [`blockcore::ErrorKind::Invalid`] for options that exclude each other or make no image, and nothing has been
/// written then; what the nodes answered, and there is no image then.
pub async fn create_on(
    file: &Rc<Root>,
    data_file: Option<(&Rc<Root>, &str)>,
    options: &Options,
) -> Result<(), Error> {
    let spec = Spec::parse(options, data_file.map(|(_, name)| name))?;
    let plan = Plan::new(&spec)?;
    let request = file.enter(RequestKind::Other, 0, 0).await;
    let target = Target::Node(request.io());
    target.empty().await?;
    if let Some((data, _)) = data_file {
        let request = data.enter(RequestKind::Other, 0, 0).await;
        let data = Target::Node(request.io());
        fill_data(&data, &spec).await?;
    }
    plan.write(&target, &spec).await
}

/// The options of a new file under `name`.
fn new_file(options: &mut Options, name: &str) -> Result<Option<Options>, Error> {
    match options.take_child(name)? {
        None | Some(ChildOption::Absent) => Ok(None),
        Some(ChildOption::Inline(mut file)) => match file.take("driver").as_deref() {
            None | Some("file") => Ok(Some(file)),
            Some(other) => Err(Error::unsupported(format!(
                "'{name}' of a new image cannot be made by driver '{other}': only 'file' makes files"
            ))),
        },
        Some(ChildOption::Node(node)) => Err(Error::unsupported(format!(
            "'{name}' of a new image is to be node '{node}', and only files that are made with it can be \
             had here"
        ))),
    }
}

/// A file that was made for an image.
struct NewFile {
    path: PathBuf,
}

impl NewFile {
    /// Makes a file of `bytes` unless its options say how long it is; says whether they did not.
    async fn make(
        context: &Rc<IoContext>,
        mut options: Options,
        bytes: u64,
    ) -> Result<(Self, bool), Error> {
        let is_sized = options.get("size").is_none();
        if is_sized {
            options.set("size", bytes.to_string());
        }
        let path = options.get("filename").unwrap_or("").into();
        let make = file::FILE.create.expect("files can be made");
        make(Rc::clone(context), options).await?;
        Ok((Self { path }, is_sized))
    }

    async fn open(&self, context: &Rc<IoContext>) -> Result<Target<'static>, Error> {
        let options = OpenOptions {
            write: true,
            ..OpenOptions::default()
        };
        match context
            .host(HostCall::Open(self.path.clone(), options))
            .await
        {
            Ok(HostReply::File(file)) => Ok(Target::file(context, file)),
            Ok(reply) => unreachable!("an open answered with {reply:?}"),
            Err(error) => Err(Error::host(
                format!("cannot open '{}', which was just made", self.path.display()),
                error,
            )),
        }
    }

    async fn remove(&self, context: &Rc<IoContext>) {
        if let Err(error) = context.host(HostCall::Remove(self.path.clone())).await {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove it again");
        }
    }
}

async fn fill_files(
    context: &Rc<IoContext>,
    spec: &Spec,
    plan: &Plan,
    image: &NewFile,
    data: Option<&(NewFile, bool)>,
) -> Result<(), Error> {
    if let Some((data, true)) = data {
        fill_data(&data.open(context).await?, spec).await?;
    }
    plan.write(&image.open(context).await?, spec).await
}

/// Gives the external data file its length, and prepares space as the image's options say.
async fn fill_data(data: &Target<'_>, spec: &Spec) -> Result<(), Error> {
    data.lengthen(spec.bytes, spec.preallocation).await?;
    data.sync().await
}
