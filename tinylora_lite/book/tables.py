"""The tables of the chapters on the paper's claims, from the lab's records."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import numpy as np

from tinylora_lite.book.glue import Markdown, table
from tinylora_lite.lab.claim import Point
from tinylora_lite.lab.claims import aim, claims, controls, family, precision, seeds, size, teaching
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.claims import sft_parameters as sft
from tinylora_lite.lab.plan import rows_of
from tinylora_lite.lab.shapes import climb
from tinylora_lite.lab.statistics import difference, estimates, smallest_count
from tinylora_lite.lab.store import Record, Store
from tinylora_lite.lab.trial import Trial


def counts_for_shares(store: Store) -> Markdown:
    """The fewest parameters that recover most of the gain of all weights."""
    found = {share: smallest_count(share, rl.LADDER[:-1], rl.FULL, rl.BASE, store) for share in (0.9, 0.95, 0.975)}
    rows = ((f"{share:.1%}", f"{count:,}", f"{low:,} to {high:,}") for share, (count, low, high) in found.items())
    return table(("of the full gain", "numbers", "95 % interval"), "lrl", rows)


def swept(point: Point, store: Store) -> list[tuple[Trial, Record]]:
    """The runs on the validation split that a point's rate was chosen by, with their records, by rate and seed."""
    same = ((t, r) for t, r in store.items() if t.split == "validation" and t.shape() == point.trial.shape())
    return sorted(same, key=lambda pair: (pair[0].learning_rate, pair[0].seed))


def sweeps_of_the_stranger(store: Store) -> Markdown:
    """What each rate does to the loss over the last ten steps and to the accuracy, with the stranger's answers."""
    rows = []
    for point in (sft.LADDERS["stranger"][3], sft.LADDERS["stranger"][-1]):
        for trial, record in swept(point, store):
            if trial.seed == 0:
                loss, right = np.mean(record["loss"][-10:]), record["scores"]["sampled"]["accuracy"]
                rows.append((point.label, f"{trial.learning_rate:.2g}", f"{loss:.2f}", f"{right:.0%}"))
    return table(("trained", "rate", "loss, nats a token", "right, validation"), "lrrr", rows)


def best_of_draws(store: Store) -> Markdown:
    """What one draw of P and the best of eight reach, and the standard deviations by P and by all else."""
    rows = []
    for count, points in seeds.POINTS.items():
        best = (f"{seeds.best_of(points, store, draws):.1%}" for draws in (1, 8))
        deviations = (f"{100 * share:.1f}" for share in seeds.shares(seeds.table(points, store)))
        rows.append((count, *best, *deviations))
    return table(("numbers", "one draw", "the best of 8", "P", "all else"), "rrrrr", rows)


def equal_bytes(store: Store) -> Markdown:
    """How far fp32 is ahead of the 16-bit formats that hold as many bytes."""
    rows = []
    for few, many in precision.EQUAL_BYTES:
        for narrow in ("bf16", "fp16"):
            pair = precision.POINTS["fp32"][few], precision.POINTS[narrow][many]
            gaps = (difference(*pair, score).as_points() for score in (store, store.scored("greedy")))
            sizes = few * precision.BYTES["fp32"], many * precision.BYTES[narrow]
            rows.append((few, sizes[0], f"{many} in {narrow}", sizes[1], *gaps))
    return table(("fp32", "bytes", "16 bits", "bytes", "fp32 ahead by, sampled", "greedy"), "rrlrll", rows)


def controls_elsewhere(store: Store) -> Markdown:
    """Right answers, the format and a coin as the reward on other bases."""
    rows = ((base, *_percents(points, store)) for base, points in controls.ELSEWHERE.items())
    return table(("base", "untouched", "right answers", "format", "coin"), "lllll", rows)


def new_skills(store: Store) -> Markdown:
    """What rewards and demonstrations teach of new skills, and what is left of the old task."""
    rows = []
    for way in teaching.WAYS:
        for name in teaching.SHAPES:
            points = [teaching.POINTS[skill][way][name] for skill in teaching.SKILLS]
            found = [e for point in points for e in (point.estimate(store), teaching.kept(point, store))]
            rows.append((name, way, *(e.as_percent() if e else "not yet run" for e in found)))
    columns = [column for title in teaching.SKILLS.values() for column in (title, "old task then")]
    return table(("trained", "by", *columns), "ll" + "l" * len(columns), rows)


def thirteen_numbers(store: Store) -> Markdown:
    """Thirteen parameters on drawn and on calibrated directions, and the bits of all of it."""
    both, own = (store, store.scored("greedy")), aim.own_bits(rl.THIRTEEN)
    best = (f"{seeds.best_of(seeds.POINTS[13], score, seeds.DRAWS):.0%}" for score in both)
    named = {f"calibrated, r = {point.trial.rank}": point for point in aim.CALIBRATED}
    named |= {"*49 numbers, LoRA-XS, r = 1*": rl.LORA_XS[0], "*all weights*": rl.FULL}
    rows = [
        ("on random directions", *_percents([rl.THIRTEEN], *both), own),
        (f"on the best of {seeds.DRAWS} draws", *best, f"{own + log2(seeds.DRAWS):.0f}"),
        *((name, *_percents([p], *both), f"{aim.bits(p, store, True):,}") for name, p in named.items()),
    ]
    return table(("thirteen numbers", "sampled", "greedy", "all bits but a seed"), "lllr", rows)


def fewer_problems(store: Store) -> Markdown:
    """Directions from fewer problems."""
    rows = []
    for point in (*aim.FEWER, aim.CALIBRATED[-1]):
        found = estimates([point], store)[0]
        problems = point.trial.calibration.removeprefix("problems=") or 384
        rows.append((problems, found.as_percent(), ", ".join(f"{value:.0%}" for value in found.values)))
    return table(("problems", "accuracy", "seeds"), "rll", rows)


def aimed_elsewhere(store: Store) -> Markdown:
    """Calibrated directions on other bases."""
    bits = [aim.own_bits(rl.THIRTEEN)]
    bits += (aim.bits(point, store, True) for point in (aim.CALIBRATED[0], aim.CALIBRATED[3], rl.LORA_XS[0]))
    rows = [("*all bits*", "", *(f"{count:,}" for count in bits), f"{aim.BITS} for each weight")]
    for base, narrow in aim.ELSEWHERE.items():
        untouched, random, *others = (aim.LADDERS[base][name] for name in aim.BESIDE)
        found = _percents([untouched, random, narrow, *others], store)
        rows.append(((size.SIZES | family.FAMILIES)[base], *found))
    shapes = "13 random", "13 calibrated, r = 1", "13 calibrated, r = 8", "49 LoRA-XS", "all weights"
    return table(("base", "untouched", *shapes), "lllllll", rows)


def sizes(store: Store) -> Markdown:
    """Bases of three sizes, and the fewest parameters for most of the gain of all weights."""
    shapes = "13 random", "13 calibrated", "49 LoRA-XS", "all weights"
    rows = []
    for base, ladder in size.LADDERS.items():
        found = _percents([ladder[name] for name in ("base", *shapes)], store)
        count, low, high = smallest_count(0.95, *climb(ladder), store)
        rows.append((size.SIZES[base], *found, f"{count:,} [{low:,}, {high:,}]"))
    return table(("base", "untouched", *shapes, "numbers for 95 %"), "lllllll", rows)


def verdicts(store: Store) -> Markdown:
    """Every claim: the paper's words, what was found here, and the verdict by both kinds of answers."""
    found = list(claims().values())
    entries = []
    for row, greedy in zip(rows_of(found, store), rows_of(found, store.scored("greedy")), strict=True):
        finding = "" if greedy["finding"] == "not in the paper" else f": {greedy['finding']}"
        entries += [
            f"**{row['title']}**",
            f"*The paper* ({row['where']}): {row['paper']}",
            f"*Here*: {row['ours'] or 'Its runs are not complete.'}",
            f"*Verdict*: **{row['finding']}**. `tinylora lab run {row['name']}`",
            f":::{{dropdown}} By greedy answers{finding}\n{greedy['ours']}\n:::",
            "---",
        ]
    return Markdown("\n\n".join(entries))


def _percents(points: Sequence[Point], *stores: Store) -> list[str]:
    """The estimate of each point by each store."""
    return [estimate.as_percent() for store in stores for estimate in estimates(points, store)]
