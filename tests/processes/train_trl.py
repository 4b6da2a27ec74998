"""Run by ``accelerate launch``: trains 13 numbers on the nano base by TRL and writes what came out.

train_trl.py FOLDER OPTIONS.json
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.engines.trl import train_trl
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.utils import distributed


def shard_on_cpus() -> None:
    """Accelerate switches FSDP on for GPUs only, so it is told that the processes have one each."""
    plain = PartialState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def main(folder: Path, options: dict) -> None:
    torch.set_num_threads(1)
    if options.pop("fsdp", False):
        shard_on_cpus()
    model, tokenizer = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
    sampler = ModelSampler(model, tokenizer) if options.pop("sampler") else None
    settings = tl.GRPOSettings(max_new_tokens=nano.MAX_NEW_TOKENS, **options)
    task = nano.task()
    run = train_trl(model, tokenizer, adapter, task, settings, sampler=sampler, folder=folder / "run", use_cpu=True)
    result = {
        "processes": distributed.world_size(),
        "weights": type(next(model.parameters())).__name__,
        "v": {"values": adapter.vectors.flatten().tolist(), "type": str(adapter.vectors.dtype)},
        "steps": run.steps,
    }
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
