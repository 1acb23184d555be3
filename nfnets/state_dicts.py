"""State_dicts on disk: read from the forms that users save them in, compared with a model's own, written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from nfnets.errors import UserError, first_line
from nfnets.plain import is_file

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_REMEDY = "save model.state_dict() with torch.save or safetensors"


def load_state(model: nn.Module, path: Path) -> list[str]:
    """Load a state_dict from disk into a model, or say in one line why it does not fit.

    Args:
        model: Gets the weights. Its counters of batches stay where the file, as old ones do, has none. Tied tensors
            may be there once, as safetensors saves them.
        path: A .safetensors file, or what `torch.save` wrote: a state_dict, bare or as an entry "state_dict" or
            "model", with DistributedDataParallel's prefix or without.

    Returns:
        What was done to the file's state_dict so that it fits, a line each.

    Raises:
        UserError: no such file, not a state_dict, or other keys or shapes; the model is as it was.

    Example:
        >>> import tempfile
        >>> file, layer = Path(tempfile.mkdtemp()) / "w.pt", nn.Linear(2, 2)
        >>> torch.save({"model": nn.Sequential(layer).state_dict()}, file)
        >>> [line.removeprefix(f"{file}: ") for line in load_state(nn.Sequential(layer), file)]
        ["took its entry 'model'"]
    """
    state, done = read_state(path)
    own = model.state_dict()
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state) and not own.keys() & state.keys():
            consume_prefix_in_state_dict_if_present(state, prefix)
            done.append(f"took {prefix!r} off its names")
    for key in own.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = own[key]
        elif (twin := _tied(own, key, state)) is not None:
            state[key] = state[twin]
    if wrong := differences(own, state):
        raise UserError(f"{path}: weights of another model: {wrong}")
    model.load_state_dict(state)
    return [f"{path}: {line}" for line in done]


def write_state(path: Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a model's state as safetensors, the same bytes for the same state; for a path that `files` gave.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> file, layer = Path(tempfile.mkdtemp()) / "w.safetensors", nn.Linear(2, 2)
        >>> write_state(file, layer, {"b": "1", "a": "2"})
        >>> file.read_bytes()[8:40]
        b'{"__metadata__":{"a":"2","b":"1"'
    """
    try:
        save_model(model, str(path), dict(metadata))
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    # The library writes the metadata in an order that is random for each process. In place, and of the same length: its
    # JSON and ours escape alike.
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def differences(own: Mapping[str, Any], given: Mapping[str, Any], most: int = 4) -> str:
    """How a state_dict differs from the one that is wanted: names and shapes; "" if it does not.

    Example:
        >>> differences(nn.Linear(3, 2).state_dict(), {"weight": torch.zeros(2, 4), "gain": torch.zeros(2)})
        'missing bias; unknown gain; weight is 2x4, expected 2x3'
    """

    def listed(kind: str, names: list[str]) -> str:
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return f"{kind}{', '.join(names[:most])}{more}" if names else ""

    def shape(value: Any) -> str:
        sizes = getattr(value, "shape", None)
        return "no tensor" if sizes is None else "x".join(map(str, sizes)) or "one number"

    other = [
        f"{name} is {shape(given[name])}, expected {shape(own[name])}"
        for name in own
        if name in given and shape(given[name]) != shape(own[name])
    ]
    parts = [
        listed("missing ", [name for name in own if name not in given]),
        listed("unknown ", [name for name in given if name not in own]),
        listed("", other),
    ]
    return "; ".join(filter(None, parts))


def read_state(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A file's state_dict, and what it was taken out of, a line each. Executes no code.

    Raises:
        UserError: no such file, or no state_dict in it that can be loaded safely.
    """
    if not is_file(path):
        raise UserError(f"{path}: no such file; expected weights as .safetensors or a state_dict")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as weights ({first_line(error)})") from None
    done: list[str] = []
    while len(done) < 3 and (entry := _wrapper(found)):  # a dict can hold itself
        found = found[entry]
        done.append(f"took its entry {entry!r}")
    if not found or not is_state(found):
        raise UserError(f"{path}: not readable as weights ({_description(found)}); {_REMEDY}")
    return found, done


def _tied(own: Mapping[str, Any], key: str, given: Mapping[str, Any]) -> str | None:
    """A given name of a tensor that the model has under this one, too."""
    for name, tensor in own.items():
        if name in given and name != key and _place(tensor) == _place(own[key]):
            return name
    return None


def _place(tensor: Any) -> Any:
    """What two names of one tensor have in common; tensors without values have nothing."""
    if not isinstance(tensor, Tensor) or tensor.numel() == 0 or tensor.device.type == "meta":
        return object()
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an archive that is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # pickle's errors have no common ground below it, and torch's advise to trust the file
        raise UserError(
            f"{path}: not readable as weights: no state_dict that can be loaded safely, but a whole pickled model, "
            f"other objects or a damaged file; {_REMEDY}"
        ) from None


def _wrapper(found: Any) -> str | None:
    if not isinstance(found, dict) or (found and is_state(found)):
        return None
    return next((name for name in _WRAPPERS if isinstance(found.get(name), dict)), None)


def is_state(found: Any) -> bool:
    """Whether this is a state_dict: names to tensors, and what modules add to them."""
    return isinstance(found, Mapping) and all(
        isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
        for key, value in found.items()
    )


def _description(found: Any) -> str:
    """What a file holds in place of names and tensors."""
    if not isinstance(found, dict) or not found:
        return f"it holds {'an empty dict' if found == {} else f'a {type(found).__name__}'}, no state_dict"
    key, value = next((k, v) for k, v in found.items() if not (isinstance(k, str) and isinstance(v, Tensor)))
    if not isinstance(key, str):
        return f"its key {key!r} is no name"
    return f"its entry {key!r} is a {type(value).__name__}, no tensor"
