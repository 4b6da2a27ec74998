"""Serves all that a page loads from the book itself, so that it works without network.

MathJax comes from the package sphinx-mathjax-offline. Its own Sphinx extension copies all 24 MB
into every build; a page needs one script, its fonts, and the TeX extensions that the script may
ask for. Thebe, which Jupyter Book brings along unasked, would come from a CDN: its script goes.
"""

from importlib.util import find_spec
from pathlib import Path

from sphinx.util.fileutil import copy_asset

SCRIPT = "tex-chtml.js"
NEEDED = (SCRIPT, "input/tex/extensions", "output/chtml/fonts")


def point_to_mathjax(app, config):
    config.mathjax_path = f"mathjax/{SCRIPT}"


def copy_mathjax(app, error):
    if error is None and app.builder.format == "html":
        source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
        target = Path(app.outdir) / "_static" / "mathjax"
        for name in NEEDED:
            is_folder = (source / name).is_dir()
            copy_asset(str(source / name), str(target / name if is_folder else target))


def drop_thebe(app, pagename, templatename, context, doctree):
    for kind in ("script_files", "css_files"):
        context[kind] = [
            asset
            for asset in context.get(kind, [])
            if "thebe" not in str(getattr(asset, "filename", asset)).lower()
            and "THEBE" not in getattr(asset, "attributes", {}).get("body", "")
        ]


def setup(app):
    app.connect("config-inited", point_to_mathjax)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
