"""Find out who answers: the adapter, the base, or something between.

The sampler of a settings file is given known parameters, and its answers are compared with what the model computes.
With --url, a server that was started with an adapter (vLLM, llama-server, llama-cpp-python or another one with OpenAI's
/v1/completions and log-probabilities) is compared with the adapter's file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylora_lite as tl
from tinylora_lite.cli import shared

if TYPE_CHECKING:
    from tinylora_lite.view.progress import Progress

EXAMPLE = "tinylora check-sampler a.tinylora --base FOLDER --url http://127.0.0.1:8080"
SEED_HELP = "of the sampling"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora check-sampler``."""
    add = parser.add_argument
    add("subject", metavar="SETTINGS|FILE", help="a settings file or a preset; with --url, an adapter file")
    add("overrides", nargs="*", metavar="key=value", help="settings that differ: sampler.engine=vllm")
    add("--gpu", help="the GPU that a preset is for")
    add("--url", help="of the server, for example http://127.0.0.1:8080")
    add("--base", help=f"with --url: {shared.BASE_HELP}")
    add("--model", metavar="NAME", help="with --url: what requests name, of vLLM the LoRA (default: the first listed)")
    add("--basis", type=Path, help=f"with --url, {shared.BASIS_HELP}")


def run(arguments: argparse.Namespace) -> None:
    """Shows the differences and who answered; or JSON. Raises ``RuntimeError`` unless the adapter did."""
    a = arguments
    if (a.url is None) != (a.base is None):
        raise ValueError(
            "--url names a server, and --base the base of the adapter that it serves; give both or neither"
        )
    if a.url is not None and (a.overrides or a.gpu):
        raise ValueError("key=value and --gpu belong to settings; with --url there are none")
    if a.url is None and (a.model or a.basis):
        raise ValueError("--model and --basis are of a server; name it with --url")
    with shared.command_progress() as progress, shared.told_warnings():
        found = (_engine if a.url is None else _server)(a, progress)
    right = found.verdict == "adapter"
    shared.show(a, asdict(found), shared.described(asdict(found)), *([str(found)] if right else []))
    if not right:
        raise RuntimeError(str(found))


def _engine(a: argparse.Namespace, progress: Progress) -> tl.SamplerCheck:
    """Of the sampler that a settings file asks for; its adapter is random, whatever the projection is to be."""
    from tinylora_lite.experiment.models import load_tokenizer
    from tinylora_lite.experiment.run import short_prompts, task_named
    from tinylora_lite.experiment.runner import Runner
    from tinylora_lite.sampling.check import TOKENS

    settings = shared.read_settings(a.subject, a.gpu, a.overrides)
    if settings.adapter.kind == "all":
        raise ValueError("all weights train under these settings, and no engine follows them; nothing is to be checked")
    if settings.adapter.calibrated:
        settings = settings.override(["adapter.projection=random"])
    tokenizer = load_tokenizer(settings.model, settings.revision)
    task = short_prompts(task_named(settings.task, settings), tokenizer, settings.max_prompt_tokens)
    options: dict[str, Any] = {"max_model_len": settings.max_prompt_tokens + TOKENS}
    runner = Runner.open(settings, tokenizer, progress, lora_folder=Path(settings.folder) / "lora", **options)
    adapter = tl.attach(runner.base, settings.adapter.config())
    progress.begin("asking the sampler")
    temperature = settings.training_settings(len(task.train)).temperature
    return tl.check_sampler(runner.base, tokenizer, adapter, runner.sampler, task, temperature=temperature, seed=a.seed)


def _server(a: argparse.Namespace, progress: Progress) -> tl.SamplerCheck:
    """Of a server that was started with the adapter of a file."""
    from tinylora_lite import nano
    from tinylora_lite.experiment.models import is_nano, load_tokenizer
    from tinylora_lite.sampling.openai_server import OpenAISampler

    tokenizer = load_tokenizer(a.base)
    sampler = OpenAISampler(a.url, tokenizer, name=a.model)  # before the base, which may take minutes
    model, adapter = shared.load_adapted(Path(a.subject), a.base, a.basis, progress)
    progress.begin("asking the server")
    task = nano.task() if is_nano(a.base) else nano.word_problems(1)
    return tl.check_sampler(model, tokenizer, adapter, sampler, task, plant=False, seed=a.seed)
