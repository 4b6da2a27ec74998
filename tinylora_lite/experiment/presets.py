"""Settings to start from: the paper's recipes on its models, as far as the paper tells them, for a GPU.

A preset is put together from tables: a model, a recipe (the paper's GSM8K run or its MATH run), a method (GRPO; SFT;
GRPO on calibrated directions) and a GPU. ``NOTES`` says where a preset departs from the paper and why; they are the
head of the YAML that ``tinylora preset NAME`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tinylora_lite.experiment.settings import RunSettings

Method = Literal["grpo", "sft", "calibrated"]
PAPER_RATES = (1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4)
"""Paper, section 5.1: the best of them for each size of update."""


@dataclass(frozen=True)
class Base:
    """A model: name and commit on the hub, billions of weights, and how many modules share one of 13 parameters."""

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
        "tests": ["gsm8k"],
    },
    "math": {
        "max_prompt_tokens": 1024,
        "training": {"epochs": 3, "prompts_per_step": 256, "group_size": 8, "max_new_tokens": 3072, "kl": 0.001},
        "tests": ["math500", "minerva", "olympiadbench", "aime24", "amc23"],
    },
}
"""Paper, sections 5.1 and 5.2."""

OPTIMIZATION = {"temperature": 1.0, "learning_rate": 1e-4, "max_grad_norm": 1.0}
LOSS = {"scale": "group", "normalise": "token", "clip_low": 0.2, "clip_high": 0.2, "tis_cap": 2.0, "truncated": "zero"}
CALIBRATED = {"rank": 8, "u": 13, "n_tie": "all", "projection": "calibrated"}

GPUS = ("t4", "a100-80gb", "h100")
"""The GPUs that a preset comes for; ``tinylora plan-run`` takes others."""
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
rank r, which is used below, loses nothing to a merge's rounding.""",
    "grpo": "13 parameters: the paper's u = 1, with the smallest n_tie that spends no more on this model.",
    "sft": """\
The paper says of SFT that it trains on answers, and nothing more: batch, epochs and rates are those of the GRPO run,
and the answers are the data set's own worked solutions.""",
    "calibrated": """\
Calibrated directions are this project's own method, not the paper's: 13 directions of rank 8 from the policy gradients
of {problems} training problems, one vector for all modules. Some rates are above the paper's, because directions of
unit norm need longer steps (0.2 was best on nano).""",
    "t4": """\
For a T4: float16, since it multiplies no bfloat16; one epoch, batches of {prompts} and {tokens:,} tokens, to end
sooner; transformers samples, since few engines support the GPU.""",
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


def preset(name: str, gpu: str | None = None) -> RunSettings:
    """The settings of a preset.

    Args:
        name: one of :func:`preset_names`.
        gpu: one of ``GPUS``; ``None`` takes the A100 of 80 GB. The nano presets need none.

    Raises:
        ValueError: there is no such preset, or none for this GPU.
    """
    if name not in preset_names():
        raise ValueError(f"no preset named {name}; tinylora preset lists them ({preset_names()[4]}, for one)")
    if name in NANO:
        if gpu is not None:
            raise ValueError(f"the preset {name} runs on a CPU; leave the GPU out")
        return RunSettings.from_dict({"folder": f"runs/{name}"} | _nano(_method(name)))
    gpu = "a100-80gb" if gpu in (None, "a100") else str(gpu).lower()
    if gpu not in GPUS:
        raise ValueError(f"presets are for {', '.join(GPUS)}, not {gpu}; take the nearest, and ask tinylora plan-run")
    base, recipe = name.split("/")[:2]
    return RunSettings.from_dict({"folder": f"runs/{name}"} | _full_size(BASES[base], recipe, _method(name), gpu))


def describe(name: str, gpu: str | None = None) -> str:
    """Where a preset departs from the paper and why, as text of several lines."""
    settings = preset(name, gpu)
    if name in NANO:
        return f"{name}\n\n{NOTES['nano']}"
    base, recipe = name.split("/")[:2]
    training, method, positions = settings.training, _method(name), BASES[base].positions
    said = {
        "sft" if method == "sft" else "batch": True,
        "paper": True,
        "rates": True,
        "calibrated" if method == "calibrated" else "grpo": True,
        "sync": settings.sampler.engine == "vllm",
        "math": recipe == "math",
        "positions": positions < 8192,
        "t4": gpu is not None and gpu.lower() == "t4",
    }
    values = {"prompts": training["prompts_per_step"], "group": training.get("group_size"), "positions": positions}
    values |= {"tokens": training["max_new_tokens"], "problems": settings.adapter.calibration.problems}
    notes = [NOTES[note].format(**values) for note, holds in said.items() if holds]
    return "\n\n".join([f"{name}, for {gpu or 'a100-80gb'}; paper: arXiv 2602.04118", *notes])


def _method(name: str) -> Method:
    last = name.rsplit("/", 1)[-1]
    return "sft" if last == "sft" else "calibrated" if last == "calibrated" else "grpo"


def _full_size(base: Base, recipe: str, method: Method, gpu: str) -> dict[str, Any]:
    """What the paper says, and what the GPU changes: memory and speed, and on a T4 the length of the run."""
    t4, said = gpu == "t4", RECIPES[recipe]
    training = said["training"] | OPTIMIZATION | LOSS | {"save_every": 10, "seed": 0}
    longest = min(training["max_new_tokens"], base.positions - said["max_prompt_tokens"], 1024 if t4 else 10**9)
    training["max_new_tokens"] = longest
    adapter: dict[str, Any] = {"n_tie": base.n_tie}
    rates: tuple[float, ...] = PAPER_RATES
    if t4:
        training["epochs"] = 1
    if method == "sft":
        kept = ("epochs", "prompts_per_step", "learning_rate", "max_grad_norm", "save_every", "seed")
        training = {name: training[name] for name in kept} | {"max_new_tokens": 1024}
    elif t4:
        training["prompts_per_step"] = 32
    if method == "calibrated":
        calibration = {"problems": 128, "max_new_tokens": 512} if t4 else {}
        adapter = CALIBRATED | {"calibration": calibration}
        rates = (*PAPER_RATES[-2:], 1e-3, 1e-2, 1e-1)
        training["learning_rate"] = 1e-2
    small, tiny = base.billions < 4, base.billions < 1
    training["micro_batch"] = (4 if tiny else 2) if t4 else (16 if small else 8)
    return {
        "model": base.hub,
        "revision": base.revision,
        "dtype": "float16" if t4 else "bfloat16",
        "quantize": "nf4" if t4 and base.billions > 2 else None,
        "gradient_checkpointing": True,
        "task": recipe,
        "max_prompt_tokens": min(said["max_prompt_tokens"], 512) if t4 else said["max_prompt_tokens"],
        "method": "sft" if method == "sft" else "grpo",
        "adapter": adapter,
        "training": training,
        "learning_rates": rates,
        "sampler": {"batch_size": 64 if base.billions < 2 else 16}
        if t4
        else {"engine": "vllm", "gpu_memory": 0.45 if small else 0.5},
        "evaluation": {"tasks": said["tests"][:1] if t4 else said["tests"], "max_new_tokens": longest},
    }


def _nano(method: Method) -> dict[str, Any]:
    rate = 0.2 if method == "calibrated" else 0.1
    training = {"steps": 30, "prompts_per_step": 32, "learning_rate": rate, "max_new_tokens": 48}
    training |= {"seed": 0} if method == "sft" else {"group_size": 8, "seed": 0}
    calibrated = CALIBRATED | {"calibration": {"problems": 384, "max_new_tokens": 48}}
    return {
        "model": "nano",
        "dtype": "float32",
        "task": "nano",
        "max_prompt_tokens": 208,
        "method": "sft" if method == "sft" else "grpo",
        "adapter": calibrated if method == "calibrated" else {"n_tie": 4},
        "training": training,
        "evaluation": {"tasks": ["nano"], "problems": 500, "temperature": 1.0, "max_new_tokens": 48},
    }
