"""One HTML file about a run, made from its checkpoints and its journal. It needs no network.

`collect` reads the run, `charts` says what is drawn, `tables` writes the same as HTML tables, `page` puts them
together with plotly.js, `page.js` and `page.css`.
"""

from ckptmgr.cli.report.collect import survey
from ckptmgr.cli.report.page import html

__all__ = ["html", "survey"]
