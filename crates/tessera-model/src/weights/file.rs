//! One safetensors file: its header, and byte ranges by positioned reads, which any number of threads may
//! do at once.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::error::{ModelError, Result};

/// Longest header the safetensors format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open file.
#[derive(Debug)]
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
}

/// A tensor as a file's header describes it.
#[derive(Debug)]
pub(super) struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Offset of the first byte in the file.
    pub start: u64,
}

/// What a header holds: tensors, and the free text beside them.
#[derive(Debug)]
pub(super) struct Header {
    pub tensors: Vec<Stored>,
    pub metadata: HashMap<String, String>,
}

impl WeightFile {
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        match File::open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(ModelError::File { file: path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `out` with the bytes from offset `start` on.
    pub(super) fn read_at(&self, out: &mut [u8], start: u64) -> io::Result<()> {
        self.file.read_exact_at(out, start)
    }

    /// Reads the header: u64 length, JSON, data from there on.
    ///
    /// # Errors
    /// A header that is too long or no JSON; a file that ends before its last tensor.
    pub(super) fn header(&self) -> Result<Header> {
        let malformed = |reason: String| ModelError::Checkpoint { file: self.path.clone(), reason };
        let failed = |source: io::Error| ModelError::File { file: self.path.clone(), source };
        let file_len = self.file.metadata().map_err(failed)?.len();
        let mut prefix = [0u8; 8];
        if file_len < prefix.len() as u64 {
            return Err(malformed(format!("{file_len} bytes are too few for a safetensors file")));
        }
        self.read_at(&mut prefix, 0).map_err(failed)?;
        let header_len = u64::from_le_bytes(prefix);
        let data_start = header_len.saturating_add(prefix.len() as u64);
        if header_len > MAX_HEADER_BYTES || data_start > file_len {
            return Err(malformed(format!("a header of {header_len} bytes does not fit the file")));
        }
        let mut header = vec![0u8; header_len as usize];
        self.read_at(&mut header, prefix.len() as u64).map_err(failed)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|source| ModelError::Json { file: self.path.clone(), source })?;
        let needed = data_start + metadata.data_len() as u64;
        if needed > file_len {
            return Err(malformed(format!("is cut short: {file_len} bytes of {needed}")));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| Stored {
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            start: data_start + info.data_offsets.0 as u64,
        });
        Ok(Header {
            tensors: tensors.collect(),
            metadata: metadata.metadata().clone().unwrap_or_default(),
        })
    }
}
