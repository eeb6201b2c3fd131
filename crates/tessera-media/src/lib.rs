//! From the bytes a client sent to the patch rows the vision tower eats: content hash, header, pixels,
//! size rule, resampling, normalisation, patch order. No tensors, no sockets, no threads.
//!
//! Invariants
//! - Media is untrusted: every size is read from the header and checked against [`MediaLimits`] before
//!   anything of that size is allocated, and broken data is a typed [`MediaError`], never a panic.
//! - [`probe`] and [`decode`] agree: the size and orientation that a header promised are what the pixels
//!   have, so that token counts may be computed long before an image is decoded.
//! - Size rule, resampling and normalisation are the reference's bit for bit (Qwen2.5-VL as in
//!   `transformers` with torchvision), because the pixels decide the embedding and its key.
//!
//! Modules: [`config`] (limits), [`header`] (format, size and orientation without decoding), [`exif`]
//! and [`jpeg`] (markers), [`decode`] (pixels), [`rgb`] (the 8-bit image), [`size`] (smart resize),
//! [`resize`] (bicubic recipes), [`patch`] (normalise and lay out), [`prepare`] (all of it in one call),
//! [`id`] (content hashes), [`error`].

pub mod config;
pub mod decode;
pub mod error;
mod exif;
pub mod header;
pub mod id;
mod jpeg;
pub mod patch;
pub mod prepare;
pub mod resize;
pub mod rgb;
pub mod size;

pub use config::MediaLimits;
pub use decode::decode;
pub use error::MediaError;
pub use header::{ImageFormat, ImageInfo, Orientation, probe};
pub use id::{frame_list_id, media_id};
pub use patch::{PatchConfig, Patches, patchify};
pub use prepare::{PixelRecipe, prepare};
pub use resize::{ResizeRecipe, resize};
pub use rgb::RgbImage8;
pub use size::{Size, smart_resize};
