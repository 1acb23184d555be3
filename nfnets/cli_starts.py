"""The options of `nfnets init`."""

from __future__ import annotations

from typing import Annotated

import typer

from nfnets.cli_options import NAME_VALUE

# Written out, as METHODS.
STARTS = (
    "he, glorot, lecun, truncated_normal, orthogonal, delta_orthogonal, lsuv, autoinit, tat, dks, selu, weight_norm, "
    "zero, zero_gamma, fixup, skipinit"
)
Start = Annotated[str, typer.Option("--method", metavar="START", help=f"How to initialize: {STARTS}.")]
CompareStarts = Annotated[
    bool, typer.Option("--compare", help="Start copies in several ways and measure them side by side.")
]
StartsToo = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="STARTS",
        help="With --compare: which, by commas; [bold]as is[/] leaves the weights. Default: eleven of them.",
        show_default=False,
    ),
]
StartOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar=NAME_VALUE,
        help="An option of the initializer, such as eta=0.8 of tat. Repeatable.",
        show_default=False,
    ),
]
