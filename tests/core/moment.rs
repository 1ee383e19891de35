//! A disk as it was at one moment, read while its users go on: copy-before-write and snapshot-access.

use std::rc::Rc;
use std::time::Duration;

use blockcore::engine::sim::FileProperties;
use blockcore::graph::{Change, RootSpec};
use blockcore::io::Root;
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};

use crate::life::Life;
use crate::view::View;

impl Life {
    /// Keeps what a part of a disk is now, and reads it while its users write; then lets go of it.
    pub(crate) async fn look_back(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let disk = self.any_disk();
        let part = format!("part{disk}");
        let view = self.control.read(|graph| {
            let id = graph.node(&part).expect("parts stay").id();
            View::of(graph, &test.case, id)
        });
        let (case, faults) = (&test.case.disks[view.disk], &test.case.faults);
        // Where the map of an image could not be written, the file may say something else than is read.
        let unsure = faults.write_error_permille > 0 || faults.no_space_permille > 0;
        let differs = case.cluster.is_some() && unsure;
        if view.image || view.bytes == 0 || case.resizes || differs {
            return Ok(());
        }
        let number = self.new_name();
        let names = ["kept", "old", "as-it-was"].map(|what| format!("{what}-{number}"));
        let path = format!("/simulated/{}", names[0]);
        let properties = FileProperties::default();
        test.simulation.create_file(&path, properties, view.bytes);
        let Some(was) = self.keep(&part, &view, &names, &path).await? else {
            return Ok(());
        };
        self.read_back(&names[2], &was).await?;
        self.let_go(&part, &names).await
    }

    /// Puts the filters in place; gives what the part holds then. `None` if that was refused.
    async fn keep(
        self: &Rc<Self>,
        part: &str,
        view: &View,
        names: &[String; 3],
        path: &str,
    ) -> Result<Option<Vec<u8>>, String> {
        let test = &self.test;
        let [kept, old, as_it_was] = names;
        let texts = [
            format!("driver=file,node-name={kept},filename={path},discard=unmap"),
            format!(
                "driver=copy-before-write,node-name={old},file={part},target={kept},discard=unmap"
            ),
            format!("driver=snapshot-access,node-name={as_it_was},file={old},read-only=on"),
        ];
        let build = async |change: &mut Change| {
            for text in &texts[..2] {
                change.add(Options::parse(text, None)?, None).await?;
            }
            let (part, filter) = (change.find(part)?, change.find(old)?);
            change.replace_node(part, filter)?;
            change.add(Options::parse(&texts[2], None)?, None).await?;
            Ok::<_, Error>(())
        };
        let mut change = self.control.begin().await;
        let prepared = match build(&mut change).await {
            Ok(()) => change.prepare().await,
            Err(error) => {
                change.abort().await;
                Err(error)
            }
        };
        let prepared = match prepared {
            Ok(prepared) => prepared,
            // Somebody writes to the disk by another way.
            Err(error) if error.kind() == ErrorKind::Busy => {
                test.count(|totals| &mut totals.refused);
                return Ok(None);
            }
            Err(error) => return self.check_error("keeping a moment", &error).map(|()| None),
        };
        // Whoever could write there is drained.
        let mut was = test.contents(view.disk);
        was.drain(..view.base as usize);
        was.truncate(view.bytes as usize);
        let closing = prepared.commit();
        self.update_views();
        if let Err(error) = closing.finish().await {
            self.check_error("keeping a moment", &error)?;
        }
        Ok(Some(was))
    }

    async fn read_back(self: &Rc<Self>, node: &str, was: &[u8]) -> Result<(), String> {
        let test = &self.test;
        let spec = RootSpec {
            shares: blockcore::graph::permission::Permissions::all(),
            ..RootSpec::reader("somebody who looks back")
        };
        let id = match self.control.add_root(node, spec).await {
            Ok(id) => id,
            Err(error) => return self.check_error("looking back", &error),
        };
        let root = self.control.root_here(id).map_err(|error| error.report())?;
        for _ in 0..2 + test.below(6) {
            self.rest(Duration::from_micros(test.below(1000))).await;
            self.compare(&root, was).await?;
        }
        drop(root);
        while let Err(error) = self.control.remove_root(id).await {
            self.check_error("looking back no more", &error)?;
            if self.control.node_of(id).is_none() {
                break;
            }
        }
        Ok(())
    }

    async fn compare(self: &Rc<Self>, root: &Rc<Root>, was: &[u8]) -> Result<(), String> {
        let test = &self.test;
        let offset = test.below(was.len() as u64);
        let bytes = 1 + test.below((was.len() as u64 - offset).min(8192));
        let into = Segments::allocate(bytes as usize, 4096);
        if root.read(offset, into.clone()).await.is_err() {
            let faults = &test.case.faults;
            let explained = faults.read_error_permille > 0 || faults.call_error_permille > 0;
            return match explained {
                true => Ok(()),
                false => Err("what was cannot be read, which nothing explains".into()),
            };
        }
        test.count(|totals| &mut totals.looks_back);
        let (is, range) = (into.to_vec(), offset as usize..(offset + bytes) as usize);
        let mut pairs = was[range].iter().zip(&is);
        match pairs.position(|(was, is)| was != is) {
            None => Ok(()),
            Some(at) => Err(format!(
                "byte {:#x} of a part was {:#04x} when it was kept, and {:#04x} is read",
                offset as usize + at,
                was[offset as usize + at],
                is[at]
            )),
        }
    }

    /// Takes everything apart, as often as it takes.
    async fn let_go(self: &Rc<Self>, part: &str, names: &[String; 3]) -> Result<(), String> {
        let [kept, old, as_it_was] = names;
        loop {
            let mut change = self.control.begin().await;
            let mut build = || {
                change.remove(as_it_was)?;
                let (part, filter) = (change.find(part)?, change.find(old)?);
                change.replace_node(filter, part)?;
                change.remove(old)?;
                change.remove(kept)
            };
            let prepared = match build() {
                Ok(()) => change.prepare().await,
                Err(error) => return Err(error.report()),
            };
            match prepared {
                Ok(prepared) => {
                    let closing = prepared.commit();
                    self.update_views();
                    if let Err(error) = closing.finish().await {
                        self.check_error("letting a moment go", &error)?;
                    }
                    return Ok(());
                }
                Err(error) => self.check_error("letting a moment go", &error)?,
            }
        }
    }
}
