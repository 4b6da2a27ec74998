"""The book's address: read from `[project.urls]` in pyproject.toml, handed to all who ask for it.

Launch buttons, canonical links, social previews, the sitemap and the 404 page each have a setting
of their own for the same address. Written out in _config.yml they would drift apart; now a fork
changes two lines.
"""

import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]


def set_addresses(app, config):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    urls = pyproject["project"]["urls"]
    homepage = urls["Homepage"].rstrip("/") + "/"
    config.html_baseurl = homepage
    config.ogp_site_url = homepage
    config.notfound_urls_prefix = urlsplit(homepage).path
    config.html_theme_options["repository_url"] = urls["Repository"]
    # What the next deployment brings is not there yet.
    config.linkcheck_ignore += [f"{homepage}.*", f"{urls['Repository']}.*"]


def write_sitemap(app, error):
    # All pages, and not only those that this build wrote anew.
    if error is None and app.builder.format == "html":
        base = app.config.html_baseurl
        pages = [base + app.builder.get_target_uri(name) for name in sorted(app.env.found_docs)]
        entries = "".join(f"  <url><loc>{page}</loc></url>\n" for page in pages)
        (app.outdir / "sitemap.xml").write_text(
            '<?xml version="1.0" encoding="utf-8"?>\n'
            f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{entries}</urlset>\n',
            encoding="utf-8",
        )


def launch_notebooks_only(app, pagename, templatename, context, doctree):
    # Colab opens .ipynb files; on a Markdown page that runs code the theme's button would lead to an error.
    if not str(app.env.doc2path(pagename)).endswith(".ipynb"):
        buttons = context.get("header_buttons", [])
        context["header_buttons"] = [button for button in buttons if button.get("label") != "launch-buttons"]


def setup(app):
    app.connect("config-inited", set_addresses, priority=100)
    app.connect("html-page-context", launch_notebooks_only, priority=900)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
