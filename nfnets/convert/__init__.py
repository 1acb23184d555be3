"""Conversion of BatchNorm CNNs: plan, convert, methods."""

from nfnets.convert.apply import ConversionError, convert, plan
from nfnets.convert.bake import bake
from nfnets.convert.methods import Method, list_methods, register
from nfnets.convert.plan import Plan, Row

__all__ = ["ConversionError", "Method", "Plan", "Row", "bake", "convert", "list_methods", "plan", "register"]
