"""The command that lists encoders, and says which of them fits an MLLM."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pivot_hub.cli.app import JsonPath, app, log, out, write
from pivot_hub.errors import RecipeError


@app.command("list")
def list_command(
    filter: Annotated[
        str,
        typer.Argument(help="A short name, for all that is known of it; a part of names; or a pattern as in *-sft."),
    ] = "",
    mllm: Annotated[
        str | None, typer.Option("--for", help="Folder or Hub name of an MLLM: say which encoders fit it.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """List the encoders of this package: shape, cost, memory, licence, and what was measured.

    Short names stand for Hub repositories of the organisation `pivot`; PIVOT_HUB_ORG names another one.

    Example: `pivot list siglip2-so400m`; encoders for an MLLM: `pivot list --for google/gemma-3-4b-it`
    """
    from pivot_hub.registry.encoders import describe_encoder, list_encoders

    entries = list_encoders(filter)
    if not entries:
        names = ", ".join(entry.name for entry in list_encoders())
        raise RecipeError(f"no encoder's name or base contains {filter!r}; there are: {names}.")
    if mllm is not None:
        from pivot_hub.registry.fit import fit_encoders

        fit = fit_encoders(mllm, filter)
        table = Table("encoder", "status", "fits", "differences", box=None, pad_edge=False)
        for each in fit.encoders:
            table.add_row(each.encoder, each.status, each.verdict, "; ".join(each.differences) or "none")
        log(f"{mllm}: {fit.tower}")
        out.print(table)
        if any(each.verdict != "no" for each in fit.encoders):
            log("drop-in: the weights load into the MLLM's vision tower, and the projector keeps its shape; it was")
            log("trained with other features: measure, or train it again. new projector: train a stage `align` for it.")
        if all(each.verdict == "no" for each in fit.encoders):
            log(
                f"no: take the MLLM's own tower out with `pivot extract {mllm} encoder`, or train it: recipes `*-vl-*`."
            )
        write(json_path, asdict(fit))
        return
    exact = [entry for entry in entries if entry.name == filter]
    if exact:
        log(describe_encoder(exact[0]))
        write(json_path, [exact[0].to_dict()])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("encoder", "status", "base"):
        table.add_column(heading, overflow="fold")
    for heading in ("px", "patch", "dim", "layers", "params", "GMACs", "bf16 MB", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("licence", overflow="ellipsis", no_wrap=True, max_width=12)
    for entry in entries:
        speed = next((f"{s.images_per_s:g}" for s in entry.speeds if s.form == "pivot"), "-")
        table.add_row(
            entry.name,
            entry.status,
            entry.base or "-",
            *(str(number) for number in (entry.image_px, entry.patch_px, entry.dim, entry.layers)),
            f"{entry.parameters / 1e6:,.1f} M",
            f"{entry.gmacs:,.4g}",
            f"{entry.weights_mb(2):,.0f}",
            speed,
            entry.licence,
        )
    out.print(table)
    log(
        "planned: not trained yet, so there are no weights. images/s: measured in float32; `pivot list NAME` has device"
    )
    log("and conditions, the memory of a forward pass, and all results.")
    write(json_path, [entry.to_dict() for entry in entries])
