//! Which scheme a layer gets: ordered rules and what to leave alone.
//!
//! A target is `@standard` (in `ignore` only), an exact name, a glob, `Linear`, or `re:` and a regex that matches from
//! the start of the name as Python's `re.match` does. Each is tried with and without a trailing `.weight`.

use globset::GlobBuilder;
use quarrel_proto::v1;
use regex::{Regex, RegexBuilder};

use crate::plan::PlanError;

/// Globs and regexes in one recipe. With [`PATTERN_BYTES_MAX`] it bounds what a command can make the server hold.
const PATTERNS_MAX: usize = 512;
/// Compiled size of one pattern.
const PATTERN_BYTES_MAX: usize = 1 << 16;

/// Names that keep their precision by convention: embeddings, output heads, norms, routers. SPEC.md lists them.
pub const STANDARD: [&str; 17] = [
    "*embed_tokens",
    "*embeddings*",
    "*embedding",
    "*wte",
    "*wpe",
    "*embed_positions",
    "*relative_attention_bias",
    "shared",
    "lm_head",
    "*.lm_head",
    "*norm",
    "*norm[0-9]",
    "*layernorm*",
    "*LayerNorm*",
    "*.ln_*",
    "*.router*",
    "*mlp.gate",
];

/// The part of [`STANDARD`] that names embeddings, which `Linear` does not match.
const EMBEDDINGS: usize = 8;

/// What a rule's target or an ignored name matches.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Exact(String),
    Pattern(Regex),
    Linear(Vec<Regex>),
}

/// How a layer met a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    No,
    /// By a pattern or a class.
    Loosely,
    /// By its very name.
    ByName,
}

impl Target {
    pub(crate) fn matches(&self, name: &str, rank: usize) -> Match {
        let short = name.strip_suffix(".weight").unwrap_or(name);
        let found = |yes: bool| if yes { Match::Loosely } else { Match::No };
        match self {
            Target::Exact(exact) if exact == name || exact == short => Match::ByName,
            Target::Exact(_) => Match::No,
            Target::Pattern(pattern) => found(pattern.is_match(name) || pattern.is_match(short)),
            Target::Linear(embeddings) => found(rank == 2 && !embeddings.iter().any(|pattern| pattern.is_match(short))),
        }
    }
}

/// Compiles targets, within the bounds of one recipe.
#[derive(Debug, Default)]
pub(crate) struct Targets {
    patterns: usize,
}

impl Targets {
    /// A rule's target.
    pub(crate) fn rule(&mut self, text: &str) -> Result<Target, PlanError> {
        match text {
            "" => Err(invalid(text, "it is empty")),
            "Linear" => {
                let embeddings = STANDARD[..EMBEDDINGS].iter().map(|glob| self.glob(glob)).collect::<Result<_, _>>()?;
                Ok(Target::Linear(embeddings))
            }
            _ if text.starts_with('@') => Err(invalid(text, "sets stand in `ignore` only")),
            _ => match text.strip_prefix("re:") {
                Some(pattern) => Ok(Target::Pattern(self.regex(text, &format!("^(?:{pattern})"))?)),
                None if text.contains(['*', '?', '[', '{', '\\']) => Ok(Target::Pattern(self.glob(text)?)),
                None => Ok(Target::Exact(text.to_owned())),
            },
        }
    }

    /// An entry of `ignore`.
    pub(crate) fn ignore(&mut self, text: &str) -> Result<Vec<Target>, PlanError> {
        match text {
            "@standard" => STANDARD.iter().map(|glob| self.rule(glob)).collect(),
            _ if text.starts_with('@') => Err(invalid(text, "expected `@standard`, the only set")),
            _ => Ok(vec![self.rule(text)?]),
        }
    }

    fn glob(&mut self, text: &str) -> Result<Regex, PlanError> {
        let glob = GlobBuilder::new(text).build().map_err(|error| invalid(text, &error.kind().to_string()))?;
        // A name may hold a new line, and `*` means anything.
        self.regex(text, &format!("(?s:{})", unprefixed(glob.regex())))
    }

    fn regex(&mut self, text: &str, pattern: &str) -> Result<Regex, PlanError> {
        self.patterns += 1;
        if self.patterns > PATTERNS_MAX {
            return Err(invalid(text, &format!("a recipe holds at most {PATTERNS_MAX} globs and regexes")));
        }
        RegexBuilder::new(pattern)
            .size_limit(PATTERN_BYTES_MAX)
            .dfa_size_limit(PATTERN_BYTES_MAX)
            .build()
            .map_err(|error| invalid(text, &error.to_string()))
    }
}

/// globset writes its regexes for byte strings; names are UTF-8, where they mean the same.
fn unprefixed(regex: &str) -> &str {
    regex.strip_prefix("(?-u)").unwrap_or(regex)
}

fn invalid(target: &str, why: &str) -> PlanError {
    PlanError::Target { target: crate::shorten(target, 200), why: crate::shorten(why, 500) }
}

/// The recipes that have a name. Each leaves alone what `@standard` names.
pub(crate) fn profile(name: &str) -> Result<v1::Recipe, PlanError> {
    let (scheme, fallback) = match name {
        "edge" => {
            let schemes = vec!["int4/g128".to_owned(), "int8".to_owned()];
            ("int2/g64", Some(v1::Ladder { schemes, sqnr_db_min: Some(18.0), cosine_min: None }))
        }
        "local" => ("W4A16", None),
        "cloud" => ("W8A16", None),
        _ => return Err(PlanError::Profile(crate::shorten(name, 100))),
    };
    let rule = v1::Rule {
        targets: vec!["*".to_owned()],
        scheme: scheme.to_owned(),
        on_indivisible: Some("keep".to_owned()),
        fallback,
        ..Default::default()
    };
    Ok(v1::Recipe { rules: vec![rule], ignore: vec!["@standard".to_owned()] })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn targets_match_as_the_ecosystem_means_them() {
        use Match::{ByName, Loosely, No};
        let cases = [
            ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight", 2, ByName),
            ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", 2, ByName),
            ("up_proj", "model.layers.0.mlp.up_proj.weight", 2, No),
            ("*up_proj", "model.layers.0.mlp.up_proj.weight", 2, Loosely),
            ("*", "x", 1, Loosely),
            ("*.proj", "two\nlines.proj", 2, Loosely),
            ("*.{q,k}_proj", "l.0.k_proj", 2, Loosely),
            ("Linear", "l.0.k_proj.weight", 2, Loosely),
            ("Linear", "l.0.conv.weight", 4, No),
            ("Linear", "model.embed_tokens.weight", 2, No),
            ("re:.*self_attn", "l.0.self_attn.k_proj.weight", 2, Loosely),
            ("re:self_attn", "l.0.self_attn.k_proj.weight", 2, No),
            ("re:a|b", "xb", 2, No),
        ];
        for (target, name, rank, expected) in cases {
            assert_eq!(Targets::default().rule(target).unwrap().matches(name, rank), expected, "{target} {name}");
        }
    }

    #[test]
    fn standard_keeps_embeddings_heads_norms_and_routers() {
        let standard = Targets::default().ignore("@standard").unwrap();
        let kept = |name: &str| standard.iter().any(|target| target.matches(name, 2) != Match::No);
        for name in [
            "model.embed_tokens.weight",
            "embeddings.word_embeddings.weight",
            "transformer.wte.weight",
            "lm_head.weight",
            "model.norm.weight",
            "l.0.input_layernorm.weight",
            "encoder.layer.0.output.LayerNorm.weight",
            "h.0.ln_1.weight",
            "model.layers.0.mlp.gate.weight",
            "l.0.block_sparse_moe.router.weight",
            "l.0.norm1.weight",
            "l.0.q_norm.weight",
        ] {
            assert!(kept(name), "{name}");
        }
        for name in [
            "l.0.mlp.gate_proj.weight",
            "l.0.self_attn.q_proj.weight",
            "encoder.layer.0.output.dense.weight",
            "normalizer.fc.weight",
        ] {
            assert!(!kept(name), "{name}");
        }
    }

    #[test]
    fn patterns_that_cannot_be_used_are_errors() {
        for target in ["re:(", "re:(?=x)", "[", "@standard", "", "re:a{1000}{1000}"] {
            assert!(Targets::default().rule(target).is_err(), "{target}");
        }
        assert!(Targets::default().ignore("@all").is_err());
        let mut targets = Targets::default();
        assert!((0..2_000).try_for_each(|_| targets.rule("*x").map(drop)).is_err());
    }
}
