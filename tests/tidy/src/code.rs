//! Rust text without its comments and without what stands in its literals, so that a rule about code is not broken by
//! a sentence about the rule.

/// `text` with comments and the insides of string and character literals blanked; every line keeps its number.
pub fn code(text: &str) -> String {
    let mut rest = text;
    let mut code = String::with_capacity(text.len());
    while let Some(next) = rest.chars().next() {
        let before = code.chars().next_back();
        let skipped = match next {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            '"' => quoted(rest, '"'),
            '\'' => character(rest),
            'r' if !before.is_some_and(|c| c.is_alphanumeric() && c != 'b' && c != 'c') => raw(rest),
            _ => 0,
        };
        let (blanked, kept) = rest.split_at(skipped);
        if blanked.starts_with('"') {
            code.push_str("\"\"");
        }
        code.extend(blanked.chars().filter(|&c| c == '\n'));
        if skipped == 0 {
            code.push(next);
        }
        rest = if skipped == 0 { &rest[next.len_utf8()..] } else { kept };
    }
    code
}

/// Bytes of a block comment; they nest.
fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    for (at, _) in text.char_indices() {
        if text[at..].starts_with("/*") {
            depth += 1;
        } else if text[..at].ends_with("*/") && at > 2 {
            depth -= 1;
            if depth == 0 {
                return at;
            }
        }
    }
    text.len()
}

/// Bytes of a literal between `quote`s, with backslash escapes.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Bytes of a character literal; 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut inside = text.chars().skip(1);
    match (inside.next(), inside.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted(text, '\''),
        _ => 0,
    }
}

/// Bytes of a raw string literal; 0 for anything else that begins with `r`.
fn raw(text: &str) -> usize {
    let hashes = text[1..].chars().take_while(|&c| c == '#').count();
    if !text[1 + hashes..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let start = 2 + hashes;
    text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
}

#[test]
fn only_code_is_left_and_lines_keep_their_numbers() {
    let cases = [
        ("a // unsafe\nb", "a \nb"),
        ("a /* x /* y */ \n z */ b", "a \n b"),
        (r#"f("un\"safe // no") + 1"#, "f(\"\") + 1"),
        ("r\"x\\\" + y", " + y"),
        ("br#\"a \" b\n\"# + for_r", "b\n + for_r"),
        ("['\"', 'a', '\\'', '\\u{1F600}']; &'a str", "[, , , ]; &'a str"),
        ("unsafe { r }", "unsafe { r }"),
    ];
    for (text, expected) in cases {
        assert_eq!(code(text), expected, "{text}");
    }
}
