"""The claims, one file each: ``CLAIM`` in it says what is run, how it is drawn, and what would be which verdict."""

from __future__ import annotations

import importlib
import pkgutil
import runpy
from functools import cache
from pathlib import Path

from tinylora_lite.lab.claim import Claim
from tinylora_lite.lab.store import RESULTS


@cache
def everything() -> dict[str, Claim]:
    """What the lab can run, by name: its claims, and the runs of the first chapters."""
    found = [importlib.import_module(f"{__name__}.{m.name}").CLAIM for m in pkgutil.iter_modules(__path__)]
    return {claim.name: claim for claim in sorted(found, key=lambda claim: claim.order)}


def claims() -> dict[str, Claim]:
    """The claims of the table by name, in its order."""
    return {name: claim for name, claim in everything().items() if claim.folder == RESULTS}


def claim_of(name: str) -> Claim:
    """A claim by its name, or from a file of one's own by its path.

    Raises:
        ValueError: there is none of that name, or the file holds no ``CLAIM``.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}")
        try:
            claim = runpy.run_path(name).get("CLAIM")
        except Exception as error:
            raise ValueError(f"{name} does not run: {type(error).__name__}: {error}") from error
        if not isinstance(claim, Claim):
            raise ValueError(f"{name} must define CLAIM, a tinylora_lite.lab.claim.Claim")
        return claim
    if name not in everything():
        raise ValueError(f"no claim named {name!r}; there are: {', '.join(everything())}")
    return everything()[name]
