"""Runs an answer under watch, and says what is wrong with it. The same file in each lab that uses it."""

import contextlib
import inspect
import linecache
import sys
import textwrap
import warnings

import torch
from torch import Tensor

PACKAGE = "replicate"  # it has the answers
TESTS = ("checks", "marking")
torch.set_num_threads(1)  # the tensors are small, and many notebooks may be graded side by side


class NotYet(AssertionError):
    """An answer is not right yet. The message says why, and what to try."""

    def _render_traceback_(self):
        """What Jupyter prints in place of a traceback."""
        return ["\n".join(line for part in f"Not yet. {self}".split("\n") for line in _wrapped(part))]


def run(answer, *arguments, by_hand=False, **options):
    """What the student's function gives for copies of the arguments.

    Args:
        by_hand: it may not ask autograd for gradients.

    Raises:
        NotYet: it is no function, stops with an error, returns nothing, changes what it was given, or lets
            the package, the tests or (by_hand) autograd do the work.
    """
    name = getattr(answer, "__name__", None)
    if not callable(answer):
        raise NotYet(f"The answer should be a function. Its type is {type(answer).__name__}.")
    if _uses_package(answer, set()):
        raise NotYet(_imported(name))
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    with _watch(by_hand) as found, _quiet():
        try:
            result = answer(*copies, **options)
        except NotYet:
            raise
        except KeyboardInterrupt:
            raise NotYet(
                f"{name} was stopped because it ran for too long. Is there an endless loop?"
            ) from None
        except Exception as error:
            problem = _stopped(name, error)
        else:
            problem = None
    if "package" in found:
        raise NotYet(_imported(name))
    if "tests" in found:
        raise NotYet(f"{name} calls a function of the tests that is not for you: its name begins with `_`.")
    if "autograd" in found:
        raise NotYet(
            f"{name} asks autograd for the gradients. Write the products yourself: that is the task."
        )
    if problem:
        raise NotYet(problem)
    if result is None:
        raise NotYet(f"{name} returns None. Does it end with `return`?")
    for i, (before, after) in enumerate(zip(arguments, copies)):
        if isinstance(before, Tensor) and not _same(before, after):
            raise NotYet(
                f"{name} changes its argument number {i + 1} in place. The caller still needs it: compute a "
                "new tensor, or work on a copy, `.clone()`."
            )
    return result


def shaped(name, got, shape):
    """Raises NotYet unless `got` is a tensor of this shape."""
    if not isinstance(got, Tensor):
        raise NotYet(f"{name} should be a tensor. Its type is {type(got).__name__}.")
    if tuple(got.shape) != tuple(shape):
        raise NotYet(f"{name} has shape {list(got.shape)}. It should be {list(shape)}.")


def equal(name, got, wanted, hints=(), tolerance=1e-5):
    """Raises NotYet unless `got` is the tensor `wanted`: shape, then values, compared with the largest value.

    Args:
        hints: (a wrong tensor, what to say about it), tried in order.
    """
    if is_close(got, wanted, tolerance):
        return
    for wrong, hint in hints:
        if is_close(got, wrong, tolerance):
            raise NotYet(hint)
    shaped(name, got, wanted.shape)
    different = ~_close(got, wanted, tolerance)
    at = tuple(different.nonzero()[0].tolist())
    raise NotYet(
        f"{name}{list(at)} is {got[at].item():.6g}. It should be {wanted[at].item():.6g}. "
        f"({int(different.sum())} of {got.numel()} entries differ.)"
    )


def is_close(got, wanted, tolerance=1e-5):
    """True if `got` is a tensor of the shape of `wanted` and its values, compared with the largest value."""
    same_shape = isinstance(got, Tensor) and got.shape == wanted.shape
    return same_shape and bool(_close(got, wanted, tolerance).all())


def right(name):
    """Says that the visible tests of a task passed."""
    print(f"{name}: right on these examples. When your work is graded it is called with others too.")


def show(values):
    """Numbers of a tensor as a student would write them: [3, -1, 0.5]."""
    return "[" + ", ".join(f"{float(value):.4g}" for value in values) + "]"


def _close(got, wanted, tolerance):
    got, wanted = got.detach().double(), wanted.detach().double()
    return (got - wanted).abs() <= tolerance * max(1e-30, wanted.abs().max().item() if wanted.numel() else 1)


def _same(a, b):
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _wrapped(text):
    return textwrap.wrap(text, 88, break_long_words=False, break_on_hyphens=False) or [""]


def _of_package(module):
    return str(module).split(".")[0] == PACKAGE


def _uses_package(value, seen):
    """True if this is of the package, or a function whose text names something of it: also what it cached."""
    if _of_package(value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")):
        return True
    if not inspect.isfunction(value) or value in seen or value.__module__ in TESTS:
        return False
    seen.add(value)
    around = inspect.getclosurevars(value).nonlocals.values()
    named = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
    return any(_uses_package(one, seen) for one in (*around, *(value.__defaults__ or ()), *named))


def _names(code):
    """Names that a function and the functions inside it refer to."""
    inner = [_names(const) for const in code.co_consts if inspect.iscode(const)]
    return set(code.co_names).union(*inner)


def _imported(name):
    return (
        f"{name} lets the package `{PACKAGE}` do the work. Importing the answer earns no points: write the "
        "function yourself."
    )


def _stopped(name, error):
    """One message about an error that the student's function raised, with the line where it happened."""
    if isinstance(error, NotImplementedError):
        return f"{name} is not written yet: the line `raise NotImplementedError()` is still there."
    place, step = "", error.__traceback__
    while step:
        if step.tb_frame.f_globals.get("__name__") == "__main__":
            line = linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno).strip()
            place = f"\nIt happened in this line of yours: {line}" if line else ""
        step = step.tb_next
    if isinstance(error, TypeError) and str(error).startswith("argsort()"):
        place += "\nWith `stable`, argsort needs the names of its options: argsort(dim=-1, stable=True)."
    return f"{name} stopped with {type(error).__name__}: {error}{place}"


@contextlib.contextmanager
def _watch(by_hand):
    """Collects who does the work while the student's function runs: "package", "tests", "autograd"."""
    found, before = set(), sys.getprofile()

    def note(frame, event, _):
        if event != "call":
            return
        module = frame.f_globals.get("__name__") or ""
        if _of_package(module):
            found.add("package")
        elif module in TESTS and frame.f_code.co_name.startswith("_") and _students(frame.f_back):
            found.add("tests")
        elif by_hand and _asks_autograd(module, frame.f_code.co_name) and _students(frame.f_back):
            found.add("autograd")

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _asks_autograd(module, function):
    by_name = module in ("torch.autograd", "torch._tensor") and function in ("grad", "backward")
    return by_name or module.startswith(("torch._functorch", "torch.autograd.functional"))


def _students(frame):
    """True if this frame runs code of the notebook."""
    return frame is not None and frame.f_globals.get("__name__") == "__main__"


@contextlib.contextmanager
def _quiet():
    """No warnings: nbgrader counts anything on stderr as a failed test."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(sys.stdout):
        warnings.simplefilter("ignore")
        yield
