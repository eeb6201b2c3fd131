//! Rust text without what is not code: comments and the insides of strings become spaces, so that a word
//! found is a word used. Line breaks stay, so that lines keep their numbers.

/// Blanks comments and the insides of string and character literals.
pub fn code(text: &str) -> String {
    let source: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < source.len() {
        let end = match source[at] {
            '/' if source.get(at + 1) == Some(&'/') => line_end(&source, at),
            '/' if source.get(at + 1) == Some(&'*') => block_comment_end(&source, at),
            '"' => string_end(&source, at),
            'r' if !is_word_before(&source, at) => raw_string_end(&source, at),
            '\'' => character_end(&source, at),
            _ => at,
        };
        if end == at {
            out.push(source[at]);
            at += 1;
            continue;
        }
        let is_literal = source[at] != '/';
        for (i, &c) in source[at..end].iter().enumerate() {
            let is_border = is_literal && (i == 0 || at + i + 1 == end);
            out.push(if c == '\n' || is_border { c } else { ' ' });
        }
        at = end;
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The `r` of `br"…"` is a literal's; that of `for"` is not.
fn is_word_before(source: &[char], at: usize) -> bool {
    match at.checked_sub(1).map(|before| source[before]) {
        Some('b' | 'c') => at >= 2 && is_word(source[at - 2]),
        Some(before) => is_word(before),
        None => false,
    }
}

fn line_end(source: &[char], at: usize) -> usize {
    source[at..].iter().position(|&c| c == '\n').map_or(source.len(), |length| at + length)
}

/// Block comments nest.
fn block_comment_end(source: &[char], at: usize) -> usize {
    let (mut depth, mut i) = (0, at);
    while i < source.len() {
        match (source[i], source.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    source.len()
}

fn string_end(source: &[char], at: usize) -> usize {
    let mut i = at + 1;
    while i < source.len() {
        match source[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    source.len()
}

/// `at` itself when no raw string begins there (an identifier, or `r#type`).
fn raw_string_end(source: &[char], at: usize) -> usize {
    let hashes = source[at + 1..].iter().take_while(|&&c| c == '#').count();
    if source.get(at + 1 + hashes) != Some(&'"') {
        return at;
    }
    let mut i = at + 2 + hashes;
    while i < source.len() {
        let closes = source[i] == '"' && source[i + 1..].iter().take(hashes).all(|&c| c == '#');
        if closes && i + hashes < source.len() {
            return i + 1 + hashes;
        }
        i += 1;
    }
    source.len()
}

/// `at` itself when this is a lifetime.
fn character_end(source: &[char], at: usize) -> usize {
    match (source.get(at + 1), source.get(at + 2)) {
        (Some('\\'), _) => {
            // The character after the backslash may itself be a quote.
            let rest = source.get(at + 3..).unwrap_or_default();
            let close = rest.iter().position(|&c| c == '\'');
            close.map_or(source.len(), |length| at + 3 + length + 1)
        }
        (Some(_), Some('\'')) => at + 3,
        _ => at,
    }
}

/// Blanks every item under `#[cfg(test)]` in code without comments and strings.
pub fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = code.to_owned();
    let mut from = 0;
    while let Some(found) = out[from..].find(MARK) {
        let begin = from + found;
        let end = item_end(&out, begin + MARK.len());
        let blank: String =
            out[begin..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(begin..end, &blank);
        from = begin;
    }
    out
}

/// End of the item that begins at `at`: a `;` outside of brackets, or the brace that closes its body.
fn item_end(code: &str, at: usize) -> usize {
    let mut depth = 0usize;
    for (i, c) in code[at..].char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 && c == '}' {
                    return at + i + 1;
                }
            }
            ';' if depth == 0 => return at + i + 1,
            _ => {}
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_code_stays() {
        let cases = [
            ("a // todo!()\nb", "a           \nb"),
            ("a /* x /* y */ z */ b", "a                   b"),
            (r#"f("std::env \" x") + 1"#, r#"f("             ") + 1"#),
            ("let c = '\"'; // x", "let c = ' ';     "),
            ("let c = '\\''; d", "let c = '  '; d"),
            ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
            ("r#\"std \" env\"# + 1", "r            # + 1"),
            ("br\"x\" for r#type", "br  \" for r#type"),
            ("\"a\nb\"", "\" \n \""),
            ("b'\\x00' x", "b'    ' x"),
        ];
        for (text, expected) in cases {
            assert_eq!(code(text), expected, "{text}");
        }
    }

    #[test]
    fn unfinished_literals_end_with_the_text() {
        for text in ["\"abc", "r#\"abc\"", "/* abc", "'\\", "'"] {
            assert_eq!(code(text).chars().count(), text.chars().count(), "{text}");
        }
    }

    #[test]
    fn test_items_are_blanked() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() { [1; 2]; }\n}\nfn c() {}\n";
        let product = without_tests(text);
        assert!(product.contains("fn a") && product.contains("fn c") && !product.contains("fn b"));
        assert_eq!(product.lines().count(), text.lines().count());
        let product = without_tests("#[cfg(test)]\nmod tests;\nfn c() {}");
        assert!(product.contains("fn c") && !product.contains("mod"));
        let product = without_tests("#[cfg(test)]\nconst A: [u8; 2] = [1; 2];\nfn c() {}");
        assert!(product.contains("fn c") && !product.contains("const"));
    }
}
