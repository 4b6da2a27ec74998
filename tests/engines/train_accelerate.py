"""Run by ``accelerate launch``: a loop of one's own with ``accelerate``, and the LoRA's gradients averaged by DDP.

train_accelerate.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.engines import TinyLoraAdamW, as_lora


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _ = nano.load()
    adapter, gradients = tl.attach(model, tl.TinyLoraConfig(n_tie=16)), []
    adapter.vectors.register_post_accumulate_grad_hook(lambda v: gradients.append(v.grad.tolist()))
    with as_lora(adapter) as lora:
        optimizer = TinyLoraAdamW(lora.parameters(), lr=0.05, adapter=adapter, max_grad_norm=0.5)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
        policy, optimizer, scheduler = accelerator.prepare(lora, optimizer, scheduler)
        kind = type(policy).__name__
        for step in range(4):
            ids = torch.arange(5, 65).view(4, 15).roll(step, dims=1)
            for row in ids[accelerator.process_index :: accelerator.num_processes].split(4 // 2 // 2):
                with accelerator.accumulate(policy):
                    logits = policy(input_ids=row[:, :-1]).logits
                    accelerator.backward(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            if step == 1:
                accelerator.save_state(str(folder / "state"))
                kept = adapter.vectors.detach().clone()
        result = {"kind": kind, "v": adapter.vectors.tolist(), "gradient": gradients[0]}
        accelerator.load_state(str(folder / "state"))
        result["resumes"] = torch.equal(adapter.vectors, kept)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
