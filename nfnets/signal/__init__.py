"""How the signal propagates through a network: measure, draw, judge."""

from nfnets.signal.live import Alarm, SignalWarning
from nfnets.signal.moments import Moments, channel_moments, merge, similarity
from nfnets.signal.probe import Probe, probe
from nfnets.signal.profile import assert_signal, profile
from nfnets.signal.report import Point, SignalReport
from nfnets.signal.rules import RULES, Check, Finding, Rule, check

__all__ = [
    "RULES",
    "Alarm",
    "Check",
    "Finding",
    "Moments",
    "Point",
    "Probe",
    "Rule",
    "SignalReport",
    "SignalWarning",
    "assert_signal",
    "channel_moments",
    "check",
    "merge",
    "probe",
    "profile",
    "similarity",
]
