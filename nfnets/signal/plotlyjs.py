"""plotly.js for pages that open offline: packed into the page, or in one file that the pages of a folder share.

`plotly-basic.min.js.gz` is `plotly-basic.min.js` of the npm package `plotly.js-basic-dist-min`, 4.1.1, packed by
`gzip -9n`: the lines, points and bars of plotly.js, a fourth of the whole. Its license (MIT) stands in its head.
"""

from __future__ import annotations

import base64
import functools
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
    """A script that holds plotly.js and unpacks it: half a megabyte."""
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
    content = Path(__file__).with_name("plotly-basic.min.js.gz").read_bytes()
    return _UNPACK % base64.b64encode(content).decode()
