"""Each remedy is done to its planted fault, as the verdict's first line says it: what is left of the fault then.

python tests/planted_remedies.py    # the table of docs/signal.md
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

import torch
from planted_faults import FAULTS, Absent, Detached, Subject, Unscaled, size_of, trained
from planted_nets import NETS
from torch import nn

import nfnets
import nfnets.init
from nfnets.signal import Finding, SignalReport

Cure = Callable[[Subject, Finding], None]


def layer_at(s: Subject, name: str) -> nn.Module:
    """The weight layer that a point names, or the last one before it."""
    weighted = [
        (n, m) for n, m in s.model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)
    ]
    names = [n for n, _ in s.model.named_modules()]
    at = names.index(name.partition("#")[0])
    before = [m for n, m in weighted if names.index(n) <= at or n.startswith(f"{name.partition('#')[0]}.")]
    return before[-1]


def normalized_inputs(s: Subject, _: Finding) -> None:
    s.inputs = (s.inputs - s.inputs.mean()) / s.inputs.std()


def other_samples(s: Subject, _: Finding) -> None:
    s.inputs = torch.randn_like(s.inputs)


def drawn_anew(s: Subject, f: Finding) -> None:
    for layer in s.layers() if f.rule == "identical-units" else [layer_at(s, f.name)]:
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def rescaled(s: Subject, f: Finding) -> None:
    factor = f.value if f.rule == "odd-layer" else math.sqrt(f.value)
    size_of(layer_at(s, f.name)).div_(factor)


def biases_raised(s: Subject, f: Finding) -> None:
    bias = getattr(layer_at(s, f.name), "bias", None)
    if bias is not None:
        bias.zero_()


def by_lsuv(s: Subject, _: Finding) -> None:
    nfnets.init.lsuv_(s.model, s.inputs)


def attached(s: Subject, _: Finding) -> None:
    for name, module in list(s.model.named_modules()):
        if isinstance(module, Detached):
            s.put(name, module.inner)


def logits_divided(s: Subject, _: Finding) -> None:
    for module in s.model.modules():
        if isinstance(module, Unscaled):
            module.root = math.sqrt(module.proj.in_features / module.heads)


def without_softmax(s: Subject, _: Finding) -> None:
    s.model = s.model[0]  # type: ignore[index]


def rate_raised(s: Subject, _: Finding) -> None:
    s.training = {"clipping": 1e-2} if "clipping" in s.training else {"lr": 1.0}


def rate_lowered(s: Subject, _: Finding) -> None:
    s.training["lr"] = s.training.get("lr", 1.0) / 30


def loss_mended(s: Subject, _: Finding) -> None:
    s.training = {"steps": 9}


def less_decay(s: Subject, _: Finding) -> None:
    s.training["decay"] = 1e-4


CURES: dict[str, tuple[str, Cure]] = {
    "input": ("normalize what goes in", normalized_inputs),
    "cosine": ("other samples", other_samples),
    "finite": ("draw the first layer's weights anew", drawn_anew),
    "odd-layer": ("this layer's weights (or gain) by the factor", rescaled),
    "jump": ("this layer's weights by the factor's root", rescaled),
    "branch": ("the branch's last layer by the factor's root", rescaled),
    "identical-units": ("random weights", drawn_anew),
    "dead-units": ("raise the biases (to 0)", biases_raised),
    "fading": ("`nfnets.init.lsuv_`", by_lsuv),
    "vanishing": ("`nfnets.init.lsuv_`", by_lsuv),
    "growth": ("`nfnets.init.lsuv_`", by_lsuv),
    "no-gradient": ("take `detach()` out", attached),
    "attention": ("divide the logits by the root of a head's width", logits_divided),
    "softmax-output": ("leave it to the loss", without_softmax),
    "slow-updates": ("raise the rate, or the clipping", rate_raised),
    "fast-updates": ("lower the rate", rate_lowered),
    "finite-gradient": ("mend the loss", loss_mended),
    "weight-decay": ("lower the weight decay", less_decay),
}


def measured(s: Subject) -> SignalReport:
    return trained(s, **s.training) if s.training else nfnets.profile(s.model, s.inputs, backward=True)


def tried(fault: str, name: str) -> tuple[str, bool, bool] | None:
    """The rule that the verdict starts with, whether its remedy ended it, and whether nothing is left."""
    s = Subject(name)
    with torch.no_grad():
        FAULTS[fault](s)
    start = {n: p.clone() for n, p in s.model.state_dict().items()}
    verdict = measured(s).check()
    if verdict:
        return None
    cause = verdict.causes[0]
    if cause.rule not in CURES:
        return cause.rule, False, False
    s.model.load_state_dict(start)  # a training starts anew
    with torch.no_grad():
        CURES[cause.rule][1](s, cause)
    after = measured(s).check()
    return cause.rule, cause.rule not in after.broken, bool(after)


def main(names: Iterable[str]) -> None:
    seen: dict[str, list[tuple[bool, bool]]] = {}
    faults: dict[str, set[str]] = {}
    for fault in FAULTS:
        for name in names:
            try:
                found = tried(fault, name)
            except Absent:
                continue
            if found is not None:
                seen.setdefault(found[0], []).append(found[1:])
                faults.setdefault(found[0], set()).add(fault)
    print(
        "| rule | what was done | planted faults | reports | rule passes | all pass |\n|---|---|---|---|---|---|"
    )
    for rule, results in seen.items():
        what = CURES[rule][0] if rule in CURES else "–"
        ended, healthy = (sum(r[i] for r in results) for i in (0, 1))
        print(
            f"| `{rule}` | {what} | {'; '.join(sorted(faults[rule]))} | {len(results)} | {ended} | {healthy} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or NETS)
