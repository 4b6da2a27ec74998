"""The table of the book: the paper's number, ours with its interval, and the verdict, claim by claim."""

from __future__ import annotations

from collections.abc import Sequence

from tinylora_lite.lab.claim import Claim
from tinylora_lite.lab.plan import progress_of
from tinylora_lite.lab.store import Store

NOT_YET = "not yet run"


def rows_of(claims: Sequence[Claim], store: Store) -> list[dict[str, str]]:
    """A row for each claim: name, title, paper, where, ours, finding; ``NOT_YET`` where runs are missing."""
    rows = []
    for claim in claims:
        row = {"name": claim.name, "title": claim.title, "paper": claim.paper, "where": claim.where}
        if progress_of(claim, store)["missing"]:
            rows.append(row | {"ours": "", "finding": NOT_YET})
        else:
            verdict = claim.judge(store)
            rows.append(row | {"ours": verdict.ours, "finding": verdict.finding})
    return rows
