"""Formats of public DALL-Es: what options map, what is refused and by which line; tests/parity compares outputs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize

import models
from cli.errors import UserError
from data.tokenizer import Tokenizer
from models.layers.attention_masks import attention_mask
from scripts.convert import main as convert
from weights.files.fields import IDLE
from weights.files.layout import model_shapes
from weights.files.tensors import write_tensors
from weights.formats import compvis, dall_e, dalle_mini, dalle_pytorch, dalle_pytorch_dvae, mindall_e
from weights.formats.runs import dalle_run
from weights.formats.taming import from_flax
from weights.run import Run

from ...models.random_parameters import random_parameters
from ..clip_samples import assert_same_trees
from .test_documents import ABSURD, changed, paths

HPARAMS = {"num_text_tokens": 13, "text_seq_len": 6, "dim": 16, "depth": 3, "heads": 2, "dim_head": 4}
HPARAMS |= {"attn_types": ["full", "axial_row", "conv_like"], "shift_tokens": False, "rotary_emb": False}
LUCIDRAINS = dalle_pytorch.dalle_fields(HPARAMS, 11, (4, 4))
MINDALL_E = {
    "stage2": {"vocab_size_txt": 13, "vocab_size_img": 11, "hparams": {"embed_dim": 64, "n_layers": 2, "n_heads": 1}}
}
MINDALL_E["stage2"]["hparams"] |= {"n_dense_layers": 2, "ctx_len_img": 16, "ctx_len_txt": 6}


def count(model):
    return sum(int(np.prod(leaf.shape)) for leaf in model_shapes(model).values())


def test_published_sizes():
    assert count(models.create_model(**mindall_e.transformer_fields({}))) == 1_291_081_728


def test_the_discrete_vae_of_openai_s_shapes():
    model = models.create_model("dvae")
    sides = {"encoder": {}, "decoder": {}}
    for path, leaf in model_shapes(model).items():
        ((name, form),) = dall_e._LAYOUT._find(path).parts
        side, _, name = name.partition(".")
        sides[side][name] = form.outward(np.broadcast_to(np.float32(0), leaf.shape))  # arrays without memory
    sides = tuple(sides.values())
    assert [sum(array.size for array in side.values()) for side in sides] == [53_786_240, 43_829_766]
    told = models.create_model(**dall_e.dvae_fields(*sides))
    assert told == model
    with pytest.raises(UserError, match="not the weights of OpenAI's discrete VAE: there is no blocks.input.w"):
        dall_e.dvae_fields({}, {})
    with pytest.raises(UserError, match=r"blocks.input.w is \(0, 3, 7, 7\)"):
        dall_e.dvae_fields({**sides[0], "blocks.input.w": np.zeros((0, 3, 7, 7))}, sides[1])


def test_a_discrete_vae_in_and_out_again(tmp_path, capsys):
    model = models.create_model("dvae", vocab_size=16, encoder_hidden=8, decoder_hidden=8, decoder_init=4)
    params = random_parameters(model)
    for side, tensors in zip(("encoder", "decoder"), dall_e.to_dall_e(params), strict=True):
        write_tensors(tmp_path / "theirs" / f"{side}.safetensors", tensors)
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert "dall_e; part 'dvae'" in capsys.readouterr().out
    assert_same_trees(Run.open(tmp_path / "ours").load().params["dvae"], params)
    convert(["--to=dall_e", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    for name in ("encoder.safetensors", "decoder.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    with pytest.raises(UserError, match="half of a discrete VAE"):
        convert(["--source=dall_e", f"--input={tmp_path}/theirs/encoder.safetensors", f"--output={tmp_path}/none"])


def test_options_of_dalle_pytorch_that_map():
    assert LUCIDRAINS["attention"] == ("full", "own_row", "conv") and LUCIDRAINS["conv_edge"] == "corner"
    assert dalle_pytorch.dalle_fields({**HPARAMS, "attn_types": None}, 11, (4, 4))["attention"] == "full"
    model = models.create_model(**LUCIDRAINS)
    again = dalle_pytorch.dalle_fields(dalle_pytorch.hyperparameters(model), 11, (4, 4))
    assert models.create_model(**again) == model
    params = random_parameters(model)
    assert_same_trees(
        dalle_pytorch.from_dalle_pytorch(model, dalle_pytorch.to_dalle_pytorch(model, params)), with_row_0(params)
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("to_logits.1.weight", (), r"of another shape: to_logits.1.weight is \(\), expected \(rows, 16\)"),
        ("to_logits.1.bias", (), r"to_logits.1.bias is \(\), expected \(rows,\)"),
        ("text_emb.weight", (5, 3), r"text_emb.weight is \(5, 3\), expected \(rows, 16\)"),
        ("image_emb.weight", (5,), r"image_emb.weight is \(5,\)"),
        ("text_pos_emb.weight", (), r"text_pos_emb.weight is \(\)"),
        ("image_pos_emb.weights.0", (1, 4, 1, 0), r"weights.0 is \(1, 4, 1, 0\), expected \(..., 16\)"),
        ("image_pos_emb.weights.1", (), r"image_pos_emb.weights.1 is \(\)"),
        ("transformer.layers.layers.0.0.fn.fn.to_out.0.weight", (), "layers.0.0.scale has 16 values and fits no"),
        ("transformer.layers.layers.1.1.scale", (1, 1, 5), "layers.1.1.scale has 5 values and fits no output"),
    ],
)
def test_odd_tensors_of_dalle_pytorch_are_named(name, shape, message):
    model = models.create_model(**LUCIDRAINS)
    tensors = dalle_pytorch.to_dalle_pytorch(model, random_parameters(model))
    with pytest.raises(UserError, match=message):
        dalle_pytorch.from_dalle_pytorch(model, {**tensors, name: np.ones(shape, np.float32)})
    if "pos_emb.weights" in name or name == "to_logits.1.weight":
        with pytest.raises(UserError, match=message):
            dalle_pytorch._image_tokens(HPARAMS, {**tensors, name: np.ones(shape, np.float32)})


def with_row_0(params):
    """Row 0 of captions is the start token's in theirs; ours reads it never, since id 0 is a pad."""
    table = params["text_embedding"]["embedding"]
    return {**params, "text_embedding": {"embedding": table.at[0].set(params["bos"]["embedding"][0])}}


@pytest.mark.parametrize(
    "option",
    [
        {"reversible": True},
        {"stable": True},
        {"sandwich_norm": True},
        {"shift_tokens": True},
        {"rotary_emb": True},
        {"sparse_attn": True},
        {"attn_types": ["full", "sparse"]},
        {"attn_types": "mlp"},
    ],
)
def test_options_of_dalle_pytorch_that_are_refused_by_name(option):
    with pytest.raises(UserError, match=f"this DALL-E of dalle_pytorch cannot be converted: {next(iter(option))}"):
        dalle_pytorch.dalle_fields({**HPARAMS, **option}, 11, (4, 4))


def test_masks_of_dalle_pytorch():
    """Of a 4 x 4 grid behind one caption token and the start: which image inputs position (2, 2) sees."""
    for layer_type, edge, seen in (
        ("own_row", "wraparound", [8, 9, 10]),
        ("conv", "corner", [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        ("conv", "clip", [5, 6, 7, 9, 10]),
    ):
        kernel = 5 if edge == "corner" else 3
        row = attention_mask(layer_type, 1, (4, 4), kernel, edge)[2 + 10]
        assert row[:2].all() and np.flatnonzero(row[2:]).tolist() == seen


def test_mindall_e_in_and_out_again(tmp_path, capsys):
    model = models.create_model(**mindall_e.transformer_fields(MINDALL_E))
    params = random_parameters(model)
    tensors = mindall_e.to_mindall_e(model, params)
    assert mindall_e.transformer_fields_of_tensors(tensors) == mindall_e.transformer_fields(MINDALL_E)
    theirs = tmp_path / "theirs"
    write_tensors(theirs / "stage2_last.safetensors", tensors)
    (theirs / "config.yaml").write_text(json.dumps(mindall_e.transformer_config(model)))
    convert([f"--input={theirs}", f"--output={tmp_path}/ours"])
    assert "there is no stage1_last.ckpt, its image tokenizer: it makes tokens" in (said := capsys.readouterr().out)
    assert "there is no tokenizer/bpe-16k-vocab.json with its merges" in said
    assert_same_trees(Run.open(tmp_path / "ours").load().params["dalle"], params)
    noted = mindall_e.transformer_config(model)
    noted["stage2"]["hparams"]["note"] = 1
    (theirs / "config.yaml").write_text(json.dumps(noted))
    with pytest.raises(UserError, match="stage2.hparams.note: not known here; .* give --ignore_keys=note"):
        convert([f"--input={theirs}", f"--output={tmp_path}/none"])
    convert([f"--input={theirs}", "--ignore_keys=note", f"--output={tmp_path}/noted"])
    (theirs / "config.yaml").write_bytes(b"stage2: \xff")
    with pytest.raises(UserError, match="config.yaml is not UTF-8 text"):
        convert([f"--input={theirs}", f"--output={tmp_path}/none"])
    for content, message in (("stage2: [", ""), ("stage2: &all [1]\nstage1: *all", ".it refers to parts of itself")):
        (theirs / "config.yaml").write_text(content)
        with pytest.raises(UserError, match=f"config.yaml is not valid YAML {message}"):
            convert([f"--input={theirs}", f"--output={tmp_path}/none"])


def test_mindall_e_s_captions(tmp_path):
    theirs = tmp_path / "theirs"
    model = models.create_model(**mindall_e.transformer_fields(MINDALL_E))
    write_tensors(theirs / "stage2_last.safetensors", mindall_e.to_mindall_e(model, random_parameters(model)))
    (theirs / "tokenizer").mkdir()
    pieces = ["[UNK]", "[PAD]", *"abc", *(f"{letter}</w>" for letter in "abc"), "ab</w>"]
    (theirs / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps({p: id for id, p in enumerate(pieces)}))
    (theirs / "tokenizer" / "bpe-16k-merges.txt").write_text("#version: 0.2\na b</w>\n")
    convert([f"--input={theirs}", f"--output={tmp_path}/ours"])
    tokenizer = Run.open(tmp_path / "ours").tokenizer()
    assert tokenizer.encode("AB cx", 6).ids.tolist() == [8, 4, 0, 1, 1, 1]
    pieces += [f"piece{n}" for n in range(9)]
    (theirs / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps({p: id for id, p in enumerate(pieces)}))
    with pytest.raises(UserError, match="bpe-16k-vocab.json has 18 ids, and the transformer 13"):
        convert([f"--input={theirs}", f"--output={tmp_path}/none"])


def test_empty_tensors_of_mindall_e_are_one_line():
    sizes = {"tok_emb_txt": (13, 0), "tok_emb_img": (11, 0), "pos_emb_txt": (6, 0), "pos_emb_img": (16, 0)}
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in sizes.items()}
    with pytest.raises(UserError, match="cannot be built"):
        mindall_e.from_mindall_e(models.create_model(**mindall_e.transformer_fields_of_tensors(tensors)), tensors)


def of_strided_dvae(arguments):
    """Reads "vae_params", with tensors of a tiny network."""
    model = models.create_model("dvae_strided", vocab_size=5, code_dim=2, width=2, levels=1)
    tensors = dalle_pytorch_dvae.dvae_layout(model).write({"params": random_parameters(model)})
    return dalle_pytorch_dvae.dvae_fields(arguments, tensors, (4, 4))


DOCUMENTS = {
    "dalle_pytorch": (HPARAMS, lambda value: dalle_pytorch.dalle_fields(value, 11, (4, 4)), dalle_pytorch._TABLE),
    "mindall_e": (MINDALL_E, mindall_e.transformer_fields, mindall_e._TABLE),
    "mindall_e's VQGAN": ({"stage1": {}}, mindall_e.vqgan_fields_of, {"stage1": mindall_e._TABLE["stage1"]}),
    "dalle_mini's VQGAN": ({"n_embed": 5}, dalle_mini.config_fields, dalle_mini._TABLE),
    "dalle_pytorch's VAE": ({}, of_strided_dvae, dalle_pytorch_dvae._TABLE),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_any_value_of_any_key_is_read_or_refused_in_a_line_that_names_the_key(name):
    document, read, table = DOCUMENTS[name]
    for path, field in paths(table):
        for value in ABSURD:
            try:
                read(changed(document, path, value))
            except UserError as error:
                assert "\n" not in str(error) and path[-1] in str(error)
            else:
                assert field is IDLE or field.fits(value), "was read"


def test_dalle_mini_s_transformer_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dallebart"}')
    with pytest.raises(
        UserError, match="DALL-E mini is an encoder-decoder .BART., of which this project has none; its"
    ):
        convert([f"--input={tmp_path}", f"--output={tmp_path}/none"])
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize({"model": {"encoder": np.zeros(1)}}))
    with pytest.raises(UserError, match="DALL-E mini is an encoder-decoder"):
        convert([f"--input={tmp_path}/flax_model.msgpack", f"--output={tmp_path}/none"])
    (tmp_path / "flax_model.msgpack").write_bytes(b"\xc1")
    with pytest.raises(UserError, match="flax_model.msgpack is damaged, or not a .msgpack file"):
        convert([f"--input={tmp_path}/flax_model.msgpack", f"--output={tmp_path}/none"])


VQGAN = {"n_embed": 5, "embed_dim": 3, "z_channels": 3, "resolution": 8, "ch": 32, "ch_mult": [1, 2]}
VQGAN |= {"num_res_blocks": 1, "attn_resolutions": [4]}


def test_sizes_of_a_vqgan():
    fields = dalle_mini.config_fields(VQGAN)
    assert (fields["multipliers"], fields["attention_levels"], fields["image_size"]) == ((1, 2), (1,), 8)
    assert dalle_mini.config_fields({"n_embed": 16384})["attention_levels"] == (4,)
    for change, message in (
        ({"embed_dim": 4}, "z_channels is 3 and embed_dim 4, ours are one"),
        ({"out_ch": 1}, "in_channels is 3 and out_ch 1, ours are one"),
        ({"resolution": 9}, "resolution is 9, which 2 entries of ch_mult do not divide"),
        ({"double_z": True}, "double_z is True; it must be False"),
    ):
        with pytest.raises(UserError, match=message):
            dalle_mini.config_fields({**VQGAN, **change})


def test_leaves_of_vqgan_jax_that_are_no_vqgan_s():
    for tree, message in (
        ({"a": {"kernel": np.zeros((2, 3))}}, r"a/kernel is \(2, 3\)"),
        ({"a": {"bias": "x"}}, "a/bias is no array"),
    ):
        with pytest.raises(UserError, match=message):
            from_flax(tree)


def test_an_image_tokenizer_of_another_grid_is_refused():
    fields = mindall_e.transformer_fields(MINDALL_E)
    with pytest.raises(UserError, match="makes 4 x 4 tokens of 5 codes, and its transformer reads 4 x 4 tokens of 11"):
        dalle_run(fields, {}, (dalle_mini.config_fields(VQGAN), {}), None, ())
    with pytest.raises(
        UserError, match="these are not the weights of a VQGAN: there is no quantize.embedding.weight or"
    ):
        model = models.create_model("autoencoder_kl", width=32, multipliers=(1,), blocks=1, latent_channels=2)
        tensors = compvis._AUTOENCODERS["quantize.embed.weight"].write({"params": random_parameters(model)})
        compvis.quantized_from_compvis(tensors, (4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalization": [[0.5, 0.5], [0.5, 0.5]]}, "must be a mean and a standard deviation above 0 of each of 3"),
        ({"normalization": [[0.5] * 3, [0.5, 0, 0.5]]}, "standard deviation above 0"),
        ({"normalization": [["a"] * 3, [0.5] * 3]}, "normalization is .*'a'"),
        ({"note": 1}, "note: not known here"),
    ],
)
def test_arguments_of_dalle_pytorch_s_vae_that_are_refused(arguments, message):
    assert of_strided_dvae({"normalization": None})["pixel_std"] == (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match=message):
        of_strided_dvae(arguments)


def test_a_vocabulary_without_ends(tmp_path):
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", "r e", "re d</w>", ""]))
    plain = Tokenizer.from_clip_vocabulary(tmp_path / "merges.txt", ends=False)
    framed = Tokenizer.from_clip_vocabulary(tmp_path / "merges.txt")
    assert (plain.vocab_size, plain.end_id) == (framed.vocab_size - 2, None)
    plain.save(tmp_path / "tokenizer.json")
    for tokenizer in (plain, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode("A Red fox", 8).ids
        assert ids.tolist()[:5] == framed.encode("A Red fox", 8).ids.tolist()[1:6] and not ids[5:].any()
        assert tokenizer.decode(ids) == "a red fox" and tokenizer.end_id is None


def test_a_stream_without_a_start_token_scores_all_but_the_first_caption_token():
    model = models.create_model(**mindall_e.transformer_fields(MINDALL_E))
    params = random_parameters(model)
    text, image = jnp.array([[3, 4, 5, 0, 0, 0]]), jnp.arange(16)[None] % 11
    logits = model.apply({"params": params}, text, image)
    assert logits.text.shape == (1, 5, 13) and logits.image.shape == (1, 16, 11)
    np.testing.assert_array_equal(model.text_targets(text), text[:, 1:])
    later = model.apply({"params": params}, text, jnp.where(jnp.arange(16) == 9, 1 - image % 2, image))
    changed = np.abs(np.asarray(later.image - logits.image)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(changed, np.arange(16) > 9)
    with pytest.raises(UserError, match="unknown image_positions 'x'; choose one of grid, raster"):
        model_shapes(models.create_model(**{**LUCIDRAINS, "image_positions": "x"}))
