"""Which models the zoo has: every one of timm's and torchvision's that holds a BatchNorm-like layer.

    python -m benchmarks.zoo.catalog            # writes models.json anew; a quarter of an hour on one core
    python -m benchmarks.zoo.catalog --others [LIBRARY …]   # writes others.json, the nets of other libraries

Models are built and run on `meta`, so no weight is drawn. An input size is accepted when the model's forward runs in
training mode and most norm layers see 4 positions or more; 64 pixels a side come first, the model's own size last.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.zoo import others
from benchmarks.zoo.build import BATCH, DETECTION, Entry, create
from benchmarks.zoo.others.net import Called, Net
from nfnets import files
from nfnets.trace import is_batch_norm_like

PATH = Path(__file__).with_name("models.json")
OTHERS = Path(__file__).with_name("others.json")
_PARTIAL = Path(__file__).parents[2] / "runs" / "zoo" / "models.partial"
_SIDES = (64, 96, 128, 160, 192, 224, 256, 299)
_ENOUGH = (
    0.6  # of the norm calls must see 4 positions or more: squeeze-excite normalizes 1×1 maps at any size
)
_MODULES = {
    "classification": torchvision.models,
    "segmentation": torchvision.models.segmentation,
    "video": torchvision.models.video,
    DETECTION: torchvision.models.detection,
    "flow": torchvision.models.optical_flow,
}
_CLIPS = ((3, 8, 64, 64), (3, 16, 64, 64), (3, 16, 128, 128), (3, 16, 224, 224))


def load(path: Path = PATH) -> list[Entry]:
    """The models as they were enumerated last."""
    return [Entry.from_json(value) for value in json.loads(path.read_text())]


def broadly(entries: list[Entry], bound: int = 200_000_000) -> list[Entry]:
    """The smallest model of each family first, then the second of each …; those above `bound` parameters last.

        Example:
            >>> from benchmarks.zoo import others
    from benchmarks.zoo.build import Entry
            >>> make = lambda name, family, size: Entry(name, "timm", family, "classification", size, 1, (3, 64, 64))
            >>> models = [make("a2", "a", 9), make("a1", "a", 3), make("b1", "b", 300), make("b0", "b", 5)]
            >>> [entry.name for entry in broadly(models, bound=100)]
            ['a1', 'b0', 'a2', 'b1']
    """
    families: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (e.parameters, e.key)):
        families.setdefault((entry.source, entry.family), []).append(entry)
    rank = {e.key: n for family in families.values() for n, e in enumerate(family)}
    return sorted(entries, key=lambda e: (e.parameters > bound, rank[e.key], e.parameters))


def in_blocks(entries: list[Entry], size: int = 20) -> list[Entry]:
    """Each library's smallest models together, then its next: imports are dear. The smallest blocks come first.

    Example:
        >>> from benchmarks.zoo.build import Entry
        >>> make = lambda name, source, size: Entry(name, source, "f", "classification", size, 1, (3, 64, 64))
        >>> models = [make("a2", "a", 90), make("a1", "a", 3), make("a0", "a", 2), make("b1", "b", 30)]
        >>> [entry.name for entry in in_blocks(models, size=2)]
        ['a0', 'a1', 'b1', 'a2']
    """
    sources: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (e.parameters, e.key)):
        sources.setdefault(entry.source, []).append(entry)
    blocks = [group[n : n + size] for group in sources.values() for n in range(0, len(group), size)]
    blocks.sort(key=lambda block: sum(entry.parameters for entry in block) / len(block))
    return [entry for block in blocks for entry in block]


def enumerate_timm(names: list[str]) -> Iterator[Entry]:
    """An entry for each of timm's architectures that has a norm layer."""
    for name in names:
        model = _on_meta("timm", name, {})
        if model is None or not _norms(model):
            continue
        family = type(model).__module__.rpartition(".")[2]
        chosen = _smallest("timm", name, _timm_candidates(model))
        yield _entry("timm", name, family, "classification", model, *chosen)


def enumerate_torchvision(names: list[str]) -> Iterator[Entry]:
    """An entry for each of torchvision's models that has a norm layer; two for detectors with one that freezes."""
    kinds = {
        name: kind for kind, module in _MODULES.items() for name in torchvision.models.list_models(module)
    }
    for name in names:
        kind = kinds.get(name)
        if kind is None:  # quantized models
            continue
        given = _torchvision_arguments(name, kind)
        model = _on_meta("torchvision", name, given)
        if model is None or not _norms(model):
            continue
        family = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if kind == DETECTION:
            side = 320 if name.startswith("ssd") else 128
            entry = _entry("torchvision", name, family, kind, model, (3, side, side), given)
            yield entry
            if "resnet50" in name and not name.endswith("v2"):
                yield Entry(**{**entry.to_json(), "shape": entry.shape, "frozen": True})
            continue
        shapes = _CLIPS if kind == "video" else [(3, side, side) for side in _SIDES]
        shapes = [(3, 128, 128)] if kind == "flow" else shapes
        chosen = _smallest("torchvision", name, [(shape, given) for shape in shapes])
        yield _entry("torchvision", name, family, kind, model, *chosen)


def _torchvision_arguments(name: str, kind: str) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": False}  # SciPy's truncated normal takes a minute
    if kind == "segmentation":
        return {"weights_backbone": None} | ({} if name.startswith("lraspp") else {"aux_loss": True})
    if kind == DETECTION:
        sized = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 128}
        return {"weights_backbone": None} | sized
    return {}


Candidate = tuple[tuple[int, ...], dict[str, Any]]


def _timm_candidates(model: nn.Module) -> Iterator[Candidate]:
    config = getattr(model, "default_cfg", {})
    channels, *own = config.get("input_size", (3, 224, 224))
    least = max(config.get("min_input_size", (0, 0, 0))[1:])
    for side in _SIDES:
        if side <= max(own):
            if side >= least:  # of the model as it is; one that is told its size can do with less
                yield (channels, side, side), {}
            yield (channels, side, side), {"img_size": side}
    yield (channels, *own), {}


def _smallest(source: str, name: str, candidates: Any) -> Candidate:
    best: tuple[float, Candidate] | None = None
    for shape, kwargs in candidates:
        share = _share_with_space(source, name, shape, kwargs)
        if share is None:
            continue
        if share >= _ENOUGH:
            return shape, kwargs
        if best is None or share > best[0]:
            best = share, (shape, kwargs)
    if best is None:
        print(f"{source}/{name}: runs at no size that was tried", file=sys.stderr)
        return (3, 224, 224), {}
    return best[1]


def _share_with_space(source: str, name: str, shape: tuple[int, ...], kwargs: dict[str, Any]) -> float | None:
    """The share of norm calls that see 4 positions or more of a sample; None where the forward fails."""
    model = _on_meta(source, name, kwargs)
    if model is None:
        return None
    spaces: list[int] = []
    for module in model.modules():
        if is_batch_norm_like(module):
            module.register_forward_hook(lambda m, args, out: spaces.append(math.prod(out.shape[2:])))
    number = 2 if name.startswith("raft") else 1
    try:
        with torch.no_grad():
            model(*(torch.empty(BATCH, *shape, device="meta") for _ in range(number)))
    except Exception:  # too small, or not the size that it was made for
        return None
    return sum(space >= 4 for space in spaces) / max(1, len(spaces))


def _on_meta(source: str, name: str, kwargs: dict[str, Any]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return create(source, name, kwargs)
    except (NotImplementedError, RuntimeError):  # something of it needs values
        return _on_cpu_then_meta(source, name, kwargs)
    except TypeError:  # takes no such argument
        return None


def _on_cpu_then_meta(source: str, name: str, kwargs: dict[str, Any]) -> nn.Module | None:
    try:
        return create(source, name, kwargs).to("meta")
    except Exception as error:
        print(f"{source}/{name} {kwargs}: {type(error).__name__}: {error}"[:160], file=sys.stderr)
        return None


def _norms(model: nn.Module) -> int:
    return sum(is_batch_norm_like(module) for module in model.modules())


def _entry(
    source: str, name: str, family: str, kind: str, model: nn.Module, shape: tuple[int, ...], kwargs: Any
) -> Entry:
    count = sum(p.numel() for p in model.parameters())
    return Entry(name, source, family, kind, count, _norms(model), tuple(shape), kwargs)


def enumerate_others(source: str, names: list[str]) -> Iterator[Entry]:
    """An entry for each net of a library that has a norm layer, at the first of its sizes that it runs on."""
    for name in names:
        net = others.nets(source)[name]
        try:
            with torch.device("meta"):
                model = create(source, name, {})
        except Exception:  # something of it needs values
            model = _on_cpu_then_meta(source, name, {})
        if model is None or not _norms(model):
            print(f"{source}/{name}: no norm layer", file=sys.stderr)
            continue
        inner = model.net if isinstance(model, Called) else model
        family = net.family or type(inner).__module__.rpartition(".")[2]
        shape = _first(net, model, "meta") or _first(net, create(source, name, {}), "cpu")
        if shape is None:
            print(f"{source}/{name}: runs at no size that was tried", file=sys.stderr)
            continue
        yield _entry(source, name, family, net.kind, model, shape, {})


def _first(net: Net, model: nn.Module, device: str) -> tuple[int, ...] | None:
    for shape in net.shapes:
        inputs = net.inputs(shape, BATCH, torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                model(*tree_map_only(Tensor, lambda t: t.to(device), inputs))
        except Exception as error:  # too small, or not the size that it was made for
            if device == "cpu":
                print(f"{net.name} {shape}: {error!r}"[:200], file=sys.stderr)
            continue
        return shape
    return None


def main(arguments: list[str]) -> None:
    """Enumerate anew and write `models.json`; a run that was stopped goes on where it was."""
    warnings.simplefilter("ignore")
    if arguments[:1] == ["--others"]:
        for source in arguments[1:] or others.LIBRARIES:
            _write_library(source)
        return
    _PARTIAL.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[dict[str, Any]]] = {}
    for text in _PARTIAL.read_text().splitlines() if _PARTIAL.exists() else ():
        done |= json.loads(text)
    listed = [("timm", enumerate_timm, name) for name in timm.list_models()]
    listed += [("torchvision", enumerate_torchvision, name) for name in torchvision.models.list_models()]
    with _PARTIAL.open("a") as file:
        for source, each, name in track(listed, "models"):
            if f"{source}/{name}" not in done:
                found = {f"{source}/{name}": [entry.to_json() for entry in each([name])]}
                file.write(json.dumps(found) + "\n")
                file.flush()
                done |= found
    values = [value for source, _, name in listed for value in done[f"{source}/{name}"]]
    files.write(PATH, "[\n" + ",\n".join(map(json.dumps, values)) + "\n]\n")
    _PARTIAL.unlink()
    print(f"{len(values)} models in {len({(v['source'], v['family']) for v in values})} families")


def _write_library(source: str) -> None:
    """Enumerate a library anew, net by net; the rows of others stay."""
    try:
        names = list(others.nets(source))
    except ImportError as error:
        print(f"{source}: {error}", file=sys.stderr)
        return
    found: list[Entry] = []
    for name in names:
        found += enumerate_others(source, [name])
        kept = load(OTHERS) if OTHERS.exists() else []
        entries = [entry for entry in kept if entry.source != source] + found
        entries.sort(key=lambda e: (e.source, e.family, e.parameters, e.name))
        lines = ",\n".join(json.dumps(entry.to_json()) for entry in entries)
        files.write(OTHERS, f"[\n{lines}\n]\n")
    print(f"{source}: {len(found)} models in {len({entry.family for entry in found})} families", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
