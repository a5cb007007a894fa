"""Rendered audio-visual scenes with exact truth, from open packages."""

from crab_edge.training.scenes.catalogue import Asset, Catalogue, ClassInfo, default_cache, fetch
from crab_edge.training.scenes.questions import question_templates
from crab_edge.training.scenes.source import RenderedScene, SceneSource
from crab_edge.training.scenes.truth import Sample

QUESTION_TEMPLATES = question_templates()

__all__ = [
    "QUESTION_TEMPLATES",
    "Asset",
    "Catalogue",
    "ClassInfo",
    "RenderedScene",
    "Sample",
    "SceneSource",
    "default_cache",
    "fetch",
    "question_templates",
]
