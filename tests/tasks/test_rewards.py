"""Rewards of answers that people and models write, and of hostile ones; the process that compares."""

import doctest
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

import tinylora_lite as tl
from tinylora_lite.tasks import answers, math_equal, rewards

DATA = Path(__file__).parents[3] / "shared" / "data"
SECONDS = 1.0
"""The wall-clock time that the reward of any completion may take."""
SLACK = 0.5
"""For a busy machine."""

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)

needs_ps = pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")


@pytest.fixture
def worker():
    """The process that compares, started before a test measures time."""
    pytest.importorskip("math_verify")
    assert math_equal.equal("1/2", r"\frac{1}{2}")


def boxed(answer: str) -> str:
    return rf"Therefore the answer is \boxed{{{answer}}}."


@pytest.mark.parametrize("module", [answers, rewards])
def test_worked_examples(module):
    tests = doctest.testmod(module)
    assert tests.failed == 0
    assert tests.attempted > 0


# --- GSM8K -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real GSM8K is not in {DATA}")
@pytest.mark.parametrize(("split", "count"), [("test", 1319), ("train", 7473)])
def test_every_gold_answer_of_gsm8k_earns_its_reward(split, count):
    lines = (DATA / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    worked = [json.loads(line)["answer"] for line in lines]
    golds = [text.split("####")[1].strip() for text in worked]
    assert len(golds) == count
    numbers = [int(gold.replace(",", "")) for gold in golds]  # the reference: Python's own reading
    assert all(tl.gsm8k_reward(text, gold) == 1.0 for text, gold in zip(worked, golds, strict=True))
    for gold, number in list(zip(golds, numbers, strict=True))[:1319]:
        for written in (f"{number:,}", f"${number}", f"{number}.00", f"{number} dollars", f"${number:,}.0"):
            assert tl.gsm8k_reward(f"#### {written}", gold) == 1.0
            assert tl.gsm8k_reward(boxed(written), gold, form="boxed") == 1.0
            assert tl.gsm8k_reward(f"So the answer is {written}.", gold, lenient=True) == 1.0
        for wrong in (number + 1, -number - 1, number * 10 + 1, number + 0.01):
            assert tl.gsm8k_reward(f"#### {wrong:.2f}", gold) == 0.0


@pytest.mark.parametrize(
    ("completion", "gold", "strict", "lenient"),
    [
        ("#### 18", "18", 1, 1),
        ("#### 18.0", "18", 1, 1),
        ("#### 18.00", "18.0", 1, 1),
        ("####18", "18", 1, 1),
        ("####\n18", "18", 1, 1),
        ("#### 18\n\nI hope this helps!", "18", 1, 1),
        ("#### 1,000", "1000", 1, 1),
        ("#### 1000", "1,000", 1, 1),
        ("#### 1,000,000.50", "1000000.5", 1, 1),
        ("#### $1{,}000", "1000", 1, 1),
        ("#### -5", "-5", 1, 1),
        ("#### \u22125", "-5", 1, 1),
        ("#### -$5", "-5", 1, 1),
        ("#### $-5", "-5", 1, 1),
        ("#### 50%", "50", 1, 1),
        (r"#### 50\%", "50", 1, 1),
        ("#### 18 eggs.", "18", 1, 1),
        ("#### 0.5", ".5", 1, 1),
        ("#### 1/2", "0.5", 1, 1),
        (r"#### \frac{1}{2}", "0.5", 1, 1),
        ("#### 18", "9 * 2 = 18\n#### 18", 1, 1),
        ("#### 17\nNo, wait.\n#### 18", "18", 1, 1),
        ("#### 18\nNo, wait.\n#### 17", "18", 0, 0),
        ("#### 18 or 19", "18", 0, 1),
        ("#### 1,23", "1", 0, 1),
        ("#### 1e3", "1000", 0, 0),
        ("#### 2^10", "2", 0, 1),
        ("#### 18", "180", 0, 0),
        ("#### 180", "18", 0, 0),
        ("#### 0.1 + 0.2", "0.3", 0, 0),
        ("#### eggs: 18", "18", 0, 1),
        ("####", "18", 0, 0),
        ("18", "18", 0, 1),
        ("so she makes $18 every day.", "18", 0, 1),
        ("9 * 2 = 18", "18", 0, 1),
        ("10 - 3", "3", 0, 1),
        (r"so it is \boxed{18}", "18", 0, 1),
        ("The answer is 18. I used 2 steps.", "18", 0, 1),
        ("**Answer:** $18$ (2 steps)", "18", 0, 1),
        ("The answer is 9 * 2 = 18.", "18", 0, 1),
        ("The answer is not clear, maybe 18", "18", 0, 1),
        ("I do not know", "18", 0, 0),
        ("", "18", 0, 0),
        ("#### 18", "", 0, 0),
        ("#### 18", "eighteen", 0, 0),
        ("#### 1/0", "0", 0, 0),
    ],
)
def test_gsm8k(completion, gold, strict, lenient):
    assert tl.gsm8k_reward(completion, gold) == strict
    assert tl.gsm8k_reward(completion, gold, lenient=True) == lenient


def test_gsm8k_under_the_boxed_prompt():
    assert tl.gsm8k_reward(r"\boxed{\$1,\!000 \text{ dollars}}", "1000", form="boxed") == 1.0
    assert tl.gsm8k_reward("#### 18", "18", form="boxed") == 0.0
    assert tl.gsm8k_reward("#### 18", "18", form="boxed", lenient=True) == 1.0
    assert tl.gsm8k_reward(r"\boxed{17}, no, \boxed{18}", "18", form="boxed") == 1.0
    assert tl.gsm8k_reward(r"\boxed{\boxed{18}}", "18", form="boxed") == 1.0


@pytest.mark.parametrize(
    ("completion", "form", "number", "kept"),
    [
        ("#### 18", "####", True, True),
        ("#### eggs", "####", True, False),
        ("18", "####", True, False),
        (r"\boxed{x}", "boxed", False, True),
        (r"\boxed{x}", "boxed", True, False),
        (r"\boxed{}", "boxed", False, False),
        (r"\boxed{1", "boxed", False, False),
        (r"\boxed {\left\{1\right\}}", "boxed", False, True),
        (r"\boxed{\{1}", "boxed", False, True),
    ],
)
def test_format(completion, form, number, kept):
    assert rewards.keeps_format(completion, form=form, number=number) is kept


# --- mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "worth"),
    [
        ("27", "27.0", 1),
        ("27", 27.0, 1),
        ("025", "25", 1),
        ("28", "27.0", 0),
        (r"\frac{1}{2}", "0.5", 1),
        ("1/2", r"\dfrac{1}{2}", 1),
        (r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}", 1),
        ("x^2 + 2x + 1", "(x+1)^2", 1),
        ("x^2 + 2x", "(x+1)^2", 0),
        ("[1,2)", "[1,2)", 1),
        ("(1,2)", "[1,2)", 0),
        (r"\{2, 1\}", r"\{1,2\}", 1),
        ("x=5", "5", 1),
        (r"50\%", "0.5", 1),
        (r"12\text{ cm}", "12", 1),
        ("1,000", "1000", 1),
        (r"4.5 \times 10^{33}", "4.5e33", 1),
        (r"4.5 \times 10^{32}", "4.5e33", 0),
        (r"\text{Friday}", "Friday", 1),
        (r"\text{Monday}", "Friday", 0),
        (r"\text{(C)}", "C", 1),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
        (r"2^{1009}", "$2^{1009}$", 1),
        (r"27 \text{ or } 28", "27", 0),
        ("26, 27, 28", "27", 0),
        ("3.14159", "3.1416", 0),
        ("", "27", 0),
        ("27", "", 0),
    ],
)
def test_mathematics(worker, answer, gold, worth):
    assert tl.math_reward(boxed(answer), gold) == worth


def test_strict_and_lenient_mathematics(worker):
    half = r"\frac{1}{2}"
    for text in (half, f"The answer is ${half}$. Good.", f"answer: {half}", f"so ${half}$", f"#### {half}", "so 0.5"):
        assert tl.math_reward(text, "0.5") == 0.0
    for text in (f"The answer is ${half}$. Good.", f"answer: {half}", f"so ${half}$", f"#### {half}", "so 0.5"):
        assert tl.math_reward(text, "0.5", lenient=True) == 1.0
    assert tl.math_reward(f"#### {half}", "0.5", form="####") == 1.0
    assert tl.math_reward(rf"the answer is 3, so \boxed{{{half}}}", "0.5", lenient=True) == 1.0
    assert tl.math_reward("so 3", "0.5", lenient=True) == 0.0


# --- hostile ---------------------------------------------------------------------------------------------------------

HOSTILE = {
    "tower": "9^{9^{9^{9^9}}}",
    "power of a power": "(10^{99999})^{99999}",
    "huge exponent": "10^{99999999}",
    "python power": "9**9**9**9",
    "factorial": "99999999!",
    "binomial": r"\binom{10^9}{5\cdot10^8}",
    "polynomial": "(x+y+z+w+a+b+c+d)^{99}-(x+1)^{99999}",
    "integral": r"\int_0^1 x^{x^{x}}\sin(x^{x}) dx",
    "series": r"\sum_{n=1}^{\infty}\frac{\sin(n^n)}{n^n}",
    "trigonometry": r"\sin(\cos(\tan(x^{99}+\sin(y^{98}))))^{50}-\cos(x)^{77}\tan(y)^{66}",
    "shallow nesting": "(" * 25 + "1" + ")" * 25,
    "deep nesting": "(" * 100_000 + "1" + ")" * 100_000,
    "roots": r"\sqrt{" * 29 + "2" + "}" * 29,
    "fractions": r"\frac{1}{1+" * 200 + "x" + "}" * 200,
    "long number": "9" * 1_000_000,
    "long grouped number": "1" + ",000" * 250_000 + "0",
    "long sum": "1+" * 500_000 + "1",
    "spaces": " " * 1_000_000,
    "spaced words": "answer" + " " * 1_000_000 + "answer is" + " " * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "dollars": "$" * 1_000_000,
    "alternating": "$ 1 " * 250_000,
    "many boxes": r"\boxed{1}" * 100_000,
    "many open boxes": r"\boxed{" * 100_000,
    "boxes in boxes": r"\boxed{" * 50_000 + "1" + "}" * 50_000,
    "unbalanced": "}" * 1000 + "{" * 1000,
    "nulls": "\0" * 1000 + "\0" + "1",
    "surrogates": "\ud800\udfff\ud800 3",
    "controls": "".join(map(chr, range(32))) + "\u202e\u2066\ufeff",
    "digits of other scripts": "\u0661\u0662\u0663 \uff11\uff12",
    "combining": "a" + "\u0301" * 100_000,
    "many marks": "#### " * 200_000,
    "code": r"\text{__import__('os')._exit(1)}",
    "calls": "__import__('time').sleep(9)",
    "newlines": "\n" * 1_000_000 + "#### \n",
}


def timed(reward, completion: str, **how) -> float:
    started = time.perf_counter()
    worth = reward(completion, "12345", **how)
    seconds = time.perf_counter() - started
    assert type(worth) is float
    assert worth == 0.0
    assert seconds < SECONDS + SLACK
    return seconds


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_hangs_or_raises(worker, name):
    text = HOSTILE[name]
    for completion in (rf"\boxed{{{text}}}", f"#### {text}", text, f"the answer is {text}"):
        for form in ("####", "boxed"):
            timed(tl.gsm8k_reward, completion, form=form)
            timed(tl.gsm8k_reward, completion, form=form, lenient=True)
    timed(tl.math_reward, rf"\boxed{{{text}}}")
    timed(tl.math_reward, f"the answer is {text}", lenient=True)


@pytest.mark.parametrize("name", ["tower", "huge exponent", "python power", "factorial", "deep"])
def test_what_no_problem_asks_for_is_not_compared(monkeypatch, name):
    """Each comparison of the kind would take until the time limit."""
    monkeypatch.setattr(math_equal, "start", lambda: pytest.fail("compared"))
    assert tl.math_reward(rf"\boxed{{{HOSTILE.get(name, '(' * 31 + '1' + ')' * 31)}}}", "12345") == 0.0


STRANGE = {"none": None, "nan": float("nan"), "bytes": b"18", "list": ["18"], "digits": 10**5000, "surrogate": "\ud800"}


@pytest.mark.parametrize("name", STRANGE)
def test_gold_may_be_anything(worker, name):
    assert tl.gsm8k_reward("#### 18", STRANGE[name]) in (0.0, 1.0)
    assert tl.math_reward(r"\boxed{18}", STRANGE[name]) in (0.0, 1.0)


@pytest.mark.parametrize("gold", [18, 18.0, Fraction(18), "18"])
def test_gold_may_be_a_number(gold):
    assert tl.gsm8k_reward("#### 18", gold) == tl.math_reward(r"\boxed{18}", gold) == 1.0


@pytest.mark.parametrize("completion", [None, 18, b"#### 18", [], object()])
def test_completion_may_be_anything(completion):
    assert tl.gsm8k_reward(completion, "17") == tl.math_reward(completion, "17") == 0.0
    assert rewards.keeps_format(completion, form="boxed") is False


# --- the process that compares ---------------------------------------------------------------------------------------


def members(group: str, states: str = "RSDT") -> list[str]:
    """The processes of a group, or all children of this one, that are in one of these states."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,ppid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    mine = str(os.getpid())
    return [
        pid for pid, pgid, parent, state in rows if (pgid == group or group == parent == mine) and state[0] in states
    ]


def test_an_ordinary_comparison_takes_milliseconds(worker):
    pairs = [(r"\frac{3}{4}", "0.75"), ("x+1", "1+x"), (r"2\sqrt{3}", r"\sqrt{12}"), ("(1,2)", "(1, 2)")]
    for gold, answer in pairs:
        assert math_equal.equal(gold, answer)
    started = time.perf_counter()
    for _ in range(25):
        for gold, answer in pairs:
            assert math_equal.equal(gold, answer)
    assert (time.perf_counter() - started) / 100 < 0.05


def test_the_limit_is_kept_by_killing_and_the_next_comparison_is_quick(worker):
    process = math_equal._process
    for _ in range(2):
        started = time.perf_counter()
        assert not math_equal.equal("1", r"\binom{10^9}{5\cdot10^8}")
        stopped = time.perf_counter()
        assert math_equal.SECONDS * 0.9 < stopped - started < SECONDS + SLACK
        assert math_equal.equal("0.75", r"\frac{3}{4}")
        assert time.perf_counter() - stopped < 0.5
        assert math_equal._process is process, "the program forks; it does not start again"


def test_threads(worker):
    verdicts = {}

    def compare(index: int) -> None:
        verdicts[index] = tl.math_reward(boxed(rf"\frac{{{index}}}{{2}}"), str(index / 2 if index % 3 else index + 5))

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(1, 19)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert verdicts == {i: float(i % 3 != 0) for i in range(1, 19)}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forks_have_a_process_of_their_own(worker):
    """What a DataLoader's workers are; parent and children ask at the same time and get their own answers."""
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        pairs = [(boxed(rf"\frac{{{i}}}{{4}}"), str(i / 4)) for i in range(1, 9)]
        waiting = pool.starmap_async(tl.math_reward, pairs)
        assert [tl.math_reward(text, str(i / 4 + i % 2)) for i, (text, _) in enumerate(pairs, 1)] == [0.0, 1.0] * 4
        assert waiting.get(60) == [1.0] * 8


@needs_ps
def test_no_zombies(worker):
    for _ in range(3):
        assert not math_equal.equal("1", r"\binom{10^9}{5\cdot10^8}")
    math_equal._close()
    assert members(str(os.getpid()), "Z") == []
    assert math_equal.equal("1/2", "0.5"), "a new one starts"


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_a_process_that_was_killed_is_replaced(worker):
    os.killpg(math_equal._process.pid, 9)
    time.sleep(0.2)
    assert math_equal.equal("0.25", r"\frac{1}{4}")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a thread")
def test_an_interrupt_leaves_no_stale_verdict(worker):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        [math_equal.equal("1", r"\binom{10^9}{5\cdot10^8}") for _ in range(20)]
    signal.signal(signal.SIGINT, before)
    assert not math_equal.equal("0.5", "1/3")
    assert math_equal.equal("0.5", "1/2")


SCRIPT = """
import sys
import torch  # in this process; not in the one that compares
from tinylora_lite.tasks.rewards import math_reward
print(math_reward(r"\\boxed{\\frac{1}{2}}", "0.5"), math_reward(r"\\boxed{\\binom{10^9}{5\\cdot10^8}}", "1"))
from tinylora_lite.tasks import math_equal
print(math_equal._process.pid)
if "die" in sys.argv:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_math_verify
@needs_ps
def test_no_main_guard_is_needed_and_nothing_outlives_the_caller(tmp_path):
    """A script without ``if __name__ == "__main__"``, which multiprocessing's spawn would run again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error::ResourceWarning", str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    for run in [subprocess.Popen([*command, end], **pipes) for end in ("return", "die")]:
        printed, complaints = run.communicate(timeout=100)
        assert printed.splitlines()[0] == "1.0 0.0", complaints
        assert complaints == ""
        deadline = time.monotonic() + 10
        while (left := members(printed.splitlines()[1])) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_process_that_compares_does_without_torch(worker):
    mapped = Path(f"/proc/{math_equal._process.pid}/maps").read_text(encoding="utf-8")
    assert re.search(r"libpython|python3", mapped)
    assert "libtorch" not in mapped


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_process_that_compares_has_a_limit_of_memory(worker):
    limits = Path(f"/proc/{math_equal._process.pid}/limits").read_text(encoding="utf-8")
    assert re.search(rf"Max address space +{4 << 30} ", limits)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(math_equal, "find_spec", lambda name: None)
    math_equal._close()
    with pytest.raises(ImportError, match=r'pip install "tinylora_lite\[train\]"'):
        tl.math_reward(boxed(r"\frac{1}{2}"), "0.5")
    assert tl.math_reward(boxed("27"), "27.0") == 1.0, "equal numbers need no math-verify"


def test_a_process_that_cannot_start_says_so(worker, monkeypatch, tmp_path):
    math_equal._close()
    monkeypatch.setattr(math_equal, "__file__", str(tmp_path / "missing.py"))
    with pytest.raises(RuntimeError, match="does not start"):
        math_equal.equal("1/2", "0.5")
    monkeypatch.undo()
    assert math_equal.equal("1/2", "0.5")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("(2^3)^2", "64"), ("(1+2^3)^2", "81"), ("(x+3^2)^2", "(x+9)^2"), ("(10^2)^{3}", "1000000")],
)
def test_the_power_of_a_bracket_is_no_tower(answer, gold):
    assert tl.math_reward(rf"\boxed{{{answer}}}", gold) == 1.0
