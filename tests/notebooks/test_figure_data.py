"""The script that compares what pages show: it captures figures, glued values and tables, and sees what changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("myst_nb")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).with_name("figure_data.py")
PAGE = """---
file_format: mystnb
kernelspec: {name: python3, display_name: Python 3}
---

# A page

```{code-cell} ipython3
---
mystnb:
  figure: {name: fig-one, caption: One.}
---
from myst_nb import glue
from IPython.display import Markdown
from tinylora_lite.view import plot

fig, ax = plot.figure()
ax.plot([0, 1], [0, 0.5], label="half")
ax.errorbar([1], [0.5], [[0.1], [0.2]])
plot.show(fig, alt="A line.")
```

```{code-cell} ipython3
:tags: [remove-input]

glue("third", 1 / 3, display=False)
glue("word", "two", display=False)
Markdown("| a |\\n|---|\\n| 1 |")
```
"""


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What a page showed, and what it showed with one value of its curve changed."""
    top = tmp_path_factory.mktemp("pages")
    for name, text in (("old", PAGE), ("new", PAGE.replace("[0, 0.5]", "[0, 0.6]"))):
        (top / name / "book").mkdir(parents=True)
        (top / name / "book" / "page.md").write_text(text, encoding="utf-8")
        (top / name / "tinylora_lite").symlink_to(SCRIPT.parents[2] / "tinylora_lite")
        done = call("run", top / name, "--tree", top / name)
        assert done.returncode == 0, done.stderr
    return top / "old", top / "new"


def test_a_page_is_captured(folders):
    found = json.loads((folders[0] / "page.json").read_text(encoding="utf-8"))
    (axes,) = found["figures"]["fig-one"]
    assert axes["lines"][0] == ["half", [[0.0, 0.0], [1.0, 0.5]]]
    assert axes["collections"][0]["paths"] == [[[1.0, 0.4], [1.0, 0.7]]]
    assert found["glue"] == {"third": 0.333333, "word": "'two'"}
    assert [text.strip() for text in found["tables"]] == ["figure: A line.", "| a |\n|---|\n| 1 |"]


def test_equal_pages_have_no_differences(folders):
    done = call("compare", folders[0], folders[0])
    assert (done.returncode, done.stdout) == (0, "page: 0 differences\n")


def test_a_changed_curve_is_found(folders):
    done = call("compare", *folders)
    assert done.returncode == 1
    assert "page/figures/fig-one/0/lines/0/1/1/1: '0.5' -> '0.6'" in done.stdout


def test_a_page_that_was_not_run_is_a_difference(folders, tmp_path):
    done = call("compare", folders[0], tmp_path)
    assert done.returncode == 1
    assert "does not exist" in done.stdout
