//! Writes altered copies of a fixture's checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

/// A checkpoint in memory.
#[derive(Clone)]
pub struct Tensors(pub BTreeMap<String, Tensor>);

#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensors {
    /// Every tensor of every safetensors file of a directory.
    pub fn read(directory: &Path) -> Self {
        let mut tensors = BTreeMap::new();
        for file in std::fs::read_dir(directory).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "safetensors") {
                continue;
            }
            let bytes = std::fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                tensors
                    .insert(name.to_owned(), Tensor { dtype, shape, bytes: view.data().to_vec() });
            }
        }
        Self(tensors)
    }

    /// Bytes of all tensors whose name passes.
    pub fn num_bytes(&self, filter: impl Fn(&str) -> bool) -> u64 {
        let chosen = self.0.iter().filter(|(name, _)| filter(name));
        chosen.map(|(_, tensor)| tensor.bytes.len() as u64).sum()
    }

    /// The same values (BF16 in the fixture) in another type.
    pub fn converted(&self, dtype: Dtype) -> Self {
        let mut tensors = self.clone();
        for tensor in tensors.0.values_mut() {
            assert_eq!(tensor.dtype, Dtype::BF16);
            let (words, _) = tensor.bytes.as_chunks();
            let values = words.iter().map(|word| bf16::from_le_bytes(*word).to_f32());
            tensor.bytes = match dtype {
                Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
                Dtype::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
                other => panic!("{other:?}"),
            };
            tensor.dtype = dtype;
        }
        tensors
    }

    fn save(&self, path: &Path, names: &[&String]) {
        let views = names.iter().map(|name| {
            let tensor = &self.0[*name];
            (*name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    /// A directory with one file.
    pub fn write(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let names: Vec<&String> = self.0.keys().collect();
        self.save(&directory.path().join("model.safetensors"), &names);
        directory
    }

    /// A directory with `count` shards, tensors dealt out in turn, and an index.
    pub fn write_sharded(&self, count: usize) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let names: Vec<&String> = self.0.keys().collect();
        let mut weight_map = serde_json::Map::new();
        for shard in 0..count {
            let file = format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
            let part: Vec<&String> = names.iter().skip(shard).step_by(count).copied().collect();
            self.save(&directory.path().join(&file), &part);
            part.iter().for_each(|name| {
                weight_map.insert((*name).clone(), file.clone().into());
            });
        }
        write_index(directory.path(), weight_map);
        directory
    }
}

pub fn write_index(directory: &Path, weight_map: serde_json::Map<String, serde_json::Value>) {
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
