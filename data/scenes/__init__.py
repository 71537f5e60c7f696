"""The embedded captioned dataset: rendered shapes, captions, and their TFDS builder. Nothing is downloaded."""

import functools

from data import storage
from data.scenes.captions import CaptionQuery, ObjectQuery, parse_caption, write_captions
from data.scenes.render import Layout, render, sample_layout
from data.scenes.scene import WORLDS, Scene, SceneObject, World, find_world, sample_scene
from data.scenes.scenes_dataset_builder import Builder

NAMES = tuple(WORLDS)
prepare = functools.partial(storage.prepare, Builder)  # (config name, data_dir, number of examples of splits)

__all__ = [
    "NAMES",
    "WORLDS",
    "CaptionQuery",
    "Layout",
    "ObjectQuery",
    "Scene",
    "SceneObject",
    "World",
    "find_world",
    "parse_caption",
    "prepare",
    "render",
    "sample_layout",
    "sample_scene",
    "write_captions",
]
