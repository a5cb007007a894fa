"""The router view: what it shows, what it escapes, and how big it gets."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from crab_edge_apps.demo._router_picture import COLOURS, mix
from crab_edge_apps.demo.router_view import router_html
from PIL import Image

from crab_edge.errors import InputError
from crab_edge.router import RouterTrace

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def trace(*runs, layers=2, experts=3, seed=0):
    """Runs of (modality, texts or a number of media tokens), with random weights."""
    tokens, modality = [], []
    for name, texts in runs:
        texts = [""] * texts if isinstance(texts, int) else texts
        tokens += texts
        modality += [name] * len(texts)
    paths = tuple(f"layers.{i}.{linear}" for i in range(layers) for linear in LINEARS)
    logits = 2 * np.random.default_rng(seed).normal(size=(len(paths), len(tokens), experts))
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return RouterTrace(paths, weights.astype(np.float32), tuple(tokens), tuple(modality))


@pytest.fixture
def small():
    return trace(("text", ["Look", ":"]), ("video", 8), ("audio", 5), ("answer", ["<event>", "dog"]))


class Tags(HTMLParser):
    """Checks that tags nest, and keeps what a browser would show or run."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def picture(image):
    raw = base64.b64decode(image["href"].removeprefix("data:image/png;base64,"))
    return np.array(Image.open(io.BytesIO(raw)).convert("RGBA"))


def test_it_is_one_self_contained_fragment(small):
    html = router_html(small)
    tags = Tags(html)
    assert tags.seen[0][0] == "figure" and not tags.all("script") and not tags.all("link")
    addresses = [a for _, attributes in tags.seen for n, a in attributes.items() if n in ("href", "src")]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"https?:|url\(|@import|\son\w+=", html)


def test_every_pixel_is_a_routers_weight_at_a_token(small):
    images = Tags(router_html(small)).all("image")[1:]  # the first is the triangle
    assert [picture(image).shape[1] for image in images] == [2, 8, 5, 2]
    place = 0
    for image in images:
        pixels = picture(image)
        rows = np.flatnonzero(np.any(np.diff(pixels[:, :, 3].astype(int), axis=0), axis=1))
        assert len(rows) == 2, "one transparent line between two decoder layers"
        for row in range(len(small.layers)):
            y = row * 10 + 5 + (row >= len(LINEARS))
            wanted = mix(small.weights[row, place : place + pixels.shape[1]])
            assert np.abs(pixels[y, :, :3].astype(int) - wanted).max() <= 24, "but for the palette's rounding"
            assert (pixels[y, :, 3] == 255).all()
        place += pixels.shape[1]


def test_certain_routers_have_the_legends_colours():
    np.testing.assert_array_equal(mix(np.eye(3)), COLOURS[:3])
    assert len({tuple(colour) for colour in mix(np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]]) / 2)}) == 3


def test_the_bars_show_the_means(small):
    html = router_html(small)
    for name, mean in small.mean_by_modality().items():
        for number, share in enumerate(mean.mean(axis=0)):
            assert f'title="expert {number + 1}: {share:.1%}"' in html, name


def test_the_routers_that_tell_modalities_apart_are_named():
    weights = np.full((8, 4, 3), 1 / 3, np.float32)
    weights[5, :2], weights[5, 2:] = (1, 0, 0), (0, 1, 0)
    base = trace(("text", ["a", "b"]), ("audio", 2))
    made = RouterTrace(base.layers, weights, base.tokens, base.modality)
    texts = Tags(router_html(made)).texts
    cards = [text for text in texts if text == "all routers" or text in made.layers]
    assert cards[:2] == ["all routers", made.layers[5]]


def test_hostile_text_stays_text():
    made = trace(("answer", ["</svg><script>alert(1)</script>", "\"'&", "\x00\x1b\u202e", "\n", " "]))
    html = router_html(made)
    assert not Tags(html).all("script") and "<script" not in html
    assert "\x00" not in html and "\x1b" not in html and "\u202e" not in html
    labels = Tags(html).texts
    assert "↵" in labels and "␣" in labels and "\"'&" in labels


def test_the_text_of_a_token_is_shown_where_one_points(small):
    titles = [text for text in Tags(router_html(small)).texts if text.startswith("answer, token 16")]
    assert len(titles) == 1 and "'dog'" in titles[0] and "expert 3" in titles[0]


def test_chinese():
    made = trace(("text", ["看"]), ("video", 200))
    html = router_html(made, "zh-CN")
    assert "专家 1" in html and "视频，200 个词元" in html
    assert "expert" not in "".join(Tags(html).texts)
    with pytest.raises(InputError, match="language 'fr': expected one of en, zh"):
        router_html(made, "fr")


def test_a_long_trace_stays_small():
    """A 7B decoder's 196 routers over 2,000 tokens."""
    runs = (
        ("text", ["a"] * 60),
        ("video", 640),
        ("audio", 250),
        ("text", ["b"] * 50),
        ("answer", ["w "] * 1000),
    )
    html = router_html(trace(*runs, layers=49))
    assert len(html) < 600_000
    tags = Tags(html)
    assert max(picture(image).shape[1] for image in tags.all("image")) <= 200
    assert "Where a column stands for several tokens, it shows their mean." in tags.texts


def test_windows():
    one = trace(("text", ["x"]), ("audio", 3), ("answer", ["y"]))
    html = router_html(RouterTrace.join([one] * 3))
    assert [text for text in Tags(html).texts if text.startswith("window")] == [
        "window 1",
        "window 2",
        "window 3",
    ]
    many = Tags(router_html(RouterTrace.join([one] * 60)))
    assert "The map shows windows 1 to 4 of 60; the bars count all of them." in many.texts
    assert len(many.all("image")) == 1 + 4 * 3


@pytest.mark.parametrize("experts", [1, 2, 5, 8])
def test_other_numbers_of_experts(experts):
    html = router_html(trace(("answer", ["a", "b"]), experts=experts))
    assert f"expert {experts}" in html and f"expert {experts + 1}" not in html


def test_more_experts_than_colours_are_refused():
    with pytest.raises(InputError, match="9 experts"):
        router_html(trace(("answer", ["a"]), experts=9))
