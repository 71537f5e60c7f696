"""UNets as the diffusers library has them: configs and tensors to our fields and parameters, and back.

`UNet2DConditionModel` is the UNet with transformers in it (Stable Diffusion, latent diffusion from text), `UNet2DModel`
the one with plain attention (DDPM, ADM, latent diffusion without a context). The traps of that format: what
`UNet2DConditionModel` calls attention_head_dim is the number of heads, while in `UNet2DModel` it is their width; a
level's way of resampling hangs on its type in one case and on downsample_type in another; and old files of
`UNet2DModel` have other names in their attention.
"""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from models.unet import UNet
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, real, several, whole, word
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree
from weights.formats.diffusers_autoencoder import NAMES as AUTOENCODERS
from weights.formats.diffusers_blocks import attention_rules, residual_rules, transformer_rules, with_new_names

PLAIN, CONDITION = "UNet2DModel", "UNet2DConditionModel"
_ATTENTION = {PLAIN: "plain", CONDITION: "transformer"}

# Keys of which ours computes one value, which is the library's default.
_SHARED_FIXED: dict[str, Any] = {
    **{"center_input_sample": False, "time_embedding_type": "positional", "mid_block_scale_factor": 1},
    **{"act_fn": "silu", "class_embed_type": None},
}
_FIXED: dict[str, dict[str, Any]] = {
    PLAIN: {**_SHARED_FIXED, "mid_block_type": "UNetMidBlock2D", "add_attention": True},
    CONDITION: {
        **_SHARED_FIXED,
        **{"mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "encoder_hid_dim": None},
        **{"encoder_hid_dim_type": None, "num_attention_heads": None, "dual_cross_attention": False},
        **{"addition_embed_type": None, "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0},
        **{"time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None},
        **{"conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False},
        **{"mid_block_only_cross_attention": None, "cross_attention_norm": None},
        **{"reverse_transformer_layers_per_block": None},
    },
}
_ALIKE: dict[str, tuple[Any, ...]] = {"act_fn": ("swish",)}
# Types of levels -> (has attention, how it resamples); None where another key says.
_LEVELS: dict[str, dict[str, tuple[bool, str | None]]] = {
    PLAIN: {
        **{"DownBlock2D": (False, "convolution"), "UpBlock2D": (False, "convolution")},
        **{"ResnetDownsampleBlock2D": (False, "residual"), "ResnetUpsampleBlock2D": (False, "residual")},
        **{"AttnDownBlock2D": (True, None), "AttnUpBlock2D": (True, None)},
    },
    CONDITION: {
        **{"DownBlock2D": (False, "convolution"), "UpBlock2D": (False, "convolution")},
        **{"CrossAttnDownBlock2D": (True, "convolution"), "CrossAttnUpBlock2D": (True, "convolution")},
    },
}
_RESAMPLERS = {"conv": "convolution", "resnet": "residual"}

_WIDTHS = "block_out_channels"
# Of each level one number, or one for all.
_DEPTH = whole(high=64)


def _tables() -> dict[str, dict[str, Field]]:
    """What each class's config.json may hold, with the library's defaults."""
    shared = {
        "sample_size": several(whole(), length=2, single=True),
        "flip_sin_to_cos": flag(True),
        "freq_shift": whole(0, low=0, high=1),
        "time_embedding_dim": whole().or_null(),
        "layers_per_block": several(_DEPTH, 2, length=_WIDTHS, single=True),
        "downsample_padding": whole(1, low=0, high=1),
        "dropout": real(0.0, low=0, high=1),
        "norm_num_groups": whole(32),
        "norm_eps": real(1e-5, low=0, above=True),
        "resnet_time_scale_shift": word("default", ("default", "scale_shift")),
        "num_class_embeds": whole().or_null(),
    }
    # Of how it was trained and averaged, and what other keys make idle.
    idle = {
        *("num_train_timesteps", "upcast_attention", "addition_time_embed_dim", "addition_embed_type_num_heads"),
        *("projection_class_embeddings_input_dim", "decay", "min_decay", "inv_gamma", "power", "optimization_step"),
        *("update_after_step", "use_ema_warmup"),
    }
    own: dict[str, dict[str, Field]] = {
        PLAIN: {
            "in_channels": whole(3),
            "out_channels": whole(3),
            _WIDTHS: several(whole(), (224, 448, 672, 896)),
            "down_block_types": _types(PLAIN, "Down", ("DownBlock2D", *3 * ("AttnDownBlock2D",))),
            "up_block_types": _types(PLAIN, "Up", (*3 * ("AttnUpBlock2D",), "UpBlock2D")),
            "downsample_type": word("conv", tuple(_RESAMPLERS)),
            "upsample_type": word("conv", tuple(_RESAMPLERS)),
            "attn_norm_num_groups": whole().or_null(),
            "attention_head_dim": whole().or_null(default=8),
        },
        CONDITION: {
            "in_channels": whole(4),
            "out_channels": whole(4),
            _WIDTHS: several(whole(), (320, 640, 1280, 1280)),
            "down_block_types": _types(CONDITION, "Down", (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")),
            "up_block_types": _types(CONDITION, "Up", ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))),
            "cross_attention_dim": several(whole(), 1280, length=_WIDTHS, single=True),
            "transformer_layers_per_block": several(_DEPTH, 1, length=_WIDTHS, single=True),
            "use_linear_projection": flag(False),
            "attention_head_dim": several(whole(), 8, length=_WIDTHS, single=True),
        },
    }
    return {
        kind: {
            **shared,
            **own[kind],
            **{key: fixed(value, *_ALIKE.get(key, ())) for key, value in _FIXED[kind].items()},
            **dict.fromkeys(idle, IDLE),
        }
        for kind in own
    }


def _types(kind: str, way: str, default: tuple[str, ...]) -> Field:
    names = tuple(name for name in _LEVELS[kind] if way in name)
    return several(word(choices=names), default, length=_WIDTHS)


_TABLES = _tables()


def unet_layout(model: UNet) -> Layout:
    """The table of a network: the library numbers the levels of the way up from the coarsest."""
    attend = attention_rules if model.attention == "plain" else transformer_rules
    levels = len(model.multipliers)
    rules = [
        Rule(r"input/(\w+)", r"conv_in.\1", CONVOLUTION),
        Rule(r"time_(\d)/(\w+)", r"time_embedding.linear_\1.\2"),
        Rule(r"class/(\w+)", r"class_embedding.\1"),
        Rule(r"output_norm/(\w+)", r"conv_norm_out.\1"),
        Rule(r"output/(\w+)", r"conv_out.\1", CONVOLUTION),
        *residual_rules(r"mid_residual_(\d)", r"mid_block.resnets.\1"),
        *attend(r"mid_attention()", r"mid_block.attentions.0"),
    ]
    for level in range(levels):
        for way, number in (("down", level), ("up", levels - 1 - level)):
            ours, theirs = f"{way}_{level}", f"{way}_blocks.{number}"
            sampler = f"{theirs}.{way}samplers.0"
            rules += residual_rules(rf"{ours}_residual_(\d+)", rf"{theirs}.resnets.\1")
            rules += attend(rf"{ours}_attention_(\d+)", rf"{theirs}.attentions.\1")
            rules.append(Rule(rf"{ours}_resample/conv/(\w+)", rf"{sampler}.conv.\1", CONVOLUTION))
            rules += residual_rules(rf"{ours}_resample()", sampler)
    return Layout(what="this UNet in the layout of diffusers", rules=tuple(rules))


def unet_from_diffusers(model: UNet, tensors: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Converts the tensors of a UNet to (params, variables) of `model`; there are no variables.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return unet_layout(model).read(model, with_new_names(tensors))["params"], {}


def unet_to_diffusers(model: UNet, params: Tree) -> Tensors:
    """Converts parameters to the tensors of the library's UNet, float32.

    Raises:
      UserError: if it has no place for them.
    """
    return unet_layout(model).write({"params": params})


def unet_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the config of one of the library's UNets as {"name": "unet", fields of `models.unet.UNet`}.

    Raises:
      UserError: if it is another network's, or a UNet that ours cannot compute; says all reasons.
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _ATTENTION:
        raise UserError(
            f"config.json is of class {kind!r}; {', '.join((PLAIN, CONDITION, *AUTOENCODERS))} are converted"
        )
    given = read_fields("this UNet", config, _TABLES[kind])
    problems: list[str] = []
    widths = tuple(given["block_out_channels"])
    attention_levels, resampler = _read_levels(kind, given, problems)
    fields = {
        "name": "unet",
        "image_size": _one("sample_size", given["sample_size"], problems),
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "width": widths[0],
        "multipliers": tuple(_ratio(width, widths[0]) for width in widths),
        "attention_levels": attention_levels,
        "blocks": _one("layers_per_block", given["layers_per_block"], problems),
        "attention": _ATTENTION[kind],
        "num_classes": given["num_class_embeds"] or 0,
        "time_width": given["time_embedding_dim"] or 4 * widths[0],
        "sine_first": not given["flip_sin_to_cos"],
        "last_period": bool(given["freq_shift"]),
        "scale_shift": given["resnet_time_scale_shift"] == "scale_shift",
        "resampler": resampler,
        "downsample_padding": (given["downsample_padding"], 1),
        "dropout": given["dropout"],
        "groups": given["norm_num_groups"],
        "norm_epsilon": given["norm_eps"],
    }
    if kind == CONDITION:
        fields |= {
            "context_width": _one("cross_attention_dim", given["cross_attention_dim"], problems),
            "transformer_depth": _one("transformer_layers_per_block", given["transformer_layers_per_block"], problems),
            "linear_projection": given["use_linear_projection"],
            **_read_heads(widths, attention_levels, given["attention_head_dim"], problems),
        }
    else:
        width = given["attention_head_dim"]
        fields |= {"heads": 1} if width is None else {"head_width": width}
        groups = given["attn_norm_num_groups"]
        if groups is None and fields["scale_shift"]:
            problems.append("attn_norm_num_groups is None, which leaves the norm out of the middle's attention")
        elif groups not in (None, fields["groups"]):
            problems.append(f"attn_norm_num_groups is {groups}, ours is norm_num_groups, {fields['groups']}")
    if problems:
        raise UserError(f"this UNet cannot be converted: {'; '.join(problems)}")
    return fields


def unet_config(model: UNet) -> dict[str, Any]:
    """Returns config.json of the library's UNet that computes what `model` does.

    Raises:
      UserError: if there is none; says all reasons.
    """
    kind = PLAIN if model.attention == "plain" else CONDITION
    levels = len(model.multipliers)
    residual = model.resampler == "residual"
    problems = []
    if model.patch_size != 1:
        problems.append(f"its patch_size is {model.patch_size}, theirs do not fold patches")
    if model.widths[0] != model.width:
        problems.append(f"its first level has {model.widths[0]} channels and its time {model.width}, theirs are one")
    if model.num_classes and model.class_embedding != "time":
        problems.append(f"its class_embedding is {model.class_embedding!r}; theirs is added to the time")
    if tuple(model.downsample_padding) not in ((0, 1), (1, 1)):
        problems.append(f"its downsample_padding is {tuple(model.downsample_padding)}, theirs (0, 1) or (1, 1)")
    if kind == CONDITION and residual:
        problems.append("its resampler is 'residual', theirs beside transformers is 'convolution'")
    if kind == CONDITION and not model.context_width:
        problems.append("its transformers read no context; theirs do")

    def types(way: str) -> list[str]:
        attending = f"{'Attn' if kind == PLAIN else 'CrossAttn'}{way}Block2D"
        plain = f"Resnet{way}sampleBlock2D" if residual else f"{way}Block2D"
        return [attending if level in model.attention_levels else plain for level in range(levels)]

    config: dict[str, Any] = {
        "_class_name": kind,
        **_FIXED[kind],
        "sample_size": model.image_size,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "block_out_channels": list(model.widths),
        "down_block_types": types("Down"),
        "up_block_types": types("Up")[::-1],
        "layers_per_block": model.blocks,
        "time_embedding_dim": None if model.time_width == 4 * model.width else model.time_width,
        "flip_sin_to_cos": not model.sine_first,
        "freq_shift": int(model.last_period),
        "downsample_padding": model.downsample_padding[0],
        "dropout": model.dropout,
        "norm_num_groups": model.groups,
        "norm_eps": model.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift else "default",
        "num_class_embeds": model.num_classes or None,
    }
    if kind == CONDITION:
        heads = model.heads or [max(1, width // model.head_width) for width in model.widths]
        config |= {
            "attention_head_dim": heads,
            "cross_attention_dim": model.context_width,
            "transformer_layers_per_block": model.transformer_depth,
            "use_linear_projection": model.linear_projection,
        }
    else:
        kept = "resnet" if residual else "conv"
        config |= {"downsample_type": kept, "upsample_type": kept, "attn_norm_num_groups": model.groups}
        config["attention_head_dim"] = _head_width(model, problems)
    if problems:
        raise UserError(f"this UNet cannot be written for diffusers: {'; '.join(problems)}")
    return config


def _read_levels(kind: str, given: Mapping[str, Any], problems: list[str]) -> tuple[tuple[int, ...], str]:
    """(levels with attention, how they resample)."""
    down, up = list(given["down_block_types"]), list(given["up_block_types"])[::-1]
    attending = [[_LEVELS[kind][name][0] for name in names] for names in (down, up)]
    if attending[0] != attending[1]:
        problems.append("the ways down and up have attention at different levels")
    resamplers = set()
    # Of the way down all levels but the coarsest resample, of the way up all but the finest.
    for names, key in ((down[:-1], "downsample_type"), (up[1:], "upsample_type")):
        for name in names:
            resamplers.add(_LEVELS[kind][name][1] or _RESAMPLERS[given[key]])
    if len(resamplers) > 1:
        problems.append(f"levels resample by {' and by '.join(sorted(map(str, resamplers)))}, ours all by one of two")
    return tuple(i for i, attends in enumerate(attending[0]) if attends), min(resamplers, default="convolution")


def _read_heads(widths: tuple[int, ...], levels: tuple[int, ...], heads: Any, problems: list[str]) -> dict[str, int]:
    """Our field for numbers of heads, one for all levels or one for each."""
    numbers = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    attending = sorted({*levels, len(widths) - 1})  # the last one's middle has attention too
    if len({numbers[level] for level in attending}) == 1:
        return {"heads": numbers[-1]}
    head_widths = {widths[level] / numbers[level] for level in attending}
    if len(head_widths) > 1:
        problems.append(f"its levels have {numbers} heads, neither one number nor of one width")
    return {"head_width": int(head_widths.pop())}


def _head_width(model: UNet, problems: list[str]) -> int | None:
    """The width of a head at every level as UNet2DModel has it; None is one head."""
    if model.head_width is not None or model.heads == 1:
        return model.head_width
    attending = {model.widths[level] for level in (*model.attention_levels, len(model.widths) - 1)}
    if len(attending) > 1:
        problems.append(f"its {model.heads} heads differ in width between levels, those of {PLAIN} do not")
    return attending.pop() // model.heads


def _one(key: str, value: Any, problems: list[str]) -> Any:
    """What stands for all levels or sides, as one number or as equal ones."""
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1:
        problems.append(f"{key} is {value}, ours one number")
    return values.pop()


def _ratio(width: int, first: int) -> int | float:
    """The multiplier of a level; a whole number where it is one."""
    return width // first if width % first == 0 else width / first
