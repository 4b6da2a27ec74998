"""Runs the benchmarks and writes their record; see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks import full_size, overhead, population, setup, sizes
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import environment

RECORD = Path(__file__).parents[1] / "book" / "results" / "benchmarks.json"
PARTS = {
    "svd": setup.svd,
    "block": setup.block,
    "shards": setup.shards,
    "overhead": overhead.whole,
    "overhead of blocks": overhead.blocks,
    "sizes": sizes.sizes,
    "population": population.population,
    "full-size": full_size.full_size,
}
ON_A_GPU = {"full-size"}


def main() -> None:
    """Runs the parts asked for and puts them into the record, beside those that are there."""
    os.environ["TINYLORA_CACHE"] = "off"  # here and in the processes of the parts: a hit is no measurement
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; without any, all that need no GPU"
    )
    parser.add_argument("--out", type=Path, default=RECORD, help="the record (default: the committed one)")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    for name in arguments.parts or [part for part in PARTS if part not in ON_A_GPU]:
        print(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        result = PARTS[name]()
        print(json.dumps(result, indent=1), flush=True)
        record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        record[name] = result | {"environment": environment() | {"threads": torch.get_num_threads()}}
        atomic_write(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
