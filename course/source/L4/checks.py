"""Tests of lab L4: they run a puzzle, watch every address its kernel touches, and name the mistake."""

import functools

import marking
import numpy as np
import torch
from marking import NotYet, right

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    HAVE_TRITON = True
except ImportError:  # macOS and Windows: the cells still run, and the puzzles are solved in numpy

    class _NoKernel:
        """What a kernel is where there is no Triton: a launch says what to do instead."""

        def __init__(self, function):
            self.name = function.__name__

        def __getitem__(self, grid):
            raise NotYet(
                f"Triton does not run here, so {self.name} cannot be launched. Write the function that "
                "launches it in numpy or torch instead."
            )

    class triton:
        """Stand-in, so that cells with kernels run."""

        jit = _NoKernel
        cdiv = staticmethod(lambda a, b: -(-a // b))
        next_power_of_2 = staticmethod(lambda n: 1 << max(0, n - 1).bit_length())

    class tl:
        """Stand-in for annotations."""

        constexpr = None

    HAVE_TRITON = False

__all__ = ["right", "tl", "triton"]

_state = {"engine": "triton", "launches": 0, "ranges": {}}


class OutOfBounds(NotYet):
    """A kernel reads or writes outside of its tensors."""


def begin(engine):
    """Says how this notebook solves the puzzles; from here on each launch is watched.

    Raises ValueError for another word than "triton" or "numpy", or for Triton where there is none.
    """
    if engine not in ("triton", "numpy"):
        raise ValueError(
            f'engine is {engine!r}; write engine = "triton", or "numpy" where Triton does not run'
        )
    if engine == "triton" and not HAVE_TRITON:
        raise ValueError(
            "Triton does not run here: it exists for Linux only, and it is not installed.\n"
            'Write engine = "numpy" in this cell. Then leave each kernel as it is, and write the function '
            "below it in numpy or torch. Its arguments, its result and its tests stay the same."
        )
    _state["engine"] = engine
    if HAVE_TRITON:
        if not triton.knobs.runtime.interpret:
            raise ValueError(
                "Triton was imported before TRITON_INTERPRET was set. Restart the kernel, run this cell "
                "first."
            )
        _watch()
    print(f"engine: {engine}" + (", interpreted; every read and write is watched" if HAVE_TRITON else ""))


def run(function, *arguments, **options):
    """What a puzzle's function gives for copies of the arguments, as tensors.

    Raises NotYet as `marking.run` does, and if it launches no kernel.
    """
    before = _state["launches"]

    @functools.wraps(function)
    def unwrapped(*given, **more):
        try:
            return function(*given, **more)
        except Exception as error:
            while error.__cause__ is not None:  # the interpreter wraps what a kernel raises
                error = error.__cause__
            raise error from None

    result = marking.run(unwrapped, *arguments, **options)
    if _state["engine"] == "triton" and _state["launches"] == before:
        raise NotYet(
            f"{function.__name__} launched no kernel: its numbers come from elsewhere. Leave the function "
            "as it was given, and write the kernel above it."
        )
    return tuple(map(torch.as_tensor, result)) if isinstance(result, tuple) else torch.as_tensor(result)


def same(name, got, wanted, hints=(), blank=None):
    """got is wanted: shape, then no place left blank, then values. Raises NotYet.

    Args:
        hints: (wrong tensor, what to say about it), tried in order.
        blank: what the output holds before the launch; None stands for NaN.
    """
    if isinstance(got, tuple):
        raise NotYet(f"{name} should be one tensor. This is a tuple of {len(got)}.")
    got, wanted = got.double(), torch.as_tensor(wanted).double()
    if got.shape != wanted.shape:
        raise NotYet(f"{name} has shape {list(got.shape)}; it should be {list(wanted.shape)}.")
    for wrong, hint in hints:
        if _equal(got, torch.as_tensor(wrong).double()).all():
            raise NotYet(hint)
    untouched = got.isnan() if blank is None else (got == blank) & (wanted != blank)
    if untouched.any():
        raise NotYet(
            f"{_place(name, untouched)} still holds what it held before the launch: no program wrote there "
            f"({int(untouched.sum())} of {got.numel()} places). Does each program take its own block, by "
            "tl.program_id? Does it also write the zeros?"
        )
    different = ~_equal(got, wanted)
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        raise NotYet(
            f"{_place(name, different)} is {got[at]:g}; it should be {wanted[at] + 0.0:g} "
            f"({int(different.sum())} of {got.numel()} places differ)."
        )


def _equal(a, b):
    return torch.isclose(a, b, rtol=1e-4, atol=1e-4)


def _place(name, where):
    return f"{name}{where.nonzero()[0].tolist()}"


def _watch():
    """Have the interpreter count launches and compare every address with the tensors of the launch."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if getattr(executor, "watched", False):
        return
    executor.watched = True
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    @functools.wraps(launch)
    def counted(self, *arguments, **options):
        _state["launches"] += 1
        named = dict(zip(self.arg_names, arguments)) | options
        tensors = {name: a for name, a in named.items() if isinstance(a, torch.Tensor)}
        _state["ranges"] = {
            name: (a.data_ptr(), a.data_ptr() + a.numel() * a.element_size(), a.element_size())
            for name, a in tensors.items()
        }
        return launch(self, *arguments, **options)

    @functools.wraps(load)
    def checked_load(self, pointers, mask, *rest):
        _inside("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    @functools.wraps(store)
    def checked_store(self, pointers, value, mask, *rest):
        _inside("write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    executor.__call__, builder.create_masked_load, builder.create_masked_store = (
        counted,
        checked_load,
        checked_store,
    )


def _inside(verb, pointers, mask):
    """Raise OutOfBounds unless the addresses that are not masked out lie in one tensor."""
    addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
    ranges = _state["ranges"]
    if not addresses.size or not ranges:
        return
    first, last = int(addresses.min()), int(addresses.max())
    if any(start <= first and last < end for start, end, _ in ranges.values()):
        return

    def away(name):
        """Bytes from a tensor to the nearest of the addresses."""
        start, end, _ = ranges[name]
        return min(max(start - int(a), int(a) - end, 0) for a in (first, last))

    name = min(ranges, key=away)
    start, end, size = ranges[name]
    wrong = first if first < start else int(addresses[addresses >= end].min())
    count, program = (end - start) // size, interpreter.interpreter_builder.grid_idx[0]
    call = {"read": "load", "write": "store"}[verb]
    raise OutOfBounds(
        f"Out of bounds: program {program} would {verb} place {(wrong - start) // size} of `{name}`, which "
        f"has places 0 to {count - 1}. If the place is computed right, give this tl.{call} a mask that is "
        f"False there.{' A place below 0 comes from a negative index.' if wrong < start else ''} (On a GPU "
        "nothing would stop you: it would be a crash, or somebody else's numbers.)"
    )


def squared_relu(function):
    """Puzzle 1 on ten numbers, four a program."""
    x = torch.tensor([-2.0, -1, 0, 1, 2, 3, -3, 0.5, -0.5, 4])
    wanted = [0, 0, 0, 1, 4, 9, 0, 0.25, 0, 16]
    hints = [
        (x.clamp(min=0), "This is relu(x): positive numbers stay as they are. Square them."),
        (x * x, "This is x²: negative numbers are squared too. Set them to zero first, then square."),
        (2 * x.clamp(min=0), "This is 2 relu(x), the derivative. Multiply relu(x) with itself."),
    ]
    same("y", run(function, x, BLOCK=4), wanted, hints)


_GROUPS = [[1.0, 2, 3, 4], [-5, 4, 1, -2], [1, -6, 2, 5], [2, 2, 2, 2], [0, 3, -3, 3]]


def prune24(function):
    """Puzzle 2 on five groups, four a program."""
    x = torch.tensor(_GROUPS)
    wanted = torch.tensor([[0.0, 0, 3, 4], [-5, 4, 0, 0], [0, -6, 0, 5], [2, 2, 0, 0], [0, 3, -3, 0]])
    hints = [
        (
            [[0, 0, 3, 4], [0, 4, 1, 0], [0, 0, 2, 5], [2, 2, 0, 0], [0, 3, 0, 3]],
            "Chosen by value, so that -5 loses against 1. Compare magnitudes (tl.abs), keep the values.",
        ),
        (
            [[0, 0, 3, 4], [-5, 4, 0, 0], [0, -6, 0, 5], [2, 2, 2, 2], [0, 3, -3, 3]],
            "Groups with equal magnitudes keep more than two, which is not 2:4. A threshold cannot tell "
            "equals apart. Use the three cases, and mind where >= stands and where >.",
        ),
        (wanted.abs(), "The places are right, but you store magnitudes: -5 became 5. Store the values of x."),
        (
            [[0, 2, 0, 4], [-5, 0, 0, -2], [0, -6, 0, 5], [2, 0, 2, 0], [0, 3, -3, 0]],
            "One of each pair is kept, always. But both may come from one pair: of 1 2 3 4, 3 and 4 are "
            "kept. That is when the smaller of one pair beats the larger of the other.",
        ),
        (
            [[0, 0, 3, 4], [-5, 4, 0, 0], [0, -6, 0, 5], [0, 0, 2, 2], [0, 0, -3, 3]],
            "Equal magnitudes: the higher index is kept. The rule is the lower one: turn > and >= around.",
        ),
        (x - wanted, "The two smallest are kept. Turn the comparisons around."),
    ]
    same("y", run(function, x, BLOCK=4), wanted, hints)


def pack24(function):
    """Puzzle 3 on six groups, two bytes a program."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]])
    hints = [
        (
            [78, 141, 201],
            "The two groups of a byte are swapped: the group with the even number belongs in the low four "
            "bits.",
        ),
        (
            [177, 114, 99],
            "The two indices of a nibble are swapped: the lower index belongs in its low two bits.",
        ),
        (
            [195, 165, 105],
            "These are the four bits of the mask, one a place. A nibble holds two indices of two bits: "
            "1100 keeps 0 and 1, and becomes 0 | 1 << 2 = 4.",
        ),
        ([98, 116, 86], "The second index is shifted by one bit. The first one needs two: shift by 2."),
        (
            [4, 8, 12],
            "Only the even groups are there. The odd group goes into the high four bits: shift it by 4, "
            "and or it.",
        ),
    ]
    same("packed", run(function, mask.to(torch.int8), BLOCK=2), [228, 216, 156], hints, blank=255)


def soft24(function):
    """Puzzle 4 on five groups, four a program."""
    w = torch.tensor([*_GROUPS[:4], [0.5, -3, 3.5, 0]])
    zeros = [0, 0, 0, 0]
    wanted = torch.tensor([[0, 0, 1, 2], [-3, 2, 0, 0], [0, -4, 0, 3], zeros, [0, -2.5, 3, 0]])
    hard = [[0, 0, 3, 4], [-5, 4, 0, 0], [0, -6, 0, 5]]
    is_hard = (
        "This is hard pruning: the kept weights stay as they are. Soft thresholding also moves them "
        "towards zero, by t."
    )
    hints = [
        ([*hard, [2, 2, 0, 0], [0, -3, 3.5, 0]], is_hard),
        ([*hard, zeros, [0, -3, 3.5, 0]], is_hard),
        ([*hard, [2, 2, 2, 2], [0.5, -3, 3.5, 0]], is_hard),
        (
            [[0, 1, 2, 3], [-4, 3, 0, -1], [0, -5, 1, 4], zeros, [0.5, -3, 3.5, 0]],
            "Your t is the smallest of the four magnitudes, so three can remain. Take the second smallest.",
        ),
        (
            [[0, 0, 0, 1], [-1, 0, 0, 0], [0, -1, 0, 0], zeros, [0, 0, 0.5, 0]],
            "Your t is the third smallest of the four magnitudes, so only one remains. Take the second "
            "smallest.",
        ),
        (
            wanted.abs(),
            "The sizes are right, the signs are lost: -5 with t = 2 becomes -3. Move negative weights up "
            "by t.",
        ),
        (
            [[0, 0, 1, 2], [-7, 2, 0, 0], [0, -8, 0, 3], zeros, [0, -3.5, 3, 0]],
            "Negative weights move away from zero: -5 with t = 2 became -7. Add t to them.",
        ),
    ]
    same("s", run(function, w, BLOCK=4), wanted, hints)


def top_k(function):
    """Puzzle 5: three of six clusters for four tokens."""
    scores = torch.tensor(
        [[0.1, 0.9, 0.5, 0.3, 0.7, 0.2], [-1, -2, -3, -4, -5, -6], [1, 2, 1, 2, 1, 1], [4, 4, 4, 4, 4, 4]]
    )
    wanted = [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    got = run(function, scores, 3)
    hints = [
        (
            [[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
            "A token whose scores are all negative gets too few clusters: the places behind the sixth hold "
            "0, which beats them. Load -inf there (other=float('-inf')).",
        ),
        (
            [wanted[0], wanted[1], [1] * 6, [1] * 6],
            "Equal scores get the same rank, so that too many are kept. Among equals the lower index beats "
            "the higher one: add this to what `beats` means.",
        ),
        (
            [[0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0] * 6],
            "Each score counts itself, and its equals, among those that beat it: >= is true there. Use >, "
            "and the lower index among equals.",
        ),
        (
            [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1]],
            "Equal scores: the higher index wins. The rule is the lower one: turn the comparison of "
            "indices around.",
        ),
        (
            [[1, 1, 1, 1, 1, 1]] * 4,
            "Everything is kept. Keep a cluster if its rank (how many beat it) is less than k.",
        ),
    ]
    last = [[1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    backwards = (
        "The lowest scores win: you count how many a score beats, along the wrong axis. Count who beats it."
    )
    one = [[1, 0, 0, 0, 0, 0], *[[0, 0, 0, 0, 0, 1]] * 3]  # the places behind the sixth are counted as well
    same("mask", got, wanted, [*hints, (last, backwards), (one, backwards)], blank=99)


def token_lists(function):
    """Puzzle 6: ten tokens, four a step, three clusters, of which one is empty."""
    lists = [[0, 3, 4, 7, 9], [1, 2, 3, 8], []]
    mask = torch.zeros(10, 3, dtype=torch.int8)
    for cluster, tokens in enumerate(lists):
        mask[tokens, cluster] = 1
    check_lists(run(function, mask, BLOCK=4), lists, _wrong_lists(lists))


def check_lists(pair, lists, hints=()):
    """The pair (tokens [n, T], counts [n]) holds these lists, filled up with -1."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise NotYet("token_lists should return the pair (tokens, counts).")
    tokens, counts = pair
    same("counts", counts, [len(part) for part in lists], [_counts_of_last(lists)], blank=-1)
    same("tokens", tokens, _filled(lists, tokens.shape[-1]), hints, blank=-2)


def _filled(lists, width):
    return torch.tensor([[*part, *[-1] * (width - len(part))] for part in lists])


def _counts_of_last(lists):
    """The counts of the last step of four tokens alone, and what to say."""
    hint = "Your counts are those of the last step alone. Add each step's count to what came before."
    return [sum(token >= 8 for token in part) for part in lists], hint


def _wrong_lists(lists):
    """(wrong lists, hint) for the visible example: ten tokens, four a step."""
    overwritten = [[-1] * 10 for _ in lists]
    for row, part in zip(overwritten, lists):
        for step in range(3):
            for place, token in enumerate(token for token in part if token // 4 == step):
                row[place] = token
    inclusive = [[-1, *part, *[-1] * (9 - len(part))] for part in lists]
    inside = [[token % 4 for token in part] for part in lists]
    reverse = [part[::-1] for part in lists]
    return [
        (
            inclusive,
            "Each token stands one place too far right. A prefix sum includes the entry itself; the place "
            "is how many were marked *before* it: subtract the entry.",
        ),
        (
            overwritten,
            "Each step begins again at place 0 and overwrites the step before. Carry along how many tokens "
            "the list has so far, and add it to the places.",
        ),
        (
            _filled(inside, 10),
            "You store a token's place inside its step (0 to 3). Store its number: step start + place.",
        ),
        (_filled(reverse, 10), "The tokens stand in reverse order. The order is theirs: ascending."),
    ]


def gather_matmul(function):
    """Puzzle 7: 19 rows picked out of 12, 20 features, 18 outputs; whole numbers, so that sums are exact."""
    draw = np.random.default_rng(7)
    x, w = (torch.tensor(draw.integers(-3, 4, shape), dtype=torch.float32) for shape in ((12, 20), (20, 18)))
    rows = torch.tensor([3, 3, 0, 11, -1, 7, 1, -1, 5, 2, 8, 10, 4, 9, 6, 11, 0, 2, -1], dtype=torch.int32)
    picked = x[rows.long().clamp(min=0)] * (rows >= 0)[:, None]
    unmasked = x[rows.long().clamp(min=0)]
    straight = torch.cat([x, torch.zeros(7, 20)])
    hints = [
        (
            picked[:, 16:] @ w[16:],
            "Only the last block of features counts: each block overwrites the sum. Add to it: "
            "total += tl.dot(...).",
        ),
        (
            picked[:, :16] @ w[:16],
            "Only the first 16 features count. Go on in steps of BLOCK_D until all D are summed up.",
        ),
        (
            straight @ w,
            "Row r is made from token r. Read `rows` first: output row r is made from token rows[r].",
        ),
        (
            (straight * torch.cat([(rows[:12] >= 0), torch.zeros(7)])[:, None]) @ w,
            "Row r is made from token r. Read `rows` first: output row r is made from token rows[r].",
        ),
        (
            unmasked @ w,
            "The rows with -1 are not zero: they hold token 0's product. Mask the load of x there.",
        ),
    ]
    same("y", run(function, x, rows, w), picked @ w, hints)


def relu2_backward(function):
    """Puzzle 8 on three groups of four, eight places a program."""
    dy2 = torch.tensor([1.0, 2, -3, 4, 5, 6, 0.5, -1, 1, -1, 7, 8])
    y1 = torch.tensor([1.0, -2, 3, 0.5, -1, -2, 4, -3, 2, 2, 2, 2])
    mask = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0], dtype=torch.int8)
    wanted = torch.tensor([2.0, 0, -18, 0, 0, 0, 4, 0, 4, -4, 0, 0])
    hints = [
        (
            [2, 0, -18, 4, 0, 0, 4, 0, 4, -4, 28, 32],
            "The mask is not applied: places that the forward pass dropped get a gradient. They had no "
            "part in y2, so theirs is zero.",
        ),
        (
            [0, 0, -18, 4, 0, 0, 4, 0, 0, 0, 28, 32],
            "dy1 keeps its own two largest of four. It must keep those of the forward pass: use the mask "
            "given.",
        ),
        (wanted / 2, "Half of what it should be: the derivative of relu(y1)² is 2 relu(y1)."),
        (
            [2, 0, -18, 0, -10, 0, 4, 0, 4, -4, 0, 0],
            "A kept place with y1 below zero has a gradient. relu(y1) is zero there, so the gradient is "
            "zero.",
        ),
        (
            [1, 0, -3, 0, 0, 0, 0.5, 0, 1, -1, 0, 0],
            "This is the derivative of relu(y1), which is 1. That of relu(y1)² is 2 relu(y1).",
        ),
        (
            [2, 0, -54, 0, 0, 0, 16, 0, 8, -8, 0, 0],
            "This multiplies by y2 = relu(y1)². The derivative is 2 relu(y1), not its square.",
        ),
    ]
    same("dy1", run(function, dy2, y1, mask, BLOCK=8), wanted, hints)
