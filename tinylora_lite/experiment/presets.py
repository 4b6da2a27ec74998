"""Settings to start from: the paper's recipes on its models, as far as the paper tells them, for the card at hand.

A preset is put together from tables: a model, a recipe (the paper's GSM8K run or its MATH run), a method (GRPO; SFT;
GRPO on calibrated directions) and a card. ``NOTES`` says where a preset departs from the paper and why; they stand at
the head of the YAML that ``tinylora preset NAME`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from tinylora_lite.experiment.settings import (
    AdapterSettings,
    CalibrationSettings,
    EvaluationSettings,
    RunSettings,
    SamplerSettings,
)

Method = Literal["grpo", "sft", "calibrated"]
PAPER_RATES = (1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4)
"""Paper, section 5.1: the best of them for each size of update."""
NUMBERS = 13


@dataclass(frozen=True)
class Base:
    """A model: name and commit on the hub, billions of weights, and how many modules share one of 13 numbers."""

    hub: str
    revision: str
    billions: float
    n_tie: int
    positions: int = 32_768


BASES: dict[str, Base] = {
    "qwen2.5-0.5b": Base("Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", 0.5, 13),
    "qwen2.5-1.5b": Base("Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306", 1.5, 16),
    "qwen2.5-3b": Base("Qwen/Qwen2.5-3B-Instruct", "aa8e72537993ba99e69dfaafa59ed015b17504d1", 3.1, 20),
    "qwen2.5-7b": Base("Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", 7.6, 16),
    "qwen2.5-math-7b": Base("Qwen/Qwen2.5-Math-7B", "b101308fe89651ea5ce025f25317fea6fc07e96e", 7.6, 16, 4096),
    "llama-3.2-3b": Base("meta-llama/Llama-3.2-3B-Instruct", "0cb88a4f764b7a12671c53f0838cd831a0843b95", 3.2, 16),
    "llama-3.1-8b": Base("meta-llama/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659", 8.0, 18),
}

RECIPES: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "max_prompt_tokens": 512,
        "training": {"epochs": 3, "prompts_per_step": 64, "group_size": 4, "max_new_tokens": 4096, "kl": 0.0},
        "evaluation": EvaluationSettings(tasks=("gsm8k",), max_new_tokens=4096),
    },
    "math": {
        "max_prompt_tokens": 1024,
        "training": {"epochs": 3, "prompts_per_step": 256, "group_size": 8, "max_new_tokens": 3072, "kl": 0.001},
        "evaluation": EvaluationSettings(
            tasks=("math500", "minerva", "olympiadbench", "aime24", "amc23"), max_new_tokens=3072
        ),
    },
}
"""Paper, sections 5.1 and 5.2."""

CARDS = ("t4", "a100-80gb", "h100")
"""The cards that a preset comes for; ``tinylora plan-run`` looks at others."""
NANO = ("nano", "nano/sft", "nano/calibrated")

NOTES: dict[str, str] = {
    "paper": """\
The paper leaves unsaid: the optimiser (Adam here, constant rate, gradients clipped at norm 1), the distribution of P
(normal, variance 1/r), where v starts (0), the cap of truncated importance sampling (2), the prompt and how its answer
is read (strict and lenient are both recorded), and whether the seed of P is one of its three seeds: run with
adapter.seed and training.seed of 0, 1 and 2.""",
    "batch": "Its batch is read as prompts: {prompts} of them, {group} answers each.",
    "rates": "learning_rates are the paper's; the best is chosen on the validation split, never on the test set.",
    "sync": """\
Its rollouts came from merged weights (sampler.sync: merged), since vLLM's LoRA did not suit it. The exact LoRA of
rank r loses nothing to a merge's rounding, and is what stands below.""",
    "budget": "13 numbers: the paper's u = 1, with the smallest n_tie that spends no more on this model.",
    "sft": """\
The paper says of SFT that it trains on answers, and nothing more: batch, epochs and rates are those of the GRPO run,
and the answers are the data set's own worked solutions.""",
    "calibrated": """\
Calibrated directions are this project's own method, not the paper's: 13 directions of rank 8 from the policy gradients
of {problems} training problems, one vector for all modules. Some rates are above the paper's, because directions of
unit norm need longer steps (0.2 was best on nano).""",
    "t4": """\
For a T4: float16, since it multiplies no bfloat16; one epoch, batches of {prompts} and {tokens:,} tokens, to end
sooner; transformers samples, since few engines support the card.""",
    "positions": "The model was made for {positions:,} positions, which prompt and answer share.",
    "math": """\
The problems are the 8,523 of SimpleRL's hard partition. Its own runs used other settings (KL 1e-4, batch 1,024);
these are the paper's.""",
    "nano": "The nano world: minutes on a CPU, by the very code that trains 7B.",
}
"""What a preset's header says, put together by :func:`describe`."""


def preset_names() -> tuple[str, ...]:
    """All presets, ``qwen2.5-7b/gsm8k`` and so on; those without a method's name train by GRPO."""
    # The hard MATH problems come with answers and without worked solutions, so there is nothing to imitate.
    methods = {"gsm8k": ("", "/sft", "/calibrated"), "math": ("", "/calibrated")}
    full_size = (f"{base}/{recipe}{method}" for base in BASES for recipe in RECIPES for method in methods[recipe])
    return (*NANO, *full_size)


def preset(name: str, card: str | None = None) -> RunSettings:
    """The settings of a preset.

    Args:
        name: one of :func:`preset_names`.
        card: one of ``CARDS``; ``None`` takes the A100 of 80 GB. The nano presets need none.

    Raises:
        ValueError: there is no such preset, or none for this card.
    """
    if name not in preset_names():
        raise ValueError(f"no preset named {name}; tinylora preset lists them ({preset_names()[4]}, for one)")
    if name in NANO:
        if card is not None:
            raise ValueError(f"the preset {name} runs on a CPU; leave the card out")
        return _nano(_method(name))
    card = "a100-80gb" if card in (None, "a100") else str(card).lower()
    if card not in CARDS:
        raise ValueError(f"presets are for {', '.join(CARDS)}, not {card}; take the nearest, and ask tinylora plan-run")
    base, recipe = name.split("/")[:2]
    settings = _on(card, BASES[base], _recipe(BASES[base], recipe, _method(name)))
    return replace(settings, folder=f"runs/{name}")


def describe(name: str, card: str | None = None) -> str:
    """Where a preset departs from the paper and why, as text of several lines."""
    settings = preset(name, card)
    if name in NANO:
        return f"{name}\n\n{NOTES['nano']}"
    base, recipe = name.split("/")[:2]
    training, method = settings.training, _method(name)
    notes = [NOTES["paper"], NOTES["rates"]]
    notes.insert(0, NOTES["batch"].format(prompts=training["prompts_per_step"], group=training.get("group_size", 1)))
    if method == "sft":
        notes[0] = NOTES["sft"]
    notes.append(
        NOTES["calibrated"].format(problems=settings.adapter.calibration.problems)
        if method == "calibrated"
        else NOTES["budget"]
    )
    if settings.sampler.engine == "vllm":
        notes.append(NOTES["sync"])
    if recipe == "math":
        notes.append(NOTES["math"])
    if BASES[base].positions < 8192:
        notes.append(NOTES["positions"].format(positions=BASES[base].positions))
    if card is not None and card.lower() == "t4":
        notes.append(NOTES["t4"].format(prompts=training["prompts_per_step"], tokens=training["max_new_tokens"]))
    return "\n\n".join([f"{name}, for {card or 'a100-80gb'}; paper: arXiv 2602.04118", *notes])


def _method(name: str) -> Method:
    last = name.rsplit("/", 1)[-1]
    return "sft" if last == "sft" else "calibrated" if last == "calibrated" else "grpo"


def _recipe(base: Base, recipe: str, method: Method) -> RunSettings:
    """What the paper says, whatever the card."""
    values = RECIPES[recipe]
    training = values["training"] | {
        "temperature": 1.0,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "scale": "group",
        "normalise": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "tis_cap": 2.0,
        "truncated": "zero",
        "save_every": 10,
        "seed": 0,
    }
    training["max_new_tokens"] = min(training["max_new_tokens"], base.positions - values["max_prompt_tokens"])
    rates: tuple[float, ...] = PAPER_RATES
    adapter = AdapterSettings(rank=2, u=1, n_tie=base.n_tie)
    evaluation = replace(values["evaluation"], max_new_tokens=training["max_new_tokens"])
    if method == "sft":
        kept = ("epochs", "prompts_per_step", "learning_rate", "max_grad_norm", "save_every", "seed")
        training = {name: training[name] for name in kept} | {"max_new_tokens": 1024}
    if method == "calibrated":
        adapter = AdapterSettings(
            rank=8,
            u=NUMBERS,
            n_tie="all",
            projection="calibrated",
            calibration=CalibrationSettings(problems=256, group_size=8, max_new_tokens=1024),
        )
        rates = (*PAPER_RATES[-2:], 1e-3, 1e-2, 1e-1)
        training["learning_rate"] = 1e-2
    return RunSettings(
        model=base.hub,
        revision=base.revision,
        task=recipe,
        max_prompt_tokens=values["max_prompt_tokens"],
        method="sft" if method == "sft" else "grpo",
        adapter=adapter,
        training=training,
        evaluation=replace(evaluation, every=0),
        learning_rates=rates,
    )


def _on(card: str, base: Base, settings: RunSettings) -> RunSettings:
    """What the card changes: memory and speed, and on a T4 the length of the run."""
    training, imitation = dict(settings.training), settings.method == "sft"
    if card == "t4":
        training |= {"epochs": 1, "micro_batch": 4 if base.billions < 1 else 2}
        training["max_new_tokens"] = min(training["max_new_tokens"], 1024)
        if not imitation:
            training["prompts_per_step"] = 32
        return replace(
            settings,
            dtype="float16",
            quantize="nf4" if base.billions > 2 else None,
            gradient_checkpointing=True,
            max_prompt_tokens=min(settings.max_prompt_tokens, 512),
            training=training,
            adapter=replace(
                settings.adapter, calibration=replace(settings.adapter.calibration, max_new_tokens=512, problems=128)
            )
            if settings.adapter.calibrated
            else settings.adapter,
            sampler=SamplerSettings(engine="transformers", batch_size=64 if base.billions < 2 else 16),
            evaluation=replace(settings.evaluation, max_new_tokens=1024, tasks=settings.evaluation.tasks[:1]),
        )
    training["micro_batch"] = 16 if base.billions < 4 else 8
    share = 0.45 if base.billions < 4 else 0.5
    sampler = SamplerSettings(engine="vllm", sync="lora", gpu_memory=share)
    return replace(settings, gradient_checkpointing=True, training=training, sampler=sampler)


def _nano(method: Method) -> RunSettings:
    training: dict[str, Any] = {"steps": 30, "prompts_per_step": 32, "learning_rate": 0.1, "max_new_tokens": 48}
    adapter = AdapterSettings(rank=2, u=1, n_tie=4)
    if method == "sft":
        training |= {"learning_rate": 0.1}
    else:
        training |= {"group_size": 8}
    if method == "calibrated":
        training["learning_rate"] = 0.2
        adapter = AdapterSettings(
            rank=8,
            u=NUMBERS,
            n_tie="all",
            projection="calibrated",
            calibration=CalibrationSettings(problems=384, group_size=8, max_new_tokens=48),
        )
    return RunSettings(
        model="nano",
        dtype="float32",
        task="nano",
        max_prompt_tokens=208,
        method="sft" if method == "sft" else "grpo",
        adapter=adapter,
        training=training | {"seed": 0},
        evaluation=EvaluationSettings(tasks=("nano",), problems=500, temperature=1.0, max_new_tokens=48),
        folder="runs/nano" if method == "grpo" else f"runs/nano/{method}",
    )
