"""One place for the book's address; no trace of any one machine."""

import re
from urllib.parse import urlsplit

from book import setup_cell

# In pieces, so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}\-])/(?:ro{2}t|wor{1}k|tm{1}p|hom{1}e|User{1}s)/[\w.]")
REGISTRY = re.compile(r"\b(?:py{1}pi\.org|python{1}hosted\.org|npm{1}js\.(?:com|org)|deb\.{1}debian)")


def hits(texts, pattern):
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in texts.items()
        for match in re.finditer(pattern, text)
    ]


def test_the_address_is_set_in_pyproject_alone(texts, project):
    # The script that writes it into the notebooks and pages is the one exception (test_setup_cell.py).
    written = setup_cell.source()
    texts = {name: text if name == "pyproject.toml" else text.replace(written, "") for name, text in texts.items()}
    for url in project["urls"].values():
        parts = urlsplit(url)
        address = re.escape((parts.netloc + parts.path).rstrip("/"))
        found = hits(texts, address)
        assert [hit for hit in found if not hit.startswith("pyproject.toml:")] == []
        assert found


def test_no_path_of_a_machine(texts):
    assert hits(texts, MACHINE_PATH) == []


def test_no_host_of_a_package_registry(texts):
    assert hits(texts, REGISTRY) == []
