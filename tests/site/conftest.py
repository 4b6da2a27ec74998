"""The built book, parsed once."""

import json
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"


def pytest_runtest_setup():
    if not (SITE / "searchindex.js").is_file():
        pytest.skip("the book is not built: run `make book` first")


@pytest.fixture(scope="session")
def site() -> Path:
    return SITE


@pytest.fixture(scope="session")
def urls() -> dict[str, str]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return pyproject["project"]["urls"]


@pytest.fixture(scope="session")
def search_index() -> dict:
    text = (SITE / "searchindex.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])


@pytest.fixture(scope="session")
def parse():
    bs4 = pytest.importorskip("bs4")
    return lambda name: bs4.BeautifulSoup((SITE / name).read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="session")
def pages(parse, search_index):
    """The pages with content by their path, parsed; leftovers of earlier builds are not."""
    names = sorted(f"{name}.html" for name in search_index["docnames"])
    return {name: parse(name) for name in names}


@pytest.fixture(scope="session")
def every_page(parse, pages):
    """These, and the pages that Sphinx adds."""
    return pages | {name: parse(name) for name in ("404.html", "search.html")}


@pytest.fixture(scope="session")
def chapters(pages):
    """The pages made from notebooks."""
    return {name: page for name, page in pages.items() if name.startswith("notebooks/")}
