//! Which columns of a layer of GPTQ or AWQ are of which group.

use safetensors::Dtype;

use super::{
    Layer,
    configuration::{Kind, Said},
};
use crate::{
    error::Wrong,
    source::{Source, Tensor},
};

impl Layer {
    /// The group of each column, where that is said: GPTQ may have taken columns to groups in another order.
    pub(super) fn find_order(
        &self,
        shard: &Source,
        name: &str,
        said: &Said,
    ) -> Result<Option<(Tensor, Vec<usize>)>, Wrong> {
        let Some(order) = shard.tensor(&format!("{name}.g_idx")) else {
            return match said.ordered {
                true => Err("its columns are ordered (`desc_act`) and it has no `g_idx`".into()),
                false => Ok(None),
            };
        };
        if order.dtype != Dtype::I32.into() || order.shape != [self.columns] {
            let (dtype, shape) = (order.dtype, &order.shape);
            return Err(format!("its `g_idx` is {dtype} {shape:?}: expected I32 {:?}", [self.columns]).into());
        }
        let bytes = shard.read_whole(order)?;
        let mut groups = Vec::with_capacity(self.columns as usize);
        for (column, bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let group = i32::from_le_bytes(*bytes);
            match usize::try_from(group).ok().filter(|group| (*group as u64) < self.groups) {
                Some(group) => groups.push(group),
                None => {
                    let most = self.groups - 1;
                    let said = format!("its `g_idx` has {group} for column {column}: expected a group, 0 to {most}");
                    return Err(said.into());
                }
            }
        }
        Ok(Some((order.clone(), groups)))
    }

    /// How many columns a group has, by what the configuration says, else by the groups of the columns.
    pub(super) fn find_group(&self, order: Option<&[usize]>, said: &Said) -> Result<u64, String> {
        let (groups, columns) = (self.groups, self.columns);
        let (group, who) = match (said.group, order) {
            (Some(group), _) => (group.unwrap_or(columns).min(columns), "its config.json"),
            (None, Some(order)) => {
                let mut held = vec![0u64; groups as usize];
                order.iter().for_each(|group| held[*group] += 1);
                (held.into_iter().max().unwrap_or(columns), "its `g_idx`")
            }
            (None, None) if groups == 1 => (columns, ""),
            (None, None) => {
                return Err(format!(
                    "it has {groups} groups, and neither a `group_size` in its config.json nor a `g_idx` says of which columns"
                ));
            }
        };
        let of_awq = self.layout.kind == Kind::Awq && columns % group != 0;
        if columns.div_ceil(group) != groups || of_awq {
            return Err(format!(
                "it has {groups} groups in {columns} columns: expected groups of {group} columns, as {who} says"
            ));
        }
        Ok(group)
    }
}
