//! `quarrel schemes`.

use crate::{
    args::{PlaceArgs, SchemesArgs},
    failure::Failure,
    place::server,
    table::{clean, print, table},
};
use quarrel_checkpoint::{listing, mixes};
use quarrel_client::proto::json;

pub(crate) async fn schemes(args: SchemesArgs) -> Result<(), Failure> {
    let place = PlaceArgs { server: args.server, ..PlaceArgs::default() };
    let found = match server(&place).await? {
        Some(client) => client.schemes().await?,
        None => listing(),
    };
    if args.json {
        return print(&json::schemes(&found));
    }
    let mut table = table(["scheme", "codes", "a scale for each", "checkpoint format", "profiles"]);
    for scheme in &found.schemes {
        let each = match (scheme.group_size, scheme.block.as_slice()) {
            (Some(size), _) => format!("group of {size}"),
            (None, [rows, columns]) => format!("block of {rows} x {columns}"),
            _ => scheme.granularity.clone(),
        };
        let symmetry = if scheme.symmetric { "" } else { ", asymmetric" };
        let format = scheme.checkpoint_format.clone().unwrap_or_default();
        let format = if scheme.needs_calibration { "none: needs calibration".to_owned() } else { format };
        table.add_row([
            clean(&scheme.name),
            format!("{}{symmetry}", scheme.element),
            each,
            format,
            scheme.profiles.join(", "),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    print(&table.to_string())?;
    print(
        "Grammar: intN[-asym][/tensor | /channel | /gG] with N of 2..8; fp8/tensor | /channel | /bRxC; a grouped preset of integers/gG, nf4/gG, fp4/gG.\n\
         Options: ;channel_dims=N of any; ;solver=mse, ;solver=hqq of integers; ;mx=floor, ;mx=rceil of MX; ;double_quant=true of nf4 and fp4.",
    )?;
    let mixes = Vec::from_iter(mixes()).join(" ");
    print(&format!(
        "Of a whole GGUF file: {mixes}. COPY quantizes nothing, and stores what is quantized in another layout."
    ))
}
