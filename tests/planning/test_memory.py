"""The planner's formulas against tensors that PyTorch makes, and its verdicts against themselves."""

import json
from dataclasses import replace

import pytest
import torch

import tinylora_lite as tl
from benchmarks.live_bytes import LiveBytes
from benchmarks.memory_checks import CASES, RECORD, activations, cache
from tinylora_lite.experiment.presets import preset
from tinylora_lite.experiment.settings import AdapterSettings, RunSettings
from tinylora_lite.planning.gpus import GPUS
from tinylora_lite.planning.memory import (
    Batch,
    memory_terms,
    saved_by_block,
    trained_parameters,
    training_terms,
    vllm_cache,
)
from tinylora_lite.planning.plan import gpus_that_fit, plan_run
from tinylora_lite.planning.shapes import ModelShape, model_config
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.policy import ON_A_CPU, ready_to_train
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import sample

SEVEN = model_config("qwen2.5-7b")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("qwen2.5-7b", "bfloat16", 1, 256, 1024, True), marks=pytest.mark.slow),
        ("llama-3.2-3b", "bfloat16", 2, 32, 96, False),
        ("qwen2.5-0.5b", "float32", 2, 64, 64, False),
    ],
)
def test_activations_of_real_shapes(case):
    found = activations(*case)
    assert found["planned_peak"] == pytest.approx(found["counted_peak"], rel=0.1)
    assert found["planned_weights"] == found["counted_weights"]


def test_keys_and_values_exactly():
    found = cache("qwen2.5-0.5b", 2, 16)
    assert found["planned"] == found["counted"]


def test_the_committed_record_holds_every_case_within_a_tenth():
    record = json.loads(RECORD.read_text())
    assert len(record["training"]) == len(CASES)
    for row in record["training"]:
        assert abs(row["planned_peak"] / row["counted_peak"] - 1) < 0.1
        assert row["planned_weights"] == row["counted_weights"]
    assert all(row["planned"] == row["counted"] for row in record["cache"])


@pytest.mark.parametrize(("recompute", "group"), [(False, 1), (False, 4), (True, 4)])
def test_a_real_run_of_a_small_model(make_model, tokenizer, task, recompute, group):
    """Real numbers, padding and shared prompts: what is kept between forward and backward."""
    model = make_model(hidden_size=128, intermediate_size=384, num_hidden_layers=8)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = tl.attach(model, tl.TinyLoraConfig(n_tie=4))
    examples = [replace(each, prompt=" ".join([each.prompt] * 8)) for each in task.train[: 8 // group]]
    ids, mask = encode_prompts(tokenizer, task, [each for each in examples for _ in range(group)])
    rollouts = sample(model, tokenizer, ids, mask, max_new_tokens=60)
    tensors = [t for n in adapter.names for t in vars(adapter.factors(n)).values() if isinstance(t, torch.Tensor)]
    inputs = [rollouts.prompt_ids, rollouts.completion_ids, rollouts.prompt_mask, rollouts.completion_mask]
    with (
        ready_to_train(model, [adapter.vectors]),
        LiveBytes([*model.parameters(), *model.buffers(), adapter.vectors, *tensors, *inputs]) as counted,
    ):
        completion_logprobs(model, rollouts).sum().backward()
    shape = ModelShape.of(model.config)
    settings = RunSettings(model="small", task="tiny", dtype="float32", gradient_checkpointing=recompute)
    batch = Batch(8, ids.shape[1], rollouts.completion_ids.shape[1], prompts=0 if recompute else 8 // group)
    planned = sum(term.bytes for term in training_terms(settings, shape, batch, "training", 2, ON_A_CPU))
    assert planned == pytest.approx(counted.peak, rel=0.1)


def test_the_factors_and_the_vectors_exactly(model):
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=3, u=2, n_tie=4))
    shape = ModelShape.of(model.config)
    settings = RunSettings(model="small", task="tiny", dtype="float32", adapter=AdapterSettings(rank=3, u=2, n_tie=4))
    terms = {term.name: term.bytes for term in memory_terms(settings, shape, 1e9)}
    parts = [getattr(adapter.factors(n), part) for n in adapter.names for part in ("left", "right", "projection")]
    assert terms["factors UΣ and Vᵀ, and P"] == sum(part.nbytes for part in parts)
    assert terms["v, its gradient and Adam's two moments"] == 4 * adapter.vectors.nbytes
    assert trained_parameters(settings, shape) == adapter.num_parameters
    assert terms["base weights"] == sum(p.nbytes for p in model.parameters())


def test_training_every_weight_takes_four_copies_and_its_inputs():
    shape = ModelShape.of(model_config("qwen2.5-0.5b"))
    settings = RunSettings(
        model="qwen2.5-0.5b", task="gsm8k", adapter=AdapterSettings(kind="all"), training={"kl": 0.1}
    )
    always = sum(term.bytes for term in memory_terms(settings, shape, 1e11) if term.phase == "always")
    assert always == 5 * 2 * shape.parameters  # weights, gradients, two moments, and the reference of the penalty
    batch = Batch(1, 10, 10)
    assert saved_by_block(shape, batch, 2, 0, everything=True) > 1.3 * saved_by_block(shape, batch, 2, 0)


def test_sharding_and_quantizing_shrink_the_weights():
    whole, shape = RunSettings(model="a", task="gsm8k"), ModelShape.of(SEVEN)
    weights = memory_terms(whole, shape, 8e10)[0].bytes
    assert weights == 2 * 7_615_616_512
    assert memory_terms(whole.override(["shard=true"]), shape, 8e10, 4)[0].bytes == weights / 4
    assert 5.4e9 < memory_terms(whole.override(["quantize=nf4"]), shape, 8e10)[0].bytes < 6e9


def test_advice_is_a_plan_that_fits():
    asked = 0
    for name, base in (("qwen2.5-7b/gsm8k", SEVEN), ("qwen2.5-7b/math/calibrated", SEVEN)):
        for gpu in ("t4", "l4", "4090", "a100-40gb"):
            settings = preset(name)
            plan = plan_run(settings, gpu, config=base)
            assert not plan.fits
            assert plan.advice, (name, gpu)
            assert plan_run(settings.override(plan.advice), gpu, config=base).fits
            for left_out in plan.advice:  # nothing is asked for in vain
                fewer = [change for change in plan.advice if change != left_out]
                assert not plan_run(settings.override(fewer), gpu, config=base).fits
                asked += 1
    assert asked > 8


def test_what_stands_in_the_way_is_named():
    small = RunSettings(model="qwen2.5-0.5b", task="gsm8k", training={"micro_batch": 1, "max_new_tokens": 8})
    assert any("bfloat16" in problem for problem in plan_run(small, "t4").problems)
    long = small.override(["training.max_new_tokens=40000", "gradient_checkpointing=true"])
    assert any("positions" in problem for problem in plan_run(long, "h200").problems)
    assert any("there is one" in problem for problem in plan_run(small.override(["shard=true"]), "l4").problems)
    tight = small.override(["sampler.engine=vllm", "sampler.gpu_memory=0.1"])
    assert any("longest sequence" in problem for problem in plan_run(tight, "l4").problems)
    with pytest.raises(ValueError, match="cannot be shared by 3"):
        plan_run(small, "l4", gpus=3)
    with pytest.raises(ValueError, match="no GPU named 3090"):
        plan_run(small, "3090")


def test_larger_gpus_fit_whatever_smaller_ones_do():
    settings = preset("qwen2.5-7b/gsm8k/sft")
    fitting = gpus_that_fit(plan_run(settings))
    least = min(GPUS[name].memory for name in fitting)
    assert set(fitting) == {name for name, gpu in GPUS.items() if gpu.memory >= least}


def test_time_counts_flops_and_bandwidth():
    settings = preset("qwen2.5-7b/gsm8k/sft").override(["gradient_checkpointing=false", "evaluation.tasks=[]"])
    time = plan_run(settings, "h100", config=SEVEN, length=300, problems=6400).time
    assert (time.steps, time.tokens) == (300, 64 * 450)
    weights = 7_615_616_512 - 152_064 * 3584 - 28 * (2 * 3584 + 4608) - 3584  # no embeddings, biases and norms
    assert time.flops == pytest.approx(4 * weights * time.tokens, rel=0.1)
    assert time.training.low == pytest.approx(time.flops / (0.5 * 989e12))
    assert time.hours.low == pytest.approx(300 * time.training.low / 3600)
    recomputed = plan_run(settings.override(["gradient_checkpointing=true"]), "h100", config=SEVEN).time
    assert 1.4 < recomputed.flops / time.flops < 1.5
    halves = plan_run(settings, "h100", config=SEVEN, gpus=2, length=300, problems=6400).time
    assert halves.training.low == pytest.approx(time.training.low / 2)


def test_decoding_reads_the_weights_at_every_step():
    settings = RunSettings(
        model="a", task="gsm8k", training={"prompts_per_step": 1, "group_size": 2, "max_new_tokens": 100}
    )
    time = plan_run(settings.override(["sampler.engine=vllm"]), "a100-80gb", config=SEVEN, length=100).time
    assert time.sampling.high == pytest.approx(100 * 15.23e9 / (0.4 * 2039e9), rel=0.05)


def test_money_only_where_a_price_is_given():
    settings = preset("nano")
    assert plan_run(settings).cost is None
    plan = plan_run(settings, price=2.0, gpus=2)
    assert plan.cost == pytest.approx((4 * plan.time.hours.low, 4 * plan.time.hours.high))


def test_a_replication_falls_into_the_range():
    """The one public run with a wall time: 4 to 5 hours on an H200, 89,676 completions of at most 1,024 tokens."""
    settings = preset("qwen2.5-7b/gsm8k", "h100").override(["training.max_new_tokens=1024", "learning_rates=[]"])
    hours = plan_run(settings, "h200", config=SEVEN, problems=7473).time.hours
    assert hours.low < 5
    assert hours.high > 4


def test_vllm_needs_room_for_its_own_weights():
    shape, settings = ModelShape.of(SEVEN), preset("qwen2.5-7b/gsm8k")
    tokens = vllm_cache(settings, shape, GPUS["a100-80gb"].memory)
    assert tokens * 57_344 + shape.parameters * 2 < 0.5 * GPUS["a100-80gb"].memory
    assert vllm_cache(settings, shape, GPUS["t4"].memory) < 0


@pytest.mark.parametrize(("other", "name"), [("a100", "a100-80gb"), ("H100-80GB", "h100"), ("rtx4090", "4090")])
def test_other_names_of_gpus(other, name):
    settings = RunSettings(model="qwen2.5-0.5b", task="gsm8k")
    assert plan_run(settings, other).gpu == plan_run(settings, name).gpu == GPUS[name]


def test_gpus():
    assert not GPUS["t4"].bfloat16
    assert all(gpu.memory < 200 * 2**30 and 1e11 < gpu.bandwidth < 1e13 for gpu in GPUS.values())
