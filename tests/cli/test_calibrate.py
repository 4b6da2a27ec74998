"""tinylora calibrate: a basis file that an adapter of the nano base takes."""

import json

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.cli import main

OPTIONS = ["--rank", "2", "--directions", "3", "--problems", "8", "--group-size", "4", "--looks", "1"]


def test_a_basis_of_the_nano_base(capsys, tmp_path):
    out = tmp_path / "new" / "basis.safetensors"
    argv = ["calibrate", "nano", "--task", "nano", *OPTIONS, "--max-new-tokens", "48", "--out", str(out), "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    basis = tl.load_basis(out)
    assert result["fingerprint"] == basis.fingerprint()
    assert (result["directions"], result["rank"], result["problems"]) == (3, 2, 8)
    assert len(result["spectrum"]) >= 3
    assert 3 <= result["informative"] <= 8
    model, _ = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=3, n_tie="all", projection=basis))
    assert adapter.num_parameters == 3


def test_too_few_problems_are_refused_before_a_model_is_loaded(capsys, tmp_path):
    assert main(["calibrate", str(tmp_path), "--task", "nano", "--directions", "9", "--problems", "8"]) == 1
    assert "8 problems have no 9 directions; calibrate on more, or ask for fewer" in capsys.readouterr().err
