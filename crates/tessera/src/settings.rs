//! Everything a process is told: defaults < file < environment < flags, merged once and checked before
//! anything is bound. Unknown keys are errors wherever they come from.

use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use figment::value::{Dict, Value};
use serde::{Deserialize, Serialize};
use tessera_decoder::DecoderConfig;
use tessera_encoder::EncoderConfig;
use tessera_membership::{ClusterAddress, MembershipUrl, StoreEndpoint};
use tessera_model::{ModelSource, WeightSource};
use tessera_router::RouterConfig;
use tessera_telemetry::LogConfig;

use crate::error::{Error, Result};

/// Environment variables are `TESSERA_` and the key in capitals, sections separated by two underscores:
/// `TESSERA_ROUTER__HTTP__LISTEN`.
const ENV_PREFIX: &str = "TESSERA_";

/// Settings of one process. A role reads the shared fields and its own section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Name of the cluster; its records live under `/tessera/{cluster}/`.
    pub cluster: String,
    /// `etcd://host:port[,host:port…]`; `tessera up` also takes `embedded`.
    pub membership: String,
    /// Model directory in Hugging Face layout.
    pub model: PathBuf,
    /// Name that clients use for the model; empty: the directory's name.
    pub model_name: String,
    /// `checkpoint`: the weights in the model directory. `random:SEED`: random weights of its shape.
    pub weights: String,
    pub log: LogConfig,
    pub router: RouterConfig,
    pub encoder: EncoderConfig,
    pub decoder: DecoderConfig,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cluster: "default".into(),
            membership: "etcd://127.0.0.1:2379".into(),
            model: PathBuf::new(),
            model_name: String::new(),
            weights: "checkpoint".into(),
            log: LogConfig::default(),
            router: RouterConfig::default(),
            encoder: EncoderConfig::default(),
            decoder: DecoderConfig::default(),
        }
    }
}

impl Settings {
    /// Merges defaults, the file, the environment and `flags` (dotted keys), in this order.
    ///
    /// # Errors
    /// Names the key and where it came from.
    pub fn load(file: Option<&Path>, flags: Vec<(String, Value)>) -> Result<Self> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(path) = file {
            figment = figment.merge(Toml::file_exact(path));
        }
        figment = figment.merge(Env::prefixed(ENV_PREFIX).split("__"));
        for (key, value) in flags {
            figment = figment.merge(Serialized::global(&key, value));
        }
        figment.extract().map_err(|error| Error::Settings(Box::new(error)))
    }

    /// Hands the shared fields to the section of the role that is about to run.
    ///
    /// # Errors
    /// A membership URL or a source of weights that does not parse; no model.
    pub fn share(mut self) -> Result<Self> {
        if self.model.as_os_str().is_empty() {
            let reason = "is missing; give a model directory in Hugging Face layout".into();
            return Err(Error::Flag { flag: "--model", reason });
        }
        let cluster = ClusterAddress { name: self.cluster.clone(), endpoints: self.endpoints()? };
        let model = ModelSource {
            directory: self.model.clone(),
            name: self.served_name(),
            weights: self.weight_source()?,
        };
        self.router.cluster = cluster.name.clone();
        self.router.membership = self.membership.clone();
        self.router.model = model.directory.clone();
        self.router.model_name = model.name.clone();
        (self.encoder.cluster, self.encoder.model) = (cluster.clone(), model.clone());
        (self.decoder.cluster, self.decoder.model) = (cluster, model);
        Ok(self)
    }

    fn endpoints(&self) -> Result<Vec<StoreEndpoint>> {
        let invalid = |reason| Error::Flag { flag: "--membership", reason };
        match self.membership.parse() {
            Ok(MembershipUrl::Etcd(endpoints)) => Ok(endpoints),
            Ok(MembershipUrl::Embedded) => Err(invalid(
                "`embedded` is for `tessera up`; a single role needs etcd://host:port".into(),
            )),
            Err(error) => Err(invalid(error.to_string())),
        }
    }

    fn weight_source(&self) -> Result<WeightSource> {
        if self.weights == "checkpoint" {
            return Ok(WeightSource::Checkpoint(self.model.clone()));
        }
        let seed = self.weights.strip_prefix("random:").and_then(|seed| seed.parse().ok());
        seed.map(|seed| WeightSource::Random { seed }).ok_or_else(|| Error::Flag {
            flag: "--weights",
            reason: format!("{:?} is neither `checkpoint` nor `random:SEED`", self.weights),
        })
    }

    /// The model's name for clients.
    pub fn served_name(&self) -> String {
        if !self.model_name.is_empty() {
            return self.model_name.clone();
        }
        let canonical = self.model.canonicalize().unwrap_or_else(|_| self.model.clone());
        canonical
            .file_name()
            .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    }

    /// All settings as a file that [`Settings::load`] reads.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(Error::WriteSettings)
    }
}

/// A value given as text: a TOML literal if it is one, else a string.
pub fn parse_value(text: &str) -> Value {
    let literal: Option<Dict> = Toml::from_str(&format!("value = {text}")).ok();
    literal.and_then(|mut dict| dict.remove("value")).unwrap_or_else(|| Value::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(text: &str, flags: &[(&str, &str)]) -> Result<Settings> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tessera.toml");
        std::fs::write(&path, text).expect("written");
        let flags = flags.iter().map(|(key, value)| (String::from(*key), parse_value(value)));
        Settings::load(Some(&path), flags.collect())
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = "cluster = \"a\"\n[router.limits]\nmax_choices = 3\nmax_messages = 7\n";
        let settings = with_file(file, &[("router.limits.max_choices", "5")]).expect("valid");
        assert_eq!(settings.cluster, "a");
        assert_eq!(settings.router.limits.max_choices, 5);
        assert_eq!(settings.router.limits.max_messages, 7);
    }

    #[test]
    fn unknown_keys_are_errors_wherever_they_stand() {
        let in_file = with_file("[router]\nhtttp = 1\n", &[]).expect_err("misspelt");
        assert!(
            format!("{in_file}: {}", crate::error::chain(&in_file)).contains("htttp"),
            "{in_file}"
        );
        let in_flag = with_file("", &[("encoder.cash_bytes", "1")]).expect_err("misspelt");
        assert!(crate::error::chain(&in_flag).contains("cash_bytes"), "{in_flag}");
    }

    #[test]
    fn shared_fields_reach_every_role() {
        let flags =
            [("model", "/m/tiny"), ("membership", "etcd://a:1,b:2"), ("weights", "random:7")];
        let settings =
            with_file("cluster = \"c\"\n", &flags).expect("valid").share().expect("valid");
        assert_eq!(settings.decoder.cluster, settings.encoder.cluster);
        assert_eq!(settings.decoder.cluster.name, "c");
        assert_eq!(settings.decoder.cluster.endpoints.len(), 2);
        assert_eq!(settings.encoder.model.weights, WeightSource::Random { seed: 7 });
        assert_eq!(settings.encoder.model.name, "tiny");
    }

    #[test]
    fn bad_shared_fields_name_their_flag() {
        let cases = [
            ("--model", vec![]),
            ("--membership", vec![("model", "m"), ("membership", "zookeeper://x")]),
            ("--membership", vec![("model", "m"), ("membership", "embedded")]),
            ("--weights", vec![("model", "m"), ("weights", "random:x")]),
        ];
        for (flag, flags) in cases {
            let error = with_file("", &flags).expect("readable").share().expect_err(flag);
            assert!(error.to_string().starts_with(flag), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let error = Settings::load(Some(Path::new("nowhere/tessera.toml")), Vec::new());
        assert!(crate::error::chain(&error.expect_err("no file")).contains("nowhere/tessera.toml"));
    }

    #[test]
    fn printed_settings_read_back_the_same() {
        let settings = with_file("cluster = \"b\"\n", &[("decoder.tp", "4")]).expect("valid");
        let text = settings.to_toml().expect("printable");
        assert_eq!(with_file(&text, &[]).expect("readable"), settings);
    }

    #[test]
    fn values_are_literals_or_text() {
        assert_eq!(parse_value("3").to_i128(), Some(3));
        assert_eq!(parse_value("true").to_bool(), Some(true));
        assert_eq!(parse_value("0.5").to_num().and_then(|n| n.to_f64()), Some(0.5));
        assert_eq!(parse_value("127.0.0.1:80").into_string().as_deref(), Some("127.0.0.1:80"));
        assert_eq!(parse_value("\"x\"").into_string().as_deref(), Some("x"));
    }
}
