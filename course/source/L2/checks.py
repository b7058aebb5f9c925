"""What the tests of lab L2 call: each function takes an answer, tries it, and names its mistake."""

import dis

import marking
import torch
from marking import NotYet, right

__all__ = ["backward", "forward", "masked_backward", "numbers", "pruned", "right", "sparse_ffn"]
ARGUMENTS = ("x", "w1", "w2", "s1", "mask", "dy3")


def numbers(seed, tokens=6, d_model=8, d_ff=16):
    """x [T, D], w1 [D, F], w2 [F, D], dy3 [T, D], and a mask [T, F] of two in every four neurons."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (tokens, d_model), (d_model, d_ff), (d_ff, d_model), (tokens, d_model)
    x, w1, w2, dy3 = (torch.randn(shape, generator=draw, dtype=torch.double) for shape in shapes)
    mask = torch.rand(tokens, d_ff // 4, 4, generator=draw).argsort(-1) < 2
    return x, w1, w2, dy3, mask.flatten(1)


def pruned(seed, tokens=6, d_model=8, d_ff=16):
    """x, w1, w2, s1, mask, dy3: `numbers`, and w1 with two of four zeros in each group of a column."""
    x, w1, w2, dy3, mask = numbers(seed, tokens, d_model, d_ff)
    kept = numbers(seed + 1, tokens=d_ff, d_ff=d_model)[-1]
    return x, w1, w2, w1 * kept.T, mask, dy3


def forward(answer, x, w1, w2):
    """Task 1."""
    got = _several("forward", marking.run(answer, x, w1, w2), ("y1", "y2", "y3"))
    y1 = x @ w1
    marking.equal("y1", got[0], y1)
    marking.equal(
        "y2",
        got[1],
        _relu2(y1),
        hints=[
            (y1.relu(), "y2 is relu(y1). The square is missing."),
            (y1.square(), "y2 is y1². A negative y1 gives zero: take relu first, then the square."),
            (2 * y1.relu(), "y2 is 2 relu(y1), the derivative. The activation is relu(y1)²."),
        ],
    )
    marking.equal(
        "y3", got[2], _relu2(y1) @ w2, hints=[(y1 @ w2, "y3 is made of y1. It should be made of y2.")]
    )


def backward(answer, x, w1, w2, dy3):
    """Task 2: against autograd, and against autograd of the layers that typical mistakes would fit."""
    got = _several("backward", marking.run(answer, x, w1, w2, dy3, by_hand=True), ("dy1", "dx", "dw1", "dw2"))
    wanted, wrong = _gradients(x, w1, w2, dy3), _of_wrong_layers(x, w1, w2, dy3)
    if marking.is_close(got[2], wanted[3]) and marking.is_close(got[3], wanted[2]):
        raise NotYet("dw1 and dw2 are exchanged. The order is dy1, dx, dw1, dw2.")
    _compare(got, wanted, wrong, len(x))


def masked_backward(answer, x, w1, w2, mask, dy3):
    """Task 3."""
    got = marking.run(answer, x, w1, w2, mask, dy3, by_hand=True)
    got = _several("masked_backward", got, ("dy1", "dx", "dw1", "dw2"))
    wanted, whole = _gradients(x, w1, w2, dy3, mask=mask), _gradients(x, w1, w2, dy3)
    dy1 = got[0]
    marking.shaped("dy1", dy1, wanted[0].shape)
    stray = (dy1 != 0) & ~mask
    if stray.any() and marking.is_close(dy1, whole[0]):
        raise NotYet(
            "dy1 has no mask. A neuron that the forward pass dropped did not change y3: its gradient is 0. "
            f"Reuse the mask. ({int(stray.sum())} entries of dy1 are not zero, and should be.)"
        )
    y2 = _relu2(x @ w1).unflatten(1, (-1, 4))
    own = torch.zeros_like(y2).scatter(-1, y2.argsort(dim=-1, descending=True, stable=True)[..., :2], 1.0)
    if marking.is_close(dy1, _gradients(x, w1, w2, dy3, mask=own.flatten(1))[0]) and stray.any():
        raise NotYet(
            "dy1 keeps the neurons with the largest y2: you chose your own mask. Use the one that is given."
        )
    if stray.any() and (dy1.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2:
        raise NotYet(
            "dy1 is 2:4, but with other neurons than the forward pass kept: it was pruned by its own sizes. "
            "Reuse the mask of the forward pass."
        )
    wrong = _of_wrong_layers(x, w1, w2, dy3, mask)
    for i, name in ((1, "dx"), (2, "dw1")):
        wrong[i].append((whole[i], f"{name} is made of the dy1 without the mask. Use the masked one."))
    wrong[3].append(
        (whole[3], "dw2 is made of the whole y2. Product 2 read the masked y2, so product 4 does too.")
    )
    _compare(got, wanted, wrong, len(x))


def sparse_ffn(answer, x, w1, w2, s1, mask, dy3):
    """Task 4: the values and gradients of a torch.autograd.Function."""

    name = "SparseFFN"
    for step in ("forward", "backward"):
        outside = _globals(getattr(answer, step, None))
        if outside:
            raise NotYet(
                f"{step} reads {outside[0]} of the notebook, which is not one of its own names. The backward "
                "pass gets what forward saved: ctx.save_for_backward(...), then ctx.saved_tensors."
            )

    def use(x, w1, w2, s1, mask, dy3):
        leaves = [a.requires_grad_() for a in (x, w1, w2)]
        y3 = answer.apply(*leaves, s1, mask)
        if y3 is None:
            return None
        if isinstance(y3, tuple | list):
            raise NotYet(f"forward returns {len(y3)} tensors. It should return one tensor, y3.")
        marking.shaped("y3", y3, dy3.shape)
        return y3.detach(), *torch.autograd.grad(y3, leaves, dy3, allow_unused=True)

    use.__name__ = name
    use.__module__ = getattr(answer, "__module__", "")
    got = _several(name, marking.run(use, x, w1, w2, s1, mask, dy3, by_hand=True), ("y3", "dx", "dw1", "dw2"))
    y3 = (_relu2(x @ s1) * mask) @ w2
    hints = [
        (
            (_relu2(x @ w1) * mask) @ w2,
            "y3 is computed with w1. The forward pass reads s1, the pruned weight.",
        ),
        (_relu2(x @ s1) @ w2, "y3 is computed without the mask of the activation."),
    ]
    marking.equal("y3", got[0], y3, hints)
    _, dx, dw1, dw2 = _gradients(x, s1, w2, dy3, mask=mask)
    for label, gradient in zip(("dx", "dw1", "dw2"), got[1:]):
        if gradient is None:
            raise NotYet(
                f"The backward pass returns None for {label}. It returns one gradient for each argument of "
                "the forward pass, in the same order: dx, dw1, dw2, None, None."
            )
    _name_the_read_weight(got, x, w1, w2, s1, mask, dy3)
    whole = _gradients(x, s1, w2, dy3)
    no_mask = "the backward pass forgets the mask of the activation."
    dx_whole = _gradients(x, s1, w2, dy3, mask=mask, back=w1)[1]
    hints = [
        (dx_whole, "dx is computed with w1. The forward pass read s1, so its gradient needs s1 as well."),
        (whole[1], f"dx is not right: {no_mask}"),
    ]
    _gradient("dx", got[1], dx, hints)
    pruned_too = (
        "dw1 is zero where s1 is zero. Then a pruned weight would never move again. The straight-through "
        "gradient goes to all of w1."
    )
    _gradient("dw1", got[2], dw1, [(dw1 * (s1 != 0), pruned_too), (whole[2], f"dw1 is not right: {no_mask}")])
    whole_y2 = "dw2 is made of the whole y2. Product 2 read the masked y2, so product 4 does too."
    _gradient("dw2", got[3], dw2, [(whole[3], whole_y2)])


def _globals(function):
    """Names of tensors that a function reads from the notebook, though they are arguments of the layer."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    read = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    return [name for name in read if name in ARGUMENTS]


def _name_the_read_weight(got, x, w1, w2, s1, mask, dy3):
    """Raises NotYet if the backward pass took relu(x w1) for relu(x s1)."""
    dy1, _, dw1, dw2 = _gradients(x, w1, w2, dy3, mask=mask)
    wrong = [dy1 @ s1.T, dy1 @ w1.T], [dw1], [dw2]
    if any(marking.is_close(value, one) for value, ones in zip(got[1:], wrong) for one in ones):
        raise NotYet(
            "The backward pass computes y1 with w1. The forward pass read s1: y1 = x s1. Save what you need "
            "in forward."
        )


def _relu2(y1):
    return y1.relu().square()


def _gradients(x, w1, w2, dy3, act=_relu2, mask=1.0, back=None):
    """(dy1, dx, dw1, dw2) of y3 = (act(x w1) mask) w2 by autograd; dx through `back`, if given."""
    x, w1, w2 = (a.clone().requires_grad_() for a in (x, w1, w2))
    y1 = x @ w1
    y3 = (act(y1) * mask) @ w2
    dy1, dx, dw1, dw2 = torch.autograd.grad(y3, (y1, x, w1, w2), dy3)
    if back is not None:
        (dx,) = torch.autograd.grad(x @ back, x, dy1)
    return dy1, dx, dw1, dw2


def _of_wrong_layers(x, w1, w2, dy3, mask=1.0):
    """For each of dy1, dx, dw1, dw2: (wrong gradient, what to say)."""
    half = _gradients(x, w1, w2, dy3, lambda y1: _relu2(y1) / 2, mask)[0]
    dy1 = [
        (half, "dy1 is half of what it should be: the derivative of relu(y1)² is 2 relu(y1)."),
        (
            _gradients(x, w1, w2, dy3, torch.square, mask)[0],
            "dy1 is not zero where y1 is negative. There relu is 0: the derivative is 2 relu(y1), not 2 y1.",
        ),
        (
            _gradients(x, w1, w2, dy3, torch.relu, mask)[0],
            "dy1 has the derivative of relu. The activation is relu(y1)², whose derivative is 2 relu(y1).",
        ),
        (
            _gradients(x, w1, w2, dy3, lambda y1: y1.relu() ** 3 * 2 / 3, mask)[0],
            "dy1 is made of y2. The derivative of relu(y1)² is 2 relu(y1), without a square.",
        ),
        (
            _gradients(x, w1, w2, dy3, lambda y1: y1, mask)[0],
            "dy1 is dy2. On the way from y2 back to y1 multiply by the derivative of relu(y1)².",
        ),
    ]
    dw2 = [
        (_gradients(x, w1, w2, dy3, lambda y1: y1, mask)[3], "dw2 is made of y1. Product 2 read y2."),
        (
            _gradients(x, w1, w2, dy3, torch.relu, mask)[3],
            "dw2 is made of relu(y1). Product 2 read its square, y2.",
        ),
    ]
    of_dy2 = _gradients(x, w1, w2, dy3, lambda y1: y1, mask)
    dx = [(of_dy2[1], "dx is made of dy2. It is made of dy1: first go back through the squared ReLU.")]
    dw1 = [(of_dy2[2], "dw1 is made of dy2. It is made of dy1: first go back through the squared ReLU.")]
    return [dy1, dx, dw1, dw2]


def _compare(got, wanted, wrong, tokens):
    for name, gradient, right_one, hints in zip(("dy1", "dx", "dw1", "dw2"), got, wanted, wrong):
        mean = f"{name} is divided by the number of tokens. A product sums over tokens, it takes no mean."
        _gradient(name, gradient, right_one, [*hints, (right_one / tokens, mean)])


def _gradient(name, got, wanted, hints):
    if isinstance(got, torch.Tensor) and got.shape == wanted.T.shape != wanted.shape:
        swapped = " Or are dw1 and dw2 exchanged?" * name.startswith("dw")
        raise NotYet(
            f"{name} has shape {list(got.shape)}. A gradient has the shape of what it belongs to, here "
            f"{list(wanted.shape)}: is a transpose missing, or one too many?{swapped}"
        )
    marking.equal(name, got, wanted, hints)


def _several(name, got, parts):
    if not isinstance(got, tuple | list) or len(got) != len(parts):
        what = f"{len(got)} values" if isinstance(got, tuple | list) else f"one {type(got).__name__}"
        raise NotYet(f"{name} returns {what}. It should return {len(parts)}: {', '.join(parts)}.")
    return got
