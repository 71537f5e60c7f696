"""Rows of attention alone: what training does with it, of each kernel that there is.

Ours is what `models.layers.attention.attend` chooses; beside it stand the plain form, tokamax's kernels and torch's.
Gradients of queries, keys and values of all are compared before they are timed.
"""

from collections.abc import Callable
from typing import Any

from updates import Case, Peers, assert_agree, our_function, synchronize, use_all_cores

from cost.side_by_side import Side


def training(peers: Peers, batch_size: int, length: int, heads: int, width: int, causal: bool = False) -> Case:
    """Attention of a sequence to itself, and its gradients.

    Args:
      peers: what is measured beside ours.
      batch_size: B.
      length: L.
      heads: N.
      width: K, of a head.
      causal: whether a position sees those before it and itself alone.
    """
    import jax
    import numpy as np

    from cost.flops import matrix_flops
    from models.layers.attention import attend

    rng, shape = np.random.default_rng(0), (batch_size, length, heads, width)
    # What the gradient of the result is: without it, all rows would weigh their values alike.
    q, k, v, given = (jax.numpy.asarray(rng.normal(size=shape), peers.dtype) for _ in range(4))
    mask = np.tri(length, dtype=bool) if causal else None

    def gradients(attention: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v, given: jax.vjp(attention, q, k, v)[1](given)

    def kernel(implementation: str) -> Callable[..., Any]:
        return gradients(lambda q, k, v: attend(q, k, v, mask, implementation))

    auto, plain = kernel("auto"), kernel("xla")

    def count() -> int:
        return matrix_flops(plain, q, k, v, given)

    expected = jax.jit(plain)(q, k, v, given)

    def check(found: Any, name: str) -> None:
        for ours, theirs, letter in zip(found, expected, "qkv", strict=True):
            ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
            assert_agree(ours, theirs, f"gradients of {letter} of {name}", 0.1 if peers.gpu else 1e-4)

    def beside(make: Callable[[], tuple[Side, Any]], name: str) -> dict[str, Side]:
        def checked(_: bool) -> Side:
            side, found = make()
            check(found, name)
            return side

        return Peers(peers.device).sides(name, checked)

    def ours(function: Callable[..., Any]) -> tuple[Side, Any]:
        return our_function(function, q, k, v, given, flops=count), jax.jit(function)(q, k, v, given)

    def tokamax() -> tuple[Side, Any]:
        from tokamax import dot_product_attention

        return ours(gradients(lambda q, k, v: dot_product_attention(q, k, v, is_causal=causal)))

    def torch() -> tuple[Side, Any]:
        return torch_side([np.asarray(each, np.float32) for each in (q, k, v, given)], causal, peers)

    side, found = ours(auto)
    check(found, "ours")
    sides = {"jax": side, **beside(lambda: ours(plain), "plain")}
    return Case({**sides, **beside(tokamax, "tokamax"), **beside(torch, "torch")}, dtype=peers.dtype)


def torch_side(arrays: list[Any], causal: bool, peers: Peers) -> tuple[Side, Any]:
    """The same by torch's fused attention, and the gradients, [B L N K]."""
    import torch

    use_all_cores()
    kind = torch.bfloat16 if peers.gpu else torch.float32
    tensors = [torch.tensor(each).to(peers.device, kind).transpose(1, 2).contiguous() for each in arrays]
    *inputs, given = tensors
    for each in inputs:
        each.requires_grad_()

    def gradients() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
        return torch.autograd.grad(out, inputs, given)

    def run(count: int) -> None:
        for _ in range(count):
            gradients()
        synchronize(peers.device)

    return Side(run), [each.transpose(1, 2).float().cpu().numpy() for each in gradients()]
