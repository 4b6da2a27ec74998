"""TinyLoRA: adapting a language model with 13 numbers, trained by reinforcement learning (arXiv 2602.04118)."""

from tinylora_lite.adapter import TinyLoraAdapter, attach
from tinylora_lite.basis import Basis, load_basis, save_basis
from tinylora_lite.calibrate import calibrate
from tinylora_lite.compare import Comparison, compare
from tinylora_lite.config import TinyLoraConfig, lora_xs
from tinylora_lite.counting import count_parameters, plan
from tinylora_lite.evaluate import Score, evaluate
from tinylora_lite.file_format import AdapterFileError
from tinylora_lite.files import load, save
from tinylora_lite.grpo import train_grpo
from tinylora_lite.grpo_settings import GRPOSettings
from tinylora_lite.lora import export_lora
from tinylora_lite.losses import grpo_advantages, grpo_loss
from tinylora_lite.merging import merge_report, merged_weights
from tinylora_lite.peft_files import export_peft, import_peft
from tinylora_lite.population import Population, attach_population
from tinylora_lite.problem_sets import load_task
from tinylora_lite.rewards import gsm8k_reward, math_reward
from tinylora_lite.runs import Run
from tinylora_lite.sft import SFTSettings, train_sft
from tinylora_lite.svd import truncated_svd
from tinylora_lite.tasks import Example, Task

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "Basis",
    "Comparison",
    "Example",
    "GRPOSettings",
    "Population",
    "Run",
    "SFTSettings",
    "Score",
    "Task",
    "TinyLoraAdapter",
    "TinyLoraConfig",
    "attach",
    "attach_population",
    "calibrate",
    "compare",
    "count_parameters",
    "evaluate",
    "export_lora",
    "export_peft",
    "grpo_advantages",
    "grpo_loss",
    "gsm8k_reward",
    "import_peft",
    "load",
    "load_basis",
    "load_task",
    "lora_xs",
    "math_reward",
    "merge_report",
    "merged_weights",
    "plan",
    "save",
    "save_basis",
    "train_grpo",
    "train_sft",
    "truncated_svd",
]
