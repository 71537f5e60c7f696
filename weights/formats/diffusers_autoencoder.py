"""First stages as the diffusers library has them: `AutoencoderKL` and `VQModel` to our fields and parameters, and back.

The traps of that format: the decoder has one residual block more than `layers_per_block`, and numbers its levels from
the coarsest; a `scaling_factor` that is left out is 0.18215, also of `VQModel`, where latent diffusion has 1; several
keys change what is computed, and ours computes one value of each.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cli.errors import UserError
from models import create_model
from models.autoencoder import KLAutoencoder, VQAutoencoder
from weights.files.fields import IDLE, Field, fixed, read_fields, real, several, whole, word
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree
from weights.formats.contract import Converted, Files, Network
from weights.formats.diffusers_blocks import attention_rules, residual_rules, with_new_names
from weights.formats.runs import STABLE_DIFFUSION_SCALE, autoencoder_run, read_latent_scale

KL, VQ = "AutoencoderKL", "VQModel"
NAMES = {KL: "autoencoder_kl", VQ: "autoencoder_vq"}

_WIDTHS = "block_out_channels"
_FIXED: dict[str, dict[str, Any]] = {
    KL: {
        **{"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
        **{"shift_factor": None, "latents_mean": None, "latents_std": None},
    },
    VQ: {"mid_block_add_attention": True, "norm_type": "group"},
}
_ATTENTION = {"down": "AttnDownEncoderBlock2D", "up": "AttnUpDecoderBlock2D"}
_PLAIN = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}


def _table(kind: str) -> dict[str, Field]:
    """What a class's config.json may hold, with the library's defaults."""

    def types(way: str) -> Field:
        return several(word(choices=(_PLAIN[way], _ATTENTION[way])), (_PLAIN[way],), length=_WIDTHS)

    own: dict[str, Field] = {
        KL: {"latent_channels": whole(4)},
        VQ: {
            **{"latent_channels": whole(3), "num_vq_embeddings": whole(256), "vq_embed_dim": whole().or_null()},
            "lookup_from_codebook": IDLE,  # of a decoder that is given tokens
        },
    }[kind]
    return {
        "in_channels": whole(3),
        "out_channels": whole(3),
        _WIDTHS: several(whole(), (64,)),
        "down_block_types": types("down"),
        "up_block_types": types("up"),
        "layers_per_block": whole(1, high=64),
        "act_fn": fixed("silu", "swish"),
        "norm_num_groups": whole(32),
        "sample_size": several(whole(), 32, length=2, single=True),
        "scaling_factor": real(STABLE_DIFFUSION_SCALE, low=0, above=True),
        "force_upcast": IDLE,  # computes a first stage in float32 where a pipeline is in float16
        **own,
        **{key: fixed(value) for key, value in _FIXED[kind].items()},
    }


_TABLES: dict[str, dict[str, Field]] = {kind: _table(kind) for kind in NAMES}


def autoencoder_layout(model: KLAutoencoder | VQAutoencoder) -> Layout:
    """The table of a network: the library numbers the levels of the way up from the coarsest."""
    levels = len(model.multipliers)
    rules = [
        Rule(r"codebook/embedding", "quantize.embedding.weight"),
        Rule(r"(quant|post_quant)/(\w+)", r"\1_conv.\2", CONVOLUTION),
        Rule(r"(encoder|decoder)/input/(\w+)", r"\1.conv_in.\2", CONVOLUTION),
        Rule(r"(encoder|decoder)/output_norm/(\w+)", r"\1.conv_norm_out.\2"),
        Rule(r"(encoder|decoder)/output/(\w+)", r"\1.conv_out.\2", CONVOLUTION),
    ]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        rules += residual_rules(rf"{side}/mid_residual_(\d)", rf"{side}.mid_block.resnets.\1")
        rules += attention_rules(rf"{side}/mid_attention()", f"{side}.mid_block.attentions.0")
        for level in range(levels):
            ours = f"{side}/{way}_{level}"
            theirs = f"{side}.{way}_blocks.{level if way == 'down' else levels - 1 - level}"
            rules += residual_rules(rf"{ours}_residual_(\d+)", rf"{theirs}.resnets.\1")
            rules += attention_rules(rf"{ours}_attention_(\d+)", rf"{theirs}.attentions.\1")
            rules.append(Rule(rf"{ours}_resample/conv/(\w+)", rf"{theirs}.{way}samplers.0.conv.\1", CONVOLUTION))
    return Layout(what="this autoencoder in the layout of diffusers", rules=tuple(rules))


def autoencoder_from_diffusers(model: KLAutoencoder | VQAutoencoder, tensors: Mapping[str, Any]) -> Tree:
    """Converts the tensors of a first stage to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return autoencoder_layout(model).read(model, with_new_names(tensors))["params"]


def autoencoder_to_diffusers(model: KLAutoencoder | VQAutoencoder, params: Tree) -> Tensors:
    """Converts parameters to the tensors of the library's first stage, float32."""
    return autoencoder_layout(model).write({"params": params})


def autoencoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the config of a first stage as {"name", fields of `models.autoencoder`}.

    Raises:
      UserError: if ours cannot compute it; says all reasons.
    """
    kind = config["_class_name"]
    given = read_fields("this autoencoder", config, _TABLES[kind])
    widths = given[_WIDTHS]
    attending = {way: [name == _ATTENTION[way] for name in given[f"{way}_block_types"]] for way in ("down", "up")}
    sides = given["sample_size"]
    problems = []
    if attending["down"] != attending["up"][::-1]:
        problems.append("encoder and decoder have attention at different levels")
    if given["in_channels"] != given["out_channels"]:
        problems.append(f"in_channels is {given['in_channels']} and out_channels {given['out_channels']}, ours are one")
    if given.get("vq_embed_dim") not in (None, given["latent_channels"]):
        problems.append(f"vq_embed_dim is {given['vq_embed_dim']}, ours is latent_channels, {given['latent_channels']}")
    if not isinstance(sides, int) and len(set(sides)) > 1:
        problems.append(f"sample_size is {sides}, ours one number")
    if problems:
        raise UserError(f"this autoencoder cannot be converted: {'; '.join(problems)}")
    fields = {
        "name": NAMES[kind],
        "image_size": sides if isinstance(sides, int) else sides[0],
        "channels": given["in_channels"],
        "width": widths[0],
        "multipliers": tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        "attention_levels": tuple(level for level, attends in enumerate(attending["down"]) if attends),
        "blocks": given["layers_per_block"],
        "latent_channels": given["latent_channels"],
        "latent_scale": float(given["scaling_factor"]),
        "groups": given["norm_num_groups"],
    }
    return fields if kind == KL else {**fields, "vocab_size": given["num_vq_embeddings"]}


def autoencoder_config(model: KLAutoencoder | VQAutoencoder, variables: Mapping[str, Tree]) -> dict[str, Any]:
    """Returns config.json of the library's first stage that computes what `model` does.

    Args:
      model: the network.
      variables: its collections, in which the scale of latents is if it was measured.

    Raises:
      UserError: if there is none.
    """
    kind = KL if isinstance(model, KLAutoencoder) else VQ
    _, scale = _shift_and_scale(model, variables)
    if model.patch_size != 1:
        raise UserError(
            f"this autoencoder cannot be written for diffusers: its patch_size is {model.patch_size}, theirs is 1"
        )

    def types(way: str) -> list[str]:
        return [
            (_ATTENTION if level in model.attention_levels else _PLAIN)[way] for level in range(len(model.multipliers))
        ]

    config = {
        "_class_name": kind,
        **_FIXED[kind],
        "in_channels": model.channels,
        "out_channels": model.channels,
        _WIDTHS: list(model.widths),
        "down_block_types": types("down"),
        "up_block_types": types("up")[::-1],
        "layers_per_block": model.blocks,
        "act_fn": "silu",
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.groups,
        "sample_size": model.image_size,
        "scaling_factor": scale,
    }
    if isinstance(model, VQAutoencoder):
        config |= {"num_vq_embeddings": model.vocab_size, "vq_embed_dim": None}
    return config


def read_autoencoder(config: Mapping[str, Any], tensors: Tensors, latent_scale: str = "") -> Converted:
    """Makes a run of a first stage's config.json and tensors.

    Args:
      config: of the library.
      tensors: likewise.
      latent_scale: what a second stage multiplies latents by, in place of the config's; "" for that.

    Raises:
      UserError: if ours cannot compute it, or the tensors are those of another network.
    """
    fields, notes = autoencoder_fields(config), ()
    if latent_scale:
        fields["latent_scale"] = read_latent_scale(latent_scale)
    elif "scaling_factor" not in config:
        of_authors = "; that of latent diffusion's authors is 1" if config["_class_name"] == VQ else ""
        notes = (
            f"its config.json has no scaling_factor, what latents are multiplied by; {fields['latent_scale']} is the "
            f"library's own default{of_authors}: give --latent_scale for another",
        )
    model = create_model(**fields)
    params = autoencoder_layout(model).read_deferred(model, with_new_names(tensors))["params"]
    return autoencoder_run(fields, {"autoencoder": params}, notes=notes)


def autoencoder_files(network: Network, config_name: str, weights_name: str) -> Files:
    """What `from_pretrained` of the library's first stage reads."""
    config = autoencoder_config(network.model, network.variables)
    shift, _ = _shift_and_scale(network.model, network.variables)
    params = _centered(network.params, shift, network.model.latent_channels) if shift else network.params
    return {config_name: config, weights_name: autoencoder_layout(network.model).write_deferred({"params": params})}


def _shift_and_scale(model: KLAutoencoder | VQAutoencoder, variables: Mapping[str, Tree]) -> tuple[float, float]:
    """What is taken off latents, and what they are then multiplied by, as given or as measured, to six digits."""
    if model.latent_scale is not None:
        return model.latent_shift, model.latent_scale
    shift, scale = (float(f"{float(np.asarray(value)):.6g}") for value in model.bind(dict(variables)).latents())
    return shift, scale


def _centered(params: Tree, shift: float, channels: int) -> Tree:
    """Parameters that give latents less `shift`, and decode these alike: the library's pipelines only multiply."""
    quant, post_quant = dict(params["quant"]), dict(params["post_quant"])
    quant["bias"] = np.asarray(quant["bias"]) - shift * (np.arange(len(quant["bias"])) < channels)  # means come first
    post_quant["bias"] = np.asarray(post_quant["bias"]) + shift * np.asarray(post_quant["kernel"]).sum((0, 1, 2))
    moved = {**params, "quant": quant, "post_quant": post_quant}
    if "codebook" in params:
        moved["codebook"] = jax.tree.map(lambda codes: np.asarray(codes) - shift, params["codebook"])
    return moved
