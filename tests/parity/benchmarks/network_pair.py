"""One of this project's diffusion networks beside its counterpart in torch, with the same weights and inputs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from random_parameters import random_parameters
from updates import assert_agree, from_torch, to_torch, torch_weights, use_all_cores

VOCABULARY = 32  # of made-up captions, which a table turns into tokens


@dataclasses.dataclass(frozen=True)
class Pair:
    """A network twice, with the same random weights.

    Attributes:
      batch_size: of inputs.
      length: tokens of the context; 0 without one.
      model: ours.
      params: its parameters.
      network: torch's, called with ([B C H W], [B], and [B L D] of a context or [B] of a class, or None).
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
    def create(
        cls, fields: Mapping[str, Any], *, batch_size: int, length: int, device: str = "cpu", attention: str = "auto"
    ) -> "Pair":
        """Builds both, and raises AssertionError unless they agree.

        Args:
          fields: {"name", fields} of ours.
          batch_size: see the attributes.
          length: see there.
          device: torch's; on "cuda" both compute in bfloat16.
          attention: what ours attends with, see `models.layers.attention.attend`.
        """
        import jax.numpy as jnp
        import numpy as np

        from models import create_model

        gpu = device == "cuda"
        model = create_model(**{**fields, "implementation": attention, "dtype": "bfloat16" if gpu else "float32"})
        params = random_parameters(model)
        use_all_cores()
        network = torch_network(model, params).to(device)
        table = np.random.default_rng(0).normal(size=(VOCABULARY, model.context_width)) if length else None
        table = None if table is None else table.astype(np.float32)
        pair = cls(batch_size, length, model, params, network, table, device)
        x_t, t, told = pair.inputs()
        ours = np.asarray(pair.ours()(params, jnp.asarray(x_t), jnp.asarray(t), told), np.float32)
        assert_agree(ours, pair.theirs(pair.network, x_t, t, told), "outputs", 0.1 if gpu else 1e-4)
        return pair

    def plain(self) -> "Pair":
        """The same with plain attention in ours, whose products `cost.flops.matrix_flops` sees."""
        return dataclasses.replace(self, model=self.model.clone(implementation="xla"))

    def inputs(self) -> tuple[Any, Any, Any]:
        """x_t [B H W C], t [B] and tokens [B L D], classes [B], or None, as numpy arrays."""
        import numpy as np

        rng, model = np.random.default_rng(1), self.model
        x_t = rng.normal(size=(self.batch_size, model.image_size, model.image_size, model.in_channels))
        t = rng.integers(0, 1000, self.batch_size)
        told = None if self.table is None else self.table[self.captions()]
        if getattr(model, "num_classes", 0):
            told = rng.integers(0, model.num_classes - 1, self.batch_size).astype(np.int32)
        return x_t.astype(np.float32), t.astype(np.float32), told

    def captions(self) -> Any:
        """Ids [B L], none of them 0."""
        import numpy as np

        shape = (self.batch_size, self.length)
        return np.random.default_rng(2).integers(1, VOCABULARY, shape).astype(np.int32)

    def apply(self, params: Any, x_t: Any, t: Any, told: Any, train: bool = False) -> Any:
        """Our forward pass."""
        from models.conditioning import Conditioning

        name = "label" if getattr(self.model, "num_classes", 0) else "tokens"
        return self.model.apply({"params": params}, x_t, t, Conditioning(**{name: told}), train)

    def ours(self) -> Callable[..., Any]:
        """The same, jitted."""
        import jax

        return jax.jit(self.apply)

    def theirs(self, network: Any, x_t: Any, t: Any, told: Any) -> Any:
        """Torch's forward pass, from and to numpy arrays, channels last."""
        import torch

        with torch.inference_mode():
            return from_torch(self.call(network.eval(), *(to_torch(value, self.device) for value in (x_t, t, told))))

    def call(self, network: Any, *arguments: Any) -> Any:
        """Torch's forward pass in the precision that is measured."""
        import torch

        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            return network(*arguments).float()


def torch_network(model: Any, params: Any) -> Any:
    """The counterpart, with copies of the parameters."""
    import diffusers
    import jax.numpy as jnp
    import numpy as np
    import torch

    from models.dit import DiT
    from models.layers.embeddings import grid_embedding
    from models.uvit import UViT
    from weights.formats.diffusers_dit import dit_config, dit_to_diffusers
    from weights.formats.diffusers_unet import unet_config, unet_to_diffusers
    from weights.formats.uvit import LAYOUT

    model = model.clone(dtype=jnp.float32)
    if isinstance(model, UViT):
        from torch_uvit import TorchUViT

        side, fixed = model.image_size // model.patch_size, model.positions == "sincos_2d"
        grid = torch.from_numpy(np.array(grid_embedding(side, side, model.width))) if fixed else None
        network, tensors = TorchUViT(model, grid), LAYOUT.write({"params": params})
    else:

        class Network(torch.nn.Module):
            """A network of diffusers with the call of the others."""

            def __init__(self, inner: torch.nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor, t: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
                return self.inner(x, t, *(() if told is None else (told,)), return_dict=False)[0]

        class OfClasses(Network):
            """A DiT, whose second argument is the time, and whose third the class."""

            def forward(self, x: torch.Tensor, t: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
                return self.inner(x, timestep=t, class_labels=told, return_dict=False)[0]

        dit = isinstance(model, DiT)
        config = dit_config(model) if dit else unet_config(model)
        written = dit_to_diffusers(model, params) if dit else unet_to_diffusers(model, params)
        kind = getattr(diffusers, config.pop("_class_name"))
        if dit:  # its positions are no parameters, and made when it is
            network = OfClasses(kind(**config))
        else:
            with torch.device("meta"):  # the weights replace what it would start with
                network = Network(kind(**config))
        tensors = {f"inner.{name}": array for name, array in written.items()}
    network.load_state_dict(torch_weights(tensors), assign=True)
    return network.requires_grad_()
