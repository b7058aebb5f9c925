"""Lab L2 answered wrongly: by the package, by autograd, and by the mistakes that are often made."""

LAYER = """
class SparseFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, s1, mask):
        relu_y1 = (x @ {read}).relu()
        kept = relu_y1.square() * mask
        ctx.save_for_backward(x, relu_y1, kept, w1, w2, s1, mask)
        return kept @ w2

    @staticmethod
    def backward(ctx, dy3):
        x, relu_y1, kept, w1, w2, s1, mask = ctx.saved_tensors
        dy1 = 2 * (dy3 @ w2.T) * relu_y1{masked}
        return {result}
"""

ANEW = """
class SparseFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, s1, mask):
        {save}
        y1 = x @ s1
        return {result}

    @staticmethod
    def backward(ctx, dy3):
        {load}
        relu_y1 = (x @ {read}).relu()
        dy1 = 2 * (dy3 @ w2.T) * relu_y1 * mask
        return dy1 @ s1.T, x.T @ dy1, (relu_y1.square() * mask).T @ dy3, None, None
"""  # its backward pass computes y1 once more

IMPORTED = {
    "forward": """
from replicate.ffn import relu2

def forward(x, w1, w2):
    y1 = x @ w1
    return y1, relu2(y1), relu2(y1) @ w2
""",
    "backward": """
from replicate import SparseFFN as Layer

def backward(x, w1, w2, dy3):
    layer = Layer(*w1.shape)
    layer.w1.data, layer.w2.data = w1, w2
    x = x.requires_grad_()
    layer(x).backward(dy3)
    dy1 = 2 * (dy3 @ w2.T) * (x @ w1).relu()
    return dy1.detach(), x.grad, layer.w1.grad, layer.w2.grad
""",
    "masked": """
from replicate import ffn

def masked_backward(x, w1, w2, mask, dy3):
    y1 = x @ w1
    dy1 = 2 * (dy3 @ w2.T) * y1.relu() * mask
    return dy1, dy1 @ w1.T, x.T @ dy1, (ffn.relu2(y1) * mask).T @ dy3
""",
    "layer": """
import replicate.ffn

class SparseFFN(replicate.ffn._SparseProducts):
    @staticmethod
    def forward(x, w1, w2, s1, mask):
        return (replicate.ffn.relu2(x @ s1) * mask) @ w2

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, w2, s1, mask = inputs
        ctx.save_for_backward(x, (x @ s1).relu(), replicate.ffn.relu2(x @ s1) * mask, w2, s1, mask)

    @staticmethod
    def backward(ctx, dy3):
        x, relu_y1, kept, w2, s1, mask = ctx.saved_tensors
        dy1 = 2 * (dy3 @ w2.T) * relu_y1 * mask
        return dy1 @ s1.T, replicate.ffn._over_tokens(dy1, x).T, kept.T @ dy3, None, None
""",
}

WRONG = {
    "no square": (
        "forward",
        """
def forward(x, w1, w2):
    y1 = x @ w1
    y2 = y1.relu()
    return y1, y2, y2 @ w2
""",
        "The square is missing",
    ),
    "no relu": (
        "forward",
        """
def forward(x, w1, w2):
    y1 = x @ w1
    return y1, y1**2, y1**2 @ w2
""",
        "A negative y1 gives zero",
    ),
    "only y3": (
        "forward",
        """
def forward(x, w1, w2):
    return (x @ w1).relu() ** 2 @ w2
""",
        "It should return 3: y1, y2, y3",
    ),
    "by autograd": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    x, w1, w2 = (a.requires_grad_() for a in (x, w1, w2))
    y1 = x @ w1
    return torch.autograd.grad(y1.relu() ** 2 @ w2, (y1, x, w1, w2), dy3)
""",
        "asks autograd for the gradients",
    ),
    "by functional autograd": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    y1 = x @ w1
    dy1 = torch.func.vjp(lambda y1: y1.relu() ** 2 @ w2, y1)[1](dy3)[0]
    return dy1, dy1 @ w1.T, x.T @ dy1, (y1.relu() ** 2).T @ dy3
""",
        "asks autograd for the gradients",
    ),
    "the factor 2 is missing": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    relu_y1 = (x @ w1).relu()
    dy1 = (dy3 @ w2.T) * relu_y1
    return dy1, dy1 @ w1.T, x.T @ dy1, relu_y1.square().T @ dy3
""",
        "dy1 is half of what it should be",
    ),
    "the derivative of relu": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    y1 = x @ w1
    dy1 = (dy3 @ w2.T) * (y1 > 0)
    return dy1, dy1 @ w1.T, x.T @ dy1, (y1.relu() ** 2).T @ dy3
""",
        "dy1 has the derivative of relu",
    ),
    "2 y1 without relu": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    y1 = x @ w1
    dy1 = 2 * (dy3 @ w2.T) * y1
    return dy1, dy1 @ w1.T, x.T @ dy1, (y1.relu() ** 2).T @ dy3
""",
        "dy1 is not zero where y1 is negative",
    ),
    "a transposed gradient": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    relu_y1 = (x @ w1).relu()
    dy1 = 2 * (dy3 @ w2.T) * relu_y1
    return dy1, dy1 @ w1.T, dy1.T @ x, relu_y1.square().T @ dy3
""",
        "is a transpose missing, or one too many? Or are dw1 and dw2 exchanged?",
    ),
    "dw1 and dw2 exchanged": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    relu_y1 = (x @ w1).relu()
    dy2 = dy3 @ w2.T
    dy1 = 2 * dy2 * relu_y1
    return dy1, dy1 @ w1.T, relu_y1.square().T @ dy3, x.T @ dy1
""",
        "dw1 and dw2 are exchanged",
    ),
    "dw1 from dy2": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    relu_y1 = (x @ w1).relu()
    dy2 = dy3 @ w2.T
    dy1 = 2 * dy2 * relu_y1
    return dy1, dy1 @ w1.T, x.T @ dy2, relu_y1.square().T @ dy3
""",
        "dw1 is made of dy2",
    ),
    "dx from dy2": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    relu_y1 = (x @ w1).relu()
    dy2 = dy3 @ w2.T
    dy1 = 2 * dy2 * relu_y1
    return dy1, dy2 @ w1.T, x.T @ dy1, relu_y1.square().T @ dy3
""",
        "dx is made of dy2",
    ),
    "dw2 from relu(y1)": (
        "backward",
        """
def backward(x, w1, w2, dy3):
    relu_y1 = (x @ w1).relu()
    dy1 = 2 * (dy3 @ w2.T) * relu_y1
    return dy1, dy1 @ w1.T, x.T @ dy1, relu_y1.T @ dy3
""",
        "dw2 is made of relu(y1)",
    ),
    "the mask is forgotten": (
        "masked",
        """
def masked_backward(x, w1, w2, mask, dy3):
    relu_y1 = (x @ w1).relu()
    dy1 = 2 * (dy3 @ w2.T) * relu_y1
    return dy1, dy1 @ w1.T, x.T @ dy1, (relu_y1.square() * mask).T @ dy3
""",
        "dy1 has no mask",
    ),
    "the gradient is pruned on its own": (
        "masked",
        """
def masked_backward(x, w1, w2, mask, dy3):
    relu_y1 = (x @ w1).relu()
    dy1 = 2 * (dy3 @ w2.T) * relu_y1
    groups = dy1.unflatten(1, (-1, 4))
    dy1 = groups.scatter(-1, groups.abs().argsort(-1)[..., :2], 0.0).flatten(1)
    return dy1, dy1 @ w1.T, x.T @ dy1, (relu_y1.square() * mask).T @ dy3
""",
        "with other neurons than the forward pass kept",
    ),
    "a mask of one's own": (
        "masked",
        """
def masked_backward(x, w1, w2, mask, dy3):
    relu_y1 = (x @ w1).relu()
    groups = relu_y1.square().unflatten(1, (-1, 4))
    own = torch.zeros_like(groups).scatter(-1, groups.topk(2, dim=-1).indices, 1.0).flatten(1)
    dy1 = 2 * (dy3 @ w2.T) * relu_y1 * own
    return dy1, dy1 @ w1.T, x.T @ dy1, (relu_y1.square() * own).T @ dy3
""",
        "you chose your own mask. Use the one that is given",
    ),
    "dx without the mask": (
        "masked",
        """
def masked_backward(x, w1, w2, mask, dy3):
    relu_y1 = (x @ w1).relu()
    whole = 2 * (dy3 @ w2.T) * relu_y1
    dy1 = whole * mask
    return dy1, whole @ w1.T, x.T @ dy1, (relu_y1.square() * mask).T @ dy3
""",
        "dx is made of the dy1 without the mask",
    ),
    "dw1 without the mask": (
        "masked",
        """
def masked_backward(x, w1, w2, mask, dy3):
    relu_y1 = (x @ w1).relu()
    whole = 2 * (dy3 @ w2.T) * relu_y1
    dy1 = whole * mask
    return dy1, dy1 @ w1.T, x.T @ whole, (relu_y1.square() * mask).T @ dy3
""",
        "dw1 is made of the dy1 without the mask",
    ),
    "dw2 from the whole y2": (
        "masked",
        """
def masked_backward(x, w1, w2, mask, dy3):
    relu_y1 = (x @ w1).relu()
    dy1 = 2 * (dy3 @ w2.T) * relu_y1 * mask
    return dy1, dy1 @ w1.T, x.T @ dy1, relu_y1.square().T @ dy3
""",
        "dw2 is made of the whole y2",
    ),
    "dx reads the whole weight": (
        "layer",
        LAYER.format(read="s1", masked=" * mask", result="dy1 @ w1.T, x.T @ dy1, kept.T @ dy3, None, None"),
        "dx is computed with w1",
    ),
    "pruned weights get no gradient": (
        "layer",
        LAYER.format(
            read="s1",
            masked=" * mask",
            result="dy1 @ s1.T, (x.T @ dy1) * (s1 != 0), kept.T @ dy3, None, None",
        ),
        "Then a pruned weight would never move again",
    ),
    "the gradient goes to s1": (
        "layer",
        LAYER.format(read="s1", masked=" * mask", result="dy1 @ s1.T, None, kept.T @ dy3, x.T @ dy1, None"),
        "The backward pass returns None for dw1",
    ),
    "forward reads w1": (
        "layer",
        LAYER.format(read="w1", masked=" * mask", result="dy1 @ w1.T, x.T @ dy1, kept.T @ dy3, None, None"),
        "y3 is computed with w1",
    ),
    "no mask in the layer's backward pass": (
        "layer",
        LAYER.format(read="s1", masked="", result="dy1 @ s1.T, x.T @ dy1, kept.T @ dy3, None, None"),
        "the backward pass forgets the mask",
    ),
    "three gradients for five arguments": (
        "layer",
        LAYER.format(read="s1", masked=" * mask", result="dy1 @ s1.T, x.T @ dy1, kept.T @ dy3"),
        "incorrect number of gradients (expected 5, got 3)",
    ),
    "the backward pass reads w1": (
        "layer",
        ANEW.format(
            save="ctx.save_for_backward(x, w1, w2, s1, mask)",
            load="x, w1, w2, s1, mask = ctx.saved_tensors",
            result="(y1.relu() ** 2 * mask) @ w2",
            read="w1",
        ),
        "The backward pass computes y1 with w1",
    ),
    "names of the notebook": (
        "layer",
        ANEW.format(
            save="ctx.save_for_backward(s1)",
            load="(s1,) = ctx.saved_tensors",
            result="(y1.relu() ** 2 * mask) @ w2",
            read="s1",
        ),
        "backward reads x of the notebook",
    ),
    "a tuple from forward": (
        "layer",
        ANEW.format(
            save="ctx.save_for_backward(x, w1, w2, s1, mask)",
            load="x, w1, w2, s1, mask = ctx.saved_tensors",
            result="y1, y1.relu() ** 2, (y1.relu() ** 2 * mask) @ w2",
            read="s1",
        ),
        "forward returns 3 tensors. It should return one tensor, y3",
    ),
}
