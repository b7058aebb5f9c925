"""What torch.compile is told of functions, without the second that importing torch._dynamo takes."""

from __future__ import annotations

from collections.abc import Callable


def constant(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`: called once while code is traced, which keeps the result."""
    function._dynamo_marked_constant = True
    return function
