"""The address in pyproject.toml reached every place that needs it."""

import re


def test_chapters_open_in_colab(chapters, urls):
    # A wrong `html_theme_options` drops all launch buttons without a warning.
    repository = urls["Repository"].removeprefix("https://github.com/")
    for name, page in chapters.items():
        notebook = f"/github/{repository}/blob/main/" + name.replace(".html", ".ipynb")
        buttons = page.select('a[title="Launch on Colab"]')
        assert [name for button in buttons if button["href"].endswith(notebook)], name


def test_no_markdown_page_opens_in_colab(pages, chapters):
    # Colab cannot open one, even where it runs code.
    assert [name for name in set(pages) - set(chapters) if pages[name].select('a[title="Launch on Colab"]')] == []


def test_every_page_leads_to_the_repository(pages, urls):
    for name, page in pages.items():
        assert page.find("a", href=urls["Repository"]), name


def test_canonical_links(pages, urls):
    for name, page in pages.items():
        assert page.find("link", rel="canonical")["href"] == urls["Homepage"] + name
        assert page.find("meta", property="og:url")["content"] == urls["Homepage"] + name


def test_sitemap(site, pages, urls):
    sitemap = (site / "sitemap.xml").read_text(encoding="utf-8")
    assert set(re.findall("<loc>(.+?)</loc>", sitemap)) == {urls["Homepage"] + name for name in pages}


def test_the_404_page_finds_its_styles(every_page, urls):
    prefix = "/" + urls["Homepage"].split("/", 3)[3]
    styles = [link["href"] for link in every_page["404.html"].find_all("link", rel="stylesheet")]
    assert styles
    assert all(href.startswith(prefix) for href in styles)
