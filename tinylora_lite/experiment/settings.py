"""One run in one file: which model, which task, what trains, how it trains and who samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tinylora_lite.experiment import settings_file
from tinylora_lite.experiment.settings_file import Settings, SettingsError
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.utils.files import atomic_write

if TYPE_CHECKING:
    from tinylora_lite.adapter.basis import Basis
    from tinylora_lite.adapter.config import TinyLoraConfig

Name = Annotated[str, Field(min_length=1)]

TRAINING = {
    "epochs": "passes over the training problems, in place of steps",
    "steps": "updates from fresh samples",
    "prompts_per_step": "problems drawn for one step",
    "group_size": "G, completions of each problem",
    "max_new_tokens": "length limit of a completion",
    "temperature": "of the sampling",
    "learning_rate": "of Adam, after warmup",
    "warmup": "steps over which the learning rate rises",
    "schedule": "of the learning rate: constant or linear (to zero)",
    "weight_decay": "of AdamW; 0 is Adam",
    "max_grad_norm": "longer gradients are shortened to it",
    "epochs_per_step": "how often the samples of a step are trained on",
    "mini_batches": "updates of an epoch, each from its share of the prompts",
    "scale": "what advantages are divided by: group, batch or none",
    "normalise": "what a loss is divided by: token, sequence or constant",
    "clip_low": "how far the ratio may fall",
    "clip_high": "how far the ratio may rise",
    "tis_cap": "of truncated importance sampling; null leaves it out",
    "kl": "coefficient of the penalty for leaving the base; 0 needs no reference pass",
    "truncated": "a completion cut off at the limit: zero reward, mask or score",
    "micro_batch": "completions in one forward and backward pass",
    "evaluate_accuracy": "whether evaluations on the validation split sample answers too",
    "evaluate_problems": "problems of an evaluation on the validation split",
    "save_every": "steps between checkpoints",
    "seed": "of the order of problems and of the sampling",
}
"""The comments of :attr:`RunSettings.training`, whose keys are the fields of the training loop's own settings."""


class CalibrationSettings(Settings):
    """How calibrated directions, ``u`` of the adapter's ``rank``, are found; see :func:`~tinylora_lite.calibrate`."""

    problems: PositiveInt = Field(256, description="to take policy gradients on")
    group_size: int = Field(8, ge=2, description="completions of each")
    looks: Literal[1, 2] = Field(2, description="1: all gradients at v = 0; 2: half of them further on")
    max_new_tokens: PositiveInt = Field(1024, description="length limit of a completion")
    seed: NonNegativeInt = Field(0, description="of the choice of problems and of the sampling")


class AdapterSettings(Settings):
    """What trains. LoRA-XS takes only ``rank`` and ``sigma``; where all weights train, nothing else counts."""

    kind: Literal["tinylora", "lora_xs", "all"] = Field("tinylora", description="tinylora, lora_xs, or all (weights)")
    rank: PositiveInt = Field(2, description="r, frozen singular triplets per module")
    u: PositiveInt = Field(1, description="parameters in one trained vector")
    n_tie: PositiveInt | Literal["all"] = Field(1, description="modules that share one vector, or all")
    tying: Literal["tiled", "structured"] = Field(
        "tiled", description="tiled: neighbours share; structured: modules of one type share"
    )
    sigma: Literal["left", "split", "right"] = Field("left", description="of singular values: left, split or right")
    seed: int = Field(0, ge=0, lt=2**64, description="of the random projections P")
    projection: str = Field("random", description="random (the paper), shared, calibrated, or a basis file's path")
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="multiplies the update, as LoRA's alpha / r does")
    init_std: float = Field(0.0, ge=0, allow_inf_nan=False, description="v starts as N(0, init_std²)")
    calibration: CalibrationSettings = Field(CalibrationSettings(), description="how a calibrated basis is made")

    @property
    def calibrated(self) -> bool:
        """Whether the projections come from a basis, made or still to be made."""
        return self.kind == "tinylora" and self.projection not in ("random", "shared")

    def config(self, basis: Basis | None = None) -> TinyLoraConfig | None:
        """The adapter's configuration; ``None`` where every weight trains.

        Raises:
            ValueError: the ``basis`` of a calibrated projection is missing or does not fit.
        """
        from tinylora_lite.adapter.config import TinyLoraConfig, lora_xs  # imports torch

        if self.kind == "all":
            return None
        if self.kind == "lora_xs":
            return dataclasses.replace(lora_xs(self.rank, sigma=self.sigma), scale=self.scale, init_std=self.init_std)
        if self.calibrated and basis is None:
            raise SettingsError("adapter.projection", f"projection={self.projection!r} needs its basis")
        own = ("rank", "u", "n_tie", "tying", "seed", "sigma", "scale", "init_std")
        P: Any = basis or self.projection
        return TinyLoraConfig(**{name: getattr(self, name) for name in own}, projection=P)


class SamplerSettings(Settings):
    """Who answers the prompts. The paper sent merged weights; ``sync="lora"`` swaps an exact LoRA of rank r."""

    engine: Literal["transformers", "vllm", "vllm-server"] = Field(
        "transformers", description="transformers (the model that trains), vllm or vllm-server"
    )
    sync: Literal["lora", "merged"] = Field("lora", description="vLLM gets an exact LoRA each step, or merged weights")
    url: str | None = Field(None, description="of vllm-server")
    tensor_parallel: PositiveInt = Field(1, description="GPUs that share one vLLM")
    gpu_memory: float = Field(0.45, gt=0, le=1, description="vLLM's share of a GPU that it shares with training")
    batch_size: PositiveInt | None = Field(
        None, description="completions at once; null: a whole step, in evaluations 256 (vLLM: 1024)"
    )

    @property
    def evaluated(self) -> int:
        """Completions that an evaluation asks for at once, on each GPU."""
        return self.batch_size or (256 if self.engine == "transformers" else 1024)


class EvaluationSettings(Settings):
    """What is measured before and after training, and on the validation split every ``every`` steps (0: never)."""

    tasks: tuple[str, ...] = Field((), strict=False, description="test sets, by name")
    problems: PositiveInt | None = Field(None, description="of each test set; null takes all")
    samples: PositiveInt = Field(1, description="completions of each problem")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    max_new_tokens: PositiveInt = Field(2048, description="length limit of a completion")
    every: NonNegativeInt = Field(0, description="steps between evaluations on the validation split; 0: none")


class RunSettings(Settings):
    """One run, its fields in the order of a settings file. :func:`load_settings` reads one.

    ``training`` holds fields of :class:`~tinylora_lite.GRPOSettings` or :class:`~tinylora_lite.SFTSettings`, with their
    defaults; ``epochs`` may take the place of ``steps``, and ``evaluation.every`` takes that of ``evaluate_every``.

    Raises:
        ValueError: a setting is of the wrong type or out of its range, or two do not go together.
    """

    model: Name = Field(description="name on the hub, a folder, or a GGUF file")
    revision: str | None = Field(None, description="commit of the hub; null takes the newest")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto", description="of the frozen base; auto: bfloat16 on a GPU or a CPU twice as fast in it, else float32"
    )
    quantize: Literal["nf4", "int8", None] = Field(None, description="the base in fewer bits: nf4, int8 or null")
    gradient_checkpointing: bool = Field(False, description="recompute activations: far less memory, 1.5 times as long")
    task: Name = Field(description="gsm8k, math, nano, words-1, words-2, ...")
    data: str | None = Field(None, description="folder to read the task from; null asks the hub")
    prompt: str | None = Field(None, description="template of the prompt; null takes the task's own")
    shots: NonNegativeInt = Field(0, description="worked training problems that each prompt shows first")
    max_prompt_tokens: PositiveInt = Field(1024, description="problems with longer prompts are left out")
    method: Literal["grpo", "sft"] = Field("grpo", description="grpo or sft")
    trainer: Literal["own", "trl"] = Field("own", description="own or trl")
    adapter: AdapterSettings = Field(AdapterSettings(), description="what trains")
    training: dict[str, Any] = Field({}, description="how it trains")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), strict=False, description="a sweep, one run each; [] runs training.learning_rate alone"
    )
    sampler: SamplerSettings = Field(SamplerSettings(), description="who answers the prompts")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="what is scored before and after training")
    shard: bool = Field(False, description="true spreads the frozen base over the GPUs (FSDP2) once each has loaded it")
    threads: PositiveInt | Literal["auto"] = Field("auto", description="of a process on a CPU; auto measures")
    processes: PositiveInt | Literal["auto"] = Field("auto", description="that share a run on CPUs; auto measures")
    folder: Name = Field("runs", description="where checkpoints and the run's record go")

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        for key, message in self._conflicts():
            raise SettingsError(key, message)
        self.training_settings(problems=1)
        return self

    def _conflicts(self) -> Iterator[tuple[str, str]]:
        """Settings that do not go together: the key to change, and why."""
        everything, trl, sampler = self.adapter.kind == "all", self.trainer == "trl", self.sampler
        if self.adapter.projection == "calibrated" and self.adapter.calibration.problems < self.adapter.u:
            few = f"{self.adapter.calibration.problems} problems have no {self.adapter.u} directions"
            yield "adapter.calibration.problems", f"{few}; calibrate on more, or ask for fewer"
        if (sampler.engine == "vllm-server") != (sampler.url is not None):
            yield "sampler.url", "url names the server of engine vllm-server; give both or neither"
        if everything and self.quantize is not None:
            yield "quantize", "a quantized base cannot train all of its weights; set quantize: null"
        if trl and (everything or self.method == "sft"):
            yield "trainer", "trl trains an adapter by GRPO and nothing else here; set trainer: own"
        if trl and self.shard:
            yield "shard", "trl shards as accelerate's own settings say (--use_fsdp); set shard: false"
        if everything and sampler.engine != "transformers":
            yield "sampler.engine", "vLLM follows an adapter, not weights that all train; set engine: transformers"
        if sampler.engine == "vllm-server" and sampler.sync == "merged":
            yield "sampler.sync", "a server is sent LoRAs, not merged weights; set sampler.sync: lora"
        if trl and self.dtype == "float16":
            yield "trainer", "under trl a float16 gradient would be rounded to nothing; set trainer: own"
        if everything and self.shard:
            yield "shard", "only a frozen base is spread over GPUs here; set shard: false"
        if len({f"{rate:g}" for rate in self.learning_rates}) < len(self.learning_rates):
            yield "learning_rates", "two learning_rates are the same in six digits and would share a folder; drop one"

    def training_settings(self, problems: int) -> GRPOSettings | SFTSettings:
        """The settings of the training loop, for so many ``problems`` in the training split.

        Raises:
            SettingsError: a value of ``training`` is unknown or out of its range.
        """
        kind: type[GRPOSettings] | type[SFTSettings] = GRPOSettings if self.method == "grpo" else SFTSettings
        known = dict.fromkeys([*(field.name for field in dataclasses.fields(kind)), "epochs"])
        for name in self.training:
            if name not in known:
                raise settings_file.unknown(f"training.{name}", known)
        values = dict(self.training)
        epochs = values.pop("epochs", None)
        if "evaluate_every" in values:
            raise SettingsError("training.evaluate_every", "evaluation.every says how often; leave evaluate_every out")
        if epochs is not None and "steps" in values:
            raise SettingsError("training.epochs", "epochs and steps both say how long to train; leave one out")
        try:
            settings = kind(**values, evaluate_every=self.evaluation.every)
            length = SFTSettings(epochs=epochs, steps=settings.steps, prompts_per_step=settings.prompts_per_step)
        except ValueError as error:
            name = str(error).split()[0]
            raise SettingsError(f"training.{name}" if name in known else "training", str(error)) from error
        return dataclasses.replace(settings, steps=length.in_steps(problems).steps)

    def with_dtype(self, dtype: str) -> RunSettings:
        """The same run, with this ``dtype`` where it is left open."""
        return self.model_copy(update={"dtype": dtype}) if self.dtype == "auto" else self

    def sweep(self) -> list[RunSettings]:
        """One run for each of ``learning_rates``, in a folder of its own; the run itself where there are none.

        >>> run = RunSettings(model="nano", task="nano", learning_rates=(1e-4, 2e-4), folder="out")
        >>> [one.folder for one in run.sweep()]
        ['out/lr-0.0001', 'out/lr-0.0002']
        """
        if not self.learning_rates:
            return [self]
        runs = []
        for rate in self.learning_rates:
            training, folder = self.training | {"learning_rate": rate}, f"{self.folder}/lr-{rate:g}"
            runs.append(self.model_copy(update={"learning_rates": (), "training": training, "folder": folder}))
        return runs

    def override(self, assignments: Sequence[str]) -> RunSettings:
        """The same run with other settings, each ``key=value`` or ``key.sub=value``, the value as in YAML.

        >>> RunSettings(model="nano", task="nano").override(["adapter.rank=4", "training.kl=1e-4"]).adapter.rank
        4

        Raises:
            SettingsError: a key is unknown or a value impossible.
            ValueError: an assignment has no equals sign, or its value is no YAML.
        """
        values = self.to_dict()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"{assignment} assigns nothing; write key=value, as in training.learning_rate=1e-4")
            *outer, last = key.strip().split(".")
            place = values
            for name in outer:
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise SettingsError(key, f"{name} holds no further settings, so there is no {key}")
            place[last] = settings_file.read(text)
            if key in ("training.steps", "training.epochs"):
                place.pop("epochs" if last == "steps" else "steps", None)
        return RunSettings.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of a settings file; :meth:`from_dict` reads them."""
        values = self.model_dump(mode="json")
        if not self.adapter.calibrated and self.adapter.calibration == CalibrationSettings():
            del values["adapter"]["calibration"]
        return values

    def to_yaml(self, header: str = "") -> str:
        """The settings file: every key with a comment; ``header`` goes above, as comments."""
        return settings_file.write(self.to_dict(), RunSettings, TRAINING, header)

    def save(self, path: str | Path, header: str = "") -> Path:
        """Writes :meth:`to_yaml` to a file, which appears whole or not at all."""
        return atomic_write(path, self.to_yaml(header))


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Reads a YAML file; keys that it lacks take their defaults. For ``overrides`` see :meth:`RunSettings.override`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, or a setting is wrong; the message names the file and the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no settings file at {path}; `tinylora preset NAME > {path}` writes one")
    text = Path(path).read_text(encoding="utf-8")
    try:
        settings = RunSettings.from_dict(settings_file.read(text))
    except SettingsError as error:
        raise SettingsError(error.key, f"{path}{settings_file.line_of(error.key, text)}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    return settings.override(overrides)
