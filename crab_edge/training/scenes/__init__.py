"""Rendered audio-visual scenes with exact truth, from open packages."""

from crab_edge.training.scenes.catalogue import Asset, Catalogue, ClassInfo, default_cache, fetch
from crab_edge.training.scenes.extras import Extras, fetch_extras
from crab_edge.training.scenes.kit import Film, TaskScene
from crab_edge.training.scenes.questions import question_templates
from crab_edge.training.scenes.source import RenderedScene, SceneSource
from crab_edge.training.scenes.staged import TaskScenes
from crab_edge.training.scenes.truth import Sample

QUESTION_TEMPLATES = question_templates()

__all__ = [
    "QUESTION_TEMPLATES",
    "Asset",
    "Catalogue",
    "ClassInfo",
    "Extras",
    "Film",
    "RenderedScene",
    "Sample",
    "SceneSource",
    "TaskScene",
    "TaskScenes",
    "default_cache",
    "fetch",
    "fetch_extras",
    "question_templates",
]
