//! What a model's `quantization_config` says of layers of GPTQ or AWQ.

use serde_json::{Map, Value};

/// How codes and zero points are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) kind: Kind,
    pub(super) bits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// What is added to stored zero points.
    Gptq(u32),
    Awq,
}

/// What a configuration says of such layers.
pub(super) struct Said {
    pub(super) layout: Layout,
    /// Columns of a group; none for all of them, if it says so.
    pub(super) group: Option<Option<u64>>,
    /// Whether zero points are all the middle of the codes, if it says so.
    pub(super) symmetric: Option<bool>,
    /// Whether columns may be of groups in another order.
    pub(super) ordered: bool,
}

impl Said {
    /// None if it is of another layout.
    pub(super) fn of(said: &Map<String, Value>) -> Result<Option<Said>, String> {
        let there = |key: &str| said.get(key).filter(|value| !value.is_null());
        let wrong = |key: &str, value: &Value, expected: &str| {
            format!("its config.json has `{key}` {value}: expected {expected}")
        };
        let text = |keys: &[&str]| match keys.iter().find_map(|key| Some((*key, there(key)?))) {
            None => Ok(None),
            Some((key, value)) => match value.as_str() {
                Some(text) => Ok(Some(text.to_ascii_lowercase())),
                None => Err(wrong(key, value, "a text")),
            },
        };
        let flag = |key: &str| match there(key) {
            None => Ok(None),
            Some(value) => value.as_bool().map(Some).ok_or_else(|| wrong(key, value, "true or false")),
        };
        let number = |keys: &[&str]| match keys.iter().find_map(|key| Some((*key, there(key)?))) {
            None => Ok(None),
            Some((key, value)) => value.as_i64().map(Some).ok_or_else(|| wrong(key, value, "a whole number")),
        };
        let kind = match text(&["quant_method"])?.as_deref() {
            Some("gptq") => match text(&["checkpoint_format", "format"])?.as_deref() {
                None | Some("gptq") => Kind::Gptq(1),
                Some("gptq_v2") => Kind::Gptq(0),
                Some(other) => {
                    return Err(format!("its GPTQ layers are in the format `{other}`: expected `gptq` or `gptq_v2`"));
                }
            },
            Some("awq") => match text(&["version"])?.as_deref() {
                None | Some("gemm") => Kind::Awq,
                Some(other) => return Err(format!("its AWQ layers are of version `{other}`: expected `gemm`")),
            },
            _ => return Ok(None),
        };
        if let Some(value) = there("dynamic").filter(|value| value.as_object().is_none_or(|object| !object.is_empty()))
        {
            return Err(wrong("dynamic", value, "none: layers of their own bits are not read"));
        }
        let bits = number(&["bits", "w_bit"])?.ok_or("its config.json has no `bits` of its layers")?;
        let is_known = match kind {
            Kind::Gptq(_) => [2, 3, 4, 8].contains(&bits),
            Kind::Awq => bits == 4,
        };
        if !is_known {
            return Err(format!("its layers have {bits} bits: expected 2, 3, 4 or 8 of GPTQ, 4 of AWQ"));
        }
        let group =
            number(&["group_size", "q_group_size"])?.map(|size| u64::try_from(size).ok().filter(|size| *size > 0));
        let symmetric = match flag("sym")? {
            Some(is) => Some(is),
            None => flag("zero_point")?.map(|is| !is),
        };
        let ordered = flag("desc_act")?.unwrap_or(false);
        Ok(Some(Said { layout: Layout { kind, bits: bits as u8 }, group, symmetric, ordered }))
    }
}
