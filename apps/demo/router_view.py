"""A router trace as one piece of HTML: mean weights by modality, and a heat map of routers by tokens.

Pure and self-contained: inline SVG and PNG, no scripts, nothing fetched. Lines and text take the colour of
the page around it, so that light and dark themes both read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from crab_edge_apps.demo._router_picture import COLOURS, data_uri, ink, legend_triangle, rgb_text

from crab_edge.errors import InputError
from crab_edge.router import RouterTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOWS_SHOWN = 4
TELLING_ROUTERS = 3
MEDIA_COLUMNS, TEXT_COLUMNS = 96, 200
MEDIA_STEP, TEXT_STEP, GAP = 2, 11, 8
HEAD, LABELS, LABEL_LETTERS = 20, 74, 12

TEXTS = {
    "en": {
        "title": "Which expert spoke",
        "how": "Every adapted linear of the decoder has a router that mixes its experts anew for each token. "
        "In the map a column is a token and a row a router; the colour mixes the experts' colours, leaning "
        "towards the stronger ones as the triangle shows.",
        "all": "all routers",
        "expert": "expert {0}",
        "means": "Mean weight by modality, and the routers that tell modalities apart most",
        "map": "Weights by router and token",
        "heading": "{0}, {1} tokens",
        "token": "token {0}",
        "range": "tokens {0} to {1}",
        "layer": "layer {0}",
        "window": "window {0}",
        "cut": "The map shows windows 1 to {0} of {1}; the bars count all of them.",
        "binned": "Where a column stands for several tokens, it shows their mean.",
        "text": "prompt",
        "video": "video",
        "image": "image",
        "audio": "audio",
        "answer": "answer",
    },
    "zh": {
        "title": "哪位专家在发言",
        "how": "解码器中每个带适配器的线性层都有一个路由器，为每个词元重新混合各专家。"
        "图中每列是一个词元，每行是一个路由器；颜色由各专家的颜色混合而成，偏向权重较大的专家，如三角形所示。",
        "all": "全部路由器",
        "expert": "专家 {0}",
        "means": "各模态的平均权重，以及最能区分模态的路由器",
        "map": "按路由器和词元的权重",
        "heading": "{0}，{1} 个词元",
        "token": "词元 {0}",
        "range": "词元 {0} 至 {1}",
        "layer": "第 {0} 层",
        "window": "窗口 {0}",
        "cut": "图中显示第 1 至 {0} 个窗口（共 {1} 个）；条形统计全部窗口。",
        "binned": "一列代表多个词元时，显示其平均值。",
        "text": "提示",
        "video": "视频",
        "image": "图像",
        "audio": "音频",
        "answer": "回答",
    },
}

STYLE = """
.crab-router{margin:0;font:13px/1.45 system-ui,sans-serif;color:inherit}
.crab-router h4{margin:.9em 0 .35em;font-size:13px;font-weight:600;color:inherit}
.crab-router p{margin:.3em 0;max-width:72ch;opacity:.85}
.crab-router .key{display:flex;gap:16px;align-items:center;flex-wrap:wrap}
.crab-router .key span{white-space:nowrap}
.crab-router .key i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px;
vertical-align:-1px}
.crab-router .cards{display:flex;flex-wrap:wrap;gap:10px 24px}
.crab-router .card{flex:1 1 220px;max-width:340px}
.crab-router .bars{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 8px;
align-items:center;margin-top:2px}
.crab-router .bar{display:flex;height:17px;border-radius:3px;overflow:hidden}
.crab-router .bar b{font-weight:500;font-size:11px;line-height:17px;text-align:center;overflow:hidden;
white-space:nowrap}
.crab-router small{opacity:.8}
.crab-router .map{display:flex}
.crab-router .map>svg{flex:none}
.crab-router .scroll{overflow-x:auto;flex:1 1 auto;min-width:0;scrollbar-color:#8889 #0000}
.crab-router svg{display:block;max-width:none}
.crab-router svg text{fill:currentColor;font:10px system-ui,sans-serif}
.crab-router svg text.head{font-size:11px;font-weight:600}
.crab-router svg text.soft{opacity:.7}
.crab-router svg image{image-rendering:pixelated}
.crab-router svg rect{fill:transparent}
.crab-router svg rect:hover{fill:currentColor;fill-opacity:.25}
.crab-router svg line{stroke:currentColor;stroke-opacity:.35}
"""


def router_html(trace: RouterTrace, language: str = "en") -> str:
    """The view of `trace` as an HTML fragment; `language` "en" or "zh" (a region such as "zh-CN" may follow).

    Media tokens and long texts are shown in bins, and the map holds the first windows only, so that the
    fragment stays below about a megabyte whatever the trace. InputError for another language, or for more
    experts than there are colours (eight).
    """
    words = TEXTS.get(language.replace("_", "-").partition("-")[0].lower())
    if words is None:
        raise InputError(f"language {language!r}: expected one of {', '.join(TEXTS)}")
    if trace.experts > len(COLOURS):
        raise InputError(f"a trace of {trace.experts} experts; the view has colours for {len(COLOURS)}")
    names = [words["expert"].format(number + 1) for number in range(trace.experts)]
    parts = [
        f"<style>{STYLE}</style>",
        f"<h4>{words['title']}</h4><p>{words['how']}</p>",
        _key(names),
        f"<h4>{words['means']}</h4>",
        _bars(trace, names, words),
        f"<h4>{words['map']}</h4>",
        _map(trace, names, words),
    ]
    return f'<figure class="crab-router">{"".join(parts)}</figure>'


def _key(names: list[str]) -> str:
    chips = "".join(
        f'<span><i style="background:{rgb_text(COLOURS[number])}"></i>{name}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="key">{legend_triangle(names)}{chips}</div>'


def _bars(trace: RouterTrace, names: list[str], words: dict[str, str]) -> str:
    """Mean weights by modality: over all routers, and of those routers that tell modalities apart most."""
    means = trace.mean_by_modality()
    cards = [_card(words["all"], {name: mean.mean(axis=0) for name, mean in means.items()}, names, words)]
    stacked = np.stack(list(means.values()))
    # Total variation between the two modalities that differ most: half the sum of absolute differences.
    apart = np.abs(stacked[:, None] - stacked[None]).sum(axis=-1).max(axis=(0, 1)) / 2
    for number in np.argsort(-apart, kind="stable")[:TELLING_ROUTERS] if len(means) > 1 else ():
        shares = {name: mean[number] for name, mean in means.items()}
        cards.append(_card(trace.layers[number], shares, names, words))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(title: str, shares: dict[str, NDArray[np.float32]], names: list[str], words: dict[str, str]) -> str:
    """One stacked bar a modality; `shares` are [experts]."""
    rows = []
    for modality, weights in shares.items():
        cells = "".join(
            f'<b style="width:{100 * share:.2f}%;background:{rgb_text(COLOURS[number])};'
            f'color:{ink(COLOURS[number])}" title="{names[number]}: {share:.1%}">'
            f"{f'{share:.0%}' if share >= 0.08 else ''}</b>"
            for number, share in enumerate(map(float, weights))
        )
        rows.append(f'<span>{words[modality]}</span><div class="bar">{cells}</div>')
    return f'<div class="card"><small>{escape(title)}</small><div class="bars">{"".join(rows)}</div></div>'


@dataclass(frozen=True)
class _Segment:
    """A run of tokens of one modality in one window, and the tokens where each of its columns begins."""

    window: int
    modality: str
    begin: int
    end: int
    edges: NDArray[np.intp]

    @property
    def media(self) -> bool:
        return self.modality in ("video", "image", "audio")

    @property
    def step(self) -> int:
        """Pixels a column."""
        return MEDIA_STEP if self.media else TEXT_STEP

    @property
    def width(self) -> int:
        return self.step * len(self.edges)


def _segments(trace: RouterTrace) -> Iterator[_Segment]:
    shown = trace.windows[:WINDOWS_SHOWN]
    ends = [*trace.windows[1:], len(trace.tokens)]
    for window, (start, stop) in enumerate(zip(shown, ends, strict=False)):
        begin = start
        for at in range(start + 1, stop + 1):
            if at < stop and trace.modality[at] == trace.modality[begin]:
                continue
            media = trace.modality[begin] in ("video", "image", "audio")
            columns = min(at - begin, MEDIA_COLUMNS if media else TEXT_COLUMNS)
            edges = begin + np.arange(columns) * (at - begin) // columns
            yield _Segment(window, trace.modality[begin], begin, at, edges)
            begin = at


def _map(trace: RouterTrace, names: list[str], words: dict[str, str]) -> str:
    rows = _rows(trace.layers)
    segments = list(_segments(trace))
    height = rows[-1].bottom
    below = HEAD + height + LABELS
    drawn, x, window = [], 0, -1
    for segment in segments:
        if segment.window != window and len(trace.windows) > 1:
            label = escape(words["window"].format(segment.window + 1))
            drawn.append(f'<line x1="{x + 1}" x2="{x + 1}" y1="0" y2="{below}"/>')
            drawn.append(f'<text class="head" x="{x + 5}" y="{below - 4}">{label}</text>')
            x += GAP
        window = segment.window
        drawn.append(_segment(trace, segment, rows, x, names, words))
        x += segment.width + GAP
    label = escape(words["map"])
    scroll = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">'
        f'<svg role="img" aria-label="{label}" width="{x}" height="{below}">{"".join(drawn)}</svg></div>'
    )
    notes = []
    if any(len(segment.edges) < segment.end - segment.begin for segment in segments):
        notes.append(words["binned"])
    if len(trace.windows) > WINDOWS_SHOWN:
        notes.append(words["cut"].format(WINDOWS_SHOWN, len(trace.windows)))
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    return f'<div class="map">{_row_labels(rows, below, words)}{scroll}</div>{note}'


@dataclass(frozen=True)
class _Row:
    """One router's place in the map, in pixels from its top."""

    path: str
    layer: int | None
    name: str
    top: int
    height: int

    @property
    def bottom(self) -> int:
        return self.top + self.height


def _rows(paths: tuple[str, ...]) -> list[_Row]:
    """Routers from top to bottom, a pixel apart where a decoder layer ends."""
    height = max(3, min(10, 480 // len(paths)))
    rows: list[_Row] = []
    for path in paths:
        match = re.search(r"\blayers\.(\d+)\.", path)
        layer = int(match.group(1)) if match else None
        name = path.rpartition(".")[2].removesuffix("_proj")
        gap = 1 if rows and rows[-1].layer != layer else 0
        rows.append(_Row(path, layer, name, rows[-1].bottom + gap if rows else 0, height))
    return rows


def _row_labels(rows: list[_Row], height: int, words: dict[str, str]) -> str:
    """The column left of the map that stays when it scrolls."""
    named = rows[0].height >= 9
    out = []
    for number, row in enumerate(rows):
        y = HEAD + row.top
        if row.layer is not None and (number == 0 or rows[number - 1].layer != row.layer):
            text = words["layer"].format(row.layer)
            out.append(f'<text x="0" y="{y + 9}">{text}</text>')
        if named:
            out.append(f'<text class="soft" x="82" y="{y + 8}" text-anchor="end">{escape(row.name)}</text>')
        out.append(
            f'<rect x="0" y="{y}" width="86" height="{row.height}"><title>{escape(row.path)}</title></rect>'
        )
    return f'<svg role="presentation" width="88" height="{height}">{"".join(out)}</svg>'


def _segment(
    trace: RouterTrace, segment: _Segment, rows: list[_Row], x: int, names: list[str], words: dict[str, str]
) -> str:
    """Picture, columns to point at, heading and token texts of one run of tokens."""
    counts = np.diff([*segment.edges, segment.end])
    sums = np.add.reduceat(
        trace.weights[:, segment.begin : segment.end], segment.edges - segment.begin, axis=1
    )
    means = sums / counts[None, :, None]
    bottom = HEAD + rows[-1].bottom
    uri = data_uri(means, [(row.top, row.bottom) for row in rows])
    out = [
        f'<image x="{x}" y="{HEAD}" width="{segment.width}" height="{rows[-1].bottom}" '
        f'preserveAspectRatio="none" href="{uri}"/>'
    ]
    heading = words["heading"].format(words[segment.modality], segment.end - segment.begin)
    if segment.width > 60:
        out.append(f'<text class="head" x="{x}" y="{HEAD - 6}">{heading}</text>')
    over_layers = means.mean(axis=0)
    for number, begin in enumerate(segment.edges):
        end = int(begin + counts[number])
        text = "".join(trace.tokens[begin:end])
        shares = ", ".join(f"{n} {s:.0%}" for n, s in zip(names, over_layers[number], strict=True))
        place = words["token"].format(begin) if end - begin == 1 else words["range"].format(begin, end - 1)
        quoted = f" {_visible(text, 80)!r}" if text else ""
        title = escape(f"{words[segment.modality]}, {place}{quoted}: {shares}")
        left = x + number * segment.step
        out.append(
            f'<rect x="{left}" y="{HEAD}" width="{segment.step}" height="{rows[-1].bottom}">'
            f"<title>{title}</title></rect>"
        )
        if not segment.media and text:
            place = f"translate({left + segment.step - 2} {bottom + 5}) rotate(-90)"
            label = escape(_visible(text, LABEL_LETTERS))
            out.append(f'<text text-anchor="end" transform="{place}">{label}</text>')
    return "".join(out)


def _visible(text: str, letters: int) -> str:
    """At most so many letters; blanks and control characters made visible, none that XML forbids."""
    text = text.replace("\n", "↵").replace("\t", "→")
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if text == " " * len(text):
        text = "␣" * len(text)
    return text if len(text) <= letters else text[: letters - 1] + "…"
