"""The report as one self-contained HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nfnets import files

TEMPLATE = Path(__file__).with_name("template.html")
_MARK = "/*REPORT*/null"


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page; it asks for nothing from anywhere."""
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":"))
    safe = text.replace("</", "<\\/").replace("<!--", "<\\!--")
    files.write(path, TEMPLATE.read_text().replace(_MARK, safe))
