"""Wrong submissions to lab L4: answers imported from the package, and mistakes with part of their message."""

import json

from replicate.system import paths

CELLS = {
    cell["id"]: "".join(cell["source"])
    for cell in json.loads((paths.ROOT / "course/source/L4/L4_triton.ipynb").read_text("utf-8"))["cells"]
}


def changed(name, *pairs):
    """A solution cell with pieces of its text replaced: old, new, old, new, ..."""
    code = CELLS[name]
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in code, f"{name} has no {old!r}"
        code = code.replace(old, new)
    return code


def stub(name):
    """A solution cell as it is handed out."""
    head, rest = CELLS[name].split("    ### BEGIN SOLUTION\n")
    return head + "    raise NotImplementedError()\n" + rest.split("    ### END SOLUTION\n")[1]


# "numpy" needs no kernel, so that an imported answer gets past the count of launches.
IMPORTED = {
    "squared_relu": """
checks.begin("numpy")


def squared_relu(x, BLOCK=64):
    from replicate.ffn import relu2

    return relu2(x)
""",
    "prune24": """
checks.begin("numpy")
from replicate.sparsity import prune24 as ready


def prune24(x, BLOCK=16):
    return ready(x)
""",
    "pack24": """
checks.begin("numpy")
from replicate.sparsity import mask24


def pack24(mask, BLOCK=16):
    kept = mask24(mask).nonzero()[:, 1].view(-1, 2)
    nibble = kept[:, 0] | kept[:, 1] << 2
    return (nibble[0::2] | nibble[1::2] << 4).to(torch.uint8)
""",
    "soft24": """
checks.begin("numpy")
from replicate.sparsity import soft_threshold24


def soft24(w, BLOCK=16):
    return soft_threshold24(w)
""",
    "top_k": """
checks.begin("numpy")
from replicate.router import route


def top_k(scores, k):
    best = route(scores, torch.eye(scores.shape[1]), k)
    return torch.zeros(scores.shape, dtype=torch.int8).scatter(1, best.long(), 1)
""",
    "token_lists": """
from replicate.kernels.venom.token_lists import token_lists as ready


def token_lists(mask, BLOCK=16):
    marked = mask.nonzero()
    tokens = torch.full((mask.shape[1], mask.shape[0]), -1, dtype=torch.int32)
    for e, _, rows in ready(marked[:, 1:].contiguous(), mask.shape[1], 16).runs():
        tokens[e, : len(rows)] = marked[rows.long(), 0].int()
    return tokens, mask.sum(0)
""",
    "gather_matmul": """
checks.begin("numpy")


def gather_matmul(x, rows, w, BLOCK=16):
    from replicate.kernels.venom.gather import venom_gather_matmul_reference

    picked = torch.where((rows >= 0)[:, None], x[rows.long()], 0.0)
    return venom_gather_matmul_reference(picked, torch.arange(len(w))[None], w, len(rows))
""",
    "relu2_backward": """
checks.begin("numpy")
from replicate.kernels.two_four.relu2_prune24 import relu2_prune24_backward_reference


def relu2_backward(dy2, y1, mask, BLOCK=64):
    return relu2_prune24_backward_reference(dy2, y1.relu().square(), mask != 0)
""",
}

WRONG = {
    "nothing written": ("squared_relu", stub("squared_relu"), "is not written yet"),
    "a load without a mask": (
        "squared_relu",
        changed("squared_relu", "tl.load(x + at, mask=inside, other=0.0)", "tl.load(x + at)"),
        "program 2 would read place 10 of `x`",
    ),
    "a store without a mask": (
        "squared_relu",
        changed("squared_relu", "positive * positive, mask=inside", "positive * positive"),
        "would write place 10 of `y`",
    ),
    "every program takes the first block": (
        "squared_relu",
        changed("squared_relu", "tl.program_id(0) * BLOCK + tl.arange", "tl.arange"),
        "y[4] still holds what it held before the launch",
    ),
    "ReLU without the square": (
        "squared_relu",
        changed("squared_relu", "positive * positive", "positive"),
        "This is relu(x)",
    ),
    "the square without ReLU": (
        "squared_relu",
        changed(
            "squared_relu",
            "tl.maximum(tl.load(x + at, mask=inside, other=0.0), 0.0)",
            "tl.load(x + at, mask=inside, other=0.0)",
        ),
        "negative numbers are squared too",
    ),
    "no kernel": (
        "squared_relu",
        "def squared_relu(x, BLOCK=64):\n    return x.relu() ** 2\n",
        "launched no kernel",
    ),
    "a name that does not exist": (
        "squared_relu",
        changed("squared_relu", "positive * positive", "positve * positive"),
        "NameError",
    ),
    "values instead of magnitudes": (
        "prune24",
        changed("prune24", "tl.abs(", "("),
        "Compare magnitudes",
    ),
    "a threshold keeps all equals": (
        "prune24",
        changed(
            "prune24",
            "c_wins = tl.abs(c) >= tl.abs(d)",
            "c_wins = tl.abs(c) >= tl.abs(d)\n    m = tl.maximum(tl.abs(a), tl.abs(b))\n"
            "    o = tl.maximum(tl.abs(c), tl.abs(d))\n"
            "    p = tl.maximum(tl.minimum(tl.abs(a), tl.abs(b)), tl.minimum(tl.abs(c), tl.abs(d)))\n"
            "    second = tl.maximum(tl.minimum(m, o), p)",
            "left | (~right & a_wins)",
            "tl.abs(a) >= second",
            "left | (~right & ~a_wins)",
            "tl.abs(b) >= second",
            "right | (~left & c_wins)",
            "tl.abs(c) >= second",
            "right | (~left & ~c_wins)",
            "tl.abs(d) >= second",
        ),
        "keep more than two",
    ),
    "one of each pair": (
        "prune24",
        changed(
            "prune24",
            "left | (~right & a_wins)",
            "a_wins",
            "left | (~right & ~a_wins)",
            "~a_wins",
            "right | (~left & c_wins)",
            "c_wins",
            "right | (~left & ~c_wins)",
            "~c_wins",
        ),
        "both may come from one pair",
    ),
    "magnitudes are stored": (
        "prune24",
        changed(
            "prune24",
            "a, 0.0)",
            "tl.abs(a), 0.0)",
            "b, 0.0)",
            "tl.abs(b), 0.0)",
            "c, 0.0)",
            "tl.abs(c), 0.0)",
            "d, 0.0)",
            "tl.abs(d), 0.0)",
        ),
        "Store the values of x",
    ),
    "equals keep the higher index": (
        "prune24",
        changed("prune24", ">=", "?", " > ", " >= ", "?", ">"),
        "the higher index is kept",
    ),
    "groups in the wrong order": (
        "pack24",
        changed("pack24", "even | odd << 4", "odd | even << 4"),
        "The two groups of a byte are swapped",
    ),
    "a shift by one bit": ("pack24", changed("pack24", "<< 2", "<< 1"), "shift by 2"),
    "bits of the mask": (
        "pack24",
        changed(
            "pack24",
            "tl.where(a, 0, tl.where(b, 1, 2)) | tl.where(d, 3, tl.where(c, 2, 1)) << 2",
            "a.to(tl.int32) | b.to(tl.int32) << 1 | c.to(tl.int32) << 2 | d.to(tl.int32) << 3",
            "tl.where(e, 0, tl.where(f, 1, 2)) | tl.where(h, 3, tl.where(g, 2, 1)) << 2",
            "e.to(tl.int32) | f.to(tl.int32) << 1 | g.to(tl.int32) << 2 | h.to(tl.int32) << 3",
        ),
        "These are the four bits of the mask",
    ),
    "only the even groups": (
        "pack24",
        changed("pack24", "(even | odd << 4)", "even"),
        "Only the even groups are there",
    ),
    "the third smallest": (
        "soft24",
        changed("soft24", "t = tl.minimum(minima, maxima)", "t = tl.maximum(minima, maxima)"),
        "third smallest",
    ),
    "the smallest": (
        "soft24",
        changed("soft24", "minima = tl.maximum(", "minima = tl.minimum("),
        "smallest of the four magnitudes, so three can remain",
    ),
    "hard pruning": (
        "soft24",
        changed(
            "soft24",
            *(
                piece
                for x in "abcd"
                for piece in (
                    f"{x} - tl.minimum(tl.maximum({x}, -t), t)",
                    f"tl.where(tl.abs({x}) > t, {x}, 0.0)",
                )
            ),
        ),
        "hard pruning",
    ),
    "the sign is lost": (
        "soft24",
        changed(
            "soft24",
            *(
                piece
                for x in "abcd"
                for piece in (
                    f"{x} - tl.minimum(tl.maximum({x}, -t), t)",
                    f"tl.maximum(tl.abs({x}) - t, 0.0)",
                )
            ),
        ),
        "the signs are lost",
    ),
    "equal ranks": (
        "top_k",
        changed("top_k", "(higher | equal_and_before)", "higher"),
        "Among equals the lower index beats",
    ),
    "everyone beats itself": (
        "top_k",
        changed("top_k", "(higher | equal_and_before)", "(score[:, None] >= score[None, :])"),
        "counts itself",
    ),
    "zeros behind the end": (
        "top_k",
        changed("top_k", 'float("-inf")', "0.0"),
        "too few clusters",
    ),
    "the wrong axis": ("top_k", changed("top_k", "axis=0", "axis=1"), "The lowest scores win"),
    "an inclusive prefix sum": (
        "token_lists",
        changed("token_lists", "tl.cumsum(marked, axis=0) - marked", "tl.cumsum(marked, axis=0)"),
        "one place too far right",
    ),
    "nothing carried along": (
        "token_lists",
        changed("token_lists", "place = before + tl", "place = tl"),
        "Each step begins again at place 0",
    ),
    "counts of the last step": (
        "token_lists",
        changed(
            "token_lists",
            "before += tl.sum(marked, axis=0)",
            "last = tl.sum(marked, axis=0)\n        before += last",
            "counts + e, before",
            "counts + e, last",
        ),
        "those of the last step alone",
    ),
    "places inside the step": (
        "token_lists",
        changed("token_lists", "+ place, token, mask", "+ place, token - start, mask"),
        "a token's place inside its step",
    ),
    "rows as they stand": (
        "gather_matmul",
        changed("gather_matmul", "token[:, None] * d", "r[:, None] * d", "(token >= 0)", "(r < 12)"),
        "Read `rows` first",
    ),
    "the sum is overwritten": (
        "gather_matmul",
        changed("gather_matmul", "total += tl.dot", "total = tl.dot"),
        "Only the last block of features counts",
    ),
    "row -1 is read": (
        "gather_matmul",
        changed(
            "gather_matmul",
            "(token >= 0)[:, None] & (feature < d)[None, :]",
            "(r < n_rows)[:, None] & (feature < d)[None, :]",
        ),
        "of `x`, which has places 0 to 239",
    ),
    "features behind the end": (
        "gather_matmul",
        changed(
            "gather_matmul",
            "w_mask = (feature < d)[:, None] & (column < n)[None, :]",
            "w_mask = (column < n)[None, :]",
        ),
        "of `w`, which has places 0 to 359",
    ),
    "no mask": (
        "relu2_backward",
        changed("relu2_backward", "tl.where(kept, value, 0.0)", "value"),
        "The mask is not applied",
    ),
    "no factor two": (
        "relu2_backward",
        changed("relu2_backward", "2.0 * tl", "tl"),
        "Half of what it should be",
    ),
    "no ReLU": (
        "relu2_backward",
        changed(
            "relu2_backward",
            "tl.maximum(tl.load(y1 + at, mask=inside, other=0.0), 0.0)",
            "tl.load(y1 + at, mask=inside, other=0.0)",
        ),
        "A kept place with y1 below zero",
    ),
    "only kept places are written": (
        "relu2_backward",
        changed("relu2_backward", "tl.where(kept, value, 0.0), mask=inside", "value, mask=inside & kept"),
        "Does it also write the zeros?",
    ),
}
