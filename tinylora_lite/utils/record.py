"""What makes work repeatable and what of it is kept: seeds, records, checkpoints."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylora_lite.utils.files import atomic_write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMED_PROJECTIONS = ("random", "shared", "identity")
"""The projections that have a name; a calibrated basis has a fingerprint."""
RENAMED = {
    "silent_groups": "frac_reward_zero_std",
    "gap": "logprob_diff_mean",
    "largest_gap": "logprob_diff_max",
    "capped": "tis_clip_frac",
}
"""The names that metrics had before, and TRL's."""


def seed_of(*parts: str | int) -> int:
    """A seed for each purpose: ``seed_of("rollout", seed, step)``, from 0 to 2⁶³ - 1, the same on every machine.

    A hash instead of arithmetic, because sums coincide: ``seed * 1000 + step`` gives run 0 at step 1000 and run 1 at
    step 0 the same stream.

    >>> seed_of("rollout", 0, 1) == seed_of("rollout", 0, 1), seed_of("rollout", 0, 1) == seed_of("rollout", 1, 0)
    (True, False)
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_same(folder: str | Path, what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where a folder holds ``what`` with other settings, and names the first that differs."""
    for key in {**saved, **now}:
        if key not in now:
            cure = "give another folder, or go on with the version that made it"
            raise ValueError(f"{folder} holds {what} with {key} = {saved[key]!r}, and this one has none; {cure}")
        if saved.get(key) != now[key]:
            cure = "give another folder, or delete that one"
            raise ValueError(f"{folder} holds {what} with {key} = {saved.get(key)!r}, not {now[key]!r}; {cure}")


def environment() -> dict[str, str]:
    """Versions of what computed a result, and on what: tinylora_lite, torch, transformers, python, machine."""
    import torch  # here, so that reading records starts without it

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "tinylora_lite": _version("tinylora_lite"),
        "torch": str(torch.__version__),  # a class of its own, which files would keep
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {device}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # of a checkout that is not installed
        return "not installed"


@dataclass
class Run:
    """One training run: everything that is needed to trust it, draw it and repeat it.

    Attributes:
        method: ``"grpo"``, ``"sft"`` or ``"es"``.
        settings: the settings of training.
        adapter: what trains: the adapter's settings and a hash of its modules, or ``{"kind": "all weights"}``; a
            sentence in the first records of version 0.1.0.
        parameters: how many parameters train.
        task: the task's name.
        base: SHA-256 of the base before training (:mod:`tinylora_lite.adapter.weights`).
        base_gguf: SHA-256 of the GGUF file that the base was read from; empty for other bases.
        steps: one row for each step: reward, length, entropy, gradient norm and more, and seconds since the start.
        evaluations: one row for each evaluation: the step it follows, accuracy, low, high, n, samples.
        seconds: of training and evaluating, interruptions left out.
        environment: versions and machine.
    """

    method: str
    settings: dict[str, Any]
    adapter: dict[str, Any] | str
    parameters: int
    task: str
    base: str = ""
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=environment)
    base_gguf: str = ""

    @property
    def seed(self) -> int:
        """The seed of training."""
        return int(self.settings["seed"])

    def curve(self, key: str = "reward") -> list[float]:
        """One column of ``steps``. Raises ``KeyError`` for a column that they lack."""
        return [row[key] for row in self.steps]

    def save(self, path: str | Path) -> Path:
        """Writes the record as JSON; the file appears whole or not at all."""
        return atomic_write(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Reads what :meth:`save` wrote. Raises ``ValueError`` where it is damaged, or the record of something else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (AttributeError, TypeError, ValueError) as error:  # of json, of the encoding, of the fields
            raise ValueError(f"{path} is no record of a run, or is damaged: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """A record from its fields, of which those with a default may be missing."""
        rows = [{RENAMED.get(key, key): value for key, value in row.items()} for row in values.get("steps", [])]
        return cls(**values | {"steps": rows})


def base_gguf(model: object) -> str:
    """SHA-256 of the GGUF file that a model was read from, in hexadecimal; "" for a model from elsewhere."""
    return str(getattr(model, "gguf_sha256", ""))


def describe(of: Mapping[str, Any], parameters: int) -> str:
    """An identity in words; runs that were saved by version 0.1.0 know their adapter by this sentence."""
    if of["kind"] != "tinylora":
        return str(of["kind"])
    P = of["projection"]
    projection = P if P in NAMED_PROJECTIONS else f"calibrated {P[:12]}"
    later = {
        name: of[name]
        for name, usual in (("arithmetic", "model"), ("scale", 1.0), ("init_std", 0.0))
        if of[name] != usual
    }
    tying = f"n_tie={of['n_tie']}, tying={of['tying']}"
    return (
        f"{parameters} numbers on {of['modules']} modules ({of['modules_hash']}), rank={of['rank']}, u={of['u']}, "
        f"{tying if of['groups'] is None else 'groups=' + short_hash(of['groups'])}, seed={of['seed']}, "
        f"sigma={of['sigma']}, projection={projection}"
        + "".join(f", {name}={value}" for name, value in later.items())
        + (f", given factors {of['given_factors']}" if "given_factors" in of else "")
    )


def short_hash(value: Any) -> str:
    """The first 8 hexadecimal digits of the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def save_checkpoint(
    folder: str | Path, run: Run, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Writes ``run.json`` and ``checkpoint.pt`` into ``folder``; each file appears whole or not at all."""
    run.save(Path(folder) / "run.json")  # first, so that a finished checkpoint is never beside an older record
    import torch

    state = {"optimizer": optimizer.state_dict(), "parameters": [parameter.detach() for parameter in parameters]}
    state["run"] = json.dumps(asdict(run))
    atomic_write(Path(folder) / "checkpoint.pt", lambda file: torch.save(state, file))


def check_same_run(folder: str | Path, saved: Run, run: Run, defaults: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where ``folder`` holds a run of another method, task, adapter, base or other settings.

    ``save_every`` may differ, and under a constant learning rate ``steps`` may, down to what is done: they decide where
    training stops, not where it goes. ``defaults`` are of settings that a saved run may lack, because its version did
    not have them yet.
    """

    def known(values: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {key: default for key, default in defaults.items() if key in new} | values

    free = {"save_every": 0} | ({"steps": 0} if run.settings.get("schedule") == "constant" else {})
    before, now = ({name: getattr(r, name) for name in ("method", "task", "base")} for r in (saved, run))
    before |= known(saved.settings, run.settings) | free
    check_same(folder, "a run", before, now | run.settings | free)
    adapter = run.adapter if isinstance(run.adapter, dict) else {"kind": run.adapter}
    if isinstance(saved.adapter, str):  # the sentence that was there before it became a dictionary
        check_same(folder, "a run", {"adapter": saved.adapter}, {"adapter": describe(adapter, run.parameters)})
    else:
        check_same(folder, "a run of an adapter", known(saved.adapter, adapter), adapter)


def resume(
    folder: str | Path,
    run: Run,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    defaults: Mapping[str, Any],
) -> None:
    """Puts run, parameters and optimizer where the checkpoint in ``folder`` left them; without one, changes nothing.

    ``run`` is a new run with the settings asked for; it takes the rows of the saved one. ``defaults`` are those of
    :func:`check_same_run`.

    Raises:
        ValueError: the checkpoint is damaged, of another run, or of more steps.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return
    import torch

    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved, values, moments = Run.from_dict(json.loads(state["run"])), state["parameters"], state["optimizer"]
    except Exception as error:  # pickle, zip and tensor formats each raise their own
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it to start the run again") from error
    check_same_run(folder, saved, run, defaults)
    if [value.shape for value in values] != [parameter.shape for parameter in parameters]:
        raise ValueError(f"{folder} holds a run of a model of another shape; give another folder, or delete that one")
    if len(saved.steps) > run.settings["steps"]:
        raise ValueError(f"{folder} holds a run of {len(saved.steps)} steps, more than steps={run.settings['steps']}")
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(moments)
    run.steps, run.evaluations = saved.steps, saved.evaluations
    run.seconds, run.environment = saved.seconds, saved.environment
