"""Llama as the transformers library has it (`LlamaForCausalLM`): its config and tensors to ours, and back.

The traps of that format: the scaling of rotary frequencies stands under `rope_scaling` beside `rope_theta` in files of
before transformers 5, under `rope_parameters` with both since; a tied head may be stored or not; whether a model talks
in turns its generation_config.json or its chat template tells.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cli.errors import UserError
from data.llama_tokenizer import BEGIN, CHAT_TEMPLATE, LlamaTokenizer
from models import create_model
from models.llama import Llama
from weights.files.fields import IDLE, Field, fixed, flag, group, read_fields, real, whole, word
from weights.files.layout import Layout, Rule, linear
from weights.files.origin import Origin, read_weights
from weights.files.tensors import in_shards
from weights.formats.contract import Converted, Files, Tree
from weights.formats.llama_runs import text_run

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_ROPE_NAMES = ("default", "llama3")

# Of every config of the library: of training, generation, and how it computes.
IDLE_KEYS = (
    *("add_cross_attention", "architectures", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids"),
    *("begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder"),
    *("is_encoder_decoder", "label2id", "length_penalty", "max_length", "max_position_embeddings", "min_length"),
    *("model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp"),
    *("problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict"),
    *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
    *("tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript"),
    *("transformers_version", "typical_p", "use_bfloat16", "use_cache"),
)
_SCALING: dict[str, Field] = {
    "rope_type": word("default", _ROPE_NAMES),
    "type": word("default", _ROPE_NAMES),  # its name of before transformers 4.43
    "rope_theta": real(0.0),
    "factor": real(1.0, low=0, above=True),
    "low_freq_factor": real(1.0, low=0, above=True),
    "high_freq_factor": real(4.0, low=0, above=True),
    "original_max_position_embeddings": whole(8192),
}
_ROPE_THETA = 10000.0
TEXT: dict[str, Field] = {
    **dict.fromkeys(IDLE_KEYS, IDLE),
    "vocab_size": whole(32000),
    "hidden_size": whole(4096),
    "intermediate_size": whole(11008),
    "num_hidden_layers": whole(32, high=1024),
    "num_attention_heads": whole(32),
    "num_key_value_heads": whole(None).or_null(),
    "head_dim": whole(None).or_null(),
    "hidden_act": fixed("silu", "swish"),
    "rms_norm_eps": fixed(1e-5),
    "rope_theta": real(None).or_null(),
    "rope_scaling": group(_SCALING, None).or_null(),
    "rope_parameters": group(_SCALING, None).or_null(),
    "tie_word_embeddings": flag(False),
    "attention_bias": fixed(False),
    "mlp_bias": fixed(False),
}


def self_layer(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a layer of the language model.

    Args:
      ours: a regular expression of its path.
      theirs: a template of its name.
    """
    return (
        Rule(rf"{ours}/attention_norm/scale", rf"{theirs}.input_layernorm.weight"),
        Rule(rf"{ours}/attention/query/kernel", rf"{theirs}.self_attn.q_proj.weight"),
        Rule(
            rf"{ours}/attention/key_value/kernel",
            (rf"{theirs}.self_attn.k_proj.weight", rf"{theirs}.self_attn.v_proj.weight"),
        ),
        Rule(rf"{ours}/attention/out/kernel", rf"{theirs}.self_attn.o_proj.weight", linear(inputs=2)),
        Rule(rf"{ours}/mlp_norm/scale", rf"{theirs}.post_attention_layernorm.weight"),
        *gated_mlp(ours, theirs),
    )


def gated_mlp(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a gated feed-forward block; arguments as in `self_layer`."""
    return (
        Rule(
            rf"{ours}/mlp/up_gate/kernel",
            (rf"{theirs}.mlp.up_proj.weight", rf"{theirs}.mlp.gate_proj.weight"),
            axis=2,
        ),
        Rule(rf"{ours}/mlp/down/kernel", rf"{theirs}.mlp.down_proj.weight"),
    )


LAYOUT = Layout(
    what="this Llama in the layout of transformers",
    rules=(
        Rule(r"embedding/embedding", "model.embed_tokens.weight"),
        *self_layer(r"blocks_(\d+)", r"model.layers.\1"),
        Rule(r"final_norm/scale", "model.norm.weight"),
        Rule(r"text_head/kernel", "lm_head.weight"),
    ),
    leaves={},
    ignored=r".*rotary_emb\.inv_freq",
)


def text_fields(what: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `models.llama.Llama` of a config that was read by `TEXT`.

    Args:
      what: names in errors what it describes.
      text: key -> value.

    Raises:
      UserError: if its heads cannot be built.
    """
    heads, width = text["num_attention_heads"], text["hidden_size"]
    kv_heads, head_dim = text["num_key_value_heads"] or heads, text["head_dim"]
    if heads % kv_heads or (head_dim is None and width % heads):
        raise UserError(
            f"{what} cannot be converted: its {heads} heads share a width of {width} and {kv_heads} heads of keys, "
            "which they do not divide"
        )
    return {
        "text_vocab_size": text["vocab_size"],
        "width": width,
        "depth": text["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp_hidden": text["intermediate_size"],
        "head_dim": None if head_dim in (None, width // heads) else head_dim,
        **_rope_fields(what, text),
        "tied": text["tie_word_embeddings"],
    }


def text_config(model: Any) -> dict[str, Any]:
    """The keys of a config that say what a language model computes, as transformers 5 and those before read them.

    Args:
      model: has the fields of a `Llama`.
    """
    head_dim = model.head_dim or model.width // model.heads
    scaling: dict[str, Any] = {"rope_type": "default"}
    if model.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": model.rope_low_factor,
            "high_freq_factor": model.rope_high_factor,
            "original_max_position_embeddings": model.rope_original_length,
        }
    return {
        "vocab_size": model.text_vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_factor == 1 else scaling,
        "rope_parameters": {**scaling, "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": 131072,
    }


def read_llama(origin: Origin) -> Converted:
    """Reads what `LlamaForCausalLM.save_pretrained` wrote; parameters stay in the files.

    Raises:
      UserError: if files are missing or say something else.
    """
    what = "this Llama"
    fields = {"name": "llama", **text_fields(what, read_fields(what, origin.json("config.json"), TEXT))}
    # A tied network's names all begin with "model.", which is then taken for a wrapper.
    tensors = {
        name if re.match(r"(model|lm_head)\.", name) else f"model.{name}": array
        for name, array in read_weights(origin, WEIGHTS, LAYOUT.ignored).items()
    }
    if fields["tied"]:
        tensors.pop("lm_head.weight", None)
    fields |= stored_dtype(tensors)
    return text_run(origin, fields, LAYOUT.read_deferred(create_model(**fields), tensors)["params"], {})


def llama_files(model: Llama, params: Tree) -> Files:
    """What `LlamaForCausalLM.from_pretrained` reads; tensors are made one by one."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **text_config(model)}
    config |= {"attention_bias": False, "mlp_bias": False, "dtype": written_dtype(params)}
    return {"config.json": config, **in_shards(LAYOUT.write_deferred({"params": params}))}


def tokenizer_files(tokenizer: LlamaTokenizer) -> Files:
    """What the library reads a tokenizer of, and which ids end what is generated; of turns their template too."""
    name, turns = tokenizer.name_of, tokenizer.in_turns
    ends = [tokenizer.end_id, *tokenizer.stop_ids] if turns else tokenizer.end_id
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": name(tokenizer.end_id),
        "pad_token": name(tokenizer.pad_id),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **({"chat_template": CHAT_TEMPLATE} if turns else {}),
    }
    generation = {"bos_token_id": tokenizer.start_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    return {
        "tokenizer.json": tokenizer.published(),
        "tokenizer_config.json": config,
        "generation_config.json": generation,
    }


def stored_dtype(tensors: Mapping[str, Any]) -> dict[str, str]:
    """{"param_dtype": "bfloat16"} of weights that are all stored so, which keeps them as they are; else {}."""
    kept = {np.dtype(array.dtype) for array in tensors.values()}
    return {"param_dtype": "bfloat16"} if kept == {np.dtype(jnp.bfloat16)} else {}


def written_dtype(params: Tree) -> str:
    """The name of the dtype of all parameters, float32 where they have several."""
    kept = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
    return kept.pop() if len(kept) == 1 else "float32"


def _rope_fields(what: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Of both ways of saying it; where both do, the newer one holds."""
    said = text["rope_parameters"] or text["rope_scaling"] or {}
    theta = said.get("rope_theta") or text["rope_theta"] or _ROPE_THETA
    kinds = {said.get("rope_type", "default"), said.get("type", "default")} - {"default"}
    fields = {"rope_theta": float(theta)}
    if not kinds:
        return fields
    if said["low_freq_factor"] >= said["high_freq_factor"]:
        raise UserError(f"{what} cannot be converted: its low_freq_factor must be below its high_freq_factor")
    return {
        **fields,
        "rope_factor": float(said["factor"]),
        "rope_low_factor": float(said["low_freq_factor"]),
        "rope_high_factor": float(said["high_freq_factor"]),
        "rope_original_length": said["original_max_position_embeddings"],
    }
