"""Run by ``torchrun``: some steps of verl's own FSDP2 engine with our optimizer, on CPUs.

    run_verl.py FOLDER

verl knows GPUs only, so it is told that the CPU is one.
"""

import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from torch import distributed as dist
from torch.nn import functional as F

from tinylora_lite import nano

STEPS = 4


def main(folder: Path) -> None:
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    PlatformCUDA.device_name, PlatformCUDA.device_module = "cpu", torch.cpu
    PlatformCUDA.current_device = lambda self: torch.device("cpu")
    torch.cpu.empty_cache = lambda: None

    from verl.trainer.config import CheckpointConfig
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig, HFModelConfig
    from verl.workers.engine.fsdp import transformer_impl

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with initialize_config_module("tinylora_lite.engines", version_base=None):
        overrides = [f"start={folder}", "actor_rollout_ref.actor.optim.lr=0.05"]
        settings = compose("verl", [*overrides, "actor_rollout_ref.actor.optim.total_training_steps=4"])
    actor, model = settings.actor_rollout_ref.actor, settings.actor_rollout_ref.model
    transformer_impl.apply_monkey_patch = lambda *args, **kwargs: None  # for packed sequences and value heads
    engine = transformer_impl.FSDPEngineWithLMHead(
        HFModelConfig(
            path=str(nano.CHECKPOINTS / nano.BASE),
            lora_rank=model.lora_rank,
            lora_adapter_path=model.lora_adapter_path,
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "eager"},
        ),
        FSDPEngineConfig(
            strategy=actor.fsdp_config.strategy,
            model_dtype=actor.fsdp_config.model_dtype,
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_torch_compile=False,
        ),
        omega_conf_to_dataclass(actor.optim),
        CheckpointConfig(),
    )
    engine.initialize()
    for step in range(STEPS):
        ids = torch.arange(5, 65).view(4, 15)[dist.get_rank() :: 2].roll(step, dims=1)
        engine.optimizer_zero_grad()
        logits = engine.module(input_ids=ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        engine.optimizer_step()
        engine.lr_scheduler_step()
        if step == STEPS // 2 - 1:
            engine.save_checkpoint(str(folder / "checkpoint"), global_step=step)
            kept = engine.optimizer.vectors.detach().clone()
    sent = {name: tensor.tolist() for name, tensor in engine.get_per_tensor_param(base_sync_done=True)[0]}
    result = {"v": engine.optimizer.vectors.tolist(), "sent": sent}
    engine.load_checkpoint(str(folder / "checkpoint"))
    result["resumes"] = torch.equal(engine.optimizer.vectors, kept)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
