//! Hugging Face safetensors as published: one file, or shards with an index; BF16, F16 or F32; both
//! naming styles. Only byte ranges that are asked for are read, by positioned reads, so that a rank
//! touches its own slices alone and threads could share the files.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use tessera_kernels::{TensorSlice, WeightError};

use crate::error::{ModelError, Result};
use crate::tensors::canonical;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest header the safetensors format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most bytes read at once.
const READ_BYTES: usize = 4 << 20;
const READABLE: &str = "BF16, F16, F32";

/// An opened checkpoint: files, and where each tensor lies.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// By canonical name.
    tensors: HashMap<String, Entry>,
    /// What lists the tensors, for the message about a missing one.
    listing: PathBuf,
    bytes_read: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

/// One tensor of a checkpoint.
#[derive(Debug)]
pub(super) struct Entry {
    shard: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Offset of the first byte in the file.
    start: u64,
    bytes: u64,
}

impl Entry {
    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.bytes
    }
}

/// A stored element type that loads into the two types weights are held in.
pub(super) trait Element: Copy {
    fn from_f32(value: f32) -> Self;
    fn from_bf16(value: bf16) -> Self;
    fn is_finite(self) -> bool;
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_bf16(value: bf16) -> Self {
        value.to_f32()
    }
    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for bf16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn from_bf16(value: bf16) -> Self {
        value
    }
    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens all files of a model directory and reads their headers.
    ///
    /// # Errors
    /// See [`super::Weights::open`].
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let index = directory.join(INDEX_FILE);
        let single = directory.join(SINGLE_FILE);
        let (listing, names) = if index.exists() {
            let names = shard_names(&index)?;
            (index, names)
        } else if single.exists() {
            (single, BTreeSet::from([SINGLE_FILE.to_owned()]))
        } else {
            return Err(ModelError::NoCheckpoint { directory: directory.to_owned() });
        };
        let (mut shards, mut tensors) = (Vec::new(), HashMap::new());
        for name in names {
            let shard = Shard::open(directory.join(name))?;
            for (name, entry) in shard.entries(shards.len())? {
                tensors.insert(canonical(&name), entry);
            }
            shards.push(shard);
        }
        Ok(Self { shards, tensors, listing, bytes_read: AtomicU64::new(0) })
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry, WeightError> {
        self.tensors.get(name).ok_or_else(|| WeightError::Missing {
            file: self.listing.clone(),
            tensor: name.to_owned(),
        })
    }

    /// Presence, shape and type of one tensor.
    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<(), WeightError> {
        let entry = self.entry(name)?;
        let file = || self.shards[entry.shard].path.clone();
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape.clone());
            return Err(WeightError::Shape {
                file: file(),
                tensor: name.to_owned(),
                expected,
                found,
            });
        }
        match entry.dtype {
            Dtype::BF16 | Dtype::F16 | Dtype::F32 => Ok(()),
            other => {
                let (tensor, found) = (name.to_owned(), format!("{other:?}"));
                Err(WeightError::DType { file: file(), tensor, found, expected: READABLE })
            }
        }
    }

    /// Reads bytes of a tensor from offset `from` in it.
    pub(super) fn read_raw(
        &self,
        name: &str,
        entry: &Entry,
        from: u64,
        out: &mut [u8],
    ) -> Result<(), WeightError> {
        let shard = &self.shards[entry.shard];
        let read = shard.file.read_exact_at(out, entry.start + from);
        read.map_err(|source| WeightError::Read {
            file: shard.path.clone(),
            tensor: name.to_owned(),
            source,
        })
    }

    /// Fills `out` `[rows, cols]` with a slice. Whole rows are read in one go, parts of rows one by one.
    pub(super) fn read<T: Element>(
        &self,
        slice: &TensorSlice<'_>,
        out: &mut [T],
    ) -> Result<(), WeightError> {
        self.check(slice.tensor, slice.shape)?;
        let entry = self.entry(slice.tensor)?;
        let (width, cols) = (slice.matrix_cols(), slice.cols.len());
        let runs = match cols == width {
            true => vec![(slice.rows.start * width, out)],
            false => {
                let starts = slice.rows.clone().map(|row| row * width + slice.cols.start);
                starts.zip(out.chunks_exact_mut(cols.max(1))).collect()
            }
        };
        let mut buffer = Vec::new();
        for (first, out) in runs {
            self.read_run(slice.tensor, entry, first, out, &mut buffer)?;
        }
        let bytes = slice.len() * element_bytes(entry.dtype);
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Reads consecutive elements from element `first` on.
    fn read_run<T: Element>(
        &self,
        name: &str,
        entry: &Entry,
        first: usize,
        out: &mut [T],
        buffer: &mut Vec<u8>,
    ) -> Result<(), WeightError> {
        let size = element_bytes(entry.dtype);
        let mut at = first;
        for piece in out.chunks_mut(READ_BYTES / size) {
            buffer.resize(piece.len() * size, 0);
            self.read_raw(name, entry, (at * size) as u64, buffer)?;
            decode(entry.dtype, buffer, piece);
            if let Some(bad) = piece.iter().position(|value| !value.is_finite()) {
                let width: usize = entry.shape[1..].iter().product();
                let (file, tensor) = (self.shards[entry.shard].path.clone(), name.to_owned());
                return Err(WeightError::NotFinite {
                    file,
                    tensor,
                    row: (at + bad) / width.max(1),
                });
            }
            at += piece.len();
        }
        Ok(())
    }
}

fn element_bytes(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Little-endian values of `dtype`, one of the readable types.
fn decode<T: Element>(dtype: Dtype, bytes: &[u8], out: &mut [T]) {
    match dtype {
        Dtype::BF16 => {
            let (words, _) = bytes.as_chunks();
            out.iter_mut()
                .zip(words)
                .for_each(|(out, word)| *out = T::from_bf16(bf16::from_le_bytes(*word)));
        }
        Dtype::F16 => {
            let (words, _) = bytes.as_chunks();
            let values = words.iter().map(|word| f16::from_le_bytes(*word).to_f32());
            out.iter_mut().zip(values).for_each(|(out, value)| *out = T::from_f32(value));
        }
        _ => {
            let (words, _) = bytes.as_chunks();
            out.iter_mut()
                .zip(words)
                .for_each(|(out, word)| *out = T::from_f32(f32::from_le_bytes(*word)));
        }
    }
}

/// File names of the shards, from the index. A name that leaves the directory is refused.
fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index);
    let text = text.map_err(|source| ModelError::File { file: index.to_owned(), source })?;
    let parsed: Index = serde_json::from_str(&text)
        .map_err(|source| ModelError::Json { file: index.to_owned(), source })?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    match names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        Some(name) => {
            let reason = format!("shard {name:?} is not a plain file name");
            Err(ModelError::Checkpoint { file: index.to_owned(), reason })
        }
        None => Ok(names),
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        match File::open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(ModelError::File { file: path, source }),
        }
    }

    /// Reads the header: u64 length, JSON, data from there on.
    fn entries(&self, shard: usize) -> Result<Vec<(String, Entry)>> {
        let malformed = |reason: String| ModelError::Checkpoint { file: self.path.clone(), reason };
        let failed = |source: io::Error| ModelError::File { file: self.path.clone(), source };
        let file_len = self.file.metadata().map_err(failed)?.len();
        let mut prefix = [0u8; 8];
        if file_len < prefix.len() as u64 {
            return Err(malformed(format!("{file_len} bytes are too few for a safetensors file")));
        }
        self.file.read_exact_at(&mut prefix, 0).map_err(failed)?;
        let header_len = u64::from_le_bytes(prefix);
        let data_start = header_len.saturating_add(prefix.len() as u64);
        if header_len > MAX_HEADER_BYTES || data_start > file_len {
            return Err(malformed(format!("a header of {header_len} bytes does not fit the file")));
        }
        let mut header = vec![0u8; header_len as usize];
        self.file.read_exact_at(&mut header, prefix.len() as u64).map_err(failed)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|source| ModelError::Json { file: self.path.clone(), source })?;
        let needed = data_start + metadata.data_len() as u64;
        if needed > file_len {
            return Err(malformed(format!("is cut short: {file_len} bytes of {needed}")));
        }
        let entries = metadata.tensors().into_iter().map(|(name, info)| {
            let (from, to) = info.data_offsets;
            let entry = Entry {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + from as u64,
                bytes: (to - from) as u64,
            };
            (name, entry)
        });
        Ok(entries.collect())
    }
}
