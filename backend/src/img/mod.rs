//! `stonework img`: looks at, makes, copies and changes images that nobody serves, under `qemu-img`'s
//! names, options and exit statuses. One file per verb.
//!
//! Everything is done through the block layer: an image is a node of a graph in this process
//! (`open`), read and written through a root on the one thread there is. What only a format can do is
//! asked of its driver.
//!
//! Two things differ from `qemu-img` on purpose. A format is never guessed for writing, nor for copying:
//! without one, a file that begins like a known format is refused with the command that was probably
//! meant. And verbs that only read keep out whoever writes, unless `--force-share`
//! says that a torn picture will do.
//!
//! Threads: the caller's, which blocks until the verb is done.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod check;
pub mod cli;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod dd;
pub mod info;
mod make;
pub mod map;
pub mod measure;
mod open;
mod output;
mod progress;
pub mod rebase;
pub mod resize;
pub mod snapshot;
mod walk;

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::DriverType;
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::{IoContext, Root};

use self::cli::{ImgArgs, Verb};
use crate::serve::Probe;

/// Where a verb prints what it has to say.
pub type Output = Rc<RefCell<dyn Write>>;

/// What the verbs work with.
pub struct Program {
    control: Control,
    probe: Probe,
    /// The command line, without the program's name: for commands that are proposed.
    arguments: Vec<String>,
    output: Output,
    next_name: Cell<u32>,
    /// Uses of nodes that were begun; some are over.
    roots: RefCell<Vec<RootId>>,
}

/// Why a verb failed, with the exit status that says so.
#[derive(Debug)]
struct Failure {
    status: u8,
    error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { status: 1, error }
    }
}

/// Lets an error end the verb with a status of its own.
trait WithStatus<T> {
    fn with_status(self, status: u8) -> Result<T, Failure>;
}

impl<T> WithStatus<T> for Result<T, Error> {
    fn with_status(self, status: u8) -> Result<T, Failure> {
        self.map_err(|error| Failure { status, error })
    }
}

/// Does what the command line says; returns the exit status. `arguments` are those after `img`.
///
/// Failures are reported on standard error.
pub fn run(
    args: ImgArgs,
    arguments: Vec<String>,
    drivers: Vec<&'static DriverType>,
    probe: Probe,
    output: Output,
) -> u8 {
    let failed = |error: &Error| {
        // Nobody may read it any more: the exit status tells all the same.
        let _ = writeln!(std::io::stderr(), "stonework img: {}", error.report());
    };
    let choice = match &args.verb {
        Verb::Bench(args) => args.engine(),
        // A ring's files, and with them the images' locks, are let go some time after the process has
        // ended; whoever opens the image next would have to wait for that.
        _ => EngineChoice::Threads,
    };
    let engine = match make(choice) {
        Ok(engine) => engine,
        Err(error) => {
            failed(&error);
            return 1;
        }
    };
    let context = IoContext::new(engine);
    let program = Rc::new(Program {
        control: Control::new(Graph::new(drivers), Rc::clone(&context)),
        probe,
        arguments,
        output,
        next_name: Cell::new(0),
        roots: RefCell::default(),
    });
    let done = context.block_on(async move {
        let done = verb(Rc::clone(&program), args.verb).await;
        let closed = program.close().await;
        let flushed = program.output.borrow_mut().flush();
        let flushed = flushed.map_err(|error| output_failed(&error));
        match done {
            Ok(status) => closed.and(flushed).map(|()| status).map_err(Failure::from),
            Err(failure) => Err(failure),
        }
    });
    match done {
        Ok(status) => status,
        Err(failure) => {
            failed(&failure.error);
            failure.status
        }
    }
}

async fn verb(program: Rc<Program>, verb: Verb) -> Result<u8, Failure> {
    // Boxed: only one of them runs, and each is large.
    match verb {
        Verb::Amend(args) => Box::pin(amend::run(program, args)).await,
        Verb::Bench(args) => Box::pin(bench::run(program, args)).await,
        Verb::Bitmap(args) => Box::pin(bitmap::run(program, args)).await,
        Verb::Check(args) => Box::pin(check::run(program, args)).await,
        Verb::Commit(args) => Box::pin(commit::run(program, args)).await,
        Verb::Compare(args) => Box::pin(compare::run(program, args)).await,
        Verb::Convert(args) => Box::pin(convert::run(program, args)).await,
        Verb::Create(args) => Box::pin(create::run(program, args)).await,
        Verb::Dd(args) => Box::pin(dd::run(program, args)).await,
        Verb::Info(args) => Box::pin(info::run(program, args)).await,
        Verb::Map(args) => Box::pin(map::run(program, args)).await,
        Verb::Measure(args) => Box::pin(measure::run(program, args)).await,
        Verb::Rebase(args) => Box::pin(rebase::run(program, args)).await,
        Verb::Resize(args) => Box::pin(resize::run(program, args)).await,
        Verb::Snapshot(args) => Box::pin(snapshot::run(program, args)).await,
    }
}

fn output_failed(error: &std::io::Error) -> Error {
    Error::new(
        blockcore::ErrorKind::Io,
        format!("cannot write to standard output: {error}"),
    )
}

impl Program {
    /// Closes what the verb, or its failure, has left open: a format writes back only then what it keeps.
    async fn close(&self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for root in self.roots.take() {
            if self.control.node_of(root).is_some() {
                outcome = outcome.and(self.control.remove_root(root).await);
            }
        }
        outcome.and(self.control.close_all().await)
    }

    /// Uses a node until the verb ends, or the image is closed.
    async fn use_node(&self, node: &str, spec: RootSpec) -> Result<Rc<Root>, Error> {
        let id = self.control.add_root(node, spec).await?;
        self.roots.borrow_mut().push(id);
        self.control.root_here(id)
    }

    /// Prints a line.
    fn say(&self, line: impl AsRef<str>) -> Result<(), Error> {
        let written = writeln!(self.output.borrow_mut(), "{}", line.as_ref());
        written.map_err(|error| output_failed(&error))
    }

    /// Prints text that ends no line.
    fn print(&self, text: &str) -> Result<(), Error> {
        let written = self.output.borrow_mut().write_all(text.as_bytes());
        written.map_err(|error| output_failed(&error))
    }

    /// Prints a warning, which changes nothing.
    fn warn(&self, text: impl AsRef<str>) {
        let _ = writeln!(
            std::io::stderr(),
            "stonework img: warning: {}",
            text.as_ref()
        );
    }

    /// A name for a node of ours.
    fn node_name(&self) -> String {
        let number = self.next_name.get();
        self.next_name.set(number + 1);
        format!("image{number}")
    }

    /// The command line with `option value` added after the verb, as a shell would read it.
    fn command_with(&self, option: &str, value: &str) -> String {
        self.command(&[option, value])
    }

    /// The command line with a flag added after the verb.
    fn command_with_flag(&self, flag: &str) -> String {
        self.command(&[flag])
    }

    fn command(&self, added: &[&str]) -> String {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let (verb, rest) = arguments.split_at(arguments.len().min(1));
        let begin = ["stonework", "img"];
        let words = begin.iter().chain(verb).chain(added).chain(rest);
        words.map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=,:+@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_a_shell_would_change_are_quoted() {
        assert_eq!(quoted("a.raw"), "a.raw");
        assert_eq!(quoted("my disk"), "'my disk'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
