"""One interface to every initializer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from nfnets.errors import UserError
from nfnets.given import check_named
from nfnets.init.auto import autoinit_
from nfnets.init.drawn import TITLES, draw_
from nfnets.init.fixup import fixup_
from nfnets.init.identity import zero_
from nfnets.init.lsuv import lsuv_
from nfnets.init.measured import measured
from nfnets.init.registry import find, register
from nfnets.init.selu import selu_
from nfnets.init.shaped import dks_, tat_
from nfnets.init.skipinit import skipinit_
from nfnets.init.weight_norm import weight_norm_
from nfnets.init.zero_gamma import zero_gamma_
from nfnets.scale.one_pass import check, transaction
from nfnets.scale.report import Report
from nfnets.trace import tensors_in

_SAYS = {
    "he": "normal, std √(2/fan_in): for ReLU",
    "glorot": "normal, std √(2/(fan_in + fan_out)): for tanh",
    "lecun": "normal, std √(1/fan_in): for SELU and linear nets",
    "truncated_normal": "std √(1/fan_in), nothing beyond two standard deviations",
    "orthogonal": "√2 times a random orthonormal matrix",
    "delta_orthogonal": "√2 times an orthogonal matrix at the kernel's center, zeros elsewhere",
}
for _name in TITLES:
    register(_name, partial(draw_, weights=_name), _SAYS[_name], "nothing", ("weights",))  # type: ignore[arg-type]
register(
    "zero_gamma", zero_gamma_, "the last layer of every residual branch at zero, the rest left", "shapes"
)
register("lsuv", lsuv_, "orthonormal, then every output to unit variance, in one pass")
register(
    "autoinit", autoinit_, "every output to mean square 1 by theory, through any graph; no data", "shapes"
)
register(
    "tat", tat_, "activations and weights shaped by depth (ReLU, or smooth ones), without norm and skips"
)
register("dks", dks_, "activations and weights shaped by depth, of any kind, without norm and skips")
register("selu", selu_, "SELU, LeCun's weights and alpha dropout in the places of what is there", "shapes")
register(
    "weight_norm", weight_norm_, "weight normalization, every channel to mean 0 and variance 1, in one pass"
)
register("zero", zero_, "identities and Hadamard matrices, branch ends zero; nothing random", "shapes")
register("fixup", fixup_, "residual nets: branches scaled by depth, their last layers zero", "shapes")
register("skipinit", skipinit_, "residual nets: every branch times a scalar that starts at 0", "shapes")


def initialize(
    model: nn.Module,
    *inputs: Any,
    method: str = "he",
    kwargs: dict[str, Any] | None = None,
    measure: bool = True,
    **options: Any,
) -> Report:
    """Initialize a model by a method's name, all or nothing, and say what was set, what was left and why.

    Args:
        model: changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them. He, Glorot, LeCun, truncated normal and the orthogonal
            ones need none.
        method: a name of `list_initializers()`.
        kwargs: keyword arguments of the forward.
        measure: run one forward pass afterwards, in which the report's `std`, `channel_var`, `channel_mean_sq`, `rms`
            and `cosine` are measured: what a layer really puts out, beside what the method promised.
        **options: of the method: those of its function (`draw_`, `lsuv_`, …), `generator` and `layers` among them.

    Returns:
        A `Report`; `print` it for a table.

    Raises:
        UserError: an unknown method or option, or what the method refuses; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 3))
        >>> print(initialize(model, method="orthogonal"))
        orthogonal, gain 1.41421
        layer  action  reason
        0      set     1.414 · orthonormal columns
        2      set     1.414 · orthonormal rows
    """
    check_named(kwargs)
    named = kwargs or {}
    chosen = find(method)
    chosen.check(options, named)
    if tensors_in(inputs, named):
        check(model, inputs, named)
    elif chosen.reads != "nothing":
        what = "their shapes" if chosen.reads == "shapes" else "what layers put out on them"
        raise UserError(f"method {method!r} without inputs: it reads {what}; pass what model(*inputs) takes")
    with transaction():
        report = chosen.function(model, *inputs, **options, **named)
        if measure and tensors_in(inputs, named):
            report = measured(report, model, inputs, named)
    return report
