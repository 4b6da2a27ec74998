"""Makes the PEFT folders beside it, with the PEFT that is installed; run once with 0.19.1 and once with 0.20.0:

    pip install --no-deps --target old peft==0.19.1
    PYTHONPATH=old python tests/files/peft_files/make.py

Every folder is what PEFT's own ``save_pretrained`` wrote, less its README. Beside it lie the base's weights, an input,
and the outputs that this PEFT computed.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent


class Tower(nn.Module):
    """Two blocks whose modules stand in another order than the one in which tying counts them."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"down_proj": (12, 8), "q_proj": (8, 8), "up_proj": (8, 12)}
        blocks = ({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()} for _ in range(2))
        self.layers = nn.ModuleList(nn.ModuleDict(block) for block in blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = x + block["down_proj"](torch.tanh(block["up_proj"](block["q_proj"](x))))
        return x


def make(folder: Path, save_projection: bool) -> None:
    """One adapter with uneven groups (of 1, 1, 1 and 3 modules) and its outputs."""
    import peft

    random = torch.Generator().manual_seed(7)
    base, x = Tower(), torch.randn(3, 8, generator=random)
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random))
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    targets = ["q_proj", "up_proj", "down_proj"]
    settings = {"r": 2, "u": 3, "weight_tying": 0.3, "projection_seed": 5, "save_projection": save_projection}
    model = peft.get_peft_model(base, peft.TinyLoraConfig(target_modules=targets, **settings))
    with torch.no_grad():
        for vector in model.base_model.tinylora_v["default"].values():
            vector.copy_(torch.randn(vector.shape, generator=random))
        outputs = model(x)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tensors = {"x": x, "outputs": outputs} | {f"base.{name}": weight for name, weight in weights.items()}
    save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    import peft

    make(HERE / peft.__version__ / "with_p", save_projection=True)
    make(HERE / peft.__version__ / "without_p", save_projection=False)
