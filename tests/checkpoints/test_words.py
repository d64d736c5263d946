"""Words against the tokenizer they wrap, and the tokenizers that do not belong to a checkpoint."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import BPEDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Sam3Processor

from samdistill.checkpoints.words import Words
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, build_tokenizer, sandbox_words
from samdistill.types import VISUAL, ConceptPrompts, UserError

SIZE = len(VOCABULARY)
PAD, BOS, EOS = (VOCABULARY.index(mark) for mark in ("<pad>", "<bos>", "<eos>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    sandbox_words().save(place)
    return place


@pytest.fixture
def words(folder):
    return Words.load(folder, SIZE, CONTEXT)


def test_phrases_become_their_tokens_and_are_padded_to_the_context(words):
    ids, mask = words.encode(["red circle", "square"])
    number = VOCABULARY.index
    assert ids.tolist() == [
        [BOS, number("red"), number("circle"), EOS, PAD, PAD],
        [BOS, number("square"), EOS, PAD, PAD, PAD],
    ]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_phrase_is_encoded_alike_whatever_is_asked_beside_it(words):
    alone = words.encode(["circle"])
    beside = words.encode(["small red circle", "circle", "square"])
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, beside, strict=True))


def test_transformers_pads_the_same(words, folder):
    phrases = ["red circle", "thing", "no such words"]
    theirs = AutoTokenizer.from_pretrained(folder)(
        phrases, padding="max_length", max_length=CONTEXT, return_tensors="pt"
    )
    ids, mask = words.encode(phrases)
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"])


def test_whole_words_are_those_of_one_token(words):
    assert set(words.whole_words()) == {word for word in VOCABULARY if word.isalpha()}
    pieces = ["<pad>", "c", "a", "t", "ca", "t</w>", "cat</w>", "2</w>", "a</w>"]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    bpe = BPE(numbers, [("c", "a"), ("ca", "t</w>")], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = BPEDecoder(suffix="</w>")
    found = Words(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"), 4)
    assert found.whole_words() == ("a", "cat", "t")  # "ca" is a part of words, "2" has no letter
    assert found.tokens(["cat a", "cat"]) == [{6, 8}, {6}] and found.tokens([]) == []


def test_the_longest_phrase_that_fits_and_one_token_more(words):
    assert words.fits("small red circle thing") and words.encode(["small red circle thing"])[1].sum() == CONTEXT
    assert not words.fits("a small red circle thing")
    with pytest.raises(UserError, match=r"'a small red circle thing' has 7 tokens.*at most 6"):
        words.encode(["circle", "a small red circle thing"])


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_phrase_is_refused(words, text):
    assert not words.fits(text)
    with pytest.raises(UserError, match=f"a phrase is empty.*'{VISUAL}'"):
        words.encode(["circle", text])


def test_the_word_for_boxes_alone_is_the_processors():
    assert Sam3Processor._resolve_text_prompts(None, None, [[[0.5, 0.5, 0.1, 0.1]]]) == VISUAL
    assert VISUAL in VOCABULARY


def test_the_inputs_of_a_model_are_tokens_and_boxes_on_its_device(words):
    plain = ConceptPrompts.words(["circle", "square"], [0, 0])
    ids, mask = words.encode(["circle", "square"])
    asked = words.inputs(plain, "cpu")
    assert torch.equal(asked["input_ids"], ids) and torch.equal(asked["attention_mask"], mask)
    assert asked["input_boxes"].shape == (2, 0, 4) and asked["input_boxes_labels"].shape == (2, 0)
    boxes, labels = torch.rand(2, 1, 4), torch.tensor([[-10], [0]])
    asked = words.inputs(ConceptPrompts(plain.texts, plain.image, boxes, labels), "cpu")
    assert torch.equal(asked["input_boxes"], boxes) and torch.equal(asked["input_boxes_labels"], labels)
    assert all(tensor.is_meta for tensor in words.inputs(plain, "meta").values())


def test_what_is_saved_reads_the_same(words, tmp_path):
    ids, _ = words.encode(["red circle"])
    words.save(tmp_path)
    again = Words.load(tmp_path, SIZE, CONTEXT)
    assert torch.equal(again.encode(["red circle"])[0], ids) and again.digest == words.digest
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None


def test_the_smallest_of_all_limits_is_the_context(folder, tmp_path):
    assert Words.load(folder, SIZE, 5).context == 5
    assert Words.load(folder, SIZE, 32).context == CONTEXT  # the tokenizer's own
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = int(1e30)  # what transformers says where nothing is known
    tokenizer.save_pretrained(tmp_path)
    assert Words.load(tmp_path, SIZE).context == 32


def test_the_digest_is_of_the_words(folder, words):
    shorter = Words.load(folder, SIZE, 5)
    other = build_tokenizer()
    other.add_tokens(["ellipse"])
    digests = {w.digest for w in (words, shorter, Words(other, CONTEXT))}
    before = words.digest
    words.encode(["circle"])
    assert len(digests) == 3 and words.digest == before


def test_a_tokenizer_file_stands_for_the_folder_around_it(folder, words):
    assert Words.load(folder / "tokenizer.json", SIZE, CONTEXT).digest == words.digest


def test_a_file_on_its_own_needs_a_padding_token(folder, words, tmp_path):
    alone = tmp_path / "words.json"
    shutil.copy(folder / "tokenizer.json", alone)
    with pytest.raises(UserError, match=r"no padding token; put the tokenizer_config.json"):
        Words.load(alone, SIZE, CONTEXT)
    tokenizer = Tokenizer.from_file(str(alone))
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    tokenizer.save(str(alone))
    assert torch.equal(Words.load(alone, SIZE, CONTEXT).encode(["circle"])[0], words.encode(["circle"])[0])


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 49408])
def test_another_number_of_tokens_is_a_strangers_tokenizer(folder, size):
    with pytest.raises(UserError, match=f"the tokenizer has {SIZE} tokens, but the text encoder has {size}; give"):
        Words.load(folder, size)


def test_an_id_beyond_the_table_is_found_even_where_the_count_fits(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["thing"] = SIZE  # one number is left out
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the tokenizer has {SIZE + 1} tokens"):
        Words.load(tmp_path, SIZE)


def test_a_checkpoint_without_a_tokenizer_gets_no_invented_one(tmp_path):
    """transformers alone would give a SAM 3 folder a CLIP tokenizer of two tokens."""
    (tmp_path / "config.json").write_text('{"model_type": "sam3"}')
    with pytest.raises(UserError, match=r"no tokenizer .* here; set teacher.tokenizer to the"):
        Words.load(tmp_path, 2)
    with pytest.raises(UserError, match="no such file or folder"):
        Words.load(tmp_path / "nowhere" / "at" / "all", SIZE)


@pytest.mark.parametrize("text", ["{", '{"tiny": true}', "[]"])
def test_a_damaged_tokenizer_is_one_clear_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match="not a readable tokenizer") as error:
            Words.load(place, SIZE)
        assert "\n" not in str(error.value)


def test_a_tokenizer_that_needs_code_is_refused_and_its_code_never_runs(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    about = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    with pytest.raises(UserError):
        Words.load(tmp_path, SIZE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("longest", ["6", [6], {}])
def test_a_tokenizer_whose_longest_phrase_is_no_number_is_named(longest, tmp_path):
    sandbox_words().save(tmp_path)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"model_max_length": longest}))
    with pytest.raises(UserError, match="not a readable tokenizer"):
        Words.load(tmp_path, len(VOCABULARY))
