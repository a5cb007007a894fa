"""Drawing: where ink lands, that labels stay inside and readable, and what annotated videos keep."""

import numpy as np
import pytest
from crab_edge_apps._draw import annotate_image, annotate_video, anything
from crab_edge_apps._draw.overlay import Overlay
from crab_edge_apps._draw.results import PALETTE, colours, shown
from crab_edge_apps._draw.text import chip, font_for, ink_on, one_line, shortened, wrapped

from crab_edge import masks
from crab_edge.clip import Clip
from crab_edge.errors import InputError, MediaError
from crab_edge.results import (
    Answer,
    Box,
    Caption,
    Choice,
    Event,
    Points,
    Timings,
    Unparsed,
    results_from_json,
    results_to_json,
)
from tests import media

GREY = np.full((180, 320, 3), 128, np.uint8)


def changed(after, before=GREY):
    return (after != before).any(axis=2)


def contrast(a, b):
    def luminance(colour):
        shares = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * shares[0] + 0.7152 * shares[1] + 0.0722 * shares[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_box_is_drawn_where_it_is_and_nowhere_else():
    out = annotate_image(GREY, [Box("dog", 100, 60, 200, 150)])
    ink = changed(out)
    rows, columns = np.flatnonzero(ink[:, 150:].any(axis=1)), np.flatnonzero(ink[100])
    assert abs(columns[0] - 100) <= 3 and abs(columns[-1] - 200) <= 3
    assert rows[0] >= 55 and abs(rows[-1] - 150) <= 3
    assert not ink[75:140, 110:190].any(), "the inside stays as it was"
    assert not (GREY != 128).any(), "the picture given isn't drawn on"
    assert tuple(out[100, 101]) == colours(["dog"])["dog"]


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 320, 180),
        (-50, -9, 20, 20),
        (300, 160, 900, 900),
        (310, 0, 320, 10),
        (5, 5, 5, 5),
        (90, 90, 60, 40),
    ],
)
def test_labels_stay_inside_the_frame(box):
    """A whole-frame box, boxes over the edges, an empty and a turned one: the chip's text can be read."""
    whole = np.zeros((300, 500, 3), np.uint8)
    inside = annotate_image(whole[:180, :320], [Box("a long label here", *box)])
    colour = colours(["a long label here"])["a long label here"]
    ink = np.array(ink_on(colour))
    on_chip = (np.abs(inside.astype(int) - ink) < 40).all(axis=2) if ink.any() else changed(inside, inside)
    plain = annotate_image(whole[:180, :320], [Box("", *box)])
    label = (inside != plain).any(axis=2)
    made = chip("a long label here", colour, max(10, round(180 / 27)), 320 * 3 // 5)
    rows, columns = np.flatnonzero(label.any(axis=1)), np.flatnonzero(label.any(axis=0))
    assert rows.size and columns.size and on_chip.shape == label.shape
    assert rows[-1] - rows[0] + 1 >= made.height - 4 and columns[-1] - columns[0] + 1 >= made.width - 6


def test_labels_do_not_cover_each_other():
    twice = [Box("dog", 60, 60, 200, 150), Box("cat", 62, 62, 198, 148), Box("cow", 64, 64, 190, 140)]
    overlay = Overlay(320, 180, shown(twice), None)
    overlay.draw(GREY.copy(), None)
    places = overlay._taken
    assert len(places) == 3
    for number, (x, y, width, height) in enumerate(places):
        assert x >= 0 and y >= 0 and x + width <= 320 and y + height <= 180
        for left, top, wide, high in places[:number]:
            assert x >= left + wide or left >= x + width or y >= top + high or top >= y + height


def test_text_can_be_read_on_every_colour():
    assert all(contrast(colour, ink_on(colour)) >= 4.5 for colour in PALETTE)


def test_colours_stay_with_their_labels_and_differ():
    alone, together = colours(["dog"]), colours(["cat", "Dog", "cow", "dog"])
    assert together["dog"] == alone["dog"] or len({*colours(["cat", "dog"]).values()}) == 2
    assert set(together) == {"cat", "dog", "cow"}
    many = colours(str(number) for number in range(len(PALETTE)))
    assert len(set(many.values())) == len(PALETTE)
    assert colours(["dog", "cat"]) == colours(["cat", "dog"])


def test_masks_and_points_are_stretched_and_placed():
    bits = np.zeros((90, 160), bool)
    bits[20:60, 40:100] = True
    out = annotate_image(GREY, [masks.from_bits(bits, "dog", "test")])
    ink = changed(out)
    assert ink[44:116, 84:196].all() and not ink[125:].any() and not ink[:, :75].any()
    assert (out[80, 140] != colours(["dog"])["dog"]).any(), "the picture shines through"
    out = annotate_image(GREY, [Points("", ((30.0, 40.0), (300.0, 170.0)))])
    ink = changed(out)
    assert ink[40, 30] and ink[170, 300] and ink.sum() < 700


def test_short_answers_and_captions_are_shown_and_nonsense_is_not():
    assert changed(annotate_image(GREY, [Choice("yes")], question="Is there a dog?"))[:40].any()
    assert changed(annotate_image(GREY, [Caption("a dog " * 200)])).any()
    assert not changed(annotate_image(GREY, [Unparsed("no form")])).any()
    assert not anything([[Unparsed("no form")], {"task": "ave", "parsed": []}]) and anything(
        [[Choice("yes")]]
    )


def test_results_come_typed_as_answers_or_as_json():
    parsed = (Event("dog", 1.0, 4.0, "audio"), Points("dog", ((1.0, 2.0),)), Box("dog", 1, 2, 30, 40))
    answer = Answer("ave", "raw", parsed, Timings(), question="which?")
    assert results_from_json(results_to_json(parsed)) == parsed
    same = [shown(answer), shown(answer.to_json()), shown(answer.to_json() | {"media": ["x"]})]
    assert same[0] == same[1] == same[2] and [one.result for one in shown(parsed)] == list(parsed)
    late = shown({"task": "avcap", "parsed": [{"type": "caption", "text": "a", "window": [10.0, 20.0]}]})
    assert late[0].window == (10.0, 20.0)


@pytest.mark.parametrize("label", ["", "\n\x1b[31m", "狗叫", "x" * 5000, "<b>--></b>", "\ud800", "😀"])
def test_hostile_labels_cost_nothing(label):
    results = [Box(label, 5, 5, 60, 60), Event(label, 0, 1, "audio"), Choice(label), Points(label, ((9, 9),))]
    for size in ((180, 320), (3, 5), (48, 64)):
        picture = np.zeros((*size, 3), np.uint8)
        assert annotate_image(picture, results).shape == picture.shape


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_other_arrays_are_refused(bad):
    with pytest.raises(InputError, match="uint8"):
        annotate_image(bad, [])


def test_text_is_cut_wrapped_and_spelled():
    font, _ = font_for("dog", 12)
    assert shortened("dog", font, 500) == "dog" and shortened("dog", font, 1) == ""
    cut = shortened("a very long label", font, 60)
    assert cut.endswith("...") and font.getlength(cut) <= 60
    lines = wrapped("one two three four five six", font, 60, 3)
    assert len(lines) == 3 and all(font.getlength(line) <= 60 for line in lines)
    assert " ".join(wrapped("one two three", font, 60, 9)) == "one two three"
    assert one_line(" a\nb\t\x07 ") == "a b \\x07"
    _, spelled = font_for("\U00013000", 12)
    assert spelled == "[U+13000]"


def video_frames(path):
    import av

    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def sound_packets(path):
    import av

    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return stream.codec_context.name, [bytes(packet) for packet in container.demux(stream) if packet.size]


EVENTS = {
    "task": "ave",
    "parsed": [
        {"type": "event", "label": "dog", "start_s": 0.5, "end_s": 1.0, "modality": "audio-visual"},
        {"type": "choice", "value": "yes", "window": [1.0, 2.0]},
    ],
}


def test_a_video_keeps_frames_times_and_sound(tmp_path):
    source = media.video(tmp_path / "in.mp4", seconds=2, fps=10, width=160, height=120)
    seen = []
    out = annotate_video(source, [EVENTS], tmp_path / "out.mp4", seen.append)
    before, after = video_frames(source), video_frames(out)
    assert [time for time, _ in after] == pytest.approx([time for time, _ in before], abs=1e-3)
    assert sound_packets(out) == sound_packets(source), "the sound is the same, byte for byte"
    assert seen == sorted(seen) and seen[-1] == 1.0 and all(0 <= share <= 1 for share in seen)
    for (time, old), (_, new) in zip(before, after, strict=True):
        difference = np.abs(new.astype(int) - old).mean(axis=2)
        assert difference[45:70].mean() < 6, "the middle of the picture is as it was"
        left = difference[92:110, 4:20].mean()
        assert (left > 20) == (0.5 <= time < 1.0), (time, left)
        top = difference[4:12, 4:20].mean()
        assert (top > 15) == (time >= 1.0), (time, top)


@pytest.mark.parametrize(
    ("name", "options", "codec"),
    [
        ("in.webm", {}, "opus"),
        ("in.mkv", {"audio_codec": "pcm_s16le"}, "aac"),
        ("mute.mp4", {"sound": False}, None),
        ("late.mp4", {"sound_from_s": 0.5, "b_frames": 2}, "aac"),
        ("odd.mkv", {"width": 63, "height": 47, "codec": "mpeg4"}, "aac"),
        ("uneven.mp4", {"times": [0.0, 0.1, 0.5, 0.6, 1.9]}, "aac"),
    ],
)
def test_other_containers(tmp_path, name, options, codec):
    source = media.video(tmp_path / name, **({"seconds": 2, "fps": 10} | options))
    clip = Clip.open([annotate_video(source, [EVENTS], tmp_path / "out.mp4")])
    with Clip.open([source]) as original:
        assert clip.videos[0].n_frames == original.videos[0].n_frames
        assert clip.videos[0]._times == pytest.approx(original.videos[0]._times, abs=2e-3)
        assert clip.duration_s == pytest.approx(original.duration_s, abs=0.2)
    assert (sound_packets(tmp_path / "out.mp4")[0] if clip.audios else None) == codec
    assert (clip.videos[0].width + 1) // 2 == (options.get("width", 64) + 1) // 2
    clip.close()


def test_a_turned_video_is_drawn_upright(tmp_path):
    source = media.rotated(media.video(tmp_path / "in.mp4", seconds=1), tmp_path / "turned.mp4", 1)
    with Clip.open([annotate_video(source, [EVENTS], tmp_path / "out.mp4")]) as clip:
        assert (clip.videos[0].width, clip.videos[0].height) == (48, 64)


def test_nothing_is_left_of_a_video_that_fails(tmp_path):
    sound = media.sound(tmp_path / "sound.wav")
    whole = media.video(tmp_path / "in.mp4", seconds=3)
    broken = media.truncated(media.video(tmp_path / "in.mkv", seconds=3), tmp_path / "broken.mkv", 0.5)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "out.mp4"
    out.write_bytes(b"the one before")

    def give_up(share):
        raise KeyboardInterrupt

    with pytest.raises(MediaError, match="no picture to draw on"):
        annotate_video(sound, [EVENTS], out)
    with pytest.raises(KeyboardInterrupt):
        annotate_video(whole, [EVENTS], out, give_up)
    assert out.read_bytes() == b"the one before" and list(out.parent.iterdir()) == [out]
    annotate_video(broken, [EVENTS], out)
    assert video_frames(out), "what can be decoded is drawn"


def test_a_full_disk_is_one_error(tmp_path):
    from crab_edge.errors import CrabError

    source = media.video(tmp_path / "in.mp4", seconds=1)
    with pytest.raises(CrabError, match="can't be written") as caught:
        annotate_video(source, [EVENTS], tmp_path / "nowhere" / "out.mp4")
    assert not isinstance(caught.value, MediaError) and "\n" not in str(caught.value)
