"""What operations hold in memory, from shapes alone: ordinary code on tensors that have no values.

    with Shapes() as held:
        model = build()                          # takes no memory, however large
        before = held.now
        loss(model).backward()
        print(held.height - before)              # the most bytes held at a time

Counted is every storage that an operation makes, for as long as something refers to it; an operation's own workspace
and the gaps between blocks are not. So are the floating-point operations of matrix products and attention. Code that
asks for values is told that every number is 1, that tensors are equal and that no element is zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda t: 1.0 if t.dtype.is_floating_point else 1,
    aten.equal.default: lambda a, b: True,
    aten.is_nonzero.default: lambda t: True,
    aten.nonzero.default: lambda t: t.new_empty((t.numel(), t.dim()), dtype=torch.int64),
    torch.ops.prim.device.default: lambda t: t.fake_device,
}
"""What operations answer whose result depends on values, and, as it is asked most, where a tensor is."""


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **more: Any) -> int:
    """Operations of the CPU's fused attention; it leaves out half of what a causal mask hides."""
    return sdpa_flop_count(q.shape, k.shape, v.shape) // (2 if causal else 1)


def attention_back(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, dropout: float, causal: bool, **more: Any
) -> int:
    """Of its backward."""
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape) // (2 if causal else 1)


def product(total: Tensor, a: Tensor, b: Tensor, **more: Any) -> int:
    """Of a product that is added in place."""
    return 2 * a.numel() * b.shape[-1]


OPERATIONS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back,
    aten.addmm_: product,
    aten.baddbmm_: product,
}
"""Those that torch's counter does not know."""


class Held(TorchDispatchMode):
    """Counts bytes.

    Attributes:
        now: bytes held.
        aside: bytes among them that are counted apart, as whoever watches says.
        height: the most of all so far. rest: the most beside `aside` so far. Both may be set back.
        flops: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.aside = self.height = self.rest = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = ANSWERS.get(func)
        if answer is not None and isinstance(args[0], FakeTensor):
            return answer(*args)
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        count = OPERATIONS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs)
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=found)
        if isinstance(found, Tensor):
            self._count(found)
        elif isinstance(found, (tuple, list)):
            for one in found:
                if isinstance(one, Tensor):
                    self._count(one)
        return found

    def begin(self) -> None:
        """Set both heights back to what is held now."""
        self.height, self.rest = self.now, self.now - self.aside

    def know(self, *tensors: Tensor) -> None:
        """Do not count tensors that were there before."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def _count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.height = max(self.height, self.now)
        self.rest = max(self.rest, self.now - self.aside)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Shapes:
    """Inside, tensors are made without values on any device, there or not; gives a `Held`."""

    def __enter__(self) -> Held:
        self._stack = ExitStack()
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return self._stack.enter_context(Held())

    def __exit__(self, *error: object) -> None:
        self._stack.close()
