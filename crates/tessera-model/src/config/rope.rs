//! Rotary settings: base, the three sections, and YaRN.

use super::YarnConfig;
use super::fields::Fields;
use crate::error::Result;

/// What a config file says about rotary embeddings.
pub(super) struct Rope {
    pub theta: f64,
    pub section: [u32; 3],
    pub yarn: Option<YarnConfig>,
}

/// Defaults of the reference implementation.
const BETA_FAST: f64 = 32.0;
const BETA_SLOW: f64 = 1.0;
/// Fields of YaRN variants that no published model of this family uses; ignoring them would give wrong text
/// silently.
const OTHER_FIELDS: [&str; 2] = ["mscale", "mscale_all_dim"];

impl YarnConfig {
    /// Longest context in tokens.
    pub(super) fn context(&self) -> usize {
        (self.factor * self.original_max_position_embeddings as f64) as usize
    }
}

/// Reads `rope_parameters` or `rope_scaling`. `mrope` and `default` name the same thing; other scaled
/// variants than YaRN are refused.
pub(super) fn read(top: &Fields<'_>, fields: &Fields<'_>) -> Result<Rope> {
    let mut sections = Vec::new();
    for place in [fields, top] {
        for name in ["rope_parameters", "rope_scaling"] {
            sections.extend(place.section(name)?);
        }
    }
    let Some(rope) = sections.first() else {
        return Err(fields.missing("rope_scaling"));
    };
    let theta = match rope.positive("rope_theta")? {
        Some(theta) => Some(theta),
        None => fields.positive("rope_theta")?.or(top.positive("rope_theta")?),
    };
    let theta = fields.required("rope_theta", theta)?;
    let section = rope.required("mrope_section", rope.sizes("mrope_section")?)?;
    let section: Vec<u32> = section.into_iter().map(|size| size as u32).collect();
    let section = section.try_into();
    let section =
        section.map_err(|_| rope.wrong("mrope_section", "must have three entries".to_owned()))?;
    let yarn = if is_yarn(rope)? { Some(yarn(rope)?) } else { None };
    Ok(Rope { theta, section, yarn })
}

/// `rope_type`, or its older name `type`. The published files with sections say `mrope` in one of them
/// whatever the other says.
fn is_yarn(rope: &Fields<'_>) -> Result<bool> {
    let mut is_yarn = false;
    for name in ["rope_type", "type"] {
        match rope.string(name)? {
            None | Some("mrope" | "default") => {}
            Some("yarn") => is_yarn = true,
            Some(kind) => return Err(rope.unsupported(name, &format!("rotary scaling {kind}"))),
        }
    }
    let says_default = rope.string("rope_type")? == Some("default");
    match is_yarn && says_default {
        true => Err(rope.wrong("type", "is yarn, but rope_type is default".to_owned())),
        false => Ok(is_yarn),
    }
}

fn yarn(rope: &Fields<'_>) -> Result<YarnConfig> {
    for name in OTHER_FIELDS {
        if rope.positive(name)?.is_some() {
            return Err(rope.unsupported(name, "this variant of YaRN"));
        }
    }
    if rope.boolean("truncate")? == Some(false) {
        return Err(rope.unsupported("truncate", "this variant of YaRN"));
    }
    let factor = rope.required("factor", rope.positive("factor")?)?;
    if factor < 1.0 {
        return Err(rope.wrong("factor", format!("must be at least 1, is {factor}")));
    }
    let original = "original_max_position_embeddings";
    let config = YarnConfig {
        factor,
        original_max_position_embeddings: rope.required(original, rope.size(original)?)?,
        attention_factor: match rope.positive("attention_factor")? {
            Some(attention_factor) => attention_factor,
            None => 0.1 * factor.ln() + 1.0,
        },
        beta_fast: rope.positive("beta_fast")?.unwrap_or(BETA_FAST),
        beta_slow: rope.positive("beta_slow")?.unwrap_or(BETA_SLOW),
    };
    match config.beta_fast > config.beta_slow {
        true => Ok(config),
        false => Err(rope.wrong("beta_fast", "must be above beta_slow".to_owned())),
    }
}
