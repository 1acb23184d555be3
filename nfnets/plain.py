"""Plain data from text that anybody may have written: JSON and YAML, with bounds on what may stand in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nfnets.errors import UserError, first_line

DEEPEST, MOST = 50, 100_000


def value_of(text: str, **how: Any) -> Any:
    """A value from a command line: JSON where it is some, else the text itself.

    Args:
        text: as the user wrote it.
        **how: of `json.loads`.

    Raises:
        UserError: what `fault` finds wrong, as lists in one another more than 50 deep.

    Example:
        >>> value_of("0.5"), value_of('{"a": [1]}'), value_of("layer4*")
        (0.5, {'a': [1]}, 'layer4*')
    """
    try:
        found = json.loads(text, **how)
    except RecursionError:
        found, wrong = None, f"more than {DEEPEST} lists or mappings in one another"
    except ValueError:
        return text
    else:
        wrong = fault(found)
    if wrong is not None:
        raise UserError(f"{shown(text)}: {wrong}; expected a value that JSON can hold")
    return found


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        expected: what it should be, for the error.

    Raises:
        UserError: the file cannot be read, is no JSON object, or is out of bounds; in one line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> _ = path.write_text('{"status": "do')
        >>> read_json(path, "a run's result")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: ...result.json: cannot be read (Unterminated string ...); expected a run's result
    """
    return _read(path, expected, json.loads)


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """The YAML mapping in a file, with what JSON has in it: texts as keys, numbers, lists; dates stay texts.

    Args:
        path: of the file.
        expected: what it should be, for the error.

    Raises:
        UserError: the file cannot be read, is no mapping, or is out of bounds: nested too deep, or aliases that stand
            for more than 100,000 values.
    """
    return _read(path, expected, _yaml)


def is_file(path: Path) -> bool:
    """Whether there is such a file; no error for a name that no file can have.

    Example:
        >>> is_file(Path("x" * 5000))
        False
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def fault(value: Any) -> str | None:
    """What is wrong with plain data, None if nothing is: keys that are no text, NaN, too deep, too much of it.

    Example:
        >>> fault({"a": [1, None]}), fault({1: 2}), fault([float("nan")])
        (None, 'the key 1 is no text', 'nan is no finite number')
    """
    left = MOST
    pending = [(value, 0)]
    while pending:
        one, depth = pending.pop()
        left -= 1
        if left < 0:
            return f"more than {MOST:,} values"
        if depth > DEEPEST:
            return f"more than {DEEPEST} lists or mappings in one another"
        if isinstance(one, dict):
            for key in one:
                if not isinstance(key, str):
                    return f"the key {shown(key)} is no text"
            pending += [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list | tuple):
            pending += [(inner, depth + 1) for inner in one]
        elif isinstance(one, float) and (one != one or one in (float("inf"), -float("inf"))):
            return f"{one} is no finite number"
        elif isinstance(one, str) and "\0" in one:
            return f"{shown(one)} has a zero byte"
        elif one is not None and not isinstance(one, str | int | float):
            return f"{shown(one)} is a {type(one).__name__}"
    return None


def shown(value: Any, most: int = 80) -> str:
    """A value as code, cut in its middle where it is long.

    Example:
        >>> shown("bn"), shown("1" * 5000, most=20)
        ("'bn'", "'111111111…11111111'")
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"


def _read(path: Path, expected: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {expected}") from None
    except RecursionError:
        wrong: str | None = f"more than {DEEPEST} lists or mappings in one another"
    except OSError as error:
        wrong = error.strerror or str(error)
    except (ValueError, yaml.YAMLError) as error:
        # ValueError: no UTF-8, no JSON, a date that there is not, an integer of more digits than Python reads.
        wrong = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else first_line(error)
    else:
        if isinstance(found, dict):
            if (wrong := fault(found)) is None:
                return found
        else:
            wrong = f"it holds {shown(found)}"
    raise UserError(f"{path}: cannot be read ({wrong}); expected {expected}") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without dates: JSON has none, and YAML reads impossible ones as errors."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node)  # before aliases are followed: nine lines of them can stand for a billion values
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node) -> None:
    left = MOST
    pending: list[tuple[Any, int]] = [(node, 0)]
    while pending:
        one, depth = pending.pop()
        left -= 1
        if left < 0:
            raise ValueError(f"aliases that stand for more than {MOST:,} values")
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} lists or mappings in one another")
        if isinstance(one, yaml.MappingNode):
            pending += [(each, depth + 1) for pair in one.value for each in pair]
        elif isinstance(one, yaml.SequenceNode):
            pending += [(each, depth + 1) for each in one.value]
