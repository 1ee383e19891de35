//! The first conversation with a client: what both can do, and which export it chooses.
//!
//! Threads: the control thread, in a task of each client. An option is answered before the next is read, so
//! what is kept of a client is one option, which is bounded.

use std::rc::Rc;

use blockcore::engine::Errno;
use blockcore::io::IoContext;
use formats::nbd::codec::option::{
    self, ClientOption, HandshakeFlags, Info, MAX_OPTION_BYTES, OPTION_BYTES, OptionHeader,
    OptionReply, Queries, Refusal, Wanted, info,
};
use formats::nbd::codec::{ExportFlags, MAX_PAYLOAD_BYTES, Mode};
use formats::nbd::stream::Reader;

use super::export::NbdExport;
use super::server::NbdServer;

/// Multiples of it are fast on every host.
const PREFERRED_BYTES: u32 = 4096;
/// Longest option that is passed over; who sends a longer one does not speak NBD.
const MAX_SKIPPED_BYTES: u32 = 32 << 20;

/// What a client and the server have agreed on.
pub(super) struct Agreed {
    pub(super) export: Rc<NbdExport>,
    pub(super) mode: Mode,
    /// Contexts of the export that it asks the status of, by their places.
    pub(super) contexts: Vec<u32>,
}

/// Why a conversation ended without an export.
pub(super) enum Ended {
    /// The client has left.
    Left,
    /// Its connection is lost.
    Lost(Errno),
    /// What it said makes no sense.
    Wrong(String),
}

impl From<Errno> for Ended {
    fn from(errno: Errno) -> Self {
        Self::Lost(errno)
    }
}

impl From<blockcore::Error> for Ended {
    fn from(error: blockcore::Error) -> Self {
        Self::Wrong(error.report())
    }
}

/// A conversation.
struct Talk<'a> {
    context: &'a IoContext,
    server: &'a NbdServer,
    reader: &'a mut Reader,
    /// Both do without zeroes after the answer to the old way of choosing.
    no_zeroes: bool,
    mode: Mode,
    /// Nothing is told before the connection is encrypted.
    needs_tls: bool,
    /// The export that contexts were chosen of, with them.
    chosen: Option<(Rc<NbdExport>, Vec<u32>)>,
}

/// Talks to a client until it has chosen an export.
pub(super) async fn talk(
    context: &IoContext,
    server: &NbdServer,
    reader: &mut Reader,
) -> Result<Agreed, Ended> {
    let both = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    let stream = reader.stream();
    stream.send_bytes(context, &option::greeting(both)).await?;
    let flags = option::parse_client_flags(reader.array(context).await?)?;
    let mut talk = Talk {
        context,
        server,
        reader,
        no_zeroes: flags.contains(HandshakeFlags::NO_ZEROES),
        mode: Mode::Simple,
        needs_tls: server.credentials().is_some(),
        chosen: None,
    };
    let fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
    loop {
        if let Some(agreed) = talk.option(fixed).await? {
            return Ok(agreed);
        }
    }
}

impl Talk<'_> {
    /// Answers one option.
    async fn option(&mut self, fixed: bool) -> Result<Option<Agreed>, Ended> {
        let header = self.reader.array::<OPTION_BYTES>(self.context).await?;
        let OptionHeader { option, bytes } = OptionHeader::parse(&header)?;
        if bytes > MAX_SKIPPED_BYTES {
            let text = format!("option {option} has {bytes} bytes");
            return Err(Ended::Wrong(text));
        }
        if bytes > MAX_OPTION_BYTES {
            self.reader.skip(self.context, u64::from(bytes)).await?;
            if option == option::number::EXPORT_NAME {
                return Err(Ended::Wrong("the export's name is too long".into()));
            }
            self.refuse(option, Refusal::TOO_BIG, "the option is too long")
                .await?;
            return Ok(None);
        }
        let data = self.reader.vec(self.context, bytes as usize).await?;
        let parsed = match ClientOption::parse(option, &data) {
            Ok(parsed) => parsed,
            // There is no way to refuse it.
            Err(error) if option == option::number::EXPORT_NAME => return Err(error.into()),
            Err(error) => {
                self.refuse(option, Refusal::INVALID, &error.to_string())
                    .await?;
                return Ok(None);
            }
        };
        if !fixed && !matches!(parsed, ClientOption::ExportName(_)) {
            // It would not understand an answer.
            let text = format!("option {option} without fixed newstyle negotiation");
            return Err(Ended::Wrong(text));
        }
        if self.needs_tls {
            match parsed {
                ClientOption::StartTls => return self.encrypt(option).await.map(|()| None),
                ClientOption::Abort => {}
                ClientOption::ExportName(_) => {
                    let text = "an export was chosen before the connection is encrypted";
                    return Err(Ended::Wrong(text.into()));
                }
                _ => {
                    let text = format!("Option {option:#x} not permitted before TLS");
                    self.refuse(option, Refusal::TLS_REQUIRED, &text).await?;
                    return Ok(None);
                }
            }
        }
        match parsed {
            ClientOption::ExportName(name) => return self.export_name(&name).await.map(Some),
            ClientOption::Abort => {
                // It may not wait for the answer.
                let _ = self.reply(option, &OptionReply::Ack).await;
                return Err(Ended::Left);
            }
            ClientOption::List => self.list(option).await?,
            ClientOption::StartTls if self.server.credentials().is_some() => {
                self.refuse(option, Refusal::INVALID, "TLS already enabled")
                    .await?;
            }
            ClientOption::StartTls => {
                self.refuse(option, Refusal::POLICY, "TLS not configured")
                    .await?;
            }
            ClientOption::Info(wanted) => {
                self.info(option, &wanted).await?;
            }
            ClientOption::Go(wanted) => {
                if let Some(export) = self.info(option, &wanted).await? {
                    return Ok(Some(self.agree(export)));
                }
            }
            ClientOption::StructuredReply => self.change_mode(option, Mode::Structured).await?,
            ClientOption::ExtendedHeaders => self.change_mode(option, Mode::Extended).await?,
            ClientOption::ListMetaContext(queries) => {
                self.contexts(option, &queries, true).await?;
            }
            ClientOption::SetMetaContext(queries) => {
                self.contexts(option, &queries, false).await?;
            }
            ClientOption::Unknown(number) => {
                let text = format!("Unsupported option {number}");
                self.refuse(option, Refusal::UNSUPPORTED, &text).await?;
            }
        }
        Ok(None)
    }

    /// Encrypts all that follows.
    async fn encrypt(&mut self, option: u32) -> Result<(), Ended> {
        let Some(credentials) = self.server.credentials() else {
            return Ok(());
        };
        if self.reader.has_more() {
            // It would be taken for something that was encrypted.
            let text = "something follows what begins encryption";
            return Err(Ended::Wrong(text.into()));
        }
        let connection = credentials.accept()?;
        self.reply(option, &OptionReply::Ack).await?;
        let plain = self.reader.stream();
        let encrypted = plain.encrypted(self.context, connection).await?;
        *self.reader = Reader::new(encrypted);
        self.needs_tls = false;
        Ok(())
    }

    async fn reply(&self, option: u32, reply: &OptionReply) -> Result<(), Ended> {
        let bytes = reply.to_bytes(option);
        self.reader
            .stream()
            .send_bytes(self.context, &bytes)
            .await?;
        Ok(())
    }

    async fn refuse(&self, option: u32, refusal: Refusal, text: &str) -> Result<(), Ended> {
        let reply = OptionReply::Error(refusal, text.to_owned());
        self.reply(option, &reply).await
    }

    fn agree(&mut self, export: Rc<NbdExport>) -> Agreed {
        let chosen = self.chosen.take();
        let of_export = chosen.filter(|(other, _)| Rc::ptr_eq(other, &export));
        Agreed {
            export,
            mode: self.mode,
            contexts: of_export.map_or_else(Vec::new, |(_, contexts)| contexts),
        }
    }

    async fn export_name(&mut self, name: &str) -> Result<Agreed, Ended> {
        if self.mode == Mode::Extended {
            let text = "the old way of choosing an export after extended headers";
            return Err(Ended::Wrong(text.into()));
        }
        let Some(export) = self.server.export(name) else {
            return Err(Ended::Wrong(format!("export '{name}' not present")));
        };
        let flags = self.flags(&export);
        let reply = option::export_name_reply(export.bytes(), flags, !self.no_zeroes);
        self.reader
            .stream()
            .send_bytes(self.context, &reply)
            .await?;
        Ok(self.agree(export))
    }

    /// What can be done depends on how replies look.
    fn flags(&self, export: &NbdExport) -> ExportFlags {
        let mut flags = export.facts().flags;
        flags.set(ExportFlags::SEND_DF, self.mode >= Mode::Structured);
        let has_contexts = self.mode == Mode::Extended;
        flags.set(ExportFlags::BLOCK_STATUS_PAYLOAD, has_contexts);
        flags
    }

    async fn list(&self, option: u32) -> Result<(), Ended> {
        for (name, description) in self.server.names() {
            let reply = OptionReply::Server { name, description };
            self.reply(option, &reply).await?;
        }
        self.reply(option, &OptionReply::Ack).await
    }

    /// Tells of an export, which is in the answer if there is one.
    async fn info(&self, option: u32, wanted: &Wanted) -> Result<Option<Rc<NbdExport>>, Ended> {
        let Some(export) = self.server.export(&wanted.name) else {
            let text = format!("export '{}' not present", wanted.name);
            self.refuse(option, Refusal::UNKNOWN, &text).await?;
            return Ok(None);
        };
        let config = export.config();
        let mut told = Vec::new();
        if wanted.kinds.contains(&info::NAME) {
            told.push(Info::Name(config.name.clone()));
        }
        if wanted.kinds.contains(&info::DESCRIPTION) && !config.description.is_empty() {
            told.push(Info::Description(config.description.clone()));
        }
        told.push(Info::BlockSize {
            minimum: 1,
            preferred: PREFERRED_BYTES,
            maximum: MAX_PAYLOAD_BYTES,
        });
        told.push(Info::Export {
            bytes: export.bytes(),
            flags: self.flags(&export),
        });
        for info in told {
            self.reply(option, &OptionReply::Info(info)).await?;
        }
        self.reply(option, &OptionReply::Ack).await?;
        Ok(Some(export))
    }

    async fn change_mode(&mut self, option: u32, mode: Mode) -> Result<(), Ended> {
        let refused = match (self.mode, mode) {
            (Mode::Extended, Mode::Structured) => Some((
                Refusal::EXTENDED_REQUIRED,
                "extended headers already negotiated",
            )),
            (now, wanted) if now == wanted => Some((
                Refusal::INVALID,
                match mode {
                    Mode::Extended => "extended headers already negotiated",
                    _ => "structured reply already negotiated",
                },
            )),
            _ => None,
        };
        if let Some((refusal, text)) = refused {
            return self.refuse(option, refusal, text).await;
        }
        self.mode = mode;
        self.reply(option, &OptionReply::Ack).await
    }

    /// Tells which contexts match and, unless they are only listed, keeps them.
    async fn contexts(
        &mut self,
        option: u32,
        queries: &Queries,
        listing: bool,
    ) -> Result<(), Ended> {
        if !listing {
            self.chosen = None;
        }
        if self.mode == Mode::Simple {
            let text = "contexts when structured reply is not negotiated";
            return self.refuse(option, Refusal::INVALID, text).await;
        }
        let Some(export) = self.server.export(&queries.name) else {
            let text = format!("export '{}' not present", queries.name);
            return self.refuse(option, Refusal::UNKNOWN, &text).await;
        };
        let mut matching = Vec::new();
        for (id, context) in (0..).zip(&export.facts().contexts) {
            let all = listing && queries.queries.is_empty();
            let mut asked = queries.queries.iter();
            if all || asked.any(|query| context.matches(query, listing)) {
                matching.push(id);
                let name = context.name();
                // Of what is only listed nobody knows the number.
                let id = if listing { 0 } else { id };
                self.reply(option, &OptionReply::MetaContext { id, name })
                    .await?;
            }
        }
        if !listing {
            self.chosen = Some((export, matching));
        }
        self.reply(option, &OptionReply::Ack).await
    }
}
