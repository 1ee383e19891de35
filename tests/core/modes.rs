//! Files in other modes, links that are frozen, and writers that come and go.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use blockcore::drain::Scope;
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Change, RootSpec};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;

use crate::case::Case;
use crate::guest::Asking;
use crate::life::{Life, Place, User};
use crate::operator::Outcome;
use crate::view::View;

/// Who has one of these writes.
const WRITES: Permissions = Permissions::WRITE
    .union(Permissions::WRITE_UNCHANGED)
    .union(Permissions::RESIZE);

impl Life {
    /// Options for the file of a disk.
    pub(crate) fn file_options(&self, number: usize, direct: bool, read_only: bool) -> String {
        let disk = &self.test.case.disks[number];
        let on_off = |on: bool| if on { "on" } else { "off" };
        format!(
            "driver={},node-name=file{number},filename={},cache.direct={},discard=unmap,read-only={},\
             auto-read-only={}",
            Case::driver(disk),
            disk.path,
            on_off(direct),
            on_off(read_only),
            on_off(disk.auto_read_only),
        )
    }

    /// What all users of a disk's file need together.
    pub(crate) fn needs_of_file(&self, disk: usize) -> Permissions {
        self.control.read(|graph| {
            let node = graph
                .node(&format!("file{disk}"))
                .expect("leaves stay")
                .id();
            graph.cumulative_permissions(node).0
        })
    }

    fn file_is_written(&self, disk: usize) -> bool {
        self.needs_of_file(disk).intersects(WRITES)
    }

    /// Reopens a disk's file: past the page cache or through it, and for reading only, which is refused
    /// while somebody writes.
    pub(crate) async fn reopen_file(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let disk = self.any_disk();
        if test.has_lost_an_image() {
            // Its format goes by what it knows to be durable, and would be told that all is well.
            return Ok(());
        }
        let (written, read_only) = (self.file_is_written(disk), test.chance(300));
        let options = |read_only: bool| {
            let text = self.file_options(disk, test.chance(500), read_only);
            Options::parse(&text, None).expect("well-formed")
        };
        let entry = options(read_only);
        let reopen = async |change: &mut Change| {
            change.drain(Scope::All).await;
            if test.has_lost_an_image() {
                return Err(Error::new(ErrorKind::Io, "just now"));
            }
            change.reopen(vec![entry]).await
        };
        match self.attempt(reopen).await? {
            Outcome::Committed if read_only && written => {
                return Err("a file that somebody writes to is read-only".into());
            }
            Outcome::Committed => test.count(|totals| &mut totals.reopened),
            Outcome::GivenUp => return Ok(()),
            Outcome::Refused(error) if error.kind() == ErrorKind::PermissionDenied => {
                test.count(|totals| &mut totals.refused);
                return match read_only && written {
                    true => Ok(()),
                    false => Err(format!("nobody writes, and yet: {}", error.report())),
                };
            }
            Outcome::Refused(error) => return self.check_error("reopening a file", &error),
        }
        if !read_only {
            return Ok(());
        }
        test.count(|totals| &mut totals.read_only);
        self.rest(Duration::from_micros(test.below(500))).await;
        let writer = RootSpec {
            shares: Permissions::all(),
            ..RootSpec::writer("a writer where there is to be none")
        };
        match self.control.add_root(&format!("file{disk}"), writer).await {
            Ok(_) => return Err("somebody may write to a file that is read-only".into()),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
            Err(error) => self.check_error("a writer where there is to be none", &error)?,
        }
        while let Err(error) = self.control.reopen(vec![options(false)]).await {
            self.check_error("reopening a file for writing", &error)?;
        }
        self.update_views();
        Ok(())
    }

    /// Somebody writes to a node for a while, who may be the only one.
    pub(crate) async fn write_for_a_while(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        if self.has_compressing() {
            // Nobody may write past it.
            return Ok(());
        }
        let disk = self.any_disk();
        let (node, alone) = (self.any_node(disk, false), !self.file_is_written(disk));
        let grain = test.case.grain;
        let spec = RootSpec {
            shares: Permissions::all(),
            ..RootSpec::writer("a writer for a while").in_units_of(grain as u32)
        };
        let id = match self.control.add_root(&node, spec).await {
            Ok(id) => id,
            Err(error) => return self.check_error("a writer for a while", &error),
        };
        let view = self.control.read(|graph| {
            let node = graph.node(&node).expect("nobody removes it now").id();
            View::of(graph, &test.case, node)
        });
        let user = Rc::new(User {
            id,
            unit: grain,
            writes: true,
            resizes: false,
            view: RefCell::new(view),
            places: (0..self.workers.len()).map(|_| Cell::default()).collect(),
            in_flight: Cell::new(0),
        });
        // Views of others are as they were, but permissions are not.
        self.update_views();
        self.attach(&user, 0).await?;
        let (done, wait) = oneshot::channel();
        let (life, asker) = (Rc::clone(self), Rc::clone(&user));
        let writes = 1 + test.below(3);
        self.workers[0].0.context().spawn(async move {
            for _ in 0..writes {
                if let Some(asking) = Asking::enter(&life, &asker, 0).await {
                    asking.write().await;
                }
            }
            let _ = done.send(());
        });
        wait.await.expect("whoever writes comes to an end");
        user.places[0].set(Place::default());
        while let Err(error) = self.control.remove_root(id).await {
            self.check_error("ending a writer for a while", &error)?;
            if self.control.node_of(id).is_none() {
                break;
            }
        }
        self.update_views();
        if alone {
            test.count(|totals| &mut totals.lone_writers);
        }
        Ok(())
    }

    /// Freezes a chain: nothing of it can be changed until it is thawed.
    pub(crate) async fn freeze(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let top = self.any_node(self.any_disk(), false);
        let chain: Vec<_> = self.control.read(|graph| {
            let top = graph.node(&top).expect("just seen").id();
            let names = graph
                .chain(top)
                .map(|id| graph.node_by_id(id).expect("in the graph"));
            names
                .map(|node| (node.name().to_owned(), node.driver_name()))
                .collect()
        });
        if chain.len() < 2 {
            return Ok(());
        }
        let freeze = async |change: &mut Change| {
            let top = change.find(&top)?;
            change.freeze_chain(top, None)
        };
        if !self.change("freezing a chain", freeze).await? {
            return Ok(());
        }
        self.rest(Duration::from_micros(test.below(500))).await;
        let place = test.below(chain.len() as u64 - 1) as usize;
        let ((upper, driver), (lower, _)) = (&chain[place], &chain[place + 1]);
        let how = test.below(3);
        let (elsewhere, name) = (self.any_node(self.any_disk(), false), self.new_name());
        let change = async |change: &mut Change| {
            let (up, low) = (change.find(upper)?, change.find(lower)?);
            match how {
                0 => change.freeze_chain(up, None),
                1 if *driver == "overlay" => change.set_child(up, "backing", None),
                1 if elsewhere != *lower => {
                    let elsewhere = change.find(&elsewhere)?;
                    change.set_child(up, "file", Some(elsewhere))
                }
                _ => {
                    let text = format!("driver=pass-through,node-name={name},file={lower}");
                    let filter = change.add(Options::parse(&text, None)?, None).await?;
                    change.replace_node(low, filter)
                }
            }
        };
        match self.attempt(change).await? {
            Outcome::Refused(error) if error.kind() == ErrorKind::Busy => {
                test.count(|totals| &mut totals.frozen);
            }
            // A loop is seen first.
            Outcome::Refused(error) if how == 1 && error.kind() == ErrorKind::Invalid => {}
            Outcome::Refused(error) => self.check_error("changing a frozen chain", &error)?,
            _ => {
                return Err(format!(
                    "the link from '{upper}' to '{lower}' was changed ({how}), and is frozen"
                ));
            }
        }
        let thaw = async |change: &mut Change| {
            let top = change.find(&top)?;
            change.thaw_chain(top, None);
            Ok(())
        };
        while !self.change("thawing a chain", thaw).await? {}
        Ok(())
    }
}
