import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crab_edge.errors import InputError
from crab_edge.training.tokenizer import SPECIAL, label_ids, number_ids, train_tokenizer

LABELS = ["dog", "car", "car horn", "acoustic guitar"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The sounding object is dog.", "<answer>yes</answer>"] * 5, LABELS, 700)


def test_numbers_labels_and_special_tokens_are_single(tokenizer):
    assert len(set(number_ids(tokenizer))) == 225
    assert len(set(label_ids(tokenizer, LABELS))) == 4
    assert all(tokenizer.token_to_id(t) is not None for t in SPECIAL)
    assert tokenizer.get_vocab_size() == 700
    assert max(tokenizer.get_vocab().values()) == 699


def test_numbers_and_labels_keep_their_token_in_every_surrounding(tokenizer):
    ids = tokenizer.encode("<obj>(7,121)(212,224)</obj> and a car horn, (0 7)").ids
    numbers = number_ids(tokenizer)
    assert [numbers.index(i) for i in ids if i in numbers] == [7, 121, 212, 224, 0, 7]
    assert ids.count(label_ids(tokenizer, ["car horn"])[0]) == 1
    # A label inside another word isn't that label.
    assert label_ids(tokenizer, ["car"])[0] not in tokenizer.encode("carpet cars").ids


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_decodes_to_itself(text):
    global _shared
    try:
        shared = _shared
    except NameError:
        shared = _shared = train_tokenizer(["a"], LABELS, 600)
    shared.encode_special_tokens = True
    assert shared.decode(shared.encode(text).ids, skip_special_tokens=False) == text


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(InputError, match="vocab_size is 400"):
        train_tokenizer(["a"], LABELS, 400)
