//! Pre-sharded checkpoints: per rank one file with its slices, each in one piece, so that a restart reads a
//! file from its first byte to its last. Tensors keep their published names and stored types.
//!
//! A directory holds the model's configuration and tokenizer as they were, one file per rank, one for the
//! vision tower, and a manifest, which is written last: a directory without it is no checkpoint. The
//! manifest has digests of the weights it was made from, so that fingerprints are those of the original.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tessera_types::Hash256;

use super::file::{Header, Stored, WeightFile};
use crate::error::{ModelError, Result};
use crate::split::TpSplit;

const MANIFEST_FILE: &str = "tessera_shards.json";
/// Of directory and files; another one is refused.
const FORMAT_VERSION: u32 = 1;

/// What all files of a pre-sharded checkpoint have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format_version: u32,
    /// Tensor-parallel degree.
    pub tp: u32,
    /// Digest of the weights of the language model as published.
    pub language_weights: Hash256,
    /// Digest of the weights of the vision tower.
    pub vision_weights: Hash256,
    #[serde(skip)]
    directory: PathBuf,
}

/// Where in its tensor a slice lies: in the header of a rank's file, by tensor name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Place {
    /// Of the whole tensor.
    pub shape: Vec<usize>,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

/// A slice as a rank's file holds it.
pub(super) struct Part {
    pub stored: Stored,
    pub shape: Vec<usize>,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

/// Keys of the free text in the header of each file.
mod key {
    pub const MANIFEST: &str = "tessera.manifest";
    pub const RANK: &str = "tessera.rank";
    pub const SLICES: &str = "tessera.slices";
}

impl Manifest {
    pub(super) fn new(
        directory: &Path,
        tp: u32,
        language_weights: Hash256,
        vision_weights: Hash256,
    ) -> Self {
        let (format_version, directory) = (FORMAT_VERSION, directory.to_owned());
        Self { format_version, tp, language_weights, vision_weights, directory }
    }

    /// The manifest of `directory`, if it is a pre-sharded checkpoint.
    ///
    /// # Errors
    /// A manifest that cannot be read, or of another format.
    pub(super) fn find(directory: &Path) -> Result<Option<Self>> {
        let file = directory.join(MANIFEST_FILE);
        if !file.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&file);
        let text = text.map_err(|source| ModelError::File { file: file.clone(), source })?;
        let parsed = serde_json::from_str::<Self>(&text);
        let mut manifest =
            parsed.map_err(|source| ModelError::Json { file: file.clone(), source })?;
        if manifest.format_version != FORMAT_VERSION {
            let found = manifest.format_version;
            let reason = format!("has format {found}, this program reads {FORMAT_VERSION}");
            return Err(ModelError::Checkpoint { file, reason });
        }
        manifest.directory = directory.to_owned();
        Ok(Some(manifest))
    }

    pub(super) fn file(&self) -> PathBuf {
        self.directory.join(MANIFEST_FILE)
    }

    pub(super) fn vision_file(&self) -> PathBuf {
        self.directory.join("model-vision.safetensors")
    }

    pub(super) fn rank_file(&self, rank: u32) -> PathBuf {
        self.directory.join(format!("model-tp{}-rank{rank}.safetensors", self.tp))
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a manifest is plain data")
    }

    /// The free text of a file: the manifest, and where each slice lies. `rank` is `None` for the vision
    /// tower.
    pub(super) fn metadata(
        &self,
        rank: Option<u32>,
        slices: &BTreeMap<String, Place>,
    ) -> BTreeMap<&'static str, String> {
        let slices = serde_json::to_string(slices).expect("places are plain data");
        let mut metadata = BTreeMap::from([("format", "pt".to_owned())]);
        metadata.insert(key::MANIFEST, self.to_json());
        if let Some(rank) = rank {
            metadata.insert(key::RANK, rank.to_string());
            metadata.insert(key::SLICES, slices);
        }
        metadata
    }

    /// Tensors of the vision tower.
    pub(super) fn vision_tensors(&self, file: &WeightFile) -> Result<Vec<Stored>> {
        let header = file.header()?;
        self.check_origin(file, &header)?;
        Ok(header.tensors)
    }

    /// Opens the file of one rank.
    ///
    /// # Errors
    /// See [`super::checkpoint::Checkpoint::select`].
    pub(super) fn open_rank(&self, split: &TpSplit) -> Result<(WeightFile, Vec<Part>)> {
        if split.world_size != self.tp {
            let (directory, found, expected) = (self.directory.clone(), self.tp, split.world_size);
            return Err(ModelError::ShardDegree { directory, found, expected });
        }
        let file = WeightFile::open(self.rank_file(split.rank.0))?;
        let malformed = |reason: String| {
            let file = file.path().to_owned();
            ModelError::Checkpoint { file, reason }
        };
        let header = file.header()?;
        self.check_origin(&file, &header)?;
        let rank = header.metadata.get(key::RANK).map_or("", String::as_str);
        if rank != split.rank.0.to_string() {
            return Err(malformed(format!("is of rank {rank:?}, expected {}", split.rank)));
        }
        let places = header.metadata.get(key::SLICES).map_or("", String::as_str);
        let mut places: HashMap<String, Place> = serde_json::from_str(places)
            .map_err(|source| ModelError::Json { file: file.path().to_owned(), source })?;
        let parts = header.tensors.into_iter().map(|stored| {
            let place = places.remove(&stored.name);
            let place = place.filter(|place| {
                let elements = place.rows.len() * place.cols.len();
                elements == stored.shape.iter().product::<usize>()
            });
            let reason =
                || malformed(format!("does not say which slice of {} it holds", stored.name));
            let Place { shape, rows, cols } = place.ok_or_else(reason)?;
            Ok(Part { stored, shape, rows, cols })
        });
        let parts = parts.collect::<Result<_>>()?;
        Ok((file, parts))
    }

    /// A file that was copied here from another checkpoint is refused.
    fn check_origin(&self, file: &WeightFile, header: &Header) -> Result<()> {
        match header.metadata.get(key::MANIFEST) {
            Some(found) if *found == self.to_json() => Ok(()),
            _ => Err(ModelError::Checkpoint {
                file: file.path().to_owned(),
                reason: "belongs to another pre-sharded checkpoint than its directory".to_owned(),
            }),
        }
    }
}
