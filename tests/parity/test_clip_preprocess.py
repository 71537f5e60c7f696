"""CLIP's pictures are those of torchvision's transforms, byte for byte, which OpenAI's and open_clip's code use."""

import numpy as np
import pytest
from open_clip import image_transform
from PIL import Image
from torchvision import transforms

from data.preprocess import clip_evaluation, clip_training

SIDES = [*range(20, 90, 7), 31, 32, 33, 127, 224, 225, 333, 500]


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise, in which no two crops are alike."""
    return np.random.default_rng((height, width, channels)).integers(0, 256, (height, width, channels), np.uint8)


def as_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


@pytest.mark.parametrize("size", [32, 33, 64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_evaluation_is_resize_and_center_crop(size, channels):
    published = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            lambda image: np.asarray(image.convert("RGB")),
        ]
    )
    rng = np.random.default_rng(size)
    shapes = [(int(height), int(width)) for height, width in rng.choice(SIDES, (60, 2))]
    for height, width in [*shapes, (size, size), (size, size + 1), (size + 3, size), (size, 4 * size + 5)]:
        image = picture(height, width, channels)
        assert (clip_evaluation(image, size) == published(as_pil(image))).all(), (height, width)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_evaluation_is_what_open_clip_feeds_its_networks(channels):
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    published = image_transform(224, is_train=False, mean=tuple(mean), std=tuple(deviation))
    for shape in ((300, 401), (401, 300), (225, 224), (640, 427), (100, 151)):
        image = picture(*shape, channels)
        fed = published(as_pil(image)).permute(1, 2, 0).numpy()
        assert (clip_evaluation(image, 224) == np.rint((fed * deviation + mean) * 255)).all(), shape


def test_training_is_a_crop_of_the_same_resized_picture():
    resize = transforms.Resize(32, transforms.InterpolationMode.BICUBIC)
    for height, width in ((45, 97), (97, 45), (33, 70)):
        image = picture(height, width)
        resized = np.asarray(resize(as_pil(image)))
        crops = np.lib.stride_tricks.sliding_window_view(resized, (32, 32, 3)).reshape(-1, 32, 32, 3)
        seen = set()
        for seed in range(40):
            crop = clip_training(image, 32, np.random.default_rng(seed))
            seen.add(int(np.flatnonzero((crops == crop).all((1, 2, 3)))[0]))
        assert len(seen) > 0.5 * min(len(crops), 40)
