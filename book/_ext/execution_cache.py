"""Throws the execution cache away when the library changed.

Jupyter Book runs a notebook again when the notebook's code changed, and only then: after an edit
in `tinylora_lite` a page would go on showing what the old library printed. So the cache carries a
digest of all that a notebook reads but does not contain, and goes when the digest does not fit.
"""

import hashlib
import shutil
from pathlib import Path

from sphinx.util.logging import getLogger

ROOT = Path(__file__).parents[2]
READ = ("requirements.txt", "tinylora_lite/**/*", "notebooks/**/*", "book/*", "book/[!_]*/**/*")
NOT_READ = {".bib", ".css", ".ico", ".ipynb", ".md", ".pyc", ".svg"}


def is_read(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    return path.is_file() and path.suffix not in NOT_READ and not hidden


def digest() -> str:
    result = hashlib.sha256()
    for path in sorted({path for pattern in READ for path in ROOT.glob(pattern)}):
        if is_read(path):
            result.update(path.relative_to(ROOT).as_posix().encode())
            result.update(hashlib.sha256(path.read_bytes()).digest())
    return result.hexdigest()


def drop_if_stale(app, config):
    cache = Path(config.nb_execution_cache_path)
    stamp = cache / "inputs.sha256"
    now = digest()
    if cache.is_dir() and (not stamp.is_file() or stamp.read_text() != now):
        getLogger(__name__).info("The library or its data changed: every notebook runs again.")
        shutil.rmtree(cache)
    cache.mkdir(parents=True, exist_ok=True)
    stamp.write_text(now)


def read_again(app, env, added, changed, removed):
    # Sphinx would keep the page of a source that did not change, and never ask the emptied cache.
    cache = Path(app.config.nb_execution_cache_path)
    emptied = [path.name for path in cache.iterdir()] == ["inputs.sha256"]
    return env.found_docs if emptied else []


def setup(app):
    app.connect("config-inited", drop_if_stale, priority=100)
    app.connect("env-get-outdated", read_again)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
