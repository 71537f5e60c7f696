"""Training steps of both sides: the project's own update of a given loss, and what scripts of torch do.

Losses are given, so that both sides compute the same one; batches are made up once, and data are not in the time.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cost.side_by_side import Side

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
      sides: by label, this project's first.
      units: of what is counted, in a step.
      dtype: what both compute in.
    """

    sides: Mapping[str, Side]
    units: int = 1
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Peers:
    """Which peers are measured.

    Attributes:
      device: torch's; on "cuda" both sides compute in bfloat16.
      compiled: whether torch.compile is one of them.
    """

    device: str = "cpu"
    compiled: bool = False

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """What both sides compute in."""
        return "bfloat16" if self.gpu else "float32"

    def sides(self, label: str, make: Callable[[bool], Side]) -> dict[str, Side]:
        """{label: make(False)}, and with torch.compile make(True); what cannot be made fails when it is to run."""
        wanted = {label: False, **({f"{label}, torch.compile": True} if self.compiled else {})}
        return {name: _made(make, compiled) for name, compiled in wanted.items()}


def _made(make: Callable[[bool], Side], compiled: bool) -> Side:
    try:
        return make(compiled)
    except Exception as error:  # such as a library that is missing, or a lack of memory
        reason = f"{type(error).__name__}: {error}"  # and not what it holds: its frames keep what was made until then

    def run(_: int) -> None:
        raise RuntimeError(reason)

    return Side(run)


def our_updates(
    loss: Callable[[Any, Any, Any], Any],
    params: Any,
    batch: Mapping[str, Any],
    trainable: Sequence[str] = (".*",),
    plain: Callable[[Any, Any, Any], Any] | None = None,
) -> Side:
    """Updates by the project's own step, which donates its state.

    Args:
      loss: (params, batch, a key) -> a number.
      params: {part: tree}.
      batch: arrays.
      trainable: `config.trainable`.
      plain: the same loss with plain attention, of which FLOPs are counted, since `matrix_flops` does not see into
        fused kernels; None for `loss`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from configs.common import get_defaults
    from cost.flops import matrix_flops
    from train.objectives.contract import Aux
    from train.optimizer import create_optimizer
    from train.state import create_state
    from train.step import make_train_step
    from train.trainable import trained_params

    class GivenLoss:
        """The objective."""

        def __init__(self, of: Callable[[Any, Any, Any], Any]) -> None:
            self.of = of

        def init(self, *_: Any) -> tuple[Any, Any]:
            return params, {}

        def preview(self, *_: Any) -> dict[str, Any]:
            return {}

        def loss(self, params: Any, variables: Any, frozen: Any, batch: Any, rng: Any, *_: Any) -> tuple[Any, Aux]:
            return self.of(params, batch, rng), Aux(metrics={}, variables=variables)

    config = get_defaults()
    config.steps = 10**6
    config.trainable = tuple(trainable)
    config.optimizer.weight_decay = WEIGHT_DECAY
    config.optimizer.schedule.peak = LEARNING_RATE
    params = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), params)  # copies, which the step may take
    trained = trained_params(params, config.trainable)
    optimizer, schedule = create_optimizer(config.optimizer, trained, config.steps)
    step, counted = (make_train_step(config, GivenLoss(each), optimizer, schedule) for each in (loss, plain or loss))
    rows = jax.device_put({name: jnp.asarray(value) for name, value in batch.items()})
    rows["index"] = jnp.arange(len(next(iter(rows.values()))))
    state = create_state(params, {}, jax.jit(optimizer.init)(trained), averaged={})
    shapes = jax.eval_shape(lambda: state)
    return our_program(step, state, {}, rows, flops=lambda: matrix_flops(counted, shapes, {}, rows))


def our_program(step: Callable[..., Any], state: Any, *others: Any, flops: Callable[[], int] | None = None) -> Side:
    """A step that takes its state and returns the next one first, jitted already or not."""
    import jax

    jitted: Any = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=0)
    compiled, known = _compile(jitted, state, *others)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, *_ = compiled(state, *others)
        jax.block_until_ready(state)

    return Side(run, flops, **known)


def our_function(function: Callable[..., Any], *arguments: Any, flops: Callable[[], int] | None = None) -> Side:
    """Calls of a function that is compiled here."""
    import jax

    compiled, known = _compile(jax.jit(function), *arguments)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(compiled(*arguments))

    return Side(run, flops, **known)


def _compile(jitted: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The program, and what is known of it before it runs: fields of a `Side`."""
    import time

    from cost.hlo import read_attention
    from cost.measured import program_bytes

    begun = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    known = {"compile_seconds": time.perf_counter() - begun, "attention": read_attention(compiled.as_text())}
    return compiled, {**known, "memory": lambda: program_bytes(compiled.memory_analysis())}


def our_calls(
    function: Callable[..., Any],
    *arguments: Any,
    flops: Callable[[], int] | None = None,
    reads: Callable[[], int] | None = None,
) -> Side:
    """Calls of a function that compiles itself."""
    import jax

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(function(*arguments))

    return Side(run, flops, reads=reads)


def their_updates(
    network: Any, loss: Callable[[Any], Any], *, compiled: bool = False, device: str = "cpu", train: bool = True
) -> Side:
    """Updates of a torch module by AdamW, as its training scripts do.

    Args:
      network: the module; a copy is trained.
      loss: (the network) -> a number.
      compiled: by torch.compile.
      device: where it is.
      train: whether it is in training mode.
    """
    import torch

    use_all_cores()
    before = torch_bytes(device)
    model = copy.deepcopy(network).train(train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    called = torch.compile(model) if compiled else model

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss(called).backward()
            optimizer.step()
        synchronize(device)

    return Side(run, memory=torch_memory(run, device, before))


def their_calls(function: Callable[[], Any], device: str = "cpu") -> Side:
    """Calls of a function of torch, without gradients, and of a network that all such sides of a row share."""
    import torch

    use_all_cores()

    def run(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                function()
        synchronize(device)

    return Side(run, memory=torch_memory(run, device))


def torch_memory(run: Callable[[int], None], device: str, before: int = 0) -> Callable[[], int] | None:
    """What a GPU holds at most for torch in a step, less what it held before this side was made; None of a CPU.

    Measured at once, while no side that is made later holds anything, and in the second step: the first one makes the
    moments of the optimizer.
    """
    import torch

    if device != "cuda":
        return None
    run(1)
    torch.cuda.reset_peak_memory_stats()
    run(1)
    peak = torch.cuda.max_memory_allocated() - before
    return lambda: peak


def torch_bytes(device: str) -> int:
    """What torch holds of a GPU now; 0 on a CPU."""
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else 0


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def use_all_cores() -> None:
    """Gives torch as many threads as XLA has."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def assert_agree(ours: Any, theirs: Any, what: str, tolerance: float) -> None:
    """Raises AssertionError unless two arrays are equal up to a share of the largest value."""
    import numpy as np

    difference, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    assert difference < tolerance * scale, f"the {what} differ by {difference:.1e} of values up to {scale:.1f}"


def to_torch(value: Any, device: str = "cpu") -> Any:
    """A tensor; of pictures with channels first."""
    import numpy as np
    import torch

    if value is None:
        return None
    tensor = torch.from_numpy(np.array(value)).to(device)
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def from_torch(pictures: Any) -> Any:
    """A numpy array with channels last."""
    return pictures.float().permute(0, 2, 3, 1).cpu().numpy()


def torch_weights(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of copies."""
    import numpy as np
    import torch

    return {name: torch.tensor(np.asarray(array)) for name, array in tensors.items()}
