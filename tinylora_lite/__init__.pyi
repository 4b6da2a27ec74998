"""The public interface, and where each name lives."""

from .adapter.adapter import TinyLoraAdapter as TinyLoraAdapter
from .adapter.adapter import attach as attach
from .adapter.basis import Basis as Basis
from .adapter.batched import Population as Population
from .adapter.batched import attach_population as attach_population
from .adapter.config import TinyLoraConfig as TinyLoraConfig
from .adapter.config import lora_xs as lora_xs
from .adapter.svd import truncated_svd as truncated_svd
from .evaluation.compare import Comparison as Comparison
from .evaluation.compare import compare as compare
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.evaluate import evaluate_population as evaluate_population
from .evaluation.score import Score as Score
from .files.adapter_file import load as load
from .files.adapter_file import save as save
from .files.basis import load_basis as load_basis
from .files.basis import save_basis as save_basis
from .files.file_format import AdapterFileError as AdapterFileError
from .files.gguf_lora import export_gguf as export_gguf
from .files.lora import export_lora as export_lora
from .files.merge import merge_report as merge_report
from .files.merge import merged_weights as merged_weights
from .files.peft import export_peft as export_peft
from .files.peft import import_peft as import_peft
from .planning.counting import count_parameters as count_parameters
from .planning.counting import plan as plan
from .sampling.check import SamplerCheck as SamplerCheck
from .sampling.check import check_sampler as check_sampler
from .tasks.datasets import load_task as load_task
from .tasks.rewards import gsm8k_reward as gsm8k_reward
from .tasks.rewards import math_reward as math_reward
from .tasks.task import Example as Example
from .tasks.task import Task as Task
from .training.calibrate import calibrate as calibrate
from .training.grpo import train_grpo as train_grpo
from .training.losses import grpo_advantages as grpo_advantages
from .training.losses import grpo_loss as grpo_loss
from .training.settings import GRPOSettings as GRPOSettings
from .training.settings import SFTSettings as SFTSettings
from .training.sft import train_sft as train_sft
from .utils.record import Run as Run

__version__: str
