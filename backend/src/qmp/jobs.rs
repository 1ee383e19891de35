//! Commands that start, steer and tell of jobs.
//!
//! `block-job-*` are QEMU's older forms of `job-*`: they call a job by `device`, which is its name all the
//! same.

use std::rc::Rc;

use blockcore::Error;
use blockcore::graph::{LineEnd, NodeId};
use blockcore::io::policy::OnError;
use blockcore::job::{
    BackupSpec, BackupSync, CommitSpec, JobKind, JobSpec, JobState, JobView, Jobs, MirrorSpec,
    MirrorSync, StreamSpec,
};

use super::Service;
use super::command::Commands;
use crate::qapi::{ErrorClass, QmpError};
use crate::{qapi_enum, qapi_struct, qapi_union};

/// Memory for what a mirror has under way, in bytes, unless it is told another size; QEMU's.
const MIRROR_BUFFER_BYTES: u64 = 10 << 20;
/// How many pieces a backup has under way, unless it is told another number; QEMU's.
const BACKUP_WORKERS: i64 = 64;

qapi_enum! {
    /// What kind of job.
    pub enum JobType {
        /// Writes what overlays hold to an image below.
        Commit = "commit",
        /// Writes into an overlay what images below hold.
        Stream = "stream",
        /// Copies a disk, and goes on with what changes.
        Mirror = "mirror",
        /// Copies a disk as it was at one moment.
        Backup = "backup",
    }
}

impl JobType {
    pub(super) fn of(kind: JobKind) -> Self {
        match kind {
            JobKind::Backup => Self::Backup,
            JobKind::Commit => Self::Commit,
            JobKind::Mirror => Self::Mirror,
            JobKind::Stream => Self::Stream,
        }
    }
}

qapi_enum! {
    /// How far a job is.
    pub enum JobStatus {
        /// It is there, and has not begun.
        Created = "created",
        /// It works.
        Running = "running",
        /// It is held.
        Paused = "paused",
        /// It can be completed.
        Ready = "ready",
        /// It is held, and can be completed.
        Standby = "standby",
        /// It waits for others.
        Waiting = "waiting",
        /// It waits to be finalized.
        Pending = "pending",
        /// It is being taken back.
        Aborting = "aborting",
        /// It is over.
        Concluded = "concluded",
        /// It is forgotten.
        Null = "null",
    }
}

impl JobStatus {
    pub(super) fn of(state: JobState) -> Self {
        match state {
            JobState::Created => Self::Created,
            JobState::Running => Self::Running,
            JobState::Paused => Self::Paused,
            JobState::Ready => Self::Ready,
            JobState::Standby => Self::Standby,
            JobState::Waiting => Self::Waiting,
            JobState::Pending => Self::Pending,
            JobState::Aborting => Self::Aborting,
            JobState::Concluded => Self::Concluded,
            JobState::Null => Self::Null,
        }
    }
}

qapi_enum! {
    /// What becomes of a job's failure to read or write.
    pub enum BlockdevOnError {
        /// The job fails.
        Report = "report",
        /// The job tries again later, or leaves it out and fails in the end.
        Ignore = "ignore",
        /// As `stop` if the host has no space left, else as `report`.
        Enospc = "enospc",
        /// The job is paused.
        Stop = "stop",
        /// As `enospc`.
        Auto = "auto",
    }
}

qapi_enum! {
    /// Which part of a disk is copied.
    pub enum MirrorSyncMode {
        /// What the topmost image has.
        Top = "top",
        /// All of it.
        Full = "full",
        /// What changes from now on.
        None = "none",
        /// What a dirty bitmap has marked.
        Incremental = "incremental",
        /// As that, and what becomes of the bitmap is told.
        Bitmap = "bitmap",
    }
}

qapi_enum! {
    /// What becomes of the dirty bitmap that a backup was made by.
    pub enum BitmapSyncMode {
        /// It marks what has changed since, if the backup succeeds.
        OnSuccess = "on-success",
        /// It stays as it is.
        Never = "never",
        /// It marks what has changed since, or was not copied.
        Always = "always",
    }
}

qapi_enum! {
    /// Whether guests wait for a mirror's target.
    pub enum MirrorCopyMode {
        /// They do not.
        Background = "background",
        /// They do.
        WriteBlocking = "write-blocking",
    }
}

qapi_struct! {
    /// How a backup does its work.
    pub struct BackupPerf {
        /// Whether the host may copy; it is not asked to.
        use_copy_range: Option<bool> = "use-copy-range",
        /// How much is under way at once.
        max_workers: Option<i64> = "max-workers",
        /// The longest piece in bytes; ours are a mebibyte at most.
        max_chunk: Option<i64> = "max-chunk",
        /// The smallest unit of copying in bytes.
        min_cluster_size: Option<u64> = "min-cluster-size",
    }
}

qapi_struct! {
    /// A job by its name.
    pub struct JobById {
        /// Which.
        id: String = "id",
    }
}

qapi_struct! {
    /// A job by its name.
    pub struct JobByDevice {
        /// Which.
        device: String = "device",
    }
}

qapi_struct! {
    /// A job that is to give up.
    pub struct BlockJobCancel {
        /// Which.
        device: String = "device",
        /// Whether at once, also if it is ready or paused.
        force: Option<bool> = "force",
    }
}

qapi_struct! {
    /// How fast a job may be.
    pub struct BlockJobSetSpeed {
        /// Which.
        device: String = "device",
        /// Bytes per second; 0 for no limit.
        speed: i64 = "speed",
    }
}

qapi_struct! {
    /// What is changed about a mirror.
    pub struct BlockJobChangeMirror {
        /// Which.
        id: String = "id",
        /// Whether guests wait for the target.
        copy_mode: MirrorCopyMode = "copy-mode",
    }
}

qapi_union! {
    /// What is changed about a job.
    pub enum BlockJobChange by "type" {
        /// A mirror.
        Mirror(BlockJobChangeMirror) = "mirror",
    }
}

qapi_struct! {
    /// A job.
    pub struct JobInfo {
        /// Its name.
        id: String = "id",
        /// What kind.
        kind: JobType = "type",
        /// How far it is.
        status: JobStatus = "status",
        /// How much is done.
        current_progress: i64 = "current-progress",
        /// How much there is to do, as far as is known.
        total_progress: i64 = "total-progress",
        /// Why it failed.
        error: Option<String> = "error",
    }
}

qapi_struct! {
    /// A job, as older clients know it.
    pub struct BlockJobInfo {
        /// What kind.
        kind: JobType = "type",
        /// Its name.
        device: String = "device",
        /// How much there is to do, as far as is known.
        len: i64 = "len",
        /// How much is done.
        offset: i64 = "offset",
        /// Whether it works right now.
        busy: bool = "busy",
        /// Whether it has been told to hold still.
        paused: bool = "paused",
        /// Bytes per second, at most; 0 for no limit.
        speed: i64 = "speed",
        /// Whether it stopped for a failure: `ok`, `failed` or `nospace`.
        io_status: String = "io-status",
        /// Whether it can be completed.
        ready: bool = "ready",
        /// How far it is.
        status: JobStatus = "status",
        /// Whether its result becomes a fact without a word.
        auto_finalize: bool = "auto-finalize",
        /// Whether it is forgotten when it is over.
        auto_dismiss: bool = "auto-dismiss",
        /// Why it failed.
        error: Option<String> = "error",
        /// Of a mirror: whether its target is the same as its source, and stays so.
        actively_synced: Option<bool> = "actively-synced",
    }
}

qapi_struct! {
    /// A backup to be started.
    pub struct BlockdevBackup {
        /// The job's name.
        job_id: Option<String> = "job-id",
        /// The disk's node.
        device: String = "device",
        /// The node that gets the copy.
        target: String = "target",
        /// What is copied.
        sync: MirrorSyncMode = "sync",
        /// Bytes per second, at most; 0 for no limit.
        speed: Option<i64> = "speed",
        /// The dirty bitmap that says what is copied.
        bitmap: Option<String> = "bitmap",
        /// What becomes of it.
        bitmap_mode: Option<BitmapSyncMode> = "bitmap-mode",
        /// Whether the copy is compressed.
        compress: Option<bool> = "compress",
        /// What becomes of failures to read.
        on_source_error: Option<BlockdevOnError> = "on-source-error",
        /// What becomes of failures to write.
        on_target_error: Option<BlockdevOnError> = "on-target-error",
        /// Whether its result becomes a fact without a word.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether it is forgotten when it is over.
        auto_dismiss: Option<bool> = "auto-dismiss",
        /// What the filter above the disk is called.
        filter_node_name: Option<String> = "filter-node-name",
        /// Whether what has been copied is discarded.
        discard_source: Option<bool> = "discard-source",
        /// How it does its work.
        x_perf: Option<BackupPerf> = "x-perf",
    }
}

qapi_struct! {
    /// A mirror to be started.
    pub struct BlockdevMirror {
        /// The job's name.
        job_id: Option<String> = "job-id",
        /// The disk's node.
        device: String = "device",
        /// The node that gets the copy.
        target: String = "target",
        /// The node whose place the target takes.
        replaces: Option<String> = "replaces",
        /// What is copied at first.
        sync: MirrorSyncMode = "sync",
        /// Bytes per second, at most; 0 for no limit.
        speed: Option<i64> = "speed",
        /// How much is copied where a little has changed, in bytes.
        granularity: Option<u64> = "granularity",
        /// Memory for what is under way, in bytes.
        buf_size: Option<i64> = "buf-size",
        /// What becomes of failures to read.
        on_source_error: Option<BlockdevOnError> = "on-source-error",
        /// What becomes of failures to write.
        on_target_error: Option<BlockdevOnError> = "on-target-error",
        /// What the filter above the disk is called.
        filter_node_name: Option<String> = "filter-node-name",
        /// Whether guests wait for the target.
        copy_mode: Option<MirrorCopyMode> = "copy-mode",
        /// Whether its result becomes a fact without a word.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether it is forgotten when it is over.
        auto_dismiss: Option<bool> = "auto-dismiss",
    }
}

qapi_struct! {
    /// A commit to be started.
    pub struct BlockCommit {
        /// The job's name.
        job_id: Option<String> = "job-id",
        /// The node at which guests are.
        device: String = "device",
        /// The node that gets the data; the last of the chain by default.
        base_node: Option<String> = "base-node",
        /// As that, by the name of its image.
        base: Option<String> = "base",
        /// The topmost node that is committed; the active one by default.
        top_node: Option<String> = "top-node",
        /// As that, by the name of its image.
        top: Option<String> = "top",
        /// What the overlay's header is to say of its backing image.
        backing_file: Option<String> = "backing-file",
        /// Whether a base that is no image format is called `raw` there.
        backing_mask_protocol: Option<bool> = "backing-mask-protocol",
        /// Bytes per second, at most; 0 for no limit.
        speed: Option<i64> = "speed",
        /// What becomes of failures.
        on_error: Option<BlockdevOnError> = "on-error",
        /// What the filter above the topmost node is called.
        filter_node_name: Option<String> = "filter-node-name",
        /// Whether its result becomes a fact without a word.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether it is forgotten when it is over.
        auto_dismiss: Option<bool> = "auto-dismiss",
    }
}

qapi_struct! {
    /// A stream to be started.
    pub struct BlockStream {
        /// The job's name.
        job_id: Option<String> = "job-id",
        /// The overlay's node.
        device: String = "device",
        /// The image below which nothing is copied from, by its name.
        base: Option<String> = "base",
        /// As that, by its node.
        base_node: Option<String> = "base-node",
        /// What the overlay's header is to say of its backing image.
        backing_file: Option<String> = "backing-file",
        /// Whether a base that is no image format is called `raw` there.
        backing_mask_protocol: Option<bool> = "backing-mask-protocol",
        /// The lowest node that is copied from.
        bottom: Option<String> = "bottom",
        /// Bytes per second, at most; 0 for no limit.
        speed: Option<i64> = "speed",
        /// What becomes of failures.
        on_error: Option<BlockdevOnError> = "on-error",
        /// What the filter above the overlay is called.
        filter_node_name: Option<String> = "filter-node-name",
        /// Whether its result becomes a fact without a word.
        auto_finalize: Option<bool> = "auto-finalize",
        /// Whether it is forgotten when it is over.
        auto_dismiss: Option<bool> = "auto-dismiss",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("query-jobs", query_jobs);
    commands.add("query-block-jobs", query_block_jobs);
    commands.add("job-pause", |service, job: JobById| async move {
        Ok(jobs(&service)?.pause(&job.id)?)
    });
    commands.add("job-resume", |service, job: JobById| async move {
        Ok(jobs(&service)?.resume(&job.id)?)
    });
    commands.add("job-cancel", |service, job: JobById| async move {
        Ok(jobs(&service)?.cancel(&job.id, true)?)
    });
    commands.add("job-complete", |service, job: JobById| async move {
        Ok(jobs(&service)?.complete(&job.id)?)
    });
    commands.add("job-finalize", |service, job: JobById| async move {
        Ok(jobs(&service)?.finalize(&job.id).await?)
    });
    commands.add("job-dismiss", |service, job: JobById| async move {
        Ok(jobs(&service)?.dismiss(&job.id)?)
    });
    commands.add("block-job-pause", |service, job: JobByDevice| async move {
        Ok(block_job(&service, &job.device)?.pause(&job.device)?)
    });
    commands.add("block-job-resume", |service, job: JobByDevice| async move {
        Ok(block_job(&service, &job.device)?.resume(&job.device)?)
    });
    commands.add("block-job-cancel", block_job_cancel);
    commands.add(
        "block-job-complete",
        |service, job: JobByDevice| async move {
            Ok(block_job(&service, &job.device)?.complete(&job.device)?)
        },
    );
    commands.add("block-job-finalize", |service, job: JobById| async move {
        Ok(block_job(&service, &job.id)?.finalize(&job.id).await?)
    });
    commands.add("block-job-dismiss", |service, job: JobById| async move {
        Ok(block_job(&service, &job.id)?.dismiss(&job.id)?)
    });
    commands.add(
        "block-job-set-speed",
        |service, speed: BlockJobSetSpeed| async move {
            let jobs = block_job(&service, &speed.device)?;
            Ok(jobs.set_speed(&speed.device, speed.speed)?)
        },
    );
    commands.add("block-job-change", block_job_change);
    commands.add("blockdev-backup", blockdev_backup);
    commands.add("blockdev-mirror", blockdev_mirror);
    commands.add("block-commit", block_commit);
    commands.add("block-stream", block_stream);
}

fn refuse<T>(sentence: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(sentence))
}

fn jobs(service: &Service) -> Result<Jobs, QmpError> {
    Ok(service.daemon()?.jobs().clone())
}

/// The jobs, among which there is one called `device`.
fn block_job(service: &Service, device: &str) -> Result<Jobs, QmpError> {
    let jobs = jobs(service)?;
    match jobs.views().iter().any(|job| job.id == device) {
        true => Ok(jobs),
        false => Err(QmpError::new(
            ErrorClass::DeviceNotActive,
            format!("Block job '{device}' not found"),
        )),
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

async fn query_jobs(service: Rc<Service>, (): ()) -> Result<Vec<JobInfo>, QmpError> {
    let info = |job: JobView| JobInfo {
        id: job.id,
        kind: JobType::of(job.kind),
        status: JobStatus::of(job.state),
        current_progress: signed(job.done),
        total_progress: signed(job.total),
        error: job.error,
    };
    Ok(jobs(&service)?.views().into_iter().map(info).collect())
}

async fn query_block_jobs(service: Rc<Service>, (): ()) -> Result<Vec<BlockJobInfo>, QmpError> {
    let info = |job: JobView| BlockJobInfo {
        kind: JobType::of(job.kind),
        device: job.id,
        len: signed(job.total),
        offset: signed(job.done),
        busy: job.is_busy,
        paused: job.is_paused,
        speed: signed(job.speed),
        io_status: job.io_status.name().to_owned(),
        ready: matches!(job.state, JobState::Ready | JobState::Standby),
        status: JobStatus::of(job.state),
        auto_finalize: job.auto_finalize,
        auto_dismiss: job.auto_dismiss,
        error: job.error,
        actively_synced: job.actively_synced,
    };
    Ok(jobs(&service)?.views().into_iter().map(info).collect())
}

async fn block_job_cancel(service: Rc<Service>, arguments: BlockJobCancel) -> Result<(), QmpError> {
    let jobs = block_job(&service, &arguments.device)?;
    match arguments.force {
        Some(true) => Ok(jobs.cancel(&arguments.device, true)?),
        Some(false) | None => Ok(jobs.cancel_unless_paused(&arguments.device)?),
    }
}

async fn block_job_change(service: Rc<Service>, arguments: BlockJobChange) -> Result<(), QmpError> {
    let BlockJobChange::Mirror(change) = arguments;
    let jobs = block_job(&service, &change.id)?;
    let blocks = change.copy_mode == MirrorCopyMode::WriteBlocking;
    Ok(jobs.change_copy_mode(&change.id, blocks)?)
}

/// What all jobs are told.
fn job_spec(
    id: Option<String>,
    speed: Option<i64>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
) -> Result<JobSpec, QmpError> {
    let Ok(speed) = u64::try_from(speed.unwrap_or(0)) else {
        return refuse("Parameter 'speed' expects a non-negative value");
    };
    Ok(JobSpec {
        // QEMU's default is the device's name; there are no devices.
        id: id.unwrap_or_default(),
        speed,
        auto_finalize: auto_finalize.unwrap_or(true),
        auto_dismiss: auto_dismiss.unwrap_or(true),
    })
}

fn policy(on_error: Option<BlockdevOnError>) -> OnError {
    match on_error {
        None | Some(BlockdevOnError::Report) => OnError::Report,
        Some(BlockdevOnError::Ignore) => OnError::Ignore,
        Some(BlockdevOnError::Enospc | BlockdevOnError::Auto) => OnError::Enospc,
        Some(BlockdevOnError::Stop) => OnError::Stop,
    }
}

/// The node called `name`, which may be a device's name for QEMU.
fn find(service: &Service, name: &str) -> Result<NodeId, QmpError> {
    let found = service
        .control()
        .read(|graph| graph.node(name).map(|node| node.id()));
    found.map_err(|_| {
        QmpError::generic(format!(
            "Cannot find device='{name}' nor node-name='{name}'"
        ))
    })
}

async fn blockdev_backup(service: Rc<Service>, arguments: BlockdevBackup) -> Result<(), QmpError> {
    find(&service, &arguments.device)?;
    find(&service, &arguments.target)?;
    let sync = match arguments.sync {
        MirrorSyncMode::Full => BackupSync::Full,
        MirrorSyncMode::Top => BackupSync::Top,
        MirrorSyncMode::None => BackupSync::None,
        mode if arguments.bitmap.is_none() => {
            return refuse(format!(
                "must provide a valid bitmap name for '{}' sync mode",
                mode.word()
            ));
        }
        mode => {
            return Err(Error::unsupported(format!(
                "sync mode '{}' is not there yet",
                mode.word()
            ))
            .into());
        }
    };
    if let Some(bitmap) = &arguments.bitmap {
        let there = service.control().read(|graph| {
            let node = graph.node(&arguments.device);
            node.is_ok_and(|node| node.bitmaps().get(bitmap).is_ok())
        });
        return refuse(match there {
            false => format!("Bitmap '{bitmap}' could not be found"),
            true => format!("bitmap '{bitmap}' cannot be used by a backup yet"),
        });
    }
    if arguments.bitmap_mode.is_some() {
        return refuse("Cannot specify bitmap sync mode without a bitmap");
    }
    for (name, is_set) in [
        ("compress", arguments.compress),
        ("discard-source", arguments.discard_source),
    ] {
        if is_set == Some(true) {
            return refuse(format!("option '{name}' of a backup is not there yet"));
        }
    }
    let perf = arguments.x_perf;
    let workers = perf.as_ref().and_then(|perf| perf.max_workers);
    let workers = workers.unwrap_or(BACKUP_WORKERS);
    if !(1..=i64::from(i32::MAX)).contains(&workers) {
        return refuse(format!("max-workers must be between 1 and {}", i32::MAX));
    }
    let least = perf.as_ref().and_then(|perf| perf.min_cluster_size);
    let least = least.unwrap_or(0);
    if least > 0 && !least.is_power_of_two() {
        return refuse("min-cluster-size needs to be a power of 2");
    }
    let job = job_spec(
        arguments.job_id,
        arguments.speed,
        arguments.auto_finalize,
        arguments.auto_dismiss,
    )?;
    let spec = BackupSpec {
        job,
        source: arguments.device,
        target: arguments.target,
        sync,
        on_source_error: policy(arguments.on_source_error),
        on_target_error: policy(arguments.on_target_error),
        filter_name: arguments.filter_node_name,
        max_workers: workers.unsigned_abs(),
        min_cluster_bytes: least,
    };
    Ok(jobs(&service)?.backup(spec).await?)
}

async fn blockdev_mirror(service: Rc<Service>, arguments: BlockdevMirror) -> Result<(), QmpError> {
    let source = find(&service, &arguments.device)?;
    let target = find(&service, &arguments.target)?;
    let has_backing = service
        .control()
        .read(|graph| graph.backing_chain_next(source).is_some());
    let sync = match arguments.sync {
        MirrorSyncMode::Full => MirrorSync::Full,
        MirrorSyncMode::Top if !has_backing => MirrorSync::Full,
        MirrorSyncMode::Top => MirrorSync::Top,
        MirrorSyncMode::None => MirrorSync::None,
        mode => return refuse(format!("Sync mode '{}' not supported", mode.word())),
    };
    let granularity = match arguments.granularity {
        None | Some(0) => service.control().read(|graph| {
            let node = graph.node_by_id(target);
            let cluster = node.map_or(0, |node| node.io().info().cluster_bytes);
            match cluster {
                0 => 64 << 10,
                cluster => cluster.clamp(4 << 10, 64 << 10),
            }
        }),
        Some(bytes) => bytes,
    };
    if !(512..=64 << 20).contains(&granularity) {
        return refuse("Parameter 'granularity' expects a value in range [512B, 64MB]");
    }
    if !granularity.is_power_of_two() {
        return refuse("Parameter 'granularity' expects a power of 2");
    }
    let Ok(buffer) = u64::try_from(arguments.buf_size.unwrap_or(0)) else {
        return refuse("Invalid parameter 'buf-size'");
    };
    let job = job_spec(
        arguments.job_id,
        arguments.speed,
        arguments.auto_finalize,
        arguments.auto_dismiss,
    )?;
    let spec = MirrorSpec {
        job,
        source: arguments.device,
        target: arguments.target,
        replaces: arguments.replaces,
        sync,
        granularity_bytes: granularity,
        buffer_bytes: match buffer {
            0 => MIRROR_BUFFER_BYTES,
            buffer => buffer.max(granularity),
        },
        on_source_error: policy(arguments.on_source_error),
        on_target_error: policy(arguments.on_target_error),
        unmap: true,
        filter_name: arguments.filter_node_name,
        write_blocking: arguments.copy_mode == Some(MirrorCopyMode::WriteBlocking),
    };
    Ok(jobs(&service)?.mirror(spec).await?)
}

/// The name of the node of a chain whose image is called `file`.
async fn in_chain(service: &Service, top: NodeId, file: &str) -> Option<String> {
    let control = service.control();
    let id = control.find_in_chain(top, file).await?;
    control.read(|graph| Some(graph.node_by_id(id)?.name().to_owned()))
}

async fn block_commit(service: Rc<Service>, arguments: BlockCommit) -> Result<(), QmpError> {
    let device = &arguments.device;
    let Ok(active) = find(&service, device) else {
        return Err(QmpError::new(
            ErrorClass::DeviceNotFound,
            format!("Device '{device}' not found"),
        ));
    };
    let is_child = service.control().read(|graph| {
        let mut lines = graph.lines().into_iter();
        lines.any(|line| line.to == active && matches!(line.from, LineEnd::Node(_)))
    });
    if is_child {
        return refuse("Need a root block node");
    }
    if arguments.top_node.is_some() && arguments.top.is_some() {
        return refuse("'top-node' and 'top' are mutually exclusive");
    }
    if arguments.base_node.is_some() && arguments.base.is_some() {
        return refuse("'base-node' and 'base' are mutually exclusive");
    }
    let top = match (arguments.top_node, arguments.top) {
        (None, Some(file)) => {
            let own = service
                .control()
                .read(|graph| graph.described(active).name());
            match own == file {
                true => None,
                false => match in_chain(&service, active, &file).await {
                    None => return refuse(format!("Top image file {file} not found")),
                    found => found,
                },
            }
        }
        (top, _) => top,
    };
    let base = match (arguments.base_node, arguments.base) {
        (None, Some(file)) => match in_chain(&service, active, &file).await {
            None => return refuse(format!("Can't find '{file}' in the backing chain")),
            found => found,
        },
        (base, _) => base,
    };
    let job = job_spec(
        arguments.job_id,
        arguments.speed,
        arguments.auto_finalize,
        arguments.auto_dismiss,
    )?;
    let spec = CommitSpec {
        job,
        active: arguments.device,
        top,
        base,
        backing_name: arguments.backing_file,
        mask_protocol: arguments.backing_mask_protocol.unwrap_or(false),
        on_error: policy(arguments.on_error),
        filter_name: arguments.filter_node_name,
    };
    Ok(jobs(&service)?.commit(spec).await?)
}

async fn block_stream(service: Rc<Service>, arguments: BlockStream) -> Result<(), QmpError> {
    for ((one, is_one), (other, is_other)) in [
        (
            ("base", arguments.base.is_some()),
            ("base-node", arguments.base_node.is_some()),
        ),
        (
            ("bottom", arguments.bottom.is_some()),
            ("base", arguments.base.is_some()),
        ),
        (
            ("bottom", arguments.bottom.is_some()),
            ("base-node", arguments.base_node.is_some()),
        ),
    ] {
        if is_one && is_other {
            return refuse(format!(
                "'{one}' and '{other}' cannot be specified at the same time"
            ));
        }
    }
    let device = find(&service, &arguments.device)?;
    let base = match (arguments.base_node, arguments.base) {
        (None, Some(file)) => match in_chain(&service, device, &file).await {
            None => return refuse(format!("Can't find '{file}' in the backing chain")),
            found => found,
        },
        (base, _) => base,
    };
    let job = job_spec(
        arguments.job_id,
        arguments.speed,
        arguments.auto_finalize,
        arguments.auto_dismiss,
    )?;
    let spec = StreamSpec {
        job,
        device: arguments.device,
        base,
        bottom: arguments.bottom,
        backing_name: arguments.backing_file,
        mask_protocol: arguments.backing_mask_protocol.unwrap_or(false),
        on_error: policy(arguments.on_error),
        filter_name: arguments.filter_node_name,
    };
    Ok(jobs(&service)?.stream(spec).await?)
}
