"""plotly.js for pages that open offline: packed into the page, or in one file that the pages of a folder share."""

from __future__ import annotations

import base64
import functools
import gzip
import html
import os
from pathlib import Path

from nfnets import files

NAME = "plotly.js"

# Scripts of a page wait for `nfnetsPlotly` where there is one; where plotly.js was loaded otherwise, they need not.
THEN = "(window.nfnetsPlotly || Promise.resolve()).then"

_UNPACK = """window.nfnetsPlotly = window.nfnetsPlotly || (async () => {
  const packed = Uint8Array.from(atob("%s"), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
})();
"""


def embedded() -> str:
    """A script that holds plotly.js and unpacks it: 2 MB in place of 4.8."""
    return f"<script>{packed()}</script>\n"


def linked(file: Path, page: Path) -> str:
    """A script that takes plotly.js from a file beside the page or above it, which is written if it is not there.

    Args:
        file: shared by the pages of a folder.
        page: the path of the page.

    Raises:
        UserError: the file cannot be written.
    """
    if not file.is_file():
        files.write(file, packed())
    path = Path(os.path.relpath(file, page.parent)).as_posix()
    return f'<script src="{html.escape(path)}"></script>\n'


@functools.cache
def packed() -> str:
    """plotly.js as a script that unpacks it."""
    from plotly.offline import get_plotlyjs

    # No time in it: the same report is the same file.
    content = gzip.compress(get_plotlyjs().encode(), compresslevel=9, mtime=0)
    return _UNPACK % base64.b64encode(content).decode()
