//! `stonework img bitmap`: changes persistent bitmaps in an image.
//!
//! What is asked for is done in the order of the command line. What was done before something failed stays.

use std::rc::Rc;

use blockcore::Error;
use blockcore::dirty_bitmap::DirtyBitmap;
use blockcore::graph::{BitmapSpec, Control};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::cli::{FormatArgs, parse_bytes};
use super::open::{How, Probing};
use super::{Failure, Program};

/// `stonework img bitmap`.
#[derive(Args, Debug)]
pub struct BitmapArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub actions: Actions,
    /// Bytes that one mark stands for
    #[arg(short, long, value_parser = parse_bytes, requires = "add")]
    pub granularity: Option<u64>,
    /// The image in which the bitmaps to merge are
    #[arg(short = 'b', long, value_name = "IMAGE", requires = "merge")]
    pub source_file: Option<String>,
    /// Format of that image
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "source_file")]
    pub source_format: Option<String>,
    /// The image
    pub filename: String,
    /// The bitmap
    pub bitmap: String,
}

/// What is done with a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is made.
    Add,
    /// It goes.
    Remove,
    /// It forgets what it has marked.
    Clear,
    /// It marks what is written from now on.
    Enable,
    /// It marks no more.
    Disable,
    /// It marks what this bitmap has marked.
    Merge(String),
}

/// What is done, in this order; at least one thing.
#[derive(Clone, Debug)]
pub struct Actions(Vec<Action>);

/// The options that ask for something, but for `--merge`.
const FLAGS: [(&str, &str, Action); 5] = [
    ("add", "Make the bitmap", Action::Add),
    ("remove", "Remove it", Action::Remove),
    ("clear", "Forget what it has marked", Action::Clear),
    ("enable", "Have it mark what is written", Action::Enable),
    ("disable", "Have it mark no more", Action::Disable),
];

impl Args for Actions {
    fn augment_args(command: Command) -> Command {
        let flag = |name: &'static str, help: &'static str| {
            Arg::new(name)
                .long(name)
                .help(help)
                .action(ArgAction::SetTrue)
                .overrides_with(name)
        };
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("BITMAP")
            .help("Mark what this bitmap has marked, too")
            .action(ArgAction::Append);
        let flags = FLAGS.map(|(name, help, _)| flag(name, help));
        command.args(flags).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut actions = Vec::new();
        for (name, _, action) in FLAGS {
            let is_given = matches.value_source(name) == Some(ValueSource::CommandLine);
            let index = matches.index_of(name).filter(|_| is_given);
            actions.extend(index.map(|index| (index, action)));
        }
        let merges = matches.get_many::<String>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        let merges = merges.map(|source| Action::Merge(source.clone()));
        actions.extend(places.zip(merges));
        if actions.is_empty() {
            return Err(clap::Error::raw(
                clap::error::ErrorKind::MissingRequiredArgument,
                "at least one of --add, --remove, --clear, --enable, --disable and --merge is needed\n",
            ));
        }
        actions.sort_by_key(|(index, _)| *index);
        Ok(Self(
            actions.into_iter().map(|(_, action)| action).collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(super) async fn run(program: Rc<Program>, args: BitmapArgs) -> Result<u8, Failure> {
    let how = How::writing(&args.format)?;
    let node = program.open_node(&args.filename, &how).await?;
    let mut source_node = node.clone();
    if let Some(source) = &args.source_file {
        let format = FormatArgs {
            format: args.source_format.clone(),
            ..FormatArgs::default()
        };
        let how = How {
            backing: false,
            ..How::reading(&format, Probing::Allowed)?
        };
        source_node = program.open_node(source, &how).await?;
    }
    let (control, name) = (&program.control, &*args.bitmap);
    for action in args.actions.0 {
        match action {
            Action::Add => {
                let spec = BitmapSpec {
                    name: name.to_owned(),
                    granularity_bytes: args.granularity,
                    persistent: true,
                    enabled: true,
                };
                control.add_bitmap(&node, &spec).await?;
            }
            Action::Remove => control.remove_bitmap(&node, name).await?,
            Action::Clear => change(control, &node, name, |bitmap| bitmap.clear()).await?,
            Action::Enable => change(control, &node, name, DirtyBitmap::enable).await?,
            Action::Disable => change(control, &node, name, DirtyBitmap::disable).await?,
            Action::Merge(source) => {
                let sources = [(source_node.clone(), source)];
                control.merge_bitmaps(&node, name, &sources).await?;
            }
        }
    }
    control.remove(&node).await?;
    Ok(0)
}

/// Changes a bitmap of a node.
async fn change(
    control: &Control,
    node: &str,
    name: &str,
    change: impl FnOnce(&mut DirtyBitmap) -> Result<(), Error>,
) -> Result<(), Error> {
    control
        .change_bitmaps(node, |bitmaps| change(bitmaps.get_mut(name)?))
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actions(words: &[&str]) -> Result<Vec<Action>, clap::Error> {
        let command = BitmapArgs::augment_args(Command::new("bitmap"));
        let ends = ["a.qcow2", "b"];
        let words = ["bitmap"].iter().chain(words).chain(&ends);
        let matches = command.try_get_matches_from(words)?;
        Ok(BitmapArgs::from_arg_matches(&matches)?.actions.0)
    }

    #[test]
    fn actions_come_in_the_order_of_the_command_line() {
        let merge = |name: &str| Action::Merge(name.into());
        assert_eq!(
            actions(&[
                "--merge",
                "x",
                "--disable",
                "--add",
                "-g",
                "4k",
                "--merge",
                "y"
            ])
            .unwrap(),
            [merge("x"), Action::Disable, Action::Add, merge("y")]
        );
        assert_eq!(
            actions(&["--enable", "--disable", "--enable"]).unwrap(),
            [Action::Disable, Action::Enable]
        );
        assert!(actions(&[]).is_err());
        assert!(actions(&["-g", "4k", "--enable"]).is_err());
        assert!(actions(&["--enable", "-b", "other"]).is_err());
    }
}
