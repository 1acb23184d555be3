"""MkDocs hook: every notebook as a page, with the outputs that it was committed with."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """Add notebooks/NAME.md and its pictures."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above draws]({name})")
            elif "text/html" in data and "<table" in "".join(data["text/html"]):
                parts.append(re.sub(r"<style.*?</style>\s*", "", "".join(data["text/html"]), flags=re.S))
            else:
                parts.append(_fenced("".join(output.get("text", data.get("text/plain", ""))), "text"))
    where = f"`notebooks/{path.name}`"
    first, *rest = parts
    return "\n\n".join([first, f"This page is {where}, run from top to bottom.", *rest]) + "\n", pictures


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
