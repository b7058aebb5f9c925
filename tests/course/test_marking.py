"""What runs a student's answer: it copies, watches, explains, and knows when the package does the work."""

import importlib.util
import sys
import warnings

import pytest
import torch

from replicate.system.paths import ROOT


@pytest.fixture
def marking(monkeypatch):
    spec = importlib.util.spec_from_file_location("marking", ROOT / "course" / "source" / "L1" / "marking.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "marking", module)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def student(code, name="answer"):
    """A function as a notebook defines it."""
    scope = {"__name__": "__main__", "torch": torch}
    exec(compile(code, "<cell>", "exec"), scope)
    return scope[name]


CACHED = "from replicate.study.statistics import t_quantile as f\nf(2)\n"  # no call of it is seen any more


def said(marking, code, *arguments, **options):
    """The message about an answer."""
    with pytest.raises(marking.NotYet) as caught:
        marking.run(student(code), *arguments, **options)
    return str(caught.value)


def test_an_answer_runs_on_copies_with_options(marking):
    x = torch.ones(3)
    answer = student("def answer(x, k, dim=0):\n    return x + k + dim")
    assert marking.run(answer, x, 2, dim=1).tolist() == [4, 4, 4]
    assert sys.getprofile() is None


@pytest.mark.parametrize(
    "code, message",
    [
        ("answer = 3", "should be a function. Its type is int"),
        ("def answer(x):\n    raise NotImplementedError()", "answer is not written yet"),
        ("def answer(x):\n    y = x", "Does it end with `return`?"),
        ("def answer(x):\n    return x.nothing", "answer stopped with AttributeError"),
        ("def answer(x):\n    return x.argsort(-1, stable=True)", "argsort(dim=-1, stable=True)"),
        ("def answer(x):\n    return x.argsort(-1, descending=True, stable=True)", "needs the names"),
        ("def answer(x):\n    x += 1\n    return x", "changes its argument number 1 in place"),
        ("def answer(x):\n    raise KeyboardInterrupt", "Is there an endless loop?"),
        ("def answer(x):\n    return marking._same(x, x)\nimport marking", "a function of the tests"),
    ],
)
def test_what_goes_wrong_is_said(marking, code, message):
    assert message in said(marking, code, torch.ones(3))


def test_the_line_that_stopped_is_shown(marking, monkeypatch):
    import linecache

    code = "def answer(x):\n    return x @ x.T @ x.T\n"
    monkeypatch.setitem(linecache.cache, "<cell>", (len(code), None, code.splitlines(True), "<cell>"))
    assert said(marking, code, torch.ones(2, 3)).endswith("line of yours: return x @ x.T @ x.T")


@pytest.mark.parametrize(
    "code",
    [
        "from replicate.sparsity import mask24 as answer",
        "import replicate.sparsity as s\ndef answer(x):\n    return s.mask24(x)",
        "def answer(x):\n    from replicate import sparsity\n    return sparsity.mask24(x)",
        "import replicate.sparsity as s\nkept = {1: s.mask24}\ndef answer(x):\n    return kept[1](x)",
        "import functools, replicate.sparsity as s\nanswer = functools.lru_cache(s.mask24)",
        CACHED + "def answer(x):\n    return f(2)",
        CACHED + "def answer(x):\n    return [f(df) for df in (2,)]",
        CACHED + "def helper(df):\n    return f(df)\ndef answer(x):\n    return helper(2)",
        CACHED + "def answer(x, f=f):\n    return f(2)",
        CACHED
        + "def outer(f):\n    def answer(x):\n        return f(2)\n    return answer\nanswer = outer(f)",
        "import functools, replicate.sparsity as s\nanswer = functools.partial(s.mask24, dim=0)",
        "from replicate.sparsity import mask24 as f\ndef answer(x, f=f):\n    try:\n        return f(x)\n"
        "    except Exception:\n        return x",
        "from replicate.sparsity import mask24 as f\ndef answer(x):\n    f(x)\n    raise ValueError",
    ],
)
def test_the_package_earns_nothing_however_it_is_called(marking, code):
    assert "lets the package `replicate` do the work" in said(marking, code, torch.ones(4, 4))


@pytest.mark.parametrize(
    "line",
    [
        "torch.autograd.grad((x * x).sum(), x)[0]",
        "(x * x).sum().backward() or x.grad",
        "torch.func.grad(lambda x: (x * x).sum())(x.detach())",
        "torch.autograd.functional.jacobian(lambda x: (x * x).sum(), x.detach())",
    ],
)
def test_gradients_by_hand(marking, line):
    code = f"def answer(x):\n    x = x.clone().requires_grad_()\n    return {line}"
    assert "asks autograd for the gradients" in said(marking, code, torch.ones(3), by_hand=True)
    assert marking.run(student(code), torch.ones(3)).tolist() == [2, 2, 2]


def test_a_warning_costs_no_points(marking, capsys):
    code = "import sys, warnings\ndef answer(x):\n    warnings.warn('old')\n"
    code += "    print('hm', file=sys.stderr)\n    return x"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marking.run(student(code), torch.ones(1))
    assert capsys.readouterr().err == "", "nbgrader gives no points for a test that writes to stderr"


def test_equal_names_the_place_or_the_mistake(marking):
    right = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    marking.equal("y", right.clone(), right, hints=[(right, "never said of a right answer")])
    for got, message in [
        (3, "y should be a tensor. Its type is int"),
        (right[0], r"y has shape \[2\]. It should be \[2, 2\]"),
        (right.T, "transposed"),
        (
            right + torch.tensor([[0, 1], [0, 0]]),
            r"y\[0, 1\] is 3. It should be 2. \(1 of 4 entries differ.\)",
        ),
        (right * torch.nan, r"y\[0, 0\] is nan"),
    ]:
        with pytest.raises(marking.NotYet, match=message):
            marking.equal("y", got, right, hints=[(right.T, "transposed")])


def test_jupyter_shows_the_message_alone(marking):
    (shown,) = marking.NotYet("word " * 40 + "\nsecond part")._render_traceback_()
    assert shown.startswith("Not yet. word") and shown.endswith("\nsecond part")
    assert max(map(len, shown.splitlines())) <= 88
