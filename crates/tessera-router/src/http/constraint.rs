//! What the output must belong to: OpenAI's `response_format` and vLLM's `structured_outputs`.

use serde_json::Value;
use tessera_types::Grammar;
use tessera_types::grammar::MAX_GRAMMAR_CHOICES;

use super::fields::{Field, Fields};
use super::unknown::UnknownFields;
use crate::error::RequestError;

/// Any JSON object.
const ANY_OBJECT: &str = r#"{"type":"object"}"#;

/// A grammar and the field it stands in.
#[derive(Debug, PartialEq)]
pub(super) struct Constraint {
    pub(super) grammar: Grammar,
    pub(super) field: String,
}

/// Reads either field.
///
/// # Errors
/// A typed error that names the field; both at once.
pub(super) fn parse_constraint(
    fields: &mut Fields<'_>,
    unknown: &UnknownFields,
) -> Result<Option<Constraint>, RequestError> {
    let format = match fields.take("response_format") {
        Some(field) => parse_response_format(&field, unknown)?,
        None => None,
    };
    let Some(field) = fields.take("structured_outputs") else {
        return Ok(format);
    };
    match format {
        Some(_) => Err(field.invalid("cannot be combined with response_format")),
        None => parse_structured_outputs(&field, unknown).map(Some),
    }
}

/// `{"type": "text" | "json_object" | "json_schema", "json_schema": {"name", "schema", "strict"}}`. A schema
/// is always kept to, `strict` or not.
fn parse_response_format(
    field: &Field<'_>,
    unknown: &UnknownFields,
) -> Result<Option<Constraint>, RequestError> {
    let mut format = field.object()?;
    let kind = format.required("type")?;
    let constraint = match kind.string()?.as_ref() {
        "text" => None,
        "json_object" => Some(json_schema(ANY_OBJECT.to_owned(), &kind)),
        "json_schema" => {
            let mut outer = format.required("json_schema")?.object()?;
            outer.get::<String>("name")?;
            outer.get::<String>("description")?;
            outer.get::<bool>("strict")?;
            let schema = outer.required("schema")?;
            unknown.note(&outer);
            Some(json_schema(parse_schema(&schema)?, &schema))
        }
        name => return Err(kind.unsupported(format!("the response format {name:.40?}"))),
    };
    unknown.note(&format);
    Ok(constraint)
}

/// Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`.
fn parse_structured_outputs(
    field: &Field<'_>,
    unknown: &UnknownFields,
) -> Result<Constraint, RequestError> {
    let mut outputs = field.object()?;
    for name in ["structural_tag", "whitespace_pattern"] {
        if let Some(field) = outputs.take(name) {
            return Err(field.unsupported(name));
        }
    }
    let mut found = Vec::new();
    if let Some(json) = outputs.take("json") {
        found.push(json_schema(parse_schema(&json)?, &json));
    }
    if let Some(json) = outputs.take("json_object")
        && json.parse()?
    {
        found.push(json_schema(ANY_OBJECT.to_owned(), &json));
    }
    if let Some(regex) = outputs.take("regex") {
        found.push(constraint(Grammar::Regex(regex.string()?.into_owned()), &regex));
    }
    if let Some(choice) = outputs.take("choice") {
        let texts = choice.list(MAX_GRAMMAR_CHOICES)?;
        let texts = texts.iter().map(|text| Ok(text.string()?.into_owned()));
        let texts = texts.collect::<Result<Vec<_>, RequestError>>()?;
        found.push(constraint(Grammar::Choice(texts), &choice));
    }
    if let Some(lark) = outputs.take("grammar") {
        found.push(constraint(Grammar::Lark(lark.string()?.into_owned()), &lark));
    }
    unknown.note(&outputs);
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => {
            Err(field.invalid("must hold exactly one of json, json_object, regex, choice, grammar"))
        }
    }
}

fn constraint(grammar: Grammar, field: &Field<'_>) -> Constraint {
    Constraint { grammar, field: field.path.clone() }
}

fn json_schema(schema: String, field: &Field<'_>) -> Constraint {
    constraint(Grammar::JsonSchema(schema), field)
}

/// A JSON schema, or one written as a string, as vLLM takes it.
fn parse_schema(field: &Field<'_>) -> Result<String, RequestError> {
    let schema: Value = match field.is_string() {
        false => field.parse()?,
        true => serde_json::from_str(&field.string()?)
            .map_err(|error| field.invalid(format!("is not JSON: {error}")))?,
    };
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(schema.to_string()),
        _ => Err(field.invalid("must be a JSON schema")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Option<Constraint>, RequestError> {
        let mut fields = Fields::from_body(body.as_bytes()).expect("test bodies are JSON");
        parse_constraint(&mut fields, &UnknownFields::default())
    }

    #[test]
    fn every_kind_is_understood() {
        let schema = |text: &str| Grammar::JsonSchema(text.to_owned());
        let cases = [
            (
                r#"{"response_format": {"type": "json_object"}}"#,
                schema(ANY_OBJECT),
                "response_format.type",
            ),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema":
                    {"name": "n", "strict": true, "schema": {"type": "array", "a": 1}}}}"#,
                schema(r#"{"type":"array","a":1}"#),
                "response_format.json_schema.schema",
            ),
            (
                r#"{"structured_outputs": {"json": {"b": 1, "a": 2}}}"#,
                schema(r#"{"b":1,"a":2}"#),
                "structured_outputs.json",
            ),
            (
                r#"{"structured_outputs": {"json": "{\"b\": 1}"}, "response_format": {"type": "text"}}"#,
                schema(r#"{"b":1}"#),
                "structured_outputs.json",
            ),
            (
                r#"{"structured_outputs": {"json_object": true}}"#,
                schema(ANY_OBJECT),
                "structured_outputs.json_object",
            ),
            (
                r#"{"structured_outputs": {"regex": "a\\d+", "json": null}}"#,
                Grammar::Regex(r"a\d+".to_owned()),
                "structured_outputs.regex",
            ),
            (
                r#"{"structured_outputs": {"choice": ["yes", "no"], "json_object": false}}"#,
                Grammar::Choice(vec!["yes".to_owned(), "no".to_owned()]),
                "structured_outputs.choice",
            ),
            (
                r#"{"structured_outputs": {"grammar": "start: \"a\""}}"#,
                Grammar::Lark("start: \"a\"".to_owned()),
                "structured_outputs.grammar",
            ),
        ];
        for (body, grammar, field) in cases {
            let parsed = parse(body).expect(body).expect(body);
            assert_eq!(parsed, Constraint { grammar, field: field.to_owned() }, "{body}");
        }
        assert_eq!(parse(r#"{"response_format": {"type": "text"}}"#).expect("valid"), None);
        assert_eq!(parse("{}").expect("valid"), None);
    }

    #[test]
    fn bad_constraints_are_refused_by_field() {
        let cases = [
            (r#"{"response_format": "json"}"#, "response_format"),
            (r#"{"response_format": {}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format.json_schema"),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}"#,
                "response_format.json_schema.schema",
            ),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}"#,
                "response_format.json_schema.schema",
            ),
            (r#"{"structured_outputs": []}"#, "structured_outputs"),
            (r#"{"structured_outputs": {}}"#, "structured_outputs"),
            (r#"{"structured_outputs": {"regex": "a", "choice": ["b"]}}"#, "structured_outputs"),
            (r#"{"structured_outputs": {"json": "{"}}"#, "structured_outputs.json"),
            (r#"{"structured_outputs": {"choice": "a"}}"#, "structured_outputs.choice"),
            (r#"{"structured_outputs": {"choice": [1]}}"#, "structured_outputs.choice[0]"),
            (r#"{"structured_outputs": {"regex": 7}}"#, "structured_outputs.regex"),
            (
                r#"{"structured_outputs": {"structural_tag": {}}}"#,
                "structured_outputs.structural_tag",
            ),
            (
                r#"{"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}"#,
                "structured_outputs",
            ),
        ];
        for (body, field) in cases {
            let error = parse(body).expect_err(body);
            assert_eq!(error.field(), Some(field), "{body}: {error}");
        }
        let many = vec!["\"a\""; MAX_GRAMMAR_CHOICES + 1].join(",");
        let body = format!(r#"{{"structured_outputs": {{"choice": [{many}]}}}}"#);
        let error = parse(&body).expect_err("too many");
        assert_eq!(error.field(), Some("structured_outputs.choice"));
    }
}
