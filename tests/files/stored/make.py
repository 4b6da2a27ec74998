"""Makes the files beside it with an older version of the library; see README.md."""

import json
import sys
from pathlib import Path

import torch

import tinylora_lite as tl
from tinylora_lite import nano

HERE = Path(__file__).parent
TARGETS = ["k_proj", "model.layers.6.mlp.down_proj"]
"""Eight modules of the nano base."""


def small_basis(names: list[str]) -> tl.Basis:
    generator = torch.Generator().manual_seed(3)
    return tl.Basis(torch.randn(2, len(names), 2, 2, generator=generator), tuple(names), provenance={"seed": 3})


def main(version: str) -> None:
    model, _ = nano.load()
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(TARGETS))]
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in names}
    configs = {
        "random": {"u": 1, "n_tie": 16, "seed": 3},
        "structured": {"rank": 3, "u": 2, "n_tie": 4, "tying": "structured", "sigma": "split", "seed": 2**64 - 1},
        "lora_xs": {"rank": 2, "u": 4, "sigma": "right", "projection": "identity", "target_modules": TARGETS},
        "shipped_basis": {"rank": 8, "u": 13, "n_tie": "all", "projection": nano.basis()},
        "own_basis": {"u": 2, "n_tie": "all", "target_modules": TARGETS, "projection": small_basis(names)},
    }
    given = {}
    if hasattr(tl.TinyLoraConfig(), "groups"):
        from tinylora_lite.factors import Factors

        groups = [0, 1, 0, 1, 2, 2, 0, 1]
        configs["groups"] = {"u": 3, "groups": groups, "arithmetic": "float32", "target_modules": TARGETS}
        configs["given"] = {"target_modules": TARGETS}
        random = torch.Generator().manual_seed(5)
        for name in names[:2]:
            out, into = shapes[name]
            parts = ((out, 2), (2, into), (1, 2, 2))
            given[name] = Factors(*(torch.randn(part, generator=random) for part in parts))
    expected = {}
    for number, (name, settings) in enumerate(configs.items()):
        factors = {"factors": given} if name == "given" else {}
        adapter = tl.attach(model, tl.TinyLoraConfig(**settings), **factors)
        with torch.no_grad():
            adapter.vectors.normal_(generator=torch.Generator().manual_seed(number))
            adapter.vectors.copy_(adapter.vectors.bfloat16())
        tl.save(adapter, HERE / version / f"{name}.tinylora", dtype=["bf16", "fp32"][number % 2])
        modules = [adapter.names[place] for place in (0, len(adapter.names) // 2, -1)]
        deltas = {module: adapter.delta(module) for module in modules}
        expected[name] = {
            module: {"norm": float(delta.norm()), "corner": delta[:2, :3].tolist()} for module, delta in deltas.items()
        }
        adapter.detach()
    tl.save_basis(small_basis(names), HERE / version / "basis.safetensors")
    (HERE / version / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
