"""Rows of Llama and its vision adapter: training steps and greedy answers, beside transformers' of the same weights."""

from typing import Any

from random_parameters import random_parameters
from updates import (
    Case,
    Peers,
    assert_agree,
    our_calls,
    our_updates,
    their_calls,
    their_updates,
    to_torch,
    torch_weights,
    use_all_cores,
)

from cost.side_by_side import Side

# Of both networks; `scenes` is about that of configs/scenes/llama.py and vision_adapter.py.
SIZES: dict[str, dict[str, Any]] = {
    "toy": {"text_vocab_size": 24, "width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_hidden": 24},
    "scenes": {"text_vocab_size": 353, "width": 96, "depth": 4, "heads": 4, "kv_heads": 2, "mlp_hidden": 256},
    "medium": {"text_vocab_size": 4096, "width": 512, "depth": 8, "heads": 8, "kv_heads": 2, "mlp_hidden": 1408},
}
EYES: dict[str, dict[str, Any]] = {
    "toy": {"image_width": 16, "image_layers": 2, "image_heads": 2, "feature_layers": (0,), "cross_layers": (1,)}
    | {"tile_size": 8, "patch_size": 4},
    "scenes": {"image_width": 96, "image_layers": 3, "image_heads": 2, "feature_layers": (0, 1)}
    | {"cross_layers": (0, 2), "tile_size": 32, "patch_size": 4},
    "medium": {"image_width": 256, "image_layers": 6, "image_heads": 4, "feature_layers": (1, 3)}
    | {"cross_layers": (1, 3, 5, 7), "tile_size": 64, "patch_size": 4},
}
_TRAINED = r"^vision_adapter/(?!language/)"


def training(peers: Peers, size: str, batch_size: int, length: int, sees: bool = False) -> Case:
    """Updates of both: cross-entropy of the next token, backward, AdamW; with pictures the language model is frozen.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: of a step.
      length: tokens of a text.
      sees: whether it is the vision adapter, of one picture a text.
    """
    import jax.numpy as jnp
    import numpy as np
    import optax
    import torch

    pair = _Pair(peers, size, batch_size, sees)
    text = np.random.default_rng(0).integers(1, pair.model.text_vocab_size, (batch_size, length)).astype(np.int32)
    if sees:
        text[:, 0] = pair.model.image_token
    pair.check(text[:, :-1])

    def loss(params: Any, batch: Any, _: Any) -> Any:
        logits = pair.logits(params[pair.part], batch["text"][:, :-1], batch)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["text"][:, 1:]))

    tokens = to_torch(text, peers.device).long()
    given = pair.their_pictures(length - 1)

    def their_loss(called: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
            logits = called(input_ids=tokens[:, :-1], use_cache=False, **given).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    ours = our_updates(
        loss, {pair.part: pair.params}, {"text": text, **pair.pictures}, (_TRAINED,) if sees else (".*",)
    )
    sides = peers.sides(
        "transformers",
        lambda compiled: their_updates(pair.network, their_loss, compiled=compiled, device=peers.device),
    )
    return Case({"jax": ours, **sides}, dtype=peers.dtype)


def decoding(
    peers: Peers,
    size: str,
    batch_size: int,
    prompt: int,
    answer: int,
    sees: bool = False,
    cross_layers: tuple[int, ...] = (),
) -> Case:
    """Greedy answers of both; what is counted is a token of an answer.

    Raises AssertionError unless both answer the same where float32 lets them.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: questions.
      prompt: tokens of a question, its end among them.
      answer: tokens of an answer.
      sees: whether there is a picture before the question.
      cross_layers: of the adapter, where they are others than those of `EYES`.
    """
    import jax
    import numpy as np
    import torch

    from sample.samplers.llama import AnswerSettings, LlamaSampler
    from sample.samplers.vision_adapter import VisionAdapterSampler

    pair = _Pair(peers, size, batch_size, sees, cross_layers)
    model, end = pair.model, pair.model.text_vocab_size - 1
    settings = AnswerSettings(answer_length=answer)
    text = np.random.default_rng(0).integers(1, end, (batch_size, prompt)).astype(np.int32)
    text[:, -1] = end
    rows: dict[str, Any] = {"text": text}
    if sees:
        sampler: Any = VisionAdapterSampler(model, settings, end)
        rows["image"] = pair.images
        text = np.pad(text, ((0, 0), (1, 0)), constant_values=model.image_token)
    else:
        sampler = LlamaSampler(model, settings, end)
    request = sampler.request(**rows)
    keys = jax.random.split(jax.random.key(0), batch_size)
    params = {pair.part: pair.params}
    tokens = to_torch(text, peers.device).long()
    given = pair.their_pictures(text.shape[1])
    told = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False, "pad_token_id": 0}

    def generate(**more: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
            return pair.network.generate(tokens, attention_mask=torch.ones_like(tokens), **given, **told, **more)

    def check(**more: Any) -> None:
        with torch.inference_mode():
            theirs = generate(**more)[:, text.shape[1] :].cpu().numpy()
        same = np.cumprod((ours == theirs) & (theirs != end), axis=1)
        assert peers.gpu or (same | (np.cumsum(theirs == end, axis=1) > 0)).mean() > 0.9, "the answers differ"

    def compiled() -> Side:
        more = _compiled_steps(peers)
        check(**more)
        return their_calls(lambda: generate(**more), peers.device)

    ours = np.asarray(sampler(params, {}, {}, request, keys)["text"])
    check()
    eager = their_calls(generate, peers.device)
    sides = peers.sides("transformers", lambda wanted: compiled() if wanted else eager)
    ours_side = our_calls(sampler, params, {}, {}, request, keys)
    return Case({"jax": ours_side, **sides}, units=batch_size * answer, dtype=peers.dtype)


def _compiled_steps(peers: Peers) -> dict[str, Any]:
    """What has transformers compile the step of a token: a cache of fixed size and, on a CPU, to be told so."""
    from transformers import CompileConfig

    how = CompileConfig()
    how._compile_all_devices = not peers.gpu  # by itself a CPU gets no torch.compile
    return {"cache_implementation": "static", "compile_config": how}


class _Pair:
    """A network twice, with the same random weights.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: texts.
      sees: whether it is the vision adapter.
      cross_layers: its own, in place of those of `EYES`; () for these.
    """

    def __init__(
        self, peers: Peers, size: str, batch_size: int, sees: bool, cross_layers: tuple[int, ...] = ()
    ) -> None:
        import jax.numpy as jnp
        import numpy as np

        from models import create_model

        fields = {**SIZES[size], "dtype": peers.dtype, "text_end_id": SIZES[size]["text_vocab_size"] - 1}
        fields |= {"rope_theta": 10000.0}
        self.peers, self.sees, self.part = peers, sees, "vision_adapter" if sees else "llama"
        self.pictures: dict[str, Any] = {}
        if sees:
            fields |= {**EYES[size], "image_token": fields["text_vocab_size"], "global_layers": 1, "max_tiles": 1}
            fields |= {"as_transformers": True, **({"cross_layers": cross_layers} if cross_layers else {})}
        self.model: Any = create_model(self.part, **fields)
        self.params = random_parameters(self.model)
        use_all_cores()
        self.network = (self._mllama() if sees else self._llama()).to(peers.device)
        if sees:
            side = self.model.tile_size
            self.images = np.random.default_rng(2).integers(0, 256, (batch_size, side, side, 3)).astype(np.uint8)
            tiles = (self.images.astype(np.float32) / 127.5 - 1)[:, None, None]
            self.pictures = {"tiles": jnp.asarray(tiles), "canvas": jnp.ones((batch_size, 1), jnp.int32)}

    def logits(self, params: Any, tokens: Any, batch: Any) -> Any:
        """Ours."""
        pictures = (batch["tiles"], batch["canvas"]) if self.sees else ()
        return self.model.apply({"params": params}, tokens, *pictures)

    def their_pictures(self, length: int) -> dict[str, Any]:
        """What transformers takes for the pictures of texts of so many tokens."""
        import numpy as np
        import torch

        if not self.sees:
            return {}
        tiles = np.asarray(self.pictures["tiles"])
        pixels = ((tiles + 1) / 2 - np.array(self.model.image_mean)) / np.array(self.model.image_std)
        count = len(tiles)
        given = {
            "pixel_values": torch.from_numpy(pixels.astype(np.float32).transpose(0, 1, 2, 5, 3, 4).copy()),
            "aspect_ratio_ids": torch.ones((count, 1), dtype=torch.long),
            "aspect_ratio_mask": torch.ones((count, 1, 1), dtype=torch.long),
            "cross_attention_mask": torch.ones((count, length, 1, 1), dtype=torch.long),
        }
        return {name: tensor.to(self.peers.device) for name, tensor in given.items()}

    def check(self, tokens: Any) -> None:
        """Raises AssertionError unless both give the same logits."""
        import jax
        import numpy as np
        import torch

        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.peers.gpu):
            given = self.their_pictures(tokens.shape[1])
            theirs = self.network(input_ids=to_torch(tokens, self.peers.device).long(), **given).logits
        ours = jax.jit(self.logits)(self.params, tokens, self.pictures)
        theirs = theirs.float().cpu().numpy()
        assert_agree(np.asarray(ours, np.float32), theirs, "logits", 0.1 if self.peers.gpu else 1e-4)

    def _llama(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        from weights.formats.transformers_llama import LAYOUT, text_config

        config = LlamaConfig(**text_config(self.model), attn_implementation="sdpa", eos_token_id=None)
        network = LlamaForCausalLM(config)
        network.load_state_dict(torch_weights(LAYOUT.write({"params": self.params})))
        return network.eval()

    def _mllama(self) -> Any:
        from transformers import MllamaConfig, MllamaForConditionalGeneration

        from weights.formats.transformers_mllama import mllama_config, mllama_tensors

        given = mllama_config(self.model)
        kept = {name: given[name] for name in ("image_token_index", "text_config", "vision_config")}
        kept["text_config"] |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
        network = MllamaForConditionalGeneration._from_config(MllamaConfig(**kept), attn_implementation="sdpa")
        tensors = mllama_tensors(self.model, self.params)
        network.load_state_dict(_as_module(network, torch_weights(tensors)))
        crossing = given["text_config"]["cross_attention_layers"]
        for name, parameter in network.named_parameters():
            adapter = "language_model" not in name and "lm_head" not in name
            parameter.requires_grad_(adapter or any(f"layers.{layer}." in name for layer in crossing))
        return network.eval()


def _as_module(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors by the module's own names, where those of files differ."""
    import re

    names = {}
    for name in tensors:
        new = re.sub(r"^language_model\.model\.", "model.language_model.", name)
        new = re.sub(r"^language_model\.lm_head", "lm_head", new)
        names[name] = re.sub(r"^(vision_model|multi_modal_projector)", r"model.\1", new)
    return {names[name] if names[name] in network.state_dict() else name: each for name, each in tensors.items()}
