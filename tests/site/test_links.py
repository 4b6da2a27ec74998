"""Links that stay inside the book lead somewhere; nothing is loaded from outside it."""

import re
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
LOADED_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "modulepreload",
    "manifest",
}


def is_outside(url: str) -> bool:
    return urlsplit(url).netloc != ""


def loads(page):
    for tag, attribute in LOADED.items():
        yield from (element[attribute] for element in page.find_all(tag, attrs={attribute: True}))
    for link in page.find_all("link", href=True):
        if LOADED_LINKS & set(link.get("rel", [])):
            yield link["href"]
    for element in page.find_all(["img", "source"], srcset=True):
        yield from (part.split()[0] for part in element["srcset"].split(","))


def test_pages_load_nothing_from_other_hosts(every_page):
    assert [(name, url) for name, page in every_page.items() for url in loads(page) if is_outside(url)] == []


def test_styles_load_nothing_from_other_hosts(site):
    pattern = re.compile(r"(?:@import\s+|url\(\s*)[\"']?(?:https?:)?//", re.IGNORECASE)
    found = [path.name for path in site.rglob("*.css") if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_loaded_files_exist(site, pages):
    missing = [
        (name, url)
        for name, page in pages.items()
        for url in loads(page)
        if not is_outside(url)
        and not url.startswith("data:")
        and not (site / normpath(join(dirname(name), unquote(urlsplit(url).path)))).is_file()
    ]
    assert missing == []


def test_links_and_anchors_resolve(site, every_page, pages):
    anchors = {name: {element["id"] for element in page.find_all(id=True)} for name, page in every_page.items()}
    dead = []
    for name, page in pages.items():
        for link in page.find_all("a", href=True):
            url = urlsplit(link["href"])
            if url.scheme or url.netloc or link["href"] == "#":
                continue
            target = normpath(join(dirname(name), unquote(url.path))) if url.path else name
            known = anchors.get(target, {unquote(url.fragment)})
            if not (site / target).is_file() or (url.fragment and unquote(url.fragment) not in known):
                dead.append((name, link["href"]))
    assert dead == []


def test_formulas_find_their_mathjax(site, pages):
    with_formulas = [page for page in pages.values() if page.select(".math")]
    for page in with_formulas:
        assert any("mathjax/" in script["src"] for script in page.find_all("script", src=True))
    assert not with_formulas or list((site / "_static" / "mathjax").rglob("*.woff"))
