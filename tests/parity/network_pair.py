"""One of this project's diffusion networks beside its counterpart in torch, with the same weights and inputs."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from side_by_side import use_all_cores

VOCABULARY = 32  # of made-up captions, which a table turns into tokens


@dataclasses.dataclass(frozen=True)
class Pair:
    """A network twice, with the same random weights.

    Attributes:
      batch_size: of inputs.
      length: tokens of the context; 0 without one.
      model: ours.
      params: its parameters.
      network: torch's, called with ([B C H W], [B], [B L D] or None).
      table: [V D], the tokens of made-up captions, None without them.
      device: torch's.
    """

    batch_size: int
    length: int
    model: Any
    params: Any
    network: Any
    table: Any
    device: str

    @classmethod
    def create(cls, fields: Mapping[str, Any], *, batch_size: int, length: int, attention: str, device: str) -> "Pair":
        """Builds both, and raises AssertionError unless they agree.

        Args:
          fields: {"name", fields} of ours.
          batch_size: see the attributes.
          length: see there.
          attention: what ours attends with, see `models.layers.attention.attend`.
          device: torch's; on "cuda" both compute in bfloat16.
        """
        import jax.numpy as jnp
        import numpy as np

        from models import create_model

        sys.path.append(str(Path(__file__).parents[1] / "models"))
        random_parameters = importlib.import_module("random_parameters").random_parameters
        gpu = device == "cuda"
        model = create_model(**{**fields, "implementation": attention, "dtype": "bfloat16" if gpu else "float32"})
        params = random_parameters(model)
        use_all_cores()
        network = torch_network(model, params).to(device)
        table = np.random.default_rng(0).normal(size=(VOCABULARY, model.context_width)) if length else None
        table = None if table is None else table.astype(np.float32)
        pair = cls(batch_size, length, model, params, network, table, device)
        x_t, t, tokens = pair.inputs()
        ours = np.asarray(pair.ours()(params, jnp.asarray(x_t), jnp.asarray(t), tokens))
        assert_agree(ours, pair.theirs(pair.network, x_t, t, tokens), "output", 0.1 if gpu else 1e-4)
        return pair

    def inputs(self) -> tuple[Any, Any, Any]:
        """x_t [B H W C], t [B] and tokens [B L D], or None, as numpy arrays."""
        import numpy as np

        rng, model = np.random.default_rng(1), self.model
        x_t = rng.normal(size=(self.batch_size, model.image_size, model.image_size, model.in_channels))
        t = rng.integers(0, 1000, self.batch_size)
        tokens = None if self.table is None else self.table[self.captions()]
        return x_t.astype(np.float32), t.astype(np.float32), tokens

    def captions(self) -> Any:
        """Ids [B L], none of them 0."""
        import numpy as np

        shape = (self.batch_size, self.length)
        return np.random.default_rng(2).integers(1, VOCABULARY, shape).astype(np.int32)

    def ours(self) -> Callable[..., Any]:
        """Our forward pass, jitted."""
        import jax

        from models.conditioning import Conditioning

        return jax.jit(lambda params, x, t, c: self.model.apply({"params": params}, x, t, Conditioning(tokens=c)))

    def theirs(self, network: Any, x_t: Any, t: Any, tokens: Any) -> Any:
        """Torch's forward pass, from and to numpy arrays, channels last."""
        import torch

        with torch.inference_mode():
            return from_torch(self.call(network, *(to_torch(value, self.device) for value in (x_t, t, tokens))))

    def call(self, network: Any, *arguments: Any) -> Any:
        """Torch's forward pass in the precision that is measured."""
        import torch

        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            return network(*arguments).float()


def torch_network(model: Any, params: Any) -> Any:
    """The counterpart, with copies of the parameters."""
    import jax.numpy as jnp
    import numpy as np
    import torch

    from models.layers.embeddings import grid_embedding
    from models.uvit import UViT
    from weights.formats.diffusers import unet_config, unet_to_diffusers
    from weights.formats.uvit import LAYOUT

    model = model.clone(dtype=jnp.float32)
    if isinstance(model, UViT):
        from torch_uvit import TorchUViT

        side, fixed = model.image_size // model.patch_size, model.positions == "sincos_2d"
        grid = torch.from_numpy(np.array(grid_embedding(side, side, model.width))) if fixed else None
        network, tensors = TorchUViT(model, grid), LAYOUT.write({"params": params})
    else:
        import diffusers

        class Network(torch.nn.Module):
            """A UNet of diffusers with the call of the others."""

            def __init__(self, unet: torch.nn.Module) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
                return self.unet(x, t, *(() if tokens is None else (tokens,)), return_dict=False)[0]

        config = unet_config(model)
        kind = getattr(diffusers, config.pop("_class_name"))
        with torch.device("meta"):  # the weights replace what it would start with
            network = Network(kind(**config))
        tensors = {f"unet.{name}": array for name, array in unet_to_diffusers(model, params).items()}
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, assign=True)
    return network.requires_grad_()


def assert_agree(ours: Any, theirs: Any, what: str, tolerance: float) -> None:
    """Raises AssertionError unless two arrays are equal up to a share of the largest value."""
    import numpy as np

    difference, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    print(f"largest difference of the {what}: {difference:.1e} of values up to {scale:.1f}", flush=True)
    assert difference < tolerance * scale, f"the {what} of the two differ"


def to_torch(value: Any, device: str) -> Any:
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
