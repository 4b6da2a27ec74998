"""One run in one file: which model, which task, which numbers, how they train and who samples.

The same file drives our own loop and TRL's, one device and several; ``load_settings`` reads it, ``tinylora train``
runs it, ``tinylora plan-run`` says beforehand what it takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tinylora_lite.adapter.config import Sigma, TinyLoraConfig, lora_xs
from tinylora_lite.adapter.projection import Basis
from tinylora_lite.adapter.tying import Tying
from tinylora_lite.experiment import settings_yaml
from tinylora_lite.experiment.settings_comments import COMMENTS
from tinylora_lite.experiment.settings_fields import SettingsError, at_least, check_keys, dataclass_of
from tinylora_lite.training.settings import GRPOSettings, SFTSettings

Dtype = Literal["bfloat16", "float32", "float16"]
"""The names of torch's dtypes that a base may have."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How calibrated directions are found; see :func:`~tinylora_lite.calibrate`.

    Their rank and number are those of the adapter (``rank``, ``u``).
    """

    problems: int = 256
    group_size: int = 8
    looks: int = 2
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, "adapter.calibration.", problems=1, group_size=2, max_new_tokens=1, seed=0)
        if self.looks not in (1, 2):
            raise SettingsError("adapter.calibration.looks", f"looks must be 1 or 2, not {self.looks!r}")


@dataclass(frozen=True)
class AdapterSettings:
    """What trains: TinyLoRA, LoRA-XS, or every weight of the model (``kind="all"``, where nothing else counts).

    ``projection`` is ``"random"`` (the paper), ``"calibrated"`` (a basis is made first, by ``calibration``), or the
    path of a basis file. LoRA-XS takes only ``rank`` and ``sigma``.
    """

    kind: Literal["tinylora", "lora_xs", "all"] = "tinylora"
    rank: int = 2
    u: int = 1
    n_tie: int | Literal["all"] = 1
    tying: Tying = "tiled"
    sigma: Sigma = "left"
    seed: int = 0
    projection: str = "random"
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)

    def __post_init__(self) -> None:
        try:
            self._plain_config()
        except ValueError as error:
            name = str(error).split()[0]
            raise SettingsError(f"adapter.{name}" if hasattr(self, name) else "adapter", f"{error}") from error

    @property
    def calibrated(self) -> bool:
        """Whether the projections come from a basis, made or still to be made."""
        return self.kind == "tinylora" and self.projection != "random"

    def config(self, basis: Basis | None = None) -> TinyLoraConfig | None:
        """The adapter's configuration; ``None`` where every weight trains.

        Args:
            basis: of calibrated directions; needed where ``projection`` is not ``"random"``.

        Raises:
            ValueError: the basis is missing or does not fit.
        """
        if self.calibrated and basis is None:
            raise SettingsError("adapter.projection", f"projection={self.projection!r} needs its basis")
        plain = self._plain_config()
        return plain if plain is None or basis is None else dataclasses.replace(plain, projection=basis)

    def _plain_config(self) -> TinyLoraConfig | None:
        if self.kind == "all":
            return None
        if self.kind == "lora_xs":
            return lora_xs(self.rank, sigma=self.sigma)
        return TinyLoraConfig(self.rank, self.u, self.n_tie, self.tying, self.seed, self.sigma)


@dataclass(frozen=True)
class SamplerSettings:
    """Who answers the prompts: the model that trains, vLLM in this process, or a vLLM server.

    ``sync`` says how vLLM follows the adapter: ``"lora"`` swaps an exact LoRA of rank r at every step, ``"merged"``
    sends merged weights, as the paper did.
    """

    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    sync: Literal["lora", "merged"] = "lora"
    url: str | None = None
    tensor_parallel: int = 1
    gpu_memory: float = 0.45
    batch_size: int | None = None

    def __post_init__(self) -> None:
        at_least(self, "sampler.", tensor_parallel=1)
        if self.batch_size is not None:
            at_least(self, "sampler.", batch_size=1)
        if not 0 < self.gpu_memory <= 1:
            raise SettingsError(
                "sampler.gpu_memory", f"gpu_memory is a share of the card above 0 and up to 1, not {self.gpu_memory!r}"
            )
        if (self.engine == "vllm-server") != (self.url is not None):
            raise SettingsError("sampler.url", "url names the server of engine vllm-server; give both or neither")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured before and after training, and on the validation split every ``every`` steps (0: never)."""

    tasks: tuple[str, ...] = ()
    problems: int | None = None
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 2048
    every: int = 0

    def __post_init__(self) -> None:
        at_least(self, "evaluation.", samples=1, max_new_tokens=1, every=0)
        if self.problems is not None:
            at_least(self, "evaluation.", problems=1)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SettingsError("evaluation.temperature", f"temperature must be at least 0, not {self.temperature!r}")


@dataclass(frozen=True)
class RunSettings:
    """One run, whole. :func:`load_settings` reads one; ``settings_comments.COMMENTS`` explains every key.

    Attributes:
        training: the fields of :class:`~tinylora_lite.GRPOSettings` or
            :class:`~tinylora_lite.SFTSettings`; ``epochs`` may stand in place of ``steps``, and
            ``evaluation.every`` stands for ``evaluate_every``. Values that are not given take those classes' defaults.
        learning_rates: a sweep; empty runs ``training.learning_rate`` alone. See :meth:`sweep`.

    Raises:
        SettingsError: a setting is of the wrong type or out of its range, or two do not go together.
    """

    model: str
    task: str
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    quantize: Literal["nf4", "int8"] | None = None
    gradient_checkpointing: bool = False
    data: str | None = None
    prompt: str | None = None
    max_prompt_tokens: int = 1024
    method: Literal["grpo", "sft"] = "grpo"
    trainer: Literal["own", "trl"] = "own"
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    training: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    learning_rates: tuple[float, ...] = ()
    shard: bool = False
    folder: str = "runs"

    def __post_init__(self) -> None:
        at_least(self, "", max_prompt_tokens=1)
        for name in ("model", "task", "folder"):
            if not getattr(self, name):
                raise SettingsError(name, f"{name} must not be empty")
        if self.adapter.kind == "all" and self.quantize is not None:
            raise SettingsError("quantize", "a quantized base cannot train all of its weights; set quantize: null")
        if self.trainer == "trl" and (self.adapter.kind == "all" or self.method == "sft"):
            raise SettingsError("trainer", "trl trains an adapter by GRPO and nothing else here; set trainer: own")
        if self.trainer == "trl" and self.shard:
            raise SettingsError("shard", "trl shards as accelerate's own settings say (--use_fsdp); set shard: false")
        if self.adapter.kind == "all" and self.sampler.engine != "transformers":
            raise SettingsError(
                "sampler.engine",
                "vLLM follows an adapter, and not weights that all train; set sampler.engine: transformers",
            )
        if self.sampler.engine == "vllm-server" and self.sampler.sync == "merged":
            raise SettingsError("sampler.sync", "a server is sent LoRAs, not merged weights; set sampler.sync: lora")
        if self.trainer == "trl" and self.dtype == "float16":
            raise SettingsError("trainer", "under trl a float16 gradient would be rounded to nothing; set trainer: own")
        if self.shard and self.adapter.kind == "all":
            raise SettingsError("shard", "only a frozen base is spread over GPUs here; set shard: false")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise SettingsError("learning_rates", "a rate stands twice in learning_rates; name each once")
        for rate in self.learning_rates:
            if not (math.isfinite(rate) and rate > 0):
                raise SettingsError("learning_rates", f"learning_rates must be finite numbers above 0, not {rate!r}")
        self.training_settings(problems=1)

    def training_settings(self, problems: int) -> GRPOSettings | SFTSettings:
        """The settings of the training loop.

        Args:
            problems: of the training split; ``epochs`` times their number, in whole steps, is how long it trains.

        Raises:
            SettingsError: a value of ``training`` is unknown or out of its range.
        """
        kind: type[GRPOSettings] | type[SFTSettings] = GRPOSettings if self.method == "grpo" else SFTSettings
        allowed = [f.name for f in fields(kind)]
        check_keys(self.training, [*allowed, "epochs"], "training.")
        values = dict(self.training)
        if "evaluate_every" in values:
            raise SettingsError("training.evaluate_every", "evaluation.every says how often; leave evaluate_every out")
        if "evaluate_every" in allowed:
            values["evaluate_every"] = self.evaluation.every
        epochs = values.pop("epochs", None)
        try:
            settings = kind(**values)
            if epochs is None:
                return settings
            if "steps" in values:
                raise SettingsError("training.epochs", "epochs and steps both say how long to train; leave one out")
            if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
                raise SettingsError("training.epochs", f"epochs must be a finite number above 0, not {epochs!r}")
            steps = max(1, math.floor(epochs * problems / settings.prompts_per_step))
            return dataclasses.replace(settings, steps=steps)
        except SettingsError:
            raise
        except (TypeError, ValueError) as error:
            name = str(error).split()[0]
            raise SettingsError(f"training.{name}" if name in allowed else "training", str(error)) from error

    def sweep(self) -> list[RunSettings]:
        """One run for each of ``learning_rates``, in a folder of its own inside ``folder``; itself where there is none.

        >>> run = RunSettings("nano", "nano", learning_rates=(1e-4, 2e-4), folder="out")
        >>> [one.folder for one in run.sweep()]
        ['out/lr-0.0001', 'out/lr-0.0002']
        """
        if not self.learning_rates:
            return [self]
        return [
            dataclasses.replace(
                self,
                learning_rates=(),
                training=self.training | {"learning_rate": rate},
                folder=f"{self.folder}/lr-{rate:g}",
            )
            for rate in self.learning_rates
        ]

    def override(self, assignments: Sequence[str]) -> RunSettings:
        """The same run with settings of a command line, each ``key=value`` or ``key.sub=value``, value as in YAML.

        >>> RunSettings("nano", "nano").override(["adapter.rank=4", "training.learning_rate=1e-4"]).adapter.rank
        4

        Raises:
            SettingsError: a key is unknown or a value impossible.
            ValueError: an assignment has no equals sign.
        """
        values = self.to_dict()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"{assignment} assigns nothing; write key=value, as in training.learning_rate=1e-4")
            *outer, last = key.strip().split(".")
            place = values
            for name in outer:
                if not isinstance(place.get(name, {}), dict):
                    raise SettingsError(key, f"{name} holds no further settings, so there is no {key}")
                place = place.setdefault(name, {})
            place[last] = settings_yaml.read_value(text)
            if key == "training.steps":
                place.pop("epochs", None)
            if key == "training.epochs":
                place.pop("steps", None)
        return RunSettings.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML hold, in the order of a settings file; :meth:`from_dict` reads them."""
        values: dict[str, Any] = {name: _plain(getattr(self, name)) for name in ORDER}
        if not self.adapter.calibrated and self.adapter.calibration == CalibrationSettings():
            del values["adapter"]["calibration"]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> RunSettings:
        """Settings from plain values.

        Raises:
            SettingsError: a key is unknown (the nearest one is named), missing, or of another type.
        """
        made: RunSettings = dataclass_of(cls, values, "")
        return made

    def to_yaml(self, header: str = "") -> str:
        """The settings file: every key with a comment; ``header`` stands above as comments."""
        return settings_yaml.write(self.to_dict(), COMMENTS, header)

    def save(self, path: str | Path, header: str = "") -> Path:
        """Writes :meth:`to_yaml` to a file, which appears whole or not at all."""
        return settings_yaml.write_file(self.to_yaml(header), path)


ORDER = (
    *("model", "revision", "dtype", "quantize", "gradient_checkpointing", "task", "data", "prompt"),
    *("max_prompt_tokens", "method", "trainer", "adapter", "training", "learning_rates", "sampler", "evaluation"),
    *("shard", "folder"),
)
"""The keys of a settings file from top to bottom."""


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Reads a settings file.

    Args:
        path: of a YAML file.
        overrides: see :meth:`RunSettings.override`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, or a setting is wrong; the message names the file and the line.
        ImportError: PyYAML is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no settings file at {path}; tinylora preset NAME > {path.name} prints one to start from"
        )
    lines: dict[str, int] = {}
    try:
        values, lines = settings_yaml.read(path.read_text(encoding="utf-8"))
        settings = RunSettings.from_dict(values)
    except SettingsError as error:
        parts = error.key.split(".")
        known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in lines]
        where = f", line {lines[known[0]]}" if known else ""
        raise SettingsError(error.key, f"{path}{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings.override(overrides)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, dict) else value
