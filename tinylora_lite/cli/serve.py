"""Start a vLLM server that follows an adapter while it trains (`sampler.engine: vllm-server`).

It serves a settings file's model with LoRAs loaded at run time, to this machine alone unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from tinylora_lite.cli import shared

EXAMPLE = "tinylora serve settings.yaml --port 8000"
SEED_HELP = "of the engine; samples depend on the seed of training and not on this one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora serve``."""
    shared.add_settings_arguments(parser, "the GPU that a preset is for")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the Python that has vLLM (default: this one)")
    parser.add_argument("--print", action="store_true", dest="print_only", help="print the command and start nothing")


def run(arguments: argparse.Namespace) -> None:
    """Becomes the server, or prints the command that starts it."""
    from tinylora_lite.experiment.models import checkpoint
    from tinylora_lite.sampling.vllm_server import serve_command

    settings = shared.read_settings(arguments.settings, arguments.gpu, arguments.overrides).with_dtype("bfloat16")
    longest = max(settings.training_settings(1).max_new_tokens, settings.evaluation.max_new_tokens)
    command = serve_command(
        checkpoint(settings.model, settings.dtype, settings.revision),
        settings.adapter.rank,
        python=arguments.python,
        host=arguments.host,
        port=arguments.port,
        tensor_parallel_size=settings.sampler.tensor_parallel,
        dtype=settings.dtype,
        gpu_memory_utilization=settings.sampler.gpu_memory,
        max_model_len=settings.max_prompt_tokens + longest,
        seed=arguments.seed,
        **({} if settings.revision is None else {"revision": settings.revision}),
    )
    if arguments.json or arguments.print_only:
        shared.show(arguments, {"command": command}, shlex.join(command))
    else:
        os.execvp(command[0], command)
