"""The optimizer over a LoRA: the gradients and the steps of the adapter itself, checkpoints, and what it refuses."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import tinylora_lite as tl
import tinylora_lite.training.batches as batches_of_training
from tinylora_lite import TinyLoraConfig, nano
from tinylora_lite.files.file_format import AdapterFileError
from tinylora_lite.sampling.logprobs import completion_logprobs

pytest.importorskip("peft")

import peft

from tinylora_lite.engines import TinyLoraAdamW, as_lora

CONFIGS = {
    "tied": TinyLoraConfig(rank=2, u=3, n_tie=5),
    "all": TinyLoraConfig(rank=4, u=13, n_tie="all", seed=1),
    "structured": TinyLoraConfig(rank=2, u=1, n_tie=2, tying="structured"),
    "split": TinyLoraConfig(rank=3, u=2, n_tie=3, sigma="split"),
    "right": TinyLoraConfig(rank=3, u=2, n_tie=3, sigma="right"),
    "LoRA-XS": tl.lora_xs(2),
}
IDS = torch.arange(5, 65).view(4, 15)


def loss_of(model, ids=IDS):
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def moved(adapter, size=0.02):
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        adapter.vectors.copy_(size * torch.randn(adapter.vectors.shape, generator=noise))
    return adapter


def gradient_of_v(optimizer):
    """The gradient of v that a step takes, from the LoRA's gradients."""
    seen = []
    handle = optimizer.vectors.register_post_accumulate_grad_hook(lambda v: seen.append(v.grad.clone()))
    optimizer.step()
    handle.remove()
    return seen[-1]


def dense_gradient(model, adapter):
    """The gradient of v by W' = W + left R right, all of it in float64, without hook and without LoRA."""
    v = adapter.vectors.detach().double().requires_grad_()
    weights = {}
    for name, group in zip(adapter.names, adapter.groups, strict=True):
        left, right, P = (part.double() for part in adapter.factors(name).parts)
        update = left @ torch.einsum("u,ujk->jk", v[group], P) @ right
        weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight").detach() + update
    logits = torch.func.functional_call(model, weights, (IDS,)).logits[:, :-1]
    return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()), v)[0]


class TestGradient:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_it_is_that_of_the_formula(self, make_model, config):
        model = make_model().double()
        adapter = moved(tl.attach(model, config))
        with adapter.disabled():
            expected = dense_gradient(model, adapter)
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.double().parameters(), adapter=adapter)
            loss_of(lora).backward()
            found = gradient_of_v(optimizer)
        assert expected.abs().min() > 0
        assert (found - expected).norm() < 1e-6 * expected.norm()

    def test_parts_accumulate(self, model):
        adapter = moved(tl.attach(model, CONFIGS["tied"]))
        found = []
        for parts in ([IDS], IDS.split(2)):
            with as_lora(adapter) as lora:
                optimizer = TinyLoraAdamW(lora.parameters(), lr=0.0, adapter=adapter)
                for part in parts:
                    (loss_of(lora, part) / len(parts)).backward()
                found.append(gradient_of_v(optimizer))
        assert torch.allclose(*found, rtol=1e-4, atol=1e-7)

    def test_a_matrix_without_gradient_counts_as_zero(self, model):
        adapter = moved(tl.attach(model, CONFIGS["tied"]))
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), lr=0.0, adapter=adapter)
            optimizer.step()
            assert optimizer.gradient_norm == 0.0
            loss_of(lora).backward()
            matrices = optimizer.param_groups[0]["params"]
            matrices[0].grad = torch.zeros_like(matrices[0])
            expected = gradient_of_v(optimizer)
            matrices[0].grad = None
            assert torch.equal(gradient_of_v(optimizer), expected)


class TestSteps:
    def steps(self, model, adapter, parameters, optimizer, scheduler=None, count=5):
        for step in range(count):
            loss_of(model, IDS.roll(step, dims=1)).backward()
            if isinstance(optimizer, torch.optim.AdamW):
                torch.nn.utils.clip_grad_norm_(parameters, 0.05)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_they_are_those_of_adamw_on_v(self, make_model, config):
        options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
        plain = make_model()
        own = tl.attach(plain, config)
        optimizer = torch.optim.AdamW([own.vectors], **options)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        self.steps(plain, own, [own.vectors], optimizer, scheduler)
        model = make_model()
        adapter = tl.attach(model, config)
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), adapter=adapter, max_grad_norm=0.05, **options)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
            self.steps(lora, adapter, None, optimizer, scheduler)
            trained = loss_of(lora)
        assert own.vectors.abs().max() > 0.01
        assert torch.allclose(adapter.vectors, own.vectors, atol=2e-6)
        assert torch.allclose(loss_of(model), trained, rtol=1e-5)

    def test_mode_and_flags_are_as_before(self, make_model):
        adapter = tl.attach(model := make_model(), CONFIGS["tied"])
        adapter.detach()
        with as_lora(adapter) as lora:
            TinyLoraAdamW(lora.parameters(), adapter=adapter)
            lora.train()
        assert all(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())

    def test_the_model_is_as_before_and_carries_v(self, make_model, tmp_path):
        model = make_model()
        adapter = tl.attach(model, CONFIGS["tied"])
        with as_lora(adapter) as lora:
            self.steps(lora, adapter, None, TinyLoraAdamW(lora.parameters(), lr=0.1, adapter=adapter))
        assert model.state_dict().keys() == make_model().state_dict().keys()
        tl.save(adapter, tmp_path / "a.tinylora", "fp32")
        assert torch.equal(tl.load(fresh := make_model(), tmp_path / "a.tinylora").vectors, adapter.vectors)
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)

    def test_a_sampler_is_sent_the_same_inside(self, model, tmp_path):
        adapter = moved(tl.attach(model, CONFIGS["split"]))
        sent = []
        for inside in (False, True):
            with as_lora(adapter) if inside else nullcontext():
                file = tl.export_lora(adapter, tmp_path / f"lora-{inside}") / "adapter_model.safetensors"
                sent.append(dict(tl.merged_weights(adapter)) | {"lora": torch.tensor(list(file.read_bytes()))})
        assert sent[0].keys() == sent[1].keys()
        assert all(torch.equal(sent[0][name], sent[1][name]) for name in sent[0])

    def test_gradients_of_zero_and_of_infinity_change_nothing(self, model):
        adapter = moved(tl.attach(model, CONFIGS["tied"]))
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), lr=0.1, weight_decay=0.1, adapter=adapter)
            matrices = optimizer.param_groups[0]["params"]
            before = [adapter.vectors.clone(), *(p.clone() for p in matrices)]
            for value in (0.0, torch.inf):
                for p in matrices:
                    p.grad = torch.full_like(p, value)
                if value:
                    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
                        optimizer.step()
                else:
                    optimizer.step()
            assert optimizer.state_dict()["state"][0]["step"] == 0
            assert all(map(torch.equal, before, [adapter.vectors, *matrices]))

    def test_in_bfloat16_v_stays_float32(self, make_model):
        model = make_model().bfloat16()
        adapter = tl.attach(model, CONFIGS["tied"])
        with as_lora(adapter) as lora:
            for name, p in lora.named_parameters():  # as an engine may do it
                if "lora_" in name:
                    p.data = p.data.bfloat16()
            optimizer = TinyLoraAdamW(lora.parameters(), lr=1e-4, adapter=adapter)
            self.steps(lora, adapter, None, optimizer)
            name, group = "model.layers.0.self_attn.q_proj", adapter.groups[0]
            B = lora.get_parameter(f"base_model.model.{name}.lora_B.default.weight")
            R = adapter.factors(name).mixing(adapter.vectors[group])
            assert B.dtype == torch.bfloat16
            assert torch.equal(B, (adapter.factors(name).left @ R).bfloat16())
        assert adapter.vectors.dtype == torch.float32
        assert not torch.equal(adapter.vectors, adapter.vectors.bfloat16().float())

    def test_a_scaler_unscales_first(self, make_model):
        found = []
        for scaler in (torch.amp.GradScaler("cpu", 2.0**12), torch.amp.GradScaler("cpu", enabled=False)):
            model = make_model()
            adapter = tl.attach(model, CONFIGS["tied"])
            with as_lora(adapter) as lora:
                optimizer = TinyLoraAdamW(lora.parameters(), lr=0.01, adapter=adapter, max_grad_norm=0.05)
                for _ in range(3):
                    scaler.scale(loss_of(lora)).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
            found.append(adapter.vectors.detach())
        assert found[0].abs().max() > 0.01
        assert torch.allclose(*found, atol=1e-5)

    def test_a_closure_is_called(self, model):
        adapter = tl.attach(model, CONFIGS["tied"])
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), lr=0.01, adapter=adapter)

            def closure():
                loss = loss_of(lora)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
        assert adapter.vectors.any()


def test_grpo_in_plain_pytorch_makes_the_steps_of_our_loop(monkeypatch):
    """The same batches, 13 calibrated parameters on nano: the gradients of the first step to 1e-6, and all steps."""
    monkeypatch.setattr(batches_of_training, "WORTH_A_PART", 10**9)  # one backward pass, and one gradient, a step
    config = TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis())
    settings = tl.GRPOSettings(
        steps=4, prompts_per_step=8, group_size=4, max_new_tokens=nano.MAX_NEW_TOKENS, learning_rate=0.1, micro_batch=32
    )
    (model, tokenizer), batches, gradients = nano.load(), [], {"own": [], "lora": []}
    own = tl.attach(model, config)
    own.vectors.register_post_accumulate_grad_hook(lambda v: gradients["own"].append(v.grad.clone()))
    tl.train_grpo(model, tokenizer, own, nano.task(), settings, on_rollouts=lambda *batch: batches.append(batch))
    model, _ = nano.load()
    adapter = tl.attach(model, config)
    adapter.vectors.register_post_accumulate_grad_hook(lambda v: gradients["lora"].append(v.grad.clone()))
    with as_lora(adapter) as lora:
        lora.eval()
        optimizer = TinyLoraAdamW(lora.parameters(), lr=0.1, adapter=adapter, max_grad_norm=settings.max_grad_norm)
        for rollouts, rewards in batches:
            logprobs = completion_logprobs(model, rollouts)
            advantages = tl.grpo_advantages(rewards).flatten()
            correction = {"sampler_logprobs": rollouts.logprobs, "tis_cap": settings.tis_cap}
            tl.grpo_loss(logprobs, logprobs.detach(), advantages, rollouts.completion_mask, **correction).backward()
            optimizer.step()
            optimizer.zero_grad()
    first = {way: found[0] for way, found in gradients.items()}
    assert (first["lora"] - first["own"]).norm() < 1e-6 * first["own"].norm()
    assert own.vectors.abs().max() > 0.1
    assert torch.allclose(adapter.vectors, own.vectors, atol=1e-4)


class TestResuming:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_exact(self, make_model, tmp_path, dtype):
        found = []
        for interrupted in (False, True):
            model = make_model()
            adapter = tl.attach(model, CONFIGS["tied"])
            with as_lora(adapter) as lora:
                lora.to(dtype)
                optimizer = TinyLoraAdamW(lora.parameters(), lr=0.01, adapter=adapter)
                TestSteps().steps(lora, adapter, None, optimizer)
                if interrupted:
                    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
                    with torch.no_grad():
                        adapter.vectors.zero_()
                    optimizer = TinyLoraAdamW(lora.parameters(), lr=0.3, adapter=adapter)
                    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
                TestSteps().steps(lora, adapter, None, optimizer)
                found.append([adapter.vectors.clone(), loss_of(lora)])
        assert all(map(torch.equal, *found))

    def test_the_state_of_another_optimizer_is_refused(self, model):
        adapter = tl.attach(model, CONFIGS["tied"])
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), adapter=adapter)
            other = torch.optim.AdamW(optimizer.param_groups[0]["params"])
            loss_of(lora).backward()
            other.step()
            with pytest.raises(ValueError, match="the state is of another optimizer or another adapter"):
                optimizer.load_state_dict(other.state_dict())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
    def test_a_copy_with_its_model_goes_on_alike(self, model, copied):
        adapter = tl.attach(model, CONFIGS["tied"])
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), lr=0.01, adapter=adapter)
            TestSteps().steps(lora, adapter, None, optimizer)
            twin, other = copied([lora, optimizer])
            for one, its in ((lora, optimizer), (twin, other)):
                TestSteps().steps(one, adapter, None, its)
            assert torch.equal(other.vectors, optimizer.vectors)
            assert other.vectors is not optimizer.vectors
            assert torch.equal(other.state_dict()["state"][0]["vectors"], optimizer.vectors)
            assert torch.equal(loss_of(twin), loss_of(lora))


def test_a_second_lora_inside_the_first_is_refused(model):
    adapter = tl.attach(model, CONFIGS["tied"])
    with as_lora(adapter):
        with pytest.raises(ValueError, match="the model carries a LoRA already; leave the other"), as_lora(adapter):
            pass
        assert not adapter.enabled


class TestParameters:
    """An engine that loads the exported LoRA itself, and knows the optimizer by its class and a file."""

    @pytest.fixture
    def start(self, make_model, tmp_path):
        base = make_model()
        adapter = moved(tl.attach(base, CONFIGS["structured"]))
        tl.export_lora(adapter, tmp_path / "lora")
        tl.save(adapter, tmp_path / "start.tinylora", "fp32", factors=True)
        lora = peft.PeftModel.from_pretrained(make_model(), tmp_path / "lora", is_trainable=True)
        return base, adapter, lora, tmp_path / "start.tinylora"

    @pytest.mark.parametrize("named", [False, True])
    @pytest.mark.parametrize("grouped", [False, True])
    def test_a_file_says_what_the_adapter_says(self, start, grouped, named):
        base, adapter, lora, file = start
        params = [(name, p) if named else p for name, p in lora.named_parameters() if p.requires_grad]
        given = [{"params": params, "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}] if grouped else params
        optimizer = TinyLoraAdamW(given, lr=0.01, weight_decay=0.5, adapter=file)
        assert optimizer.param_groups[0]["weight_decay"] == (0.0 if grouped else 0.5)
        assert torch.equal(optimizer.vectors, adapter.vectors)
        assert not any(p.requires_grad for name, p in lora.named_parameters() if ".lora_A." in name)
        loss_of(lora).backward()
        found = gradient_of_v(optimizer)
        expected = torch.autograd.grad(loss_of(base), adapter.vectors)[0]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
        logits = lora(IDS).logits
        with torch.no_grad():
            adapter.vectors.copy_(optimizer.vectors)
        assert torch.allclose(base(IDS).logits, logits, atol=1e-4)

    def test_a_file_without_factors_is_refused(self, start, tmp_path):
        _, adapter, lora, _ = start
        tl.save(adapter, tmp_path / "small.tinylora")
        with pytest.raises(AdapterFileError, match="save it with factors=True"):
            TinyLoraAdamW(lora.parameters(), adapter=tmp_path / "small.tinylora")

    def test_a_lora_that_starts_elsewhere_is_refused(self, make_model, start):
        _, _, lora, file = start
        lora.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight").data.normal_()
        with pytest.raises(ValueError, match=r"parameters at model.layers.1.mlp.up_proj are not those of the adapter"):
            TinyLoraAdamW(lora.parameters(), adapter=file)
        config = peft.LoraConfig(r=8, target_modules=["q_proj"])
        other = peft.get_peft_model(make_model(), config)
        with pytest.raises(ValueError, match="4 parameters take gradients, and not the 14 matrices B"):
            TinyLoraAdamW(other.parameters(), adapter=file)

    def test_an_adapter_that_acts_beside_the_lora_is_refused(self, start):
        _base, adapter, lora, _ = start
        with pytest.raises(ValueError, match="acts on the model beside its LoRA"):
            TinyLoraAdamW(lora.parameters(), adapter=adapter)
        adapter.detach()
        assert torch.equal(TinyLoraAdamW(lora.parameters(), adapter=adapter).vectors, adapter.vectors)

    @pytest.mark.parametrize("inside", [False, True], ids=["file", "as_lora"])
    def test_in_another_order_they_are_refused(self, make_model, start, inside):
        _, _, lora, adapter = start
        model = make_model()
        if inside:
            adapter = tl.attach(model, CONFIGS["structured"])
        with as_lora(adapter) if inside else nullcontext(lora) as lora:
            params = [p for p in lora.parameters() if p.requires_grad]
            half = len(params) // 2  # layer 1 before layer 0, of the same shapes
            with pytest.raises(ValueError, match=r"parameters at model.layers.0.self_attn.q_proj are not those"):
                TinyLoraAdamW(params[half:] + params[:half], adapter=adapter)

    def test_options_that_v_cannot_have_are_refused(self, start):
        _, _, lora, file = start
        params = [p for p in lora.parameters() if p.requires_grad]
        groups = [{"params": params[:14], "lr": 0.1}, {"params": params[14:], "lr": 0.2}]
        with pytest.raises(ValueError, match="the parameter groups have options that differ"):
            TinyLoraAdamW(groups, adapter=file)
        with pytest.raises(ValueError, match="max_grad_norm must be above 0"):
            TinyLoraAdamW(params, adapter=file, max_grad_norm=0.0)

    def test_later_ones_are_refused(self, start):
        _, _, lora, file = start
        optimizer = TinyLoraAdamW(lora.parameters(), adapter=file)
        with pytest.raises(ValueError, match="the optimizer trains v alone"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
        assert len(optimizer.param_groups) == 1

    def test_gradients_of_the_frozen_ones_do_not_add_up(self, start):
        """verl never clears the model's gradients, only the optimizer's, and one of NaN would stop it for good."""
        _, _, lora, file = start
        optimizer = TinyLoraAdamW(lora.parameters(), adapter=file)
        with lora.disable_adapter():  # the reference of a KL penalty
            lora(IDS)
        loss_of(lora).backward()
        assert any(p.grad is not None for name, p in lora.named_parameters() if ".lora_A." in name)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in lora.parameters())

    def test_of_an_adapter_of_another_rank(self, make_model, start, tmp_path):
        _, _, lora, _ = start
        model = make_model()
        other = tl.attach(model, replace(CONFIGS["structured"], rank=3))
        tl.save(other, tmp_path / "other.tinylora", factors=True)
        with pytest.raises(ValueError, match="are not those of the adapter"):
            TinyLoraAdamW(lora.parameters(), adapter=tmp_path / "other.tinylora")
