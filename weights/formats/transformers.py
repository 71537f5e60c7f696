"""What the transformers library saves: CLIP here (`CLIPModel`); GPT-2, Llama and Llama Vision in files of their own.

The traps of CLIP's config: those of before 2023 give the end token as 2, which the library takes for "the highest id
of the row"; and the activation stands twice, once for each tower.
"""

from collections.abc import Callable, Mapping
from typing import Any

from cli.errors import UserError
from data.llama_tokenizer import LlamaTokenizer
from models import create_model
from models.clip import IMAGE_MEAN, IMAGE_STD, Clip
from models.gpt2 import GPT2
from models.llama import Llama
from models.vision_adapter import VisionAdapter
from weights.files.fields import IDLE, Field, fixed, read_fields, real, several, whole, word
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, peek_json, read_weights
from weights.formats.contract import Converted, Files, Format, Network
from weights.formats.runs import CLIP_OPTIONS, clip_run
from weights.formats.transformers_gpt2 import gpt2_files, read_gpt2
from weights.formats.transformers_llama import llama_files, read_llama, tokenizer_files
from weights.formats.transformers_mllama import mllama_files, read_mllama

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# The library's names of activations -> ours; the first of two is the one that is written.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Of every config of the library: of training, generation, labels, and how it computes.
_IDLE = (
    *("add_cross_attention", "architectures", "attention_dropout", "attn_implementation", "bad_words_ids"),
    *("begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor"),
    *("initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length"),
    *("min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type"),
    *("pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate"),
    *("sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype"),
    *("torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache", "use_return_dict"),
    *("text_config_dict", "vision_config_dict", "projection_dim"),
)
_LAYERS = whole(12, high=1024)
_TOWER: dict[str, Field] = {
    **dict.fromkeys(_IDLE, IDLE),
    "num_hidden_layers": _LAYERS,
    "hidden_act": word("quick_gelu", tuple(ACTIVATIONS)),
    "layer_norm_eps": fixed(1e-5),
}
# What config.json may hold, with the library's defaults.
TEXT_TOWER: dict[str, Field] = {
    **_TOWER,
    "vocab_size": whole(49408),
    "hidden_size": whole(512),
    "intermediate_size": whole(2048),
    "num_attention_heads": whole(8),
    "max_position_embeddings": whole(77),
}
_TOWERS: dict[str, dict[str, Field]] = {
    "text": {**TEXT_TOWER, "eos_token_id": whole(49407, low=0)},
    "vision": {
        **_TOWER,
        "hidden_size": whole(768),
        "intermediate_size": whole(3072),
        "num_attention_heads": whole(12),
        "num_channels": fixed(3),
        "image_size": several(whole(), 224, length=2, single=True),
        "patch_size": several(whole(), 32, length=2, single=True),
    },
}
_ANY_GROUP = Field("an object", lambda value: isinstance(value, Mapping)).or_null({})
_CONFIG: dict[str, Field] = {
    **dict.fromkeys(_IDLE, IDLE),
    **{f"{tower}_config{suffix}": _ANY_GROUP for tower in _TOWERS for suffix in ("", "_dict")},
    "projection_dim": whole(512),
    "logit_scale_init_value": real(2.6592),
}
# What preprocessor_config.json may hold; how pictures are resized and cut is said where it differs.
_PREPARATION = {
    **{"resample": 3, "do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255},
    **{"do_normalize": True},
}
_PREPROCESSOR: dict[str, Field] = {
    "image_mean": several(real(), IMAGE_MEAN, length=3),
    "image_std": several(real(low=0, above=True), IMAGE_STD, length=3),
    **dict.fromkeys(_PREPARATION, IDLE),
    **dict.fromkeys(
        (
            *("crop_size", "data_format", "default_to_square", "device", "disable_grouping", "do_convert_rgb"),
            *("do_pad", "feature_extractor_type", "image_processor_type", "image_seq_length", "input_data_format"),
            *("pad_size", "processor_class", "return_tensors", "size", "size_divisor"),
        ),
        IDLE,
    ),
}
_CLIP_VOCABULARY = 49408


def _tower(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a transformer's layers."""
    block, layer = rf"{ours}/blocks_(\d+)", rf"{theirs}.encoder.layers.\1"
    return (
        Rule(rf"{block}/attention_norm/(\w+)", rf"{layer}.layer_norm1.\2"),
        Rule(
            rf"{block}/attention/query_key_value/(\w+)",
            tuple(rf"{layer}.self_attn.{name}_proj.\2" for name in "qkv"),
        ),
        Rule(rf"{block}/attention/out/(\w+)", rf"{layer}.self_attn.out_proj.\2", linear(inputs=2)),
        Rule(rf"{block}/mlp_norm/(\w+)", rf"{layer}.layer_norm2.\2"),
        Rule(rf"{block}/mlp/up/(\w+)", rf"{layer}.mlp.fc1.\2"),
        Rule(rf"{block}/mlp/down/(\w+)", rf"{layer}.mlp.fc2.\2"),
    )


CLIP = Layout(
    what="this CLIP in the layout of transformers",
    rules=(
        Rule(r"logit_scale", "logit_scale"),
        Rule(r"image/class_embedding", "vision_model.embeddings.class_embedding"),
        Rule(r"image/patch/(\w+)", r"vision_model.embeddings.patch_embedding.\1", CONVOLUTION),
        Rule(r"image/position/(\w+)", r"vision_model.embeddings.position_embedding.\1"),
        Rule(r"image/first_norm/(\w+)", r"vision_model.pre_layrnorm.\1"),
        Rule(r"image/final_norm/(\w+)", r"vision_model.post_layernorm.\1"),
        Rule(r"image/projection/(\w+)", r"visual_projection.\1"),
        *_tower("image", "vision_model"),
        Rule(r"text/embedding/(\w+)", r"text_model.embeddings.token_embedding.\1"),
        Rule(r"text/position/(\w+)", r"text_model.embeddings.position_embedding.\1"),
        Rule(r"text/final_norm/(\w+)", r"text_model.final_layer_norm.\1"),
        Rule(r"text/projection/(\w+)", r"text_projection.\1"),
        *_tower("text", "text_model"),
    ),
    ignored=r"(text_model|vision_model)\.embeddings\.position_ids",
)


def clip_from_transformers(model: Clip, tensors: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Converts the tensors of a `CLIPModel` to (params, variables) of `model`; there are no variables.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return CLIP.read(model, tensors)["params"], {}


def clip_to_transformers(params: Tree) -> Tensors:
    """Converts parameters to the tensors of a `CLIPModel`, float32.

    Raises:
      UserError: if it has no place for them: those of a ResNet or of a logit bias.
    """
    return CLIP.write({"params": params})


def clip_fields(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a `CLIPModel`'s config as {"name": "clip", fields of `models.clip.Clip`}. Dropout is left out.

    Args:
      config: config.json.
      preprocessor: preprocessor_config.json, for the mean and deviation of pictures; None for the published ones.

    Raises:
      UserError: if it is another model's, or a CLIP that ours cannot compute.
    """
    if config.get("model_type") != "clip":
        kind = config.get("model_type")
        raise UserError(
            f"config.json is of model_type {kind!r}; only 'clip', 'gpt2', 'llama' and 'mllama' are converted"
        )
    given = read_fields("this CLIP", config, _CONFIG)
    towers = {}
    for tower, table in _TOWERS.items():
        # The library merges its defaults into the older of the two keys, and that over the newer one.
        older, newer = (config.get(f"{tower}_config{suffix}") for suffix in ("_dict", ""))
        document = older if older is not None else newer or {}
        towers[tower] = read_fields(f"the {tower}_config of this CLIP", document, table)
    text, vision = towers["text"], towers["vision"]
    problems = [
        f"the {tower} tower has {key} {towers[tower][key]!r}, ours {value!r}"
        for tower, key, value in (
            ("text", "intermediate_size", 4 * text["hidden_size"]),
            ("vision", "hidden_act", text["hidden_act"]),
        )
        if towers[tower][key] != value
    ]
    if problems:
        raise UserError(f"this CLIP cannot be converted: {'; '.join(problems)}")
    prepared = read_fields("the preparation of pictures for this CLIP", preprocessor or {}, _PREPROCESSOR)
    say_other_preparation(preprocessor or {}, _PREPARATION)
    fields = {
        "name": "clip",
        "embed_dim": given["projection_dim"],
        "image_tower": "vit",
        "image_size": square("image_size", vision["image_size"]),
        "image_width": vision["hidden_size"],
        "image_layers": vision["num_hidden_layers"],
        "image_heads": vision["num_attention_heads"],
        "image_mlp_ratio": mlp_ratio(vision["intermediate_size"], vision["hidden_size"]),
        "patch_size": square("patch_size", vision["patch_size"]),
        "text_vocab_size": text["vocab_size"],
        "text_length": text["max_position_embeddings"],
        "text_end_id": _end_id(text["eos_token_id"], text["vocab_size"]),
        "text_width": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "activation": ACTIVATIONS[text["hidden_act"]],
        "logit_scale_init": given["logit_scale_init_value"],
        "image_mean": tuple(prepared["image_mean"]),
        "image_std": tuple(prepared["image_std"]),
    }
    return fields


def clip_configs(model: Clip) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json and preprocessor_config.json of a `CLIPModel` that computes what `model` does.

    Raises:
      UserError: if there is none.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    problems = []
    if model.image_tower != "vit":
        problems.append(f"its image_tower is {model.image_tower!r}; CLIPModel has a vit")
    if model.logit_bias_init is not None:
        problems.append("it has a logit bias; CLIPModel has none")
    if model.activation not in names:
        problems.append(f"its activation is {model.activation!r}")
    if model.text_end_id == 2:
        problems.append("its text_end_id is 2, which transformers takes for the highest id of a caption")
    problems += undivided_heads(model)
    if problems:
        raise UserError(f"this CLIP cannot be written for transformers: {'; '.join(problems)}")
    shared = {"hidden_act": names[model.activation], "layer_norm_eps": 1e-5, "projection_dim": model.embed_dim}
    text = {
        "model_type": "clip_text_model",
        "vocab_size": model.text_vocab_size,
        "hidden_size": model.text_width,
        "intermediate_size": 4 * model.text_width,
        "num_hidden_layers": model.text_layers,
        "num_attention_heads": model.text_heads,
        "max_position_embeddings": model.text_length,
        "eos_token_id": model.text_end_id,
        "bos_token_id": None,  # the network does not use them
        "pad_token_id": None,
        **shared,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": model.image_width,
        "intermediate_size": int(model.image_width * model.image_mlp_ratio),
        "num_hidden_layers": model.image_layers,
        "num_attention_heads": model.image_heads,
        "num_channels": 3,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        **shared,
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": model.logit_scale_init,
        "text_config": text,
        "vision_config": vision,
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": model.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": model.image_size, "width": model.image_size},
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(model.image_mean),
        "image_std": list(model.image_std),
    }
    return config, preprocessor


def read_clip(origin: Origin) -> tuple[dict[str, Any], Tensors]:
    """Reads a folder or repository that `save_pretrained` wrote: ({"name": "clip", fields}, tensors).

    Raises:
      UserError: if files are missing or say something else.
    """
    prepared = "preprocessor_config.json"
    preprocessor = None if origin.find(prepared) is None else origin.json(prepared)
    return clip_fields(origin.json("config.json"), preprocessor), read_weights(origin, WEIGHTS, CLIP.ignored)


def clip_files(model: Clip, params: Tree) -> Files:
    """What `CLIPModel.from_pretrained` reads.

    Raises:
      UserError: if `CLIPModel` cannot compute what `model` does.
    """
    config, preprocessor = clip_configs(model)
    return {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        WEIGHTS[0]: clip_to_transformers(params),
    }


def undivided_heads(model: Clip) -> list[str]:
    """Says where heads do not share their tower's width among them, as they do in other projects' networks."""
    image_width = model.image_width * (32 if model.image_tower == "resnet" else 1)
    towers = {"image": (model.image_heads, image_width), "text": (model.text_heads, model.text_width)}
    return [
        f"its {tower}_heads {heads} do not divide {width}" for tower, (heads, width) in towers.items() if width % heads
    ]


def say_other_preparation(preparation: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Prints how pictures were prepared for a network, where it is not as `clip_evaluation` does it."""
    other = {key: preparation[key] for key, value in usual.items() if preparation.get(key, value) != value}
    if other:
        print(
            f"warning: its pictures were prepared with {other}; here the short side is resized (bicubic) and the "
            "center cut out, so its features will differ"
        )


def mlp_ratio(hidden: int, width: int) -> int | float:
    """The ratio r of widths with int(width r) = hidden; a whole number where it is one."""
    ratio = hidden / width
    while int(width * ratio) < hidden:  # a rounding error below
        ratio += 1e-9
    return int(ratio) if ratio == int(ratio) else ratio


def _end_id(eos: int, vocab_size: int) -> int:
    """The id whose first position is pooled.

    2 is what configs said before the library used the value; it still reads the row's highest id there, which is the
    end in CLIP's vocabulary (ids that were added behind it may not occur).
    """
    if eos == 2:
        return min(vocab_size, _CLIP_VOCABULARY) - 1
    if eos < vocab_size:
        return eos
    raise UserError(
        f"eos_token_id is {eos!r}, which is not one of the {vocab_size} ids of this CLIP; correct config.json"
    )


def square(key: str, value: Any) -> int:
    """A side of a square from a number or a pair."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise UserError(f"{key} is {value}; only squares are converted")
    return sides.pop()


def _read_clip(origin: Origin, tokenizer: str) -> Converted:
    fields, tensors = read_clip(origin)
    return clip_run(origin, fields, *clip_from_transformers(create_model(**fields), tensors), tokenizer)


_READERS: dict[str, Callable[[Origin], Converted]] = {"gpt2": read_gpt2, "llama": read_llama, "mllama": read_mllama}
_WRITERS: dict[type, Callable[[Any, Tree], Files]] = {
    Clip: clip_files,
    GPT2: gpt2_files,
    Llama: llama_files,
    VisionAdapter: mllama_files,
}


def _recognizes(origin: Origin) -> bool:
    config = origin.find("config.json")
    return config is not None and peek_json(config).get("model_type") in ("clip", *_READERS)


def _read(origin: Origin, tokenizer: str = "") -> Converted:
    kind = origin.json("config.json").get("model_type")
    if kind not in _READERS:  # an unknown one is refused there
        return _read_clip(origin, tokenizer)
    if tokenizer:
        raise UserError("--tokenizer is of a CLIP, and this is a language model; leave it out")
    return _READERS[kind](origin)


def _write(network: Network) -> Files:
    """A network; of a Llama with the tokenizer of Llama 3 that its run has. Those that are trained here stay here."""
    files = _WRITERS[type(network.model)](network.model, network.params)
    if isinstance(network.model, Llama | VisionAdapter) and isinstance(network.tokenizer, LlamaTokenizer):
        files |= tokenizer_files(network.tokenizer)
    return files


FORMAT = Format(
    name="transformers",
    networks=("clip", "gpt2", "llama", "vision_adapter"),
    inputs="a CLIP, GPT-2, Llama or Llama Vision (Mllama) as save_pretrained writes it",
    outputs="CLIPModel, GPT2LMHeadModel, LlamaForCausalLM or MllamaForConditionalGeneration.from_pretrained(DIR)",
    recognizes=_recognizes,
    read=_read,
    write=_write,
    options=CLIP_OPTIONS,
)
