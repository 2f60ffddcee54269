//! SPDX licence expressions: what may stand in a manifest's `license`, and whether some licences satisfy it.
//!
//! Grammar: SPDX 2.3, annex D, without `LicenseRef`; and `/` for `OR`, as cargo's manifests said before 2018.

/// Whether `expression` can be met with licences of which `allowed` says yes; an exception comes with its licence, as in
/// `Apache-2.0 WITH LLVM-exception`.
///
/// # Errors
/// What is wrong with the expression.
pub fn satisfied(expression: &str, allowed: impl Fn(&str) -> bool) -> Result<bool, String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut parser = Parser { words: spaced.split_whitespace().collect(), at: 0, allowed };
    let satisfied = parser.any()?;
    match parser.peek() {
        None => Ok(satisfied),
        Some(word) => Err(format!("`{expression}`: unexpected `{word}`")),
    }
}

struct Parser<'a, F> {
    words: Vec<&'a str>,
    at: usize,
    allowed: F,
}

impl<'a, F: Fn(&str) -> bool> Parser<'a, F> {
    /// `a OR b`: AND binds tighter.
    fn any(&mut self) -> Result<bool, String> {
        let mut satisfied = self.all()?;
        while self.take("OR") {
            satisfied |= self.all()?;
        }
        Ok(satisfied)
    }

    fn all(&mut self) -> Result<bool, String> {
        let mut satisfied = self.one()?;
        while self.take("AND") {
            satisfied &= self.one()?;
        }
        Ok(satisfied)
    }

    fn one(&mut self) -> Result<bool, String> {
        if self.take("(") {
            let satisfied = self.any()?;
            return if self.take(")") { Ok(satisfied) } else { Err("expected `)`".to_owned()) };
        }
        let licence = self.name()?;
        if self.take("WITH") {
            let exception = self.name()?;
            return Ok((self.allowed)(&format!("{licence} WITH {exception}")));
        }
        Ok((self.allowed)(licence))
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let word = self.peek().ok_or("expected a licence, not the end")?;
        if ["AND", "OR", "WITH", "(", ")"].contains(&word) {
            return Err(format!("expected a licence, not `{word}`"));
        }
        self.at += 1;
        Ok(word)
    }

    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.at).copied()
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(word);
        self.at += usize::from(found);
        found
    }
}

#[test]
fn expressions_mean_what_spdx_says() {
    let cases = [
        ("A", Ok(true)),
        ("X", Ok(false)),
        ("X OR A", Ok(true)),
        ("X/A", Ok(true)),
        ("X / A", Ok(true)),
        ("A AND X", Ok(false)),
        ("A AND B", Ok(true)),
        ("A OR X AND X", Ok(true)),
        ("(A OR X) AND X", Ok(false)),
        ("(A OR X) AND B", Ok(true)),
        ("((X) OR (A))", Ok(true)),
        ("A WITH E", Ok(true)),
        ("B WITH E", Ok(false)),
        ("B WITH E OR A", Ok(true)),
        ("A+", Ok(false)),
        ("", Err(())),
        ("A B", Err(())),
        ("A OR", Err(())),
        ("(A", Err(())),
        ("A)", Err(())),
        ("A WITH", Err(())),
    ];
    for (expression, expected) in cases {
        let found = satisfied(expression, |name| ["A", "B", "A WITH E"].contains(&name));
        assert_eq!(found.map_err(|_| ()), expected, "{expression}");
    }
}
