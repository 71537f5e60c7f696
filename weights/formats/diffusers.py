"""UNets as the diffusers library has them: configs and tensors to our fields and parameters, and back.

First stages are in `diffusers_autoencoder.py`, schedulers in `diffusers_scheduler.py`; the format that all are of is
declared here.

`UNet2DConditionModel` is the UNet with transformers in it (Stable Diffusion, latent diffusion from text), `UNet2DModel`
the one with plain attention (DDPM, ADM, latent diffusion without a context). The traps of that format: what
`UNet2DConditionModel` calls attention_head_dim is the number of heads, while in `UNet2DModel` it is their width; a
level's way of resampling hangs on its type in one case and on downsample_type in another; and old files of
`UNet2DModel` have other names in their attention.
"""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from models import create_model
from models.captioner import Captioner
from models.dit import DiT
from models.unet import UNet
from models.unidiffuser import UniDiffuser
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, real, several, whole, word
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree
from weights.files.origin import Origin, Subfolder, peek_json, read_weights
from weights.formats import diffusers_dit, diffusers_text_decoder, diffusers_unidiffuser
from weights.formats import diffusers_unidiffuser_pipeline as unidiffuser_pipeline
from weights.formats.contract import Converted, Files, Format, Network, Pipeline, refuse_unread
from weights.formats.diffusers_autoencoder import NAMES as AUTOENCODERS
from weights.formats.diffusers_autoencoder import autoencoder_files, read_autoencoder
from weights.formats.diffusers_blocks import attention_rules, residual_rules, transformer_rules, with_new_names
from weights.formats.diffusers_pipeline import GUIDANCE, STEPS, check_parts, is_whole, pipeline_files, read_text_part
from weights.formats.diffusers_scheduler import read_scheduler
from weights.formats.dit import dit_run
from weights.formats.runs import AUTOENCODER_OPTIONS, captioner_run, check_latents, denoiser_run

CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
PIPELINE_FOLDER = "unet"
FIRST_STAGE_FOLDERS = ("vae", "vqvae")
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    *("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"),
    *("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    *("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.fp16.bin"),
)

PLAIN, CONDITION = "UNet2DModel", "UNet2DConditionModel"
_ALONE = (diffusers_text_decoder.CLASS, diffusers_unidiffuser.CLASS, *AUTOENCODERS)
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


def read_unet(origin: Origin) -> tuple[dict[str, Any], Tensors]:
    """Reads what `save_pretrained` of a UNet or of a pipeline with one wrote: ({"name": "unet", fields}, tensors).

    Raises:
      UserError: if files are missing or say something else.
    """
    part = Subfolder(origin, PIPELINE_FOLDER)
    if part.find(CONFIG) is not None:
        origin = part
    return unet_fields(origin.json(CONFIG)), read_weights(origin, WEIGHTS)


def unet_files(model: UNet, params: Tree) -> Files:
    """What `from_pretrained` of the library's UNet reads.

    Raises:
      UserError: if the library cannot compute what `model` does.
    """
    return {CONFIG: unet_config(model), WEIGHTS[0]: unet_layout(model).write_deferred({"params": params})}


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


def _dit_origin(origin: Origin) -> Origin | None:
    """Where the files of a DiT are; None if there is none."""
    for place in (Subfolder(origin, diffusers_dit.PIPELINE_FOLDER), origin):
        config = place.find(CONFIG)
        if config is not None and peek_json(config).get("_class_name") == diffusers_dit.CLASS:
            return place
    return None


def _recognizes(origin: Origin) -> bool:
    if _dit_origin(origin) is not None:
        return True
    config = origin.find(f"{PIPELINE_FOLDER}/{CONFIG}", CONFIG)
    return config is not None and peek_json(config).get("_class_name") in (PLAIN, CONDITION, *_ALONE)


def _read(origin: Origin, subfolder: str = "", latent_scale: str = "", tokenizer: str = "") -> Converted:
    if subfolder and subfolder not in (PIPELINE_FOLDER, diffusers_dit.PIPELINE_FOLDER):
        origin = Subfolder(origin, subfolder)
        origin.require(CONFIG)
    dit = _dit_origin(origin)
    config = origin.find(f"{PIPELINE_FOLDER}/{CONFIG}", CONFIG)
    # Its class may be anything, a list too.
    kind = None if config is None else peek_json(config).get("_class_name")
    if dit is None and kind in (diffusers_text_decoder.CLASS, diffusers_unidiffuser.CLASS):
        refuse_unread(f"a {kind}", latent_scale=latent_scale, tokenizer=tokenizer)
    if dit is None and kind == diffusers_text_decoder.CLASS:
        fields = diffusers_text_decoder.text_decoder_fields(origin.json(CONFIG))
        tensors = read_weights(origin, WEIGHTS, diffusers_text_decoder.IGNORED)
        params = diffusers_text_decoder.text_decoder_from_diffusers(create_model(**fields), tensors)
        return captioner_run(fields, params)
    if dit is None and kind == diffusers_unidiffuser.CLASS and origin.find(unidiffuser_pipeline.TEXT_DECODER):
        return unidiffuser_pipeline.read_pipeline(origin, WEIGHTS)
    if dit is None and kind == diffusers_unidiffuser.CLASS:
        place = origin if origin.find(f"{PIPELINE_FOLDER}/{CONFIG}") is None else Subfolder(origin, PIPELINE_FOLDER)
        fields = diffusers_unidiffuser.unidiffuser_fields(place.json(CONFIG))
        tensors = read_weights(place, WEIGHTS, diffusers_unidiffuser.IGNORED)
        params = diffusers_unidiffuser.unidiffuser_from_diffusers(create_model(**fields), tensors)
        return Converted({"objective": "", "models": {"unidiffuser": fields}}, {"unidiffuser": params})
    if dit is None and kind in tuple(AUTOENCODERS):
        refuse_unread("a first stage", tokenizer=tokenizer)
        return read_autoencoder(origin.json(CONFIG), read_weights(origin, WEIGHTS), latent_scale)
    process, sample = (None, {}) if origin.find(SCHEDULER) is None else read_scheduler(origin.json(SCHEDULER))
    if dit is not None:
        fields = diffusers_dit.dit_fields(dit.json(CONFIG))
        refuse_unread("a DiT", tokenizer=tokenizer)
        params = diffusers_dit.dit_from_diffusers(create_model(**fields), read_weights(dit, WEIGHTS))
        stage, notes = _find_first_stage(origin, fields["in_channels"], latent_scale)
        return dit_run(fields, params, process, sample, stage, notes)
    fields, tensors = read_unet(origin)
    model = create_model(**fields)
    params = unet_layout(model).read_deferred(model, with_new_names(tensors))["params"]
    text = read_text_part(origin, tokenizer) if fields.get("context_width") else None
    if text is None:
        refuse_unread("a UNet without a text encoder", tokenizer=tokenizer)
    stage, notes = _find_first_stage(origin, fields["in_channels"], latent_scale, needed=text is not None)
    found = {"vae": stage is not None, "text_encoder": text is not None, "scheduler": process is not None}
    if text is not None or is_whole(origin):
        notes += check_parts(origin, found)
    if text is not None:
        if (width := text[0]["text_width"]) != fields["context_width"]:
            raise UserError(f"its text encoder has width {width}, and its UNet reads {fields['context_width']}")
        sample = {**sample, "steps": STEPS, "guidance": GUIDANCE}  # whatever the scheduler
    return denoiser_run(fields, params, process, sample, stage, notes, text)


def _find_first_stage(
    origin: Origin, channels: int, latent_scale: str, needed: bool = False
) -> tuple[tuple[dict[str, Any], Tree] | None, tuple[str, ...]]:
    """({name, fields}, parameters) of a pipeline's first stage, if it makes latents of so many channels; and notes.

    One that is `needed` is refused where it does not fit or cannot be read, and a scale where there is none.
    """
    for folder in FIRST_STAGE_FOLDERS:
        part = Subfolder(origin, folder)
        if (path := part.find(CONFIG)) is None or peek_json(path).get("_class_name") not in tuple(AUTOENCODERS):
            continue
        try:
            read = read_autoencoder(part.json(CONFIG), read_weights(part, WEIGHTS), latent_scale)
        except UserError as error:
            if needed or latent_scale:
                raise
            return None, (f"its first stage is left out: {error}",)
        fields = read.config["models"]["autoencoder"]
        if fields["latent_channels"] == channels:
            return (fields, read.params["autoencoder"]), read.notes
        if needed:
            check_latents(channels, fields["latent_channels"])
    refuse_unread("a network without a first stage", latent_scale=latent_scale)
    return None, ()


def _write(network: Network) -> Files:
    model, params = network.model, network.params
    if isinstance(model, DiT):
        if not network.null_class:
            raise UserError(
                "this DiT has no class for none, and one for diffusers has; train it with config.loss.dropout"
            )
        return {
            CONFIG: diffusers_dit.dit_config(model),
            WEIGHTS[0]: diffusers_dit.dit_to_diffusers(model, params),
        }
    if isinstance(model, Captioner):
        return {
            CONFIG: diffusers_text_decoder.text_decoder_config(model),
            WEIGHTS[0]: diffusers_text_decoder.text_decoder_to_diffusers(params),
        }
    if isinstance(model, UniDiffuser):
        write = unidiffuser_pipeline.pipeline_files if network.beside else unidiffuser_pipeline.network_files
        return write(network, CONFIG, WEIGHTS[0])
    return unet_files(model, params) if isinstance(model, UNet) else autoencoder_files(network, CONFIG, WEIGHTS[0])


def _write_pipeline(pipeline: Pipeline) -> Files:
    return pipeline_files(pipeline, _write(pipeline.networks["denoiser"]))


FORMAT = Format(
    name="diffusers",
    networks=("unet", "dit", "unidiffuser", "captioner", *AUTOENCODERS.values()),
    inputs="a UNet, a DiT, a UniDiffuser, its captioner or a first stage; of a pipeline the first two with a first "
    "stage and what its scheduler says; whole pipelines of Stable Diffusion and UniDiffuser",
    outputs="from_pretrained(DIR) of UNet2DModel, UNet2DConditionModel if it has transformers, DiTTransformer2DModel, "
    "UniDiffuserModel (UniDiffuserPipeline, given its tokenizers), UniDiffuserTextDecoder, AutoencoderKL or VQModel; "
    "StableDiffusionPipeline of a run whose captions a frozen clip_text reads",
    recognizes=_recognizes,
    read=_read,
    write=_write,
    beside={"unidiffuser": unidiffuser_pipeline.BESIDE},
    options={
        "subfolder": "of a pipeline: the folder of a network that is read alone, such as vae; a unet or a transformer "
        "comes with its scheduler and first stage in any case",
        "tokenizer": "of a pipeline that comes without one: CLIP's vocabulary, or a tokenizer.json",
        **AUTOENCODER_OPTIONS,
    },
    write_pipeline=_write_pipeline,
)
