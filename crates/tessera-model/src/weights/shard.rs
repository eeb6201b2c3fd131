//! Writes pre-sharded checkpoints (see [`super::presharded`]).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value, json};
use tessera_types::Rank;

use super::checkpoint::Checkpoint;
use super::fingerprint;
use super::presharded::{Manifest, Place};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::progress::{LoadMeter, LoadProgress};
use crate::specs::{LanguageSpecs, Slice};
use crate::split::TpSplit;
use crate::tensors;

/// Files written at a time.
const MAX_WRITERS: usize = 4;
/// Bytes copied at a time.
const COPY_BYTES: usize = 4 << 20;
/// What is copied beside the weights: configurations, tokenizer, templates, licences.
const COPIED_EXTENSIONS: [&str; 5] = ["json", "jinja", "txt", "model", "md"];
/// Weights that other programs keep beside have extensions of their own or are larger than this.
const MAX_COPIED_BYTES: u64 = 256 << 20;

/// What to write.
#[derive(Debug, Clone, Copy)]
pub struct ShardJob<'a> {
    /// A published checkpoint.
    pub model: &'a Path,
    /// Tensor-parallel degree.
    pub tp: u32,
    /// A directory that does not exist yet, or is empty. It appears when everything has been written.
    pub out: &'a Path,
}

/// Called after every tensor, from several threads; may end the work.
pub type ShardObserver<'a> = &'a (dyn Fn(LoadProgress) -> ControlFlow<()> + Sync);

/// Writes one file per rank with the slices it loads, one with the vision tower, and copies configuration
/// and tokenizer. Everything is written to a directory beside `out`, which then takes its name.
///
/// # Errors
/// A broken or already pre-sharded model, an impossible degree, an `out` that holds something, a disk that
/// is full, [`ModelError::Cancelled`]. Nothing is left behind.
pub fn write_shards(job: &ShardJob<'_>, observe: ShardObserver<'_>) -> Result<()> {
    let config = ModelConfig::from_dir(job.model)?;
    let checkpoint = Checkpoint::open(job.model)?;
    if let Some(manifest) = checkpoint.manifest() {
        let reason = format!("is pre-sharded for TP {} already", manifest.tp);
        return Err(ModelError::Checkpoint { file: manifest.file(), reason });
    }
    let splits = (0..job.tp).map(|rank| TpSplit::new(&config.text, Rank(rank), job.tp));
    let splits = splits.collect::<Result<Vec<_>, _>>()?;
    if splits.is_empty() {
        return Err(crate::SplitError::Rank { rank: Rank(0), world_size: 0 }.into());
    }
    let vision = tensors::vision(&config.vision);
    let language_weights = fingerprint::of_tensors(&checkpoint, &tensors::language(&config.text))?;
    let vision_weights = fingerprint::of_tensors(&checkpoint, &vision)?;
    let staging = Staging::beside(job.out)?;
    let manifest = Manifest::new(&staging.directory, job.tp, language_weights, vision_weights);
    let mut files = vec![OutputFile {
        path: manifest.vision_file(),
        rank: None,
        slices: vision.iter().map(Slice::whole).collect(),
    }];
    files.extend(splits.iter().map(|split| OutputFile {
        path: manifest.rank_file(split.rank.0),
        rank: Some(split.rank.0),
        slices: LanguageSpecs::new(&config.text, split).slices(),
    }));
    let meter = LoadMeter::default();
    let writer = Writer { checkpoint: &checkpoint, manifest: &manifest, meter: &meter, observe };
    writer.announce(&files)?;
    writer.write_all(&files)?;
    copy_beside(job.model, &staging.directory)?;
    write_file(&manifest.file(), manifest.to_json().as_bytes())?;
    staging.publish(job.out)
}

/// One file to write.
struct OutputFile {
    path: PathBuf,
    /// `None`: the vision tower.
    rank: Option<u32>,
    slices: Vec<Slice>,
}

struct Writer<'a> {
    checkpoint: &'a Checkpoint,
    manifest: &'a Manifest,
    meter: &'a LoadMeter,
    observe: ShardObserver<'a>,
}

impl Writer<'_> {
    fn announce(&self, files: &[OutputFile]) -> Result<()> {
        for slice in files.iter().flat_map(|file| &file.slices) {
            self.meter.announce(self.bytes(slice)?);
        }
        Ok(())
    }

    fn bytes(&self, slice: &Slice) -> Result<u64> {
        let entry = self.checkpoint.entry(&slice.tensor)?;
        Ok((slice.view().len() * entry.element_bytes()) as u64)
    }

    /// Writes all files, a few at a time.
    fn write_all(&self, files: &[OutputFile]) -> Result<()> {
        let (next, failed) = (AtomicUsize::new(0), OnceLock::new());
        let work = || {
            while failed.get().is_none() {
                let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                if let Err(error) = self.write(file) {
                    // Only the first is reported.
                    drop(failed.set(error));
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..files.len().min(MAX_WRITERS) {
                // Where a thread cannot be started, the others write its files.
                let _ = std::thread::Builder::new().name("shard".into()).spawn_scoped(scope, work);
            }
            work();
        });
        failed.into_inner().map_or(Ok(()), Err)
    }

    fn write(&self, file: &OutputFile) -> Result<()> {
        let failed = |source| ModelError::Write { file: file.path.clone(), source };
        let mut out =
            BufWriter::with_capacity(COPY_BYTES, File::create(&file.path).map_err(failed)?);
        let header = self.header(file)?;
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(&header).map_err(failed)?;
        let mut buffer = Vec::new();
        for slice in &file.slices {
            self.checkpoint.runs(&slice.view(), |entry, first, count| {
                let size = entry.element_bytes();
                let (mut at, end) = (first * size, (first + count) * size);
                while at < end {
                    buffer.resize((end - at).min(COPY_BYTES), 0);
                    self.checkpoint.read_raw(&slice.tensor, entry, at as u64, &mut buffer)?;
                    out.write_all(&buffer).map_err(failed)?;
                    at += buffer.len();
                }
                Ok::<_, ModelError>(())
            })?;
            self.meter.add(self.bytes(slice)?);
            if (self.observe)(self.meter.progress()).is_break() {
                return Err(ModelError::Cancelled);
            }
        }
        let written = out.into_inner().map_err(io::IntoInnerError::into_error);
        written.and_then(|written| written.sync_all()).map_err(failed)
    }

    /// The JSON header of a safetensors file, filled up with spaces to whole words.
    fn header(&self, file: &OutputFile) -> Result<Vec<u8>> {
        let (mut header, mut places, mut offset) = (Map::new(), BTreeMap::new(), 0);
        for slice in &file.slices {
            let end = offset + self.bytes(slice)?;
            let held = [slice.rows.len(), slice.cols.len()];
            let is_whole = held.iter().product::<usize>() == slice.shape.iter().product::<usize>();
            let shape = match slice.shape.len() {
                _ if is_whole => &slice.shape[..],
                1 => &held[..1],
                _ => &held[..],
            };
            let dtype = self.checkpoint.entry(&slice.tensor)?.dtype;
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
            header.insert(slice.tensor.clone(), entry);
            let (rows, cols) = (slice.rows.clone(), slice.cols.clone());
            places.insert(slice.tensor.clone(), Place { shape: slice.shape.clone(), rows, cols });
            offset = end;
        }
        let metadata = self.manifest.metadata(file.rank, &places);
        header.insert("__metadata__".to_owned(), json!(metadata));
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        Ok(text)
    }
}

/// The directory that is written to until it is complete. Dropping it removes it.
struct Staging {
    directory: PathBuf,
}

impl Staging {
    fn beside(out: &Path) -> Result<Self> {
        let taken = || ModelError::OutputExists { directory: out.to_owned() };
        if out.exists() {
            let mut entries = fs::read_dir(out).map_err(|_| taken())?;
            if entries.next().is_some() {
                return Err(taken());
            }
        }
        let name = out.file_name().ok_or_else(taken)?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".partial-{}", std::process::id()));
        let directory = out.with_file_name(hidden);
        let created = fs::create_dir_all(&directory);
        created.map_err(|source| ModelError::Write { file: directory.clone(), source })?;
        Ok(Self { directory })
    }

    /// Gives the directory its name; what is in it is on the disk before.
    fn publish(self, out: &Path) -> Result<()> {
        let failed = |source| ModelError::Write { file: out.to_owned(), source };
        sync_directory(&self.directory).map_err(failed)?;
        fs::rename(&self.directory, out).map_err(failed)?;
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_directory(parent.unwrap_or(Path::new("."))).map_err(failed)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After `publish` there is nothing of this name any more.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| ModelError::Write { file: path.to_owned(), source })
}

/// Copies the small files of a model directory; weights and their index stay.
fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    let unreadable = |source| ModelError::File { file: from.to_owned(), source };
    for entry in fs::read_dir(from).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default();
        let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
        // Follows links: model hubs store files elsewhere.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        let is_small = metadata.is_file() && metadata.len() <= MAX_COPIED_BYTES;
        let is_index = name.to_string_lossy().ends_with(".index.json");
        if !is_small || is_index || !COPIED_EXTENSIONS.contains(&extension) {
            continue;
        }
        let target = to.join(name);
        let bytes = fs::read(&path).map_err(|source| ModelError::File { file: path, source })?;
        write_file(&target, &bytes)?;
    }
    Ok(())
}
