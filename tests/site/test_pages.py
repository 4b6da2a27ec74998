"""What a reader of any page may count on."""

import re

SHORTEST_ALT = 20


def test_there_is_a_book(site, pages):
    assert "book/intro.html" in pages
    assert "book/intro.html" in (site / "index.html").read_text(encoding="utf-8")


def test_titles(pages):
    titles = {name: page.title.get_text(strip=True) for name, page in pages.items()}
    assert all(titles.values())
    assert len(set(titles.values())) == len(titles)
    assert [name for name, page in pages.items() if len(page.select("article h1")) != 1] == []


def test_language(pages):
    assert [name for name, page in pages.items() if page.html.get("lang") != "en"] == []


def test_every_image_says_what_it_shows(pages):
    def says_nothing(alt: str) -> bool:
        return len(alt) < SHORTEST_ALT or "_images/" in alt or " " not in alt.strip()

    mute = [
        f"{name}: {image.get('src')}: {image.get('alt')!r}"
        for name, page in pages.items()
        for image in page.select("article img")
        if says_nothing(image.get("alt") or "")
    ]
    mute += [
        f"{name}: {drawing.get('aria-label')!r}"
        for name, page in pages.items()
        for drawing in page.select("article figure svg")
        if drawing.get("role") != "img" or says_nothing(drawing.get("aria-label") or "")
    ]
    assert mute == []


def test_every_figure_has_a_caption(pages):
    bare = [
        f"{name}: {figure.get('id')}"
        for name, page in pages.items()
        for figure in page.select("article figure")
        if figure.find("figcaption") is None
    ]
    assert bare == []


def test_no_markup_is_left_raw(pages):
    raw = re.compile(r"\{(?:cite|numref|eq|ref|doc|glue)[:\w]*\}`|^:::")
    left = [
        f"{name}: {text.strip()[:80]}"
        for name, page in pages.items()
        for text in page.select_one("article").find_all(string=raw)
        if text.find_parent(["pre", "code"]) is None
    ]
    assert left == []


def test_search_knows_the_words(search_index):
    assert "tinylora" in search_index["terms"] | search_index["titleterms"]


def test_the_cell_that_trains_a_real_model_was_run(pages):
    said = pages["notebooks/17_a_real_model.html"].select_one("article").get_text()
    assert "rewards: [" in said
