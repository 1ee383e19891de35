//! Copying an image's persistent bitmaps along with what it holds.

use blockcore::dirty_bitmap::{DirtyBitmap, Status};
use blockcore::graph::BitmapSpec;
use blockcore::{Error, ErrorKind};

use super::super::Program;
use super::super::open::Image;

/// The bitmaps that are going to be copied.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] if there are several images, or the one keeps no bitmaps;
/// [`ErrorKind::Corrupt`] for a bitmap that means nothing, unless these are skipped.
pub(super) fn to_copy(
    program: &Program,
    sources: &[Image],
    skip_broken: bool,
) -> Result<Vec<Status>, Error> {
    let [source] = sources else {
        return Err(Error::unsupported(
            "bitmaps can be copied from a single image only",
        ));
    };
    check_keeps(program, source)?;
    let mut found = source.look(|node| node.bitmaps().statuses());
    found.retain(|status| status.persistent);
    let broken = |status: &&Status| status.inconsistent;
    if let Some(status) = found.iter().find(broken).filter(|_| !skip_broken) {
        let text = format!(
            "cannot copy bitmap '{}' of '{}': it was not stored when the image was last written to, and means \
             nothing; leave such bitmaps out with --skip-broken-bitmaps, or remove it with 'stonework img \
             bitmap --remove'",
            status.name, source.name
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    for status in found.iter().filter(broken) {
        program.warn(format!(
            "bitmap '{}' means nothing, and is left out",
            status.name
        ));
    }
    found.retain(|status| !status.inconsistent);
    Ok(found)
}

fn check_keeps(program: &Program, image: &Image) -> Result<(), Error> {
    let node = image.node;
    match program.control.read(|graph| graph.keeps_bitmaps(node)) {
        true => Ok(()),
        false => Err(Error::unsupported(format!(
            "images of format '{}' keep no bitmaps",
            image.format()
        ))),
    }
}

/// Copies them to an image that has none of their names.
pub(super) async fn copy(
    program: &Program,
    source: &Image,
    target: &Image,
    bitmaps: Vec<Status>,
) -> Result<(), Error> {
    check_keeps(program, target)?;
    let name_of = |image: &Image| image.look(|node| node.name().to_owned());
    let (from, to) = (name_of(source), name_of(target));
    let control = &program.control;
    for status in bitmaps {
        let spec = BitmapSpec {
            name: status.name.clone(),
            granularity_bytes: Some(status.granularity_bytes),
            persistent: true,
            enabled: false,
        };
        control.add_bitmap(&to, &spec).await?;
        let sources = [(from.clone(), status.name.clone())];
        control.merge_bitmaps(&to, &status.name, &sources).await?;
        if status.recording {
            control
                .change_bitmaps(&to, |set| {
                    set.get_mut(&status.name).and_then(DirtyBitmap::enable)
                })
                .await?;
        }
    }
    Ok(())
}
