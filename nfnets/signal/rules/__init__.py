"""Named rules that say whether a network's signal is healthy, where it stops being so, and what to do there."""

from nfnets.signal.rules.default import DEFAULT, RULES
from nfnets.signal.rules.gradients import sick_gradients
from nfnets.signal.rules.layers import DEAD
from nfnets.signal.rules.places import growth_limit, reference, trunk
from nfnets.signal.rules.rule import Finding, Rule
from nfnets.signal.rules.symptoms import COSINE, FP16_BITS, JUMP, MEAN_SHIFT, VANISHING
from nfnets.signal.rules.verdict import Check, check, headline, judge, needs_backward

__all__ = [
    "COSINE",
    "DEAD",
    "DEFAULT",
    "FP16_BITS",
    "JUMP",
    "MEAN_SHIFT",
    "RULES",
    "VANISHING",
    "Check",
    "Finding",
    "Rule",
    "check",
    "growth_limit",
    "headline",
    "judge",
    "needs_backward",
    "reference",
    "sick_gradients",
    "trunk",
]
