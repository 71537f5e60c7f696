"""CLIP as OpenCLIP and OpenAI have it: config or shapes, and tensors to our fields and parameters, and back.

Both name tensors alike. OpenCLIP says in `open_clip_config.json`, or by a network's name, which activation they were
trained with: `ViT-B-32` has GELU, and OpenAI's weights, which come without a config, need `-quickgelu`
(mlfoundations/open_clip issue 771).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.clip import IMAGE_MEAN, IMAGE_STD, Clip
from weights.files.fields import IDLE, Field, fixed, flag, group, read_fields, real, several, whole, word
from weights.files.layout import CONVOLUTION, SAME, Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, WeightsFile, read_weights
from weights.formats.contract import Converted, Files, Format
from weights.formats.runs import CLIP_OPTIONS, clip_run
from weights.formats.transformers import mlp_ratio, say_other_preparation, square, undivided_heads

CONFIG = "open_clip_config.json"
WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_model.safetensors.index.json"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.bin.index.json"),
)
LOGIT_SCALE = float(np.log(1 / 0.07))

# What a config may say beside sizes, with the only values that ours computes; other keys are refused.
_PLAIN_BLOCK = {
    **{"block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False},
    **{"scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "ls_init_value": None},
    **{"act_kwargs": None, "norm_kwargs": None, "final_ln_after_pool": False, "output_tokens": False},
}
_FIXED: dict[str, dict[str, Any]] = {
    "": {"custom_text": False, "nonscalar_logit_scale": False},
    "vision_cfg": {
        **_PLAIN_BLOCK,
        **{"attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable", "pool_type": "tok"},
        **{"timm_model_name": None},
    },
    "text_cfg": {
        **_PLAIN_BLOCK,
        **{"mlp_ratio": 4.0, "embed_cls": False, "no_causal_mask": False, "proj_bias": False, "proj_type": "linear"},
        **{"hf_model_name": None},
    },
}
_LAYERS = whole(high=1024)
_RATIO = real(4.0, low=0, high=1024, above=True)


def _fixed(part: str) -> dict[str, Field]:
    return {key: fixed(value) for key, value in _FIXED[part].items()}


# What open_clip_config.json may hold, with the library's defaults.
_TABLE: dict[str, Field] = {
    "model_cfg": group(
        {
            **_fixed(""),
            "embed_dim": whole(),
            "quick_gelu": flag(False),
            "init_logit_scale": real(LOGIT_SCALE),
            "init_logit_bias": real().or_null(),
            "vision_cfg": group(
                {
                    **_fixed("vision_cfg"),
                    "layers": several(_LAYERS, 12, single=True),
                    "width": whole(768),
                    "head_width": whole(64),
                    "mlp_ratio": _RATIO,
                    "patch_size": whole(16).or_null(16),  # of a ResNet it is null
                    "image_size": several(whole(), 224, length=2, single=True),
                    "patch_dropout": IDLE,
                },
                {},
            ),
            "text_cfg": group(
                {
                    **_fixed("text_cfg"),
                    "context_length": whole(77),
                    "vocab_size": whole(49408),
                    "width": whole(512),
                    "heads": whole(8),
                    "layers": dataclasses.replace(_LAYERS, default=12),
                    "pool_type": word("argmax", ("argmax", "eos")),
                    "eos_id": whole(2, low=0),
                    **dict.fromkeys(("pad_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"), IDLE),
                },
                {},
            ),
        }
    ),
    "preprocess_cfg": group(
        {
            "mean": several(real(), IMAGE_MEAN, length=3),
            "std": several(real(low=0, above=True), IMAGE_STD, length=3),
            **dict.fromkeys(("size", "mode", "interpolation", "resize_mode", "fill_color"), IDLE),
        },
        {},
    ).or_null({}),
}
# Width of a head of the image tower where it is not 64, by the size in a network's name.
_HEAD_WIDTHS = {"H": 80, "g": 88, "bigG": 104, "e": 112}


def _tower(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a transformer's layers."""
    block, layer = rf"{ours}/blocks_(\d+)", rf"{theirs}.resblocks.\1"
    return (
        Rule(rf"{block}/attention_norm/(\w+)", rf"{layer}.ln_1.\2"),
        Rule(rf"{block}/attention/query_key_value/kernel", rf"{layer}.attn.in_proj_weight"),
        Rule(rf"{block}/attention/query_key_value/bias", rf"{layer}.attn.in_proj_bias"),
        Rule(rf"{block}/attention/out/(\w+)", rf"{layer}.attn.out_proj.\2", linear(inputs=2)),
        Rule(rf"{block}/mlp_norm/(\w+)", rf"{layer}.ln_2.\2"),
        Rule(rf"{block}/mlp/up/(\w+)", rf"{layer}.mlp.c_fc.\2"),
        Rule(rf"{block}/mlp/down/(\w+)", rf"{layer}.mlp.c_proj.\2"),
    )


def _bottleneck(module: str) -> Any:
    """Names a module of a ResNet's block; their blocks are counted from 0."""
    return lambda match: f"visual.layer{match[1]}.{int(match[2]) - 1}.{module.format(*match.groups()[2:])}"


_BLOCK = r"image/stage_(\d+)_block_(\d+)"

CLIP = Layout(
    what="this CLIP in the layout of OpenCLIP",
    rules=(
        Rule(r"logit_(scale|bias)", r"logit_\1"),
        Rule(r"text/embedding/(\w+)", r"token_embedding.\1"),
        Rule(r"text/position/embedding", "positional_embedding"),
        Rule(r"text/final_norm/(\w+)", r"ln_final.\1"),
        Rule(r"text/projection/kernel", "text_projection", SAME),
        *_tower("text", "transformer"),
        Rule(r"image/class_embedding", "visual.class_embedding"),
        Rule(r"image/patch/(\w+)", r"visual.conv1.\1", CONVOLUTION),
        Rule(r"image/position/embedding", "visual.positional_embedding"),
        Rule(r"image/first_norm/(\w+)", r"visual.ln_pre.\1"),
        Rule(r"image/final_norm/(\w+)", r"visual.ln_post.\1"),
        Rule(r"image/projection/kernel", "visual.proj", SAME),
        *_tower("image", "visual.transformer"),
        Rule(r"image/stem_(\d)/conv/(\w+)", r"visual.conv\1.\2", CONVOLUTION),
        Rule(r"image/stem_(\d)/norm/(\w+)", r"visual.bn\1.\2"),
        Rule(rf"{_BLOCK}/conv_(\d)/conv/(\w+)", _bottleneck("conv{0}.{1}"), CONVOLUTION),
        Rule(rf"{_BLOCK}/conv_(\d)/norm/(\w+)", _bottleneck("bn{0}.{1}")),
        Rule(rf"{_BLOCK}/skip/conv/(\w+)", _bottleneck("downsample.0.{0}"), CONVOLUTION),
        Rule(rf"{_BLOCK}/skip/norm/(\w+)", _bottleneck("downsample.1.{0}")),
        Rule(r"image/pool/position/embedding", "visual.attnpool.positional_embedding"),
        Rule(r"image/pool/(query|key|value)/(\w+)", lambda m: f"visual.attnpool.{m[1][0]}_proj.{m[2]}"),
        Rule(r"image/pool/out/(\w+)", r"visual.attnpool.c_proj.\1", linear(inputs=2)),
    ),
    # OpenAI's archives carry three numbers as tensors; masks, positions and counts are not learned.
    ignored=r"input_resolution|context_length|vocab_size|attn_mask|position_ids|visual\..*\.num_batches_tracked",
)


def clip_from_open_clip(model: Clip, tensors: Mapping[str, np.ndarray]) -> tuple[Tree, Tree]:
    """Converts a state dict to (params, variables) of `model`; a ResNet's variables are its "batch_stats".

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    collections = CLIP.read(model, tensors)
    return collections.pop("params"), collections


def clip_to_open_clip(params: Tree, variables: Tree) -> Tensors:
    """Converts parameters and variables to a state dict of float32; batch normalizations have seen 0 batches."""
    tensors = CLIP.write({"params": params, **variables})
    counts = [name.replace("running_mean", "num_batches_tracked") for name in tensors if name.endswith("running_mean")]
    return tensors | {name: np.zeros((), np.int64) for name in counts}


def clip_fields(config: Any, preprocess: Any = None) -> dict[str, Any]:
    """Reads OpenCLIP's `model_cfg` as {"name": "clip", fields of `models.clip.Clip`}. Dropout is left out.

    Args:
      config: "model_cfg" of open_clip_config.json.
      preprocess: "preprocess_cfg" of it, for the mean and deviation of pictures; None for the published ones.

    Raises:
      UserError: if it is a network that ours cannot compute.
    """
    given = read_fields("this CLIP", {"model_cfg": config, "preprocess_cfg": preprocess}, _TABLE)
    config, preparation = given["model_cfg"], given["preprocess_cfg"] or {}
    vision, text = config["vision_cfg"], config["text_cfg"]
    say_other_preparation(preprocess or {}, {"interpolation": "bicubic", "resize_mode": "shortest"})
    layers, width = vision["layers"], vision["width"]
    resnet = not isinstance(layers, int)
    if not resnet and vision["patch_size"] is None:
        raise UserError("this CLIP cannot be converted: its vision_cfg.patch_size is None; give the patches of its ViT")
    sizes = {"image_mlp_ratio": mlp_ratio(int(width * vision["mlp_ratio"]), width), "patch_size": vision["patch_size"]}
    fields = {
        "name": "clip",
        "embed_dim": config["embed_dim"],
        "image_tower": "resnet" if resnet else "vit",
        "image_size": square("image_size", vision["image_size"]),
        "image_width": width,
        "image_layers": tuple(layers) if resnet else layers,
        "image_heads": width * (32 if resnet else 1) // vision["head_width"],
        **({} if resnet else sizes),
        "text_vocab_size": text["vocab_size"],
        "text_length": text["context_length"],
        # "argmax" pools where the id is highest, which is where the end is: the last one of the vocabulary.
        "text_end_id": text["vocab_size"] - 1 if text["pool_type"] == "argmax" else text["eos_id"],
        "text_width": text["width"],
        "text_layers": text["layers"],
        "text_heads": text["heads"],
        "activation": "quick_gelu" if config["quick_gelu"] else "gelu",
        "logit_scale_init": config["init_logit_scale"],
        "image_mean": tuple(preparation.get("mean", IMAGE_MEAN)),
        "image_std": tuple(preparation.get("std", IMAGE_STD)),
    }
    bias = config["init_logit_bias"]
    return fields if bias is None else {**fields, "logit_bias_init": bias}


def clip_fields_of_tensors(tensors: Mapping[str, np.ndarray], activation: str, head_width: int = 64) -> dict[str, Any]:
    """Tells {"name": "clip", fields} from the shapes of tensors, for all that shapes can tell.

    Args:
      tensors: a state dict.
      activation: what the network was trained with.
      head_width: of the image tower; the text tower's is 64.

    Raises:
      UserError: if a tensor that says a size is missing.
    """
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise UserError(f"these are not the weights of a CLIP in the layout of OpenCLIP: there is no {name}")
        return shapes[name][axis]

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    def heads(width: int, head_width: int) -> int:
        if width % head_width:
            raise UserError(f"this CLIP has a width of {width}, which heads of {head_width} do not divide")
        return width // head_width

    text_width = size("ln_final.weight", 0)
    if "visual.proj" in shapes:
        width, patch = size("visual.conv1.weight", 0), size("visual.conv1.weight", 2)
        side = round((size("visual.positional_embedding", 0) - 1) ** 0.5)
        hidden = size("visual.transformer.resblocks.0.mlp.c_fc.weight", 0)
        image = {
            "image_tower": "vit",
            "image_size": side * patch,
            "image_width": width,
            "image_layers": count(r"visual\.transformer\.resblocks\.(\d+)\."),
            "image_heads": heads(width, head_width),
            "image_mlp_ratio": mlp_ratio(hidden, width),
            "patch_size": patch,
        }
    else:
        width = size("visual.conv3.weight", 0)
        side = round((size("visual.attnpool.positional_embedding", 0) - 1) ** 0.5)
        stages = count(r"visual\.layer(\d+)\.")
        image = {
            "image_tower": "resnet",
            "image_size": 2 ** (stages + 1) * side,  # a stem that takes 4 x 4 pixels, and stages of stride 2
            "image_width": width,
            "image_layers": tuple(count(rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, stages + 1)),
            "image_heads": heads(width * 32, head_width),
        }
    bias = {"logit_bias_init": float(tensors["logit_bias"].reshape(-1)[0])} if "logit_bias" in tensors else {}
    return {
        "name": "clip",
        "embed_dim": size("text_projection", 1),
        **image,
        "text_vocab_size": size("token_embedding.weight", 0),
        "text_length": size("positional_embedding", 0),
        "text_end_id": size("token_embedding.weight", 0) - 1,
        "text_width": text_width,
        "text_layers": count(r"transformer\.resblocks\.(\d+)\."),
        "text_heads": heads(text_width, 64),
        "activation": activation,
        "logit_scale_init": LOGIT_SCALE,
        **bias,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }


def clip_config(model: Clip) -> dict[str, Any]:
    """Returns the open_clip_config.json of a network that computes what `model` does.

    Raises:
      UserError: if there is none.
    """
    layers, heads = model.image_layers, model.image_heads
    assert heads is not None  # the network has filled it in
    problems = []
    if model.activation not in ("gelu", "quick_gelu"):
        problems.append(f"its activation is {model.activation!r}; OpenCLIP has gelu and quick_gelu")
    if isinstance(layers, tuple) and len(layers) != 4:
        problems.append(f"its image_layers are {layers}; a ResNet of OpenCLIP has 4 stages")
    problems += undivided_heads(model)
    if problems:
        raise UserError(f"this CLIP cannot be written for OpenCLIP: {'; '.join(problems)}")
    vision = {
        "image_size": model.image_size,
        "layers": list(layers) if isinstance(layers, tuple) else layers,
        "width": model.image_width,
        "head_width": model.image_width * (32 if model.image_tower == "resnet" else 1) // heads,
        "patch_size": model.patch_size,
        "mlp_ratio": model.image_mlp_ratio,
    }
    text = {
        "context_length": model.text_length,
        "vocab_size": model.text_vocab_size,
        "width": model.text_width,
        "heads": model.text_heads,
        "layers": model.text_layers,
    }
    if model.text_end_id != model.text_vocab_size - 1:
        text |= {"pool_type": "eos", "eos_id": model.text_end_id}
    config = {"embed_dim": model.embed_dim, "vision_cfg": vision, "text_cfg": text}
    config |= {"quick_gelu": model.activation == "quick_gelu", "init_logit_scale": model.logit_scale_init}
    if model.logit_bias_init is not None:
        config["init_logit_bias"] = model.logit_bias_init
    preprocess = {"mean": list(model.image_mean), "std": list(model.image_std)}
    return {"model_cfg": config, "preprocess_cfg": preprocess}


def read_clip(origin: Origin, name: str = "") -> tuple[dict[str, Any], Tensors]:
    """Reads OpenCLIP's weights: ({"name": "clip", fields}, tensors).

    Args:
      origin: a folder or repository with an open_clip_config.json, or else one with weights alone, or a file.
      name: OpenCLIP's name of the network, such as "ViT-B-32-quickgelu", where there is no config.

    Raises:
      UserError: if neither says which network it is, or the files are missing or say something else.
    """
    config = origin.find(CONFIG)
    if config is not None and name:
        raise UserError(f"{origin.describe()} has a {CONFIG}, which says what the network is; leave --name out")
    if config is not None:
        entry = origin.json(CONFIG)
        if "model_cfg" not in entry:
            raise UserError(f"{config} has no model_cfg; fetch it again")
        fields = clip_fields(entry["model_cfg"], entry.get("preprocess_cfg"))
        return fields, read_weights(origin, WEIGHTS, CLIP.ignored)
    if not name:
        raise UserError(
            f"{origin.describe()} has no {CONFIG}, and weights do not tell their activation; give OpenCLIP's name of "
            "the network, such as --name=ViT-B-32 or --name=ViT-B-32-quickgelu"
        )
    tensors = read_weights(origin, WEIGHTS, CLIP.ignored)
    size = re.match(r"ViT-([A-Za-z]+)-", name)
    if size is None and not name.startswith("RN"):
        raise UserError(
            f"--name={name}: networks called ViT-... and RN... are converted; give a folder with a {CONFIG}"
        )
    activation = "quick_gelu" if name.endswith("-quickgelu") else "gelu"
    return clip_fields_of_tensors(tensors, activation, _HEAD_WIDTHS.get(size[1], 64) if size else 64), tensors


def read_openai_clip(origin: Origin) -> tuple[dict[str, Any], Tensors]:
    """Reads a file of OpenAI's, whose networks have quick GELU: ({"name": "clip", fields}, tensors).

    Raises:
      UserError: if it is another file.
    """
    if not isinstance(origin, WeightsFile):
        raise UserError(f"{origin.describe()} is not a file; OpenAI's weights are one, such as --input=ViT-B-32.pt")
    tensors = read_weights(origin, (), CLIP.ignored)
    return clip_fields_of_tensors(tensors, "quick_gelu"), tensors


def clip_files(model: Clip, params: Tree, variables: Tree) -> Files:
    """What `open_clip.create_model("local-dir:...")` reads.

    Raises:
      UserError: if OpenCLIP cannot compute what `model` does.
    """
    return {CONFIG: clip_config(model), WEIGHTS[0]: clip_to_open_clip(params, variables)}


def openai_clip_files(model: Clip, params: Tree, variables: Tree) -> Files:
    """What `clip.model.build_model` of OpenAI's package takes.

    It tells the rest from shapes, and rounds to half precision.

    Raises:
      UserError: if OpenAI's package would make another network of them, or normalize pictures otherwise.
    """
    tensors = clip_to_open_clip(params, variables)
    told = clip_fields_of_tensors(tensors, "quick_gelu") | {"logit_bias_init": None, "image_mlp_ratio": 4}
    problems = [
        f"its {key} is {getattr(model, key)!r}; OpenAI's has {value!r}"
        for key, value in told.items()
        if key not in ("name", "logit_scale_init") and getattr(model, key) != value
    ]
    if isinstance(model.image_layers, tuple) and len(model.image_layers) != 4:
        problems.append(f"its image_layers are {model.image_layers}; a ResNet of OpenAI's has 4 stages")
    if problems:
        raise UserError(f"this CLIP cannot be written for OpenAI's package: {'; '.join(problems)}")
    return {"clip.safetensors": tensors}


def _read(origin: Origin, name: str = "", tokenizer: str = "") -> Converted:
    fields, tensors = read_clip(origin, name)
    return clip_run(origin, fields, *clip_from_open_clip(create_model(**fields), tensors), tokenizer)


def _read_openai(origin: Origin, tokenizer: str = "") -> Converted:
    fields, tensors = read_openai_clip(origin)
    return clip_run(origin, fields, *clip_from_open_clip(create_model(**fields), tensors), tokenizer)


FORMAT = Format(
    name="open_clip",
    networks=("clip",),
    inputs=f"a CLIP with {CONFIG}, or weights alone with --name",
    outputs='open_clip.create_model("local-dir:DIR"), or create_model(NAME, pretrained=FILE)',
    recognizes=lambda origin: origin.find(CONFIG) is not None,
    read=_read,
    write=lambda network: clip_files(network.model, network.params, network.variables),
    options={**CLIP_OPTIONS, "name": "OpenCLIP's name of a network that comes without a config"},
)

OPENAI_FORMAT = Format(
    name="openai",
    networks=("clip",),
    inputs="a CLIP as OpenAI publishes it, one file",
    outputs='clip.model.build_model(safetensors.torch.load_file("DIR/clip.safetensors"))',
    recognizes=lambda origin: False,  # its tensors are named as OpenCLIP's, and do not tell their activation
    read=_read_openai,
    write=lambda network: openai_clip_files(network.model, network.params, network.variables),
    options=CLIP_OPTIONS,
)
