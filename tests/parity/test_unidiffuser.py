"""UniDiffuser's network of diffusers computes what ours does with the same weights, both versions of it."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

import models
from models.clip import IMAGE_MEAN, IMAGE_STD
from models.unidiffuser import PictureAndText, UniDiffuser
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.run import Run

SIZES = {"text_dim": 6, "clip_img_dim": 10, "num_text_tokens": 5, "num_attention_heads": 4, "attention_head_dim": 8}
SIZES |= {"in_channels": 4, "out_channels": 4, "num_layers": 4, "sample_size": 8, "patch_size": 2}
SIZES |= {"activation_fn": "gelu", "norm_num_groups": 4}


@pytest.mark.parametrize("kinds", [False, True], ids=["v0", "v1"])
def test_tiny_unidiffuser_through_the_command_and_back(kinds, tmp_path):
    torch.manual_seed(0)
    network = UniDiffuserModel(**SIZES, use_data_type_embedding=kinds).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor) if "norm" in name else 0.3 * torch.randn_like(tensor))
    network.save_pretrained(tmp_path / "theirs")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.config.models.unidiffuser), run.load().params["unidiffuser"]
    rng = np.random.default_rng(0)
    image, clip, text = (rng.normal(size=(3, *shape)).astype(np.float32) for shape in ((8, 8, 4), (10,), (5, 6)))
    t_image, t_text, kind = np.float32([0, 511.3, 1000]), np.float32([1000, 20.02, 0]), np.array([0, 1, 1])
    with torch.no_grad():
        theirs = network(
            torch.from_numpy(image.transpose(0, 3, 1, 2)),
            torch.from_numpy(clip[:, None]),
            torch.from_numpy(text),
            timestep_img=torch.from_numpy(t_image),
            timestep_text=torch.from_numpy(t_text),
            data_type=torch.from_numpy(kind),
        )
    expected = (theirs[0].numpy().transpose(0, 2, 3, 1), theirs[1].numpy()[:, 0], theirs[2].numpy())
    x = PictureAndText(*map(jnp.asarray, (image, clip, text)))
    told = (jnp.asarray(kind, jnp.int32),) if kinds else ()
    out = jax.jit(model.apply)({"params": params}, x, jnp.asarray(t_image), jnp.asarray(t_text), *told)
    for ours, wanted in zip((out.image, out.clip, out.text), expected, strict=True):
        difference = float(np.abs(ours - wanted).max())
        print(f"largest difference: {difference:.1e} of values up to {np.abs(wanted).max():.1f}")
        assert difference < 1e-4

    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    loaded: Any = UniDiffuserModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report.values()), report
    unread = "transformer.pos_embed"  # written as a copy of what is read
    for name, tensor in network.state_dict().items():
        wanted = network.state_dict()[name.replace(unread, "vae_img_in")] if name.startswith(unread) else tensor
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), wanted.numpy())


@pytest.mark.parametrize("grid", [(16, 16), (4, 12)])
def test_positions_of_other_grids_are_pytorch_s_bilinear_ones(grid):
    model = UniDiffuser(
        image_size=8, patch_size=1, width=8, depth=2, heads=2, in_channels=2, clip_width=3, text_length=2, text_width=3
    )
    table = np.random.default_rng(0).normal(size=(2 + 2 + 1 + 64, 8)).astype(np.float32)
    bound = model.bind({"params": {"position": {"embedding": jnp.asarray(table)}}})
    square = torch.from_numpy(table[5:].reshape(1, 8, 8, 8)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, grid, mode="bilinear", align_corners=False)
    expected = resized.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    np.testing.assert_allclose(bound._positions(grid)[5:], expected, atol=1e-5)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(their networks by folder, the folder that they are in)."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=12, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=5, hidden_act="quick_gelu", bos_token_id=18, eos_token_id=19, pad_token_id=19,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=10, hidden_act="quick_gelu",
    )  # fmt: skip
    networks = {
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "text_decoder": UniDiffuserTextDecoder(
            prefix_length=5, prefix_inner_dim=12, prefix_hidden_dim=6, vocab_size=9, n_positions=16, n_embd=8,
            n_layer=1, n_head=2, activation_function="gelu",
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1, norm_num_groups=4,
            sample_size=16,
        ),
        "unet": UniDiffuserModel(**SIZES, use_data_type_embedding=True),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    for name, network in networks.items():
        if name == "text_decoder":  # its class cannot save safetensors
            network.save_config(folder / name)
            torch.save(network.state_dict(), folder / name / "diffusion_pytorch_model.bin")
        else:
            network.save_pretrained(folder / name)
    DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012, solver_order=3
    ).save_pretrained(folder / "scheduler")
    (folder / "text_tokenizer").mkdir()
    pieces = {piece: place for place, piece in enumerate(["!", "a", "b", "c", "d", "e", "f", "<|endoftext|>"])}
    (folder / "text_tokenizer" / "vocab.json").write_text(json.dumps(pieces))  # the captioner's end is one more
    (folder / "text_tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return {name: network.eval() for name, network in networks.items()}, folder


def test_a_whole_pipeline_becomes_a_run_that_encodes_as_it_does_and_goes_back(pipeline, tmp_path, capsys):
    networks, folder = pipeline
    convert([f"--input={folder}", f"--output={tmp_path}/ours"])
    assert "it has no tokenizer" in capsys.readouterr().out  # to read with, as there is none of CLIP's beside
    trained = TrainedSampler.open(tmp_path / "ours")
    assert trained.decode(np.array([[2, 1, 3, 0, 8, 0, 0]])) == ("bac!",)
    sampler, frozen = trained.sampler, trained.frozen
    assert (sampler.guidance, sampler.captions.beams, sampler.model.data_types) == (8.0, 5, 2)
    rng = np.random.default_rng(0)
    text = np.array([[18, 3, 19, 0, 0], [18, 4, 5, 6, 19]], np.int32)
    padded = np.where(np.cumsum(text == 19, axis=1) > 0, 19, text)
    image = rng.integers(0, 255, (2, 16, 16, 3), np.uint8)
    pixels = (image / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    with torch.no_grad():
        states = networks["text_encoder"](torch.from_numpy(padded)).last_hidden_state
        latents = networks["text_decoder"].encode(states).numpy()
        given = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        embedded = networks["image_encoder"](given).image_embeds.numpy()
    np.testing.assert_allclose(sampler.encode_text(frozen, jnp.asarray(text))["text"], latents, atol=1e-4)
    ours = sampler.encode_image(frozen, jnp.asarray(image), jax.random.split(jax.random.key(0), 2))["clip"]
    np.testing.assert_allclose(ours, embedded, atol=1e-4)

    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    for name, network in networks.items():
        loaded: Any = type(network).from_pretrained(tmp_path / "back" / name, output_loading_info=True)
        back, report = loaded
        assert not any(report.values()), (name, report)
        for key, tensor in network.state_dict().items():
            if not key.startswith("transformer.pos_embed"):  # which nothing reads
                np.testing.assert_array_equal(back.state_dict()[key].numpy(), tensor.numpy())

    theirs, ours = (
        DPMSolverMultistepScheduler.from_pretrained(path / "scheduler") for path in (folder, tmp_path / "back")
    )
    known = [{k: v for k, v in scheduler.config.items() if not k.startswith("_")} for scheduler in (theirs, ours)]
    assert known[0] == known[1]  # the same that published folders have
    ours.set_timesteps(50)
    assert (int(ours.timesteps[0]), int(ours.timesteps[-1])) == (999, 20)
    # What they tell the network is one less than here, for the same noise.
    numbers, process = jnp.asarray(ours.timesteps.numpy(), jnp.float32), sampler.process
    np.testing.assert_array_equal(process.network_time(numbers), ours.timesteps.numpy() + 1)
    schedule = process.schedule
    np.testing.assert_allclose(schedule.sigma(numbers) / schedule.alpha(numbers), ours.sigmas[:-1].numpy(), rtol=1e-4)
