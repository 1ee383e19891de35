//! Making images: their files, and through the format's driver what is in them.

use std::path::Path;
use std::rc::Rc;

use blockcore::driver::{CreateOnFn, DriverType, NewChild, Preallocation};
use blockcore::filename::full_backing_name;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};

use super::Program;
use super::create::{Creation, DATA_FILE, find, is_plain, preallocation};
use super::open::How;
use super::walk::SECTOR_BYTES;

impl Program {
    /// Makes an image, over a file that is there if nobody has it open.
    ///
    /// # Errors
    ///
    /// What the host or the format said; a new file is gone again, one that was there is emptied.
    pub(super) async fn create(&self, creation: &Creation) -> Result<(), Error> {
        let below = self.protocol_options(&creation.name)?;
        let bytes = creation.bytes.next_multiple_of(SECTOR_BYTES);
        let format = creation.format;
        let Some(create_on) = format.create_on.filter(|_| !is_plain(format)) else {
            let made = self.make_file(&creation.name, below, bytes, &creation.options);
            return made.await.map(drop);
        };
        let (of_file, mut options) = self.split(format, &creation.options);
        let mut set = |name: &str, value: &str| {
            if let Some(spec) = find(format.create_options, name) {
                options.set(spec.name, value);
            }
        };
        set("size", &bytes.to_string());
        if let Some(backing) = &creation.backing {
            set("backing_file", &backing.name);
            set("backing_fmt", backing.format.as_deref().unwrap_or(""));
        }
        let mut made = Vec::new();
        let created = self.create_on(creation, create_on, (below, of_file), options, &mut made);
        let created = created.await;
        if created.is_err() {
            // Nobody else can know these files yet.
            for path in made {
                if let Err(error) = std::fs::remove_file(&path) {
                    tracing::warn!(path, %error, "cannot remove it again");
                }
            }
        }
        created
    }

    /// Makes the files of an image and the image in them. `made` gets the paths of those that were not
    /// there.
    async fn create_on(
        &self,
        creation: &Creation,
        create_on: CreateOnFn,
        (below, of_file): (Options, Options),
        options: Options,
        made: &mut Vec<String>,
    ) -> Result<(), Error> {
        let mut names = vec![None; creation.format.children.len()];
        names[0] = Some((creation.name.clone(), creation.name.clone()));
        if let Some(data_file) = &creation.data_file {
            let full = full_backing_name(&creation.name, data_file)?;
            let mut specs = creation.format.children.iter();
            let place = specs.position(|spec| spec.name == DATA_FILE);
            if let (Some(place), Some(full)) = (place, full) {
                names[place] = Some((full, data_file.clone()));
            }
        }
        let mut images = Vec::new();
        for (place, name) in names.into_iter().enumerate() {
            let Some((path, name)) = name else {
                images.push(None);
                continue;
            };
            let (below, options) = match place {
                0 => (below.clone(), of_file.clone()),
                _ => (self.protocol_options(&path)?, Options::default()),
            };
            made.extend(self.make_file(&path, below.clone(), 0, &options).await?);
            let driver = below.get("driver").unwrap_or("");
            let how = How {
                format: Some(driver.to_owned()),
                resize: true,
                ..How::creating()
            };
            images.push(Some((self.open(&path, &how).await?, name)));
        }
        let children = images.iter().map(|image| {
            let (image, name) = image.as_ref()?;
            Some(NewChild {
                root: Rc::clone(&image.root),
                name: name.clone(),
            })
        });
        let created = create_on(children.collect(), options).await;
        for (image, _) in images.into_iter().flatten() {
            image.close().await?;
        }
        created
    }

    /// Which options are the file's, and which the format's.
    fn split(&self, format: &DriverType, options: &Options) -> (Options, Options) {
        let (mut of_file, mut of_format) = (Options::default(), Options::default());
        for (key, value) in options.iter() {
            match find(format.create_options, key) {
                Some(_) => of_format.set_value(key, value.clone()),
                None => of_file.set_value(key, value.clone()),
            }
        }
        (of_file, of_format)
    }

    /// Makes a file of so many bytes, or empties and extends the one that is there; says what was made.
    async fn make_file(
        &self,
        name: &str,
        below: Options,
        bytes: u64,
        options: &Options,
    ) -> Result<Option<String>, Error> {
        let kind = self.kind(below.get("driver").unwrap_or(""))?;
        let path = below.get("filename").unwrap_or("").to_owned();
        if let Some(create) = kind.create.filter(|_| !Path::new(&path).exists()) {
            let mut options = options.clone();
            options.set("filename", &*path);
            options.set("size", bytes.to_string());
            create(Rc::clone(self.control.context()), options).await?;
            return Ok(Some(path));
        }
        let how = How {
            format: Some(kind.name.to_owned()),
            ..How::creating()
        };
        let image = self.open(name, &how).await?;
        if kind.create.is_none() {
            // What cannot be made cannot be emptied: it has the length that it has.
            let there = image.bytes();
            image.close().await?;
            return match there >= bytes {
                true => Ok(None),
                false => Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("'{name}' has only {there} bytes, and {bytes} are needed"),
                )),
            };
        }
        let node = image.look(|node| node.name().to_owned());
        let preallocation = preallocation(options.get("preallocation").unwrap_or("off"))?;
        self.control.resize(&node, 0, Preallocation::Off).await?;
        if bytes > 0 {
            self.control.resize(&node, bytes, preallocation).await?;
        }
        image.flush().await?;
        image.close().await?;
        Ok(None)
    }
}
