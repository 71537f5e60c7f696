"""The embedded captioned dataset: rendered shapes, captions, and their TFDS builder. Nothing is downloaded."""

from data.scenes.captions import CaptionQuery, ObjectQuery, parse_caption, write_captions
from data.scenes.render import Layout, render, sample_layout
from data.scenes.scene import WORLDS, Scene, SceneObject, World, find_world, sample_scene
from data.scenes.storage import prepare

__all__ = [
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
