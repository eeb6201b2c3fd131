//! Where Jinja templates of checkpoints expect Python: `tojson` as `json.dumps` writes it, booleans and
//! floats as `str` prints them, and the string and dict methods that templates use.

use minijinja::value::{Kwargs, Serde, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

/// Installs all of it.
pub(crate) fn install(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.set_formatter(format_value);
    environment.set_unknown_method_callback(call_method);
}

/// What a template said when it refused its input.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub String);

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, "raise_exception was called");
    Err(error.with_source(Raised(message)))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, as `transformers` defines the filter: no HTML
/// escapes, keys in their order.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson cannot escape non-ASCII"));
    }
    options.assert_all_used()?;
    let json = match indent {
        None => to_json(value, Spaced),
        Some(width) => to_json(value, PrettyFormatter::with_indent(" ".repeat(width).as_bytes())),
    };
    let failed = |source| Error::new(ErrorKind::BadSerialization, "tojson").with_source(source);
    Ok(Value::from_safe_string(json.map_err(failed)?))
}

fn to_json(value: &Value, formatter: impl Formatter) -> serde_json::Result<String> {
    let mut out = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8(out).expect("serde_json writes UTF-8"))
}

/// `", "` between items and `": "` after keys.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W>(&mut self, out: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W>(&mut self, out: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W>(&mut self, out: &mut W) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        out.write_all(b": ")
    }

    fn write_f64<W>(&mut self, out: &mut W, value: f64) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        out.write_all(repr_float(value).as_bytes())
    }
}

/// `repr` of a Python float: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn repr_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// What `{{ value }}` prints.
fn format_value(
    out: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), repr_float)
        }
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(&text).map_err(Error::from)
}

/// Methods of Python's `str` and `dict`.
fn call_method(
    _state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        return string_method(text, method, arguments);
    }
    if value.kind() == ValueKind::Map {
        return map_method(value, method, arguments);
    }
    Err(Error::from(ErrorKind::UnknownMethod))
}

fn string_method(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(arguments)?;
            let drop = |c: char| characters.map_or(c.is_whitespace(), |set| set.contains(c));
            let text = if method == "rstrip" { text } else { text.trim_start_matches(drop) };
            let text = if method == "lstrip" { text } else { text.trim_end_matches(drop) };
            Value::from(text)
        }
        "startswith" | "endswith" => {
            let (affix,): (&Value,) = from_args(arguments)?;
            let has = |affix: &Value| {
                affix.as_str().is_some_and(|affix| match method {
                    "startswith" => text.starts_with(affix),
                    _ => text.ends_with(affix),
                })
            };
            let any = affix.as_str().is_none() && affix.try_iter()?.any(|one| has(&one));
            Value::from(has(affix) || any)
        }
        "split" => {
            let (separator, limit): (Option<&str>, Option<usize>) = from_args(arguments)?;
            let limit = limit.map_or(usize::MAX, |limit| limit.saturating_add(1));
            let pieces: Vec<Value> = match separator {
                Some(separator) => text.splitn(limit, separator).map(Value::from).collect(),
                None => text.split_whitespace().map(Value::from).collect(),
            };
            Value::from(pieces)
        }
        "replace" => {
            let (from, to): (&str, &str) = from_args(arguments)?;
            Value::from(text.replace(from, to))
        }
        "upper" => no_arguments(arguments, || Value::from(text.to_uppercase()))?,
        "lower" => no_arguments(arguments, || Value::from(text.to_lowercase()))?,
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

fn map_method(map: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let entries = || -> Result<Vec<(Value, Value)>, Error> {
        map.try_iter()?.map(|key| Ok((key.clone(), map.get_item(&key)?))).collect()
    };
    match method {
        "items" => {
            let pairs = entries()?.into_iter().map(|(key, item)| Value::from(vec![key, item]));
            let pairs: Vec<Value> = pairs.collect();
            no_arguments(arguments, || Value::from(pairs))
        }
        "keys" => {
            let keys: Vec<Value> = entries()?.into_iter().map(|(key, _)| key).collect();
            no_arguments(arguments, || Value::from(keys))
        }
        "values" => {
            let items: Vec<Value> = entries()?.into_iter().map(|(_, item)| item).collect();
            no_arguments(arguments, || Value::from(items))
        }
        "get" => {
            let (key, default): (&Value, Option<Value>) = from_args(arguments)?;
            let found = map.get_item(key)?;
            Ok(if found.is_undefined() { default.unwrap_or(Value::from(())) } else { found })
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn no_arguments(arguments: &[Value], value: impl FnOnce() -> Value) -> Result<Value, Error> {
    let () = from_args(arguments)?;
    Ok(value())
}

/// A JSON value as a template value, keys in their order.
pub(crate) fn from_json(value: &serde_json::Value) -> Value {
    Value::from(Serde(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, context: serde_json::Value) -> Result<String, Error> {
        let mut environment = Environment::new();
        install(&mut environment);
        environment.render_str(source, from_json(&context))
    }

    #[test]
    fn tojson_writes_what_json_dumps_writes() {
        let value =
            json!({"z": [1, 2.0, 1e20, 1e-5, true, null, "é <b> & 'q' \"\n\u{1}"], "a": {}});
        let expected =
            r#"{"z": [1, 2.0, 1e+20, 1e-05, true, null, "é <b> & 'q' \"\n\u0001"], "a": {}}"#;
        assert_eq!(render("{{ v | tojson }}", json!({"v": value})).expect("JSON"), expected);
        let pretty = render("{{ v | tojson(indent=2) }}", json!({"v": {"a": [1], "b": []}}));
        assert_eq!(pretty.expect("JSON"), "{\n  \"a\": [\n    1\n  ],\n  \"b\": []\n}");
        assert!(render("{{ 1 | tojson(frobnicate=1) }}", json!({})).is_err());
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5, "-2.5"),
        ];
        for (value, expected) in cases {
            assert_eq!(repr_float(value), expected);
        }
    }

    #[test]
    fn printed_values_look_like_python() {
        let source = "{{ true }} {{ none }} {{ 2.0 }} {{ 3 }} {{ missing }}|{{ 'a<b' }}";
        assert_eq!(render(source, json!({})).expect("text"), "True None 2.0 3 |a<b");
    }

    #[test]
    fn common_methods_work() {
        let cases = [
            ("{{ ' a '.strip() }}|{{ 'xax'.strip('x') }}|{{ ' a '.rstrip() }}", "a|a| a"),
            ("{{ 'a.b.c'.split('.')[-1] }}{{ 'a.b.c'.split('.', 1) | length }}", "c2"),
            ("{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(['x', 'c']) }}", "TrueTrue"),
            ("{{ 'Ab'.upper() }}{{ 'Ab'.lower() }}{{ 'aa'.replace('a', 'b') }}", "ABabbb"),
            ("{% for k, v in m.items() %}{{ k }}{{ v }}{% endfor %}", "y1x2"),
            (
                "{{ m.get('x') }}{{ m.get('q') }}{{ m.get('q', 7) }}{{ m.keys() | join }}",
                "2None7yx",
            ),
        ];
        for (source, expected) in cases {
            let rendered = render(source, json!({"m": {"y": 1, "x": 2}}));
            assert_eq!(rendered.unwrap_or_else(|e| panic!("{source}: {e}")), expected, "{source}");
        }
        assert!(render("{{ 'a'.frobnicate() }}", json!({})).is_err());
    }
}
