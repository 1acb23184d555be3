"""Every example in a docstring runs."""

import doctest
import importlib
import warnings

import pytest
import torch
from test_floors import MODULES

WITH_EXAMPLES = [name for name, file in MODULES.items() if ">>> " in file.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failures, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failures == 0
