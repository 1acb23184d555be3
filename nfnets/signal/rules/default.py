"""The rules that apply when none are named, causes before what follows from them."""

from __future__ import annotations

from nfnets.signal.rules import gradients, layers, symptoms, training
from nfnets.signal.rules.rule import Rule

DEFAULT: tuple[Rule, ...] = (*symptoms.RULES, *layers.RULES, *gradients.RULES, *training.RULES)
RULES = {rule.name: rule for rule in DEFAULT}
# How a column comes to be measured that need not be.
MEASURE = {
    "grad_var": "pass backward=True",
    "cosine": "pass two samples or more",
    "training_var": "pass training=True where dropout is no module",
    "update_ratio": "probe a training with updates=True",
    "identical": "no layer with several units",
    "residual_var": "no residual branches",
}
