import numpy as np
import pytest
import torch

from crab_edge.training.data import Vocabulary, activity, box_arrays, group_by_lead, spans
from crab_edge.training.heads import (
    BoxHead,
    CellHead,
    NumberHead,
    box_error,
    box_iou,
    cell_targets,
    class_prototypes,
    lifted_number_codes,
    number_codes,
    soft_numbers,
)
from crab_edge.training.synthetic import LABELS, SyntheticScenes


def test_prototypes_are_orthonormal_and_codes_of_near_numbers_are_near():
    p = class_prototypes(20, 64)
    torch.testing.assert_close(p @ p.T, torch.eye(20), atol=1e-5, rtol=0)
    similar = number_codes() @ number_codes().T
    assert (similar.argmax(dim=1) == torch.arange(225)).all()
    assert similar[100, 101] > similar[100, 105] > similar[100, 130]
    lifted = lifted_number_codes(64)
    torch.testing.assert_close(lifted @ lifted.T, similar, atol=1e-5, rtol=0)


def test_cells_of_a_box():
    label, target, weight = cell_targets(np.array([[28.0, 28, 140, 84]], np.float32), np.array([5]))
    inside = label.reshape(8, 8) == 5
    assert inside.sum() == 4 * 2 and inside[1:3, 1:5].all()
    assert (target[label == 5] == [28, 28, 140, 84]).all()
    assert set(weight[label == 5]) == {np.float32(0.4), np.float32(1.0)}


def test_a_small_object_before_a_large_one_and_a_tiny_one_has_a_cell():
    boxes = np.array([[0.0, 0, 224, 224], [60, 60, 80, 80]], np.float32)
    label, _, _ = cell_targets(boxes, np.array([1, 2]))
    assert (label == 2).sum() >= 1 and (label == 1).sum() >= 60


def test_box_iou_of_known_boxes():
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]])
    iou, giou = box_iou(a, b)
    torch.testing.assert_close(iou, torch.tensor([1.0, 1 / 3, 0.0]))
    torch.testing.assert_close(giou, torch.tensor([1.0, 1 / 3, -1 / 3]))


def test_cell_head_reads_boxes_from_the_cells_middle():
    head = CellHead(16, class_prototypes(3, 16))
    torch.nn.init.zeros_(head.box.weight)
    torch.nn.init.constant_(head.box.bias, 0.25)
    _, _, boxes = head(torch.zeros(1, 64, 16))
    assert boxes[0, 0].tolist() == pytest.approx([14 - 28, 14 - 28, 14 + 28, 14 + 28])
    assert boxes[0, 63].tolist() == pytest.approx([210 - 28, 210 - 28, 210 + 28, 210 + 28])


def test_soft_numbers_peak_at_the_value():
    soft = soft_numbers(torch.tensor([10.0, 200.0]), 2.0)
    assert soft.argmax(dim=1).tolist() == [10, 200]
    assert soft.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_activity_and_visible_boxes():
    vocabulary = Vocabulary(LABELS)
    table = activity([("bell", 0.4, 0.8), ("unknown", 0, 9)], 50, vocabulary)
    assert np.flatnonzero(table.sum(axis=1)).tolist() == list(range(10, 20))
    scene = SyntheticScenes().still(0)
    boxes, classes = box_arrays(scene, vocabulary, 0.5)
    assert boxes.shape == (2, 4) and len(set(classes.tolist())) == 2
    assert len(box_arrays(scene, vocabulary, -1.0)[0]) == 0


def test_samples_of_one_prompt_share_their_lead():
    scene = SyntheticScenes().still(3)
    lead, chosen = group_by_lead(scene.samples, np.random.default_rng(0), 1)
    assert len(chosen) == 1 and chosen[0].lead == lead


def test_spans_tell_when_a_lone_sound_began_and_the_last_one_ended():
    sounds = [("dog", 0.9, 3.0), ("cat", 2.0, 4.2)]
    found = spans(sounds, 150)
    at = {second: found[round(second / 0.04)].tolist() for second in (0.4, 1.2, 2.4, 3.6, 5.2)}
    assert at == {0.4: [-1, -1], 1.2: [1, -1], 2.4: [-1, -1], 3.6: [2, -1], 5.2: [-1, 4]}


def test_number_and_box_heads_start_at_least_squares():
    torch.manual_seed(0)
    x = torch.randn(4000, 24)
    boxes = 112 + 30 * torch.tanh(x[:, :4])
    box = BoxHead(24)
    before = box_error(box(x), boxes).mean()
    box.fit(x, boxes)
    assert box_error(box(x), boxes).mean() < 0.5 * before and (box(x) - boxes).abs().mean() < 6
    numbers = NumberHead(24, 2)
    values = torch.stack((boxes[:, 0], torch.full((4000,), -1.0)), dim=1)
    numbers.fit(x, values)
    said = numbers(x)[:, 0].argmax(dim=-1)
    assert (said - boxes[:, 0]).abs().median() < 8
    assert not numbers.project.weight[32:].any()  # nothing was known of the second number


def test_box_error_is_nothing_for_equal_boxes_and_grows_with_distance():
    truth = torch.tensor([[50.0, 50, 100, 100]]).repeat(3, 1)
    error = box_error(truth + torch.tensor([[0.0], [10.0], [80.0]]), truth)
    assert error[0].abs() < 1e-5 and error[0] < error[1] < error[2]


def test_one_sample_of_every_task_is_kept():
    from types import SimpleNamespace

    samples = [SimpleNamespace(lead="a", task=t) for t in ["ave", "avvp", *["avqa"] * 9]]
    for seed in range(20):
        _, chosen = group_by_lead(samples, np.random.default_rng(seed), 4)
        assert len(chosen) == 4 and {s.task for s in chosen} == {"ave", "avvp", "avqa"}
