//! Hugging Face safetensors as published: one file, or shards with an index; BF16, F16 or F32; both
//! naming styles. Only byte ranges that are asked for are read, by positioned reads straight into their
//! place where the types agree, so that a rank touches its own slices alone and threads share the files.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use serde::Deserialize;
use tessera_kernels::{TensorSlice, WeightError};

use super::file::{Stored, WeightFile};
use super::presharded::{self, Manifest};
use crate::error::{ModelError, Result};
use crate::split::TpSplit;
use crate::tensors::canonical;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Most bytes read at once: what was read is still in the cache when it is checked and packed.
const READ_BYTES: usize = 512 << 10;
const READABLE: &str = "BF16, F16, F32";

/// An opened checkpoint: files, and where each tensor lies.
#[derive(Debug)]
pub(super) struct Checkpoint {
    files: Vec<WeightFile>,
    /// By canonical name.
    tensors: HashMap<String, Entry>,
    /// What lists the tensors, for the message about a missing one.
    listing: PathBuf,
    /// Of a pre-sharded checkpoint.
    manifest: Option<Manifest>,
}

/// One tensor of a checkpoint, or the rectangle of it that a pre-sharded file holds.
#[derive(Debug)]
pub(super) struct Entry {
    file: usize,
    pub(super) dtype: Dtype,
    /// Shape of the whole tensor.
    pub(super) shape: Vec<usize>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    /// Offset of the first byte in the file.
    start: u64,
}

impl Entry {
    /// A whole tensor.
    pub(super) fn whole(file: usize, stored: Stored) -> (String, Self) {
        let Stored { name, dtype, shape, start } = stored;
        let rows = 0..shape.first().copied().unwrap_or(1);
        let cols = 0..shape.iter().skip(1).product();
        (canonical(&name), Self { file, dtype, shape, rows, cols, start })
    }

    /// The rectangle `rows` × `cols` of a tensor of `shape`.
    pub(super) fn part(
        file: usize,
        stored: Stored,
        shape: Vec<usize>,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> (String, Self) {
        let Stored { name, dtype, start, .. } = stored;
        (name, Self { file, dtype, shape, rows, cols, start })
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        (self.rows.len() * self.cols.len() * self.element_bytes()) as u64
    }

    pub(super) fn element_bytes(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    fn holds(&self, slice: &TensorSlice<'_>) -> bool {
        let inside = |part: &Range<usize>, held: &Range<usize>| {
            part.is_empty() || held.start <= part.start && part.end <= held.end
        };
        inside(&slice.rows, &self.rows) && inside(&slice.cols, &self.cols)
    }
}

/// A type that weights are loaded into.
pub(super) trait Element: Copy {
    const DTYPE: Dtype;
    fn from_f32(value: f32) -> Self;
    fn from_bf16(value: bf16) -> Self;
    fn is_finite(self) -> bool;
    fn bytes_mut(values: &mut [Self]) -> &mut [u8];
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_bf16(value: bf16) -> Self {
        value.to_f32()
    }
    fn is_finite(self) -> bool {
        self.is_finite()
    }
    fn bytes_mut(values: &mut [Self]) -> &mut [u8] {
        bytemuck::cast_slice_mut(values)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn from_bf16(value: bf16) -> Self {
        value
    }
    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
    fn bytes_mut(values: &mut [Self]) -> &mut [u8] {
        bytemuck::cast_slice_mut(values.reinterpret_cast_mut())
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens all files of a model directory and reads their headers; of a pre-sharded one only what all
    /// ranks share.
    ///
    /// # Errors
    /// See [`super::Weights::open`].
    pub(super) fn open(directory: &Path) -> Result<Self> {
        if let Some(manifest) = Manifest::find(directory)? {
            return Self::open_presharded(manifest);
        }
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
        let (mut files, mut tensors) = (Vec::new(), HashMap::new());
        for name in names {
            let file = WeightFile::open(directory.join(name))?;
            let stored = file.header()?.tensors.into_iter();
            tensors.extend(stored.map(|stored| Entry::whole(files.len(), stored)));
            files.push(file);
        }
        Ok(Self { files, tensors, listing, manifest: None })
    }

    /// The vision tower's file; the rank's own follows with [`Checkpoint::select`].
    fn open_presharded(manifest: Manifest) -> Result<Self> {
        let listing = manifest.vision_file();
        let (mut files, mut tensors) = (Vec::new(), HashMap::new());
        if listing.exists() {
            let file = WeightFile::open(listing.clone())?;
            let stored = manifest.vision_tensors(&file)?.into_iter();
            tensors.extend(stored.map(|stored| Entry::whole(0, stored)));
            files.push(file);
        }
        Ok(Self { files, tensors, listing, manifest: Some(manifest) })
    }

    /// Opens the file of the rank that is about to load, where ranks have files of their own.
    ///
    /// # Errors
    /// [`ModelError::ShardDegree`]; a rank file that is missing, broken or of another checkpoint.
    pub(super) fn select(&mut self, split: &TpSplit) -> Result<()> {
        let Some(manifest) = &self.manifest else { return Ok(()) };
        let (file, parts) = manifest.open_rank(split)?;
        for presharded::Part { stored, shape, rows, cols } in parts {
            let (name, entry) = Entry::part(self.files.len(), stored, shape, rows, cols);
            self.tensors.insert(name, entry);
        }
        self.listing = file.path().to_owned();
        self.files.push(file);
        Ok(())
    }

    pub(super) fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry, WeightError> {
        self.tensors.get(name).ok_or_else(|| WeightError::Missing {
            file: self.listing.clone(),
            tensor: name.to_owned(),
        })
    }

    /// Presence, shape and type of one tensor.
    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<&Entry, WeightError> {
        let entry = self.entry(name)?;
        if entry.shape != shape {
            return Err(WeightError::Shape {
                file: self.path(entry),
                tensor: name.to_owned(),
                expected: shape.to_vec(),
                found: entry.shape.clone(),
            });
        }
        match entry.dtype {
            Dtype::BF16 | Dtype::F16 | Dtype::F32 => Ok(entry),
            other => {
                let (tensor, found) = (name.to_owned(), format!("{other:?}"));
                let file = self.path(entry);
                Err(WeightError::DType { file, tensor, found, expected: READABLE })
            }
        }
    }

    fn path(&self, entry: &Entry) -> PathBuf {
        self.files[entry.file].path().to_owned()
    }

    /// Reads bytes of a tensor from offset `from` in what the file holds of it.
    pub(super) fn read_raw(
        &self,
        name: &str,
        entry: &Entry,
        from: u64,
        out: &mut [u8],
    ) -> Result<(), WeightError> {
        self.files[entry.file].read_at(out, entry.start + from).map_err(|source| {
            WeightError::Read { file: self.path(entry), tensor: name.to_owned(), source }
        })
    }

    /// Calls `read(first element, elements)` for every run of a slice that lies in one piece: all of it,
    /// or row by row where the slice leaves out columns.
    pub(super) fn runs<E>(
        &self,
        slice: &TensorSlice<'_>,
        mut read: impl FnMut(&Entry, usize, usize) -> Result<(), E>,
    ) -> Result<(), E>
    where
        E: From<WeightError>,
    {
        let entry = self.check(slice.tensor, slice.shape)?;
        if slice.is_empty() {
            return Ok(());
        }
        if !entry.holds(slice) {
            let (file, tensor) = (self.path(entry), slice.tensor.to_owned());
            let (rows, cols) = (slice.rows.clone(), slice.cols.clone());
            return Err(WeightError::NotHeld { file, tensor, rows, cols }.into());
        }
        let (width, cols) = (entry.cols.len(), slice.cols.len());
        let rows = slice.rows.start - entry.rows.start..slice.rows.end - entry.rows.start;
        let col = slice.cols.start - entry.cols.start;
        if cols == width {
            return read(entry, rows.start * width, slice.len());
        }
        rows.into_iter().try_for_each(|row| read(entry, row * width + col, cols))
    }

    /// Fills `out` `[rows, cols]` with a slice; returns the bytes read.
    pub(super) fn read<T: Element>(
        &self,
        slice: &TensorSlice<'_>,
        out: &mut [T],
    ) -> Result<u64, WeightError> {
        let (mut buffer, mut rest, mut bytes) = (Vec::new(), out, 0);
        self.runs(slice, |entry, first, count| {
            let (run, after) = std::mem::take(&mut rest).split_at_mut(count);
            rest = after;
            bytes += (count * entry.element_bytes()) as u64;
            self.read_run(slice.tensor, entry, first, run, &mut buffer)
        })?;
        Ok(bytes)
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
        let size = entry.element_bytes();
        let mut at = first;
        for piece in out.chunks_mut(READ_BYTES / size) {
            let from = (at * size) as u64;
            if entry.dtype == T::DTYPE && cfg!(target_endian = "little") {
                self.read_raw(name, entry, from, T::bytes_mut(piece))?;
            } else {
                buffer.resize(piece.len() * size, 0);
                self.read_raw(name, entry, from, buffer)?;
                decode(entry.dtype, buffer, piece);
            }
            if piece.iter().fold(false, |bad, value| bad | !value.is_finite()) {
                let bad = piece.iter().position(|value| !value.is_finite()).unwrap_or_default();
                let row = entry.rows.start + (at + bad) / entry.cols.len().max(1);
                let (file, tensor) = (self.path(entry), name.to_owned());
                return Err(WeightError::NotFinite { file, tensor, row });
            }
            at += piece.len();
        }
        Ok(())
    }
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
