"""How the signal propagates through a network: measure, draw, judge."""

from nfnets.signal.landscape import Landscape, landscape
from nfnets.signal.live import Alarm, SignalWarning
from nfnets.signal.moments import Moments, channel_moments, merge, similarity
from nfnets.signal.probe import Probe, probe
from nfnets.signal.profile import assert_signal, profile
from nfnets.signal.report import Point, SignalReport
from nfnets.signal.rules import RULES, Check, Finding, Rule, check
from nfnets.signal.saturated import Saturation, saturation

__all__ = [
    "RULES",
    "Alarm",
    "Check",
    "Finding",
    "Landscape",
    "Moments",
    "Point",
    "Probe",
    "Rule",
    "Saturation",
    "SignalReport",
    "SignalWarning",
    "assert_signal",
    "channel_moments",
    "check",
    "landscape",
    "merge",
    "probe",
    "profile",
    "saturation",
    "similarity",
]
