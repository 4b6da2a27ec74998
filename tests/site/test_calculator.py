"""The calculator of "The LoRA floor": what it counts in the browser is what the library counts."""

import json
import shutil
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tinylora_lite import count_parameters
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.planning.shapes import NAMES as ALL_NAMES
from tinylora_lite.planning.shapes import model_config

NAMES = tuple(name for name in ALL_NAMES if name != "qwen2.5-math-7b")
"""The models that the page draws: Math-7B has the shape of the 7B that is there already."""

CHAPTER = "notebooks/03_lora_floor.html"
RANKS = [{"rank": rank} for rank in (1, 2, 8, 64)]
TIES = [
    {"u": u, "n_tie": n_tie, "tying": tying}
    for u in (1, 13)
    for n_tie in (1, 2, 3, 16, 36, 100, 196, 1000, "all")
    for tying in ("tiled", "structured")
]
SETTINGS = {"full": [{}], "lora": RANKS, "lora_xs": RANKS, "vera": RANKS, "tinylora": TIES}
IN_JAVASCRIPT = {"n_tie": "nTie"}

# Reads [[function, arguments], ...] and writes the results; an error becomes its message.
RUNNER = """
const library = require(process.argv[1]);
const calls = JSON.parse(require("fs").readFileSync(0, "utf8"));
const results = calls.map(([name, parts]) => {
  try { return library[name](...parts); } catch (error) { return error.message; }
});
process.stdout.write(JSON.stringify(results));
"""

# Does what a reader does, one step after another, and leaves what the reader then sees.
READER = """
const form = document.querySelector(".calculator form");
const see = () => ({
  result: form.querySelector("output").textContent,
  rungs: [...form.querySelectorAll("table:not([hidden]) tbody tr")].map(
    (row) => [...row.cells].map((cell) => cell.textContent)),
  fields: [...form.elements].filter((field) => field.name && field.offsetParent).map((field) => field.name),
});
const seen = STEPS.map((step) => {
  for (const [name, value] of Object.entries(step)) {
    const field = form.elements[name];
    if (typeof value === "boolean") field.checked = value; else field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }
  return see();
});
const nameless = [...form.elements].filter((field) => field.name && !field.labels.length).map((field) => field.name);
const live = form.querySelector("output").getAttribute("aria-live");
const left = document.createElement("pre");
left.id = "left";
left.textContent = JSON.stringify({ seen, nameless, live });
document.body.append(left);
"""


@pytest.fixture(scope="module")
def script(site):
    return site / "_static" / "calculator.js"


@pytest.fixture(scope="module")
def chapter(pages):
    return pages[CHAPTER]


@pytest.fixture(scope="module")
def handed_over(chapter):
    return json.loads(chapter.select_one(".calculator script").string)


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(model_config(name)) for name in NAMES}


@pytest.fixture(scope="module")
def in_javascript(script):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")

    def run(calls):
        done = subprocess.run(
            [node, "-e", RUNNER, str(script)], input=json.dumps(calls), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def read(chapter, script, tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    bs4 = pytest.importorskip("bs4")
    folder = tmp_path_factory.mktemp("calculator")

    def run(*steps):
        reader = READER.replace("STEPS", json.dumps(steps))
        page = folder / "page.html"
        page.write_text(
            f'<!doctype html><meta charset="utf-8">{chapter.select_one(".calculator")}'
            f'<script src="{script.as_uri()}"></script><script>{reader}</script>',
            encoding="utf-8",
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        done = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        left = bs4.BeautifulSoup(done.stdout, "html.parser").find(id="left")
        assert left is not None, done.stderr
        return json.loads(left.string)

    return run


def test_the_chapter_hands_over_the_shape_of_every_model(handed_over, models):
    assert set(handed_over["models"]) == set(NAMES)
    assert handed_over["start"] in NAMES
    for name, model in models.items():
        shapes = [list(model.get_submodule(site.name).weight.shape) for site in find_target_modules(model)]
        known = handed_over["models"][name]
        assert known["modules"] * known["layers"] == shapes
        assert known["all"] == sum(p.numel() for p in model.parameters())


def test_counts_agree_on_every_model(handed_over, models, in_javascript):
    asked = [(name, *of) for name in NAMES for of in [(m, s) for m, given in SETTINGS.items() for s in given]]
    calls = []
    for name, method, settings in asked:
        renamed = {IN_JAVASCRIPT.get(key, key): value for key, value in settings.items()}
        calls.append(["count", [handed_over["models"][name], method, renamed]])
    assert in_javascript(calls) == [count_parameters(models[n], method, **settings) for n, method, settings in asked]


@pytest.mark.parametrize(
    ("layers", "width", "heads", "kv_heads", "mlp", "vocabulary", "tied"),
    [(3, 64, 4, 2, 96, 99, True), (5, 96, 6, 6, 160, 1000, False), (32, 4096, 32, 8, 14336, 32_000, False)],
)
def test_a_shape_of_ones_own_is_a_llama(layers, width, heads, kv_heads, mlp, vocabulary, tied, in_javascript):
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    kv = width // heads * kv_heads
    sizes = {"layers": layers, "width": width, "kv": kv, "mlp": mlp, "vocabulary": vocabulary, "tied": tied}
    (shape,) = in_javascript([["llama", [sizes]]])
    methods = [("full", {}), ("lora", {"rank": 3}), ("vera", {"rank": 3}), ("lora_xs", {"rank": 3})]
    found = in_javascript([["count", [shape, method, settings]] for method, settings in methods])
    assert found == [count_parameters(config, method, **settings) for method, settings in methods]


def test_what_cannot_be_counted_is_said(handed_over, in_javascript):
    model = handed_over["models"]["nano"]
    smallest = min(min(shape) for shape in model["modules"])
    rank = "Give “rank r” as a whole number from 1 to 100,000."
    cut = f"LoRA-XS takes its factors from the weights; here its rank ends at {smallest}."
    asked = [
        ("lora", {"rank": 0}, rank),
        ("vera", {"rank": 0.5}, rank),
        ("lora_xs", {"rank": smallest}, smallest**2 * 49),
        ("lora_xs", {"rank": smallest + 1}, cut),
        ("tinylora", {"u": None, "nTie": 1}, "Give “u, numbers in one v” as a whole number from 1 to 1,000,000."),
        ("tinylora", {"u": 1, "nTie": 0}, "Give “n_tie, modules that share it” as a whole number from 1 to 1,000,000."),
    ]
    found = in_javascript([["count", [model, method, settings]] for method, settings, _ in asked])
    assert found == [expected for *_, expected in asked]


def test_bytes_in_words(in_javascript):
    said = {2: "2 B", 26: "26 B", 999: "999 B", 1000: "1 kB", 999_999: "1 MB", 5_046_272: "5.05 MB"}
    said |= {15_231_233_024: "15.2 GB", 123_456: "123 kB", 10**15: "1,000 TB"}
    assert in_javascript([["size", [count]] for count in said]) == list(said.values())


def test_the_page_counts_while_one_types(read):
    left = read(
        {},
        {"method": "lora"},
        {"rank": 64},
        {"model": "llama-3.1-8b", "rank": 1},
        {"method": "tinylora", "nTie": 3, "tying": "structured"},
        {"allTied": True},
        {"method": "lora", "rank": ""},
    )
    start, lora, more, other, structured, tied, empty = left["seen"]
    compared = "The LoRA floor, 2,523,136, is 194,087 times as many."
    assert start["result"] == f"13 numbers 52 B in fp32, 26 B in bf16 {compared}"
    assert start["fields"] == ["model", "method", "u", "nTie", "allTied", "tying"]
    assert [numbers for _, numbers, _ in start["rungs"]] == [
        "7,615,616,512", "2,523,136", "1,390,788", "196", "13", "1",
    ]  # fmt: skip
    assert ["TinyLoRA, u = 1, n_tie = 16 (your choice)", "13", "26 B"] in start["rungs"]
    assert "This is the LoRA floor." in lora["result"]
    assert lora["fields"] == ["model", "method", "rank"]
    assert len(lora["rungs"]) == 6
    assert "64 times the LoRA floor of 2,523,136" in more["result"]
    assert len(more["rungs"]) == 7
    assert other["result"].startswith("2,621,440 numbers")
    assert structured["result"].startswith("77 numbers")
    assert tied["result"].startswith("1 number ")
    assert empty["rungs"] == []
    assert empty["result"] == "Give “rank r” as a whole number from 1 to 100,000."
    assert left["nameless"] == []
    assert left["live"] == "polite"


def test_a_shape_of_ones_own_starts_from_the_model_before(read):
    left = read({"model": "qwen2.5-7b", "method": "lora"}, {"model": "own"}, {"width": 4096, "kv": 1024}, {"mlp": 0})
    before, own, changed, wrong = left["seen"]
    assert own["result"] == before["result"]
    assert own["fields"] == ["model", "method", "layers", "width", "kv", "mlp", "vocabulary", "tied", "rank"]
    assert changed["result"].startswith(f"{28 * (9 * 4096 + 2 * 1024 + 3 * 18944):,} numbers")
    assert wrong["result"] == "Give “MLP” as a whole number from 1 to 1,000,000."


def test_without_javascript_a_table_has_every_model(chapter, models):
    assert chapter.select_one(".calculator-without").get_text().endswith("the table above has every model.")
    cells = {cell.get_text(strip=True) for cell in chapter.select("article table td")}
    floors = {f"{count_parameters(model, 'lora', rank=1):,}" for model in models.values()}
    assert floors <= cells
