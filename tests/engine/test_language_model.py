"""The public face: load, read, write, save."""

import subprocess
import sys

import pytest
import torch

import qiusuo
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.data.tokenizer import Tokenizer
from tests.model.shapes import tiny_model

TEXT = "路漫漫其修远兮，吾将上下而求索。"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_characters([TEXT])


@pytest.fixture
def folder(tmp_path, tokenizer):
    eos = tokenizer.eos_id
    model = tiny_model(eos_token_id=eos, vocab_size=tokenizer.vocab_size)
    return save_huggingface(model, tmp_path / "m", tokenizer=tokenizer)


def test_load_and_read(folder, tokenizer):
    lm = qiusuo.load(folder)
    assert isinstance(lm, qiusuo.LanguageModel)
    assert not lm.model.training
    ids = tokenizer.encode(TEXT)
    logits = lm.logits(ids)
    assert logits.shape == (len(ids), tokenizer.vocab_size)
    assert logits.dtype == torch.float32
    model = tiny_model(eos_token_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids])).x_BTD)[0]
    assert torch.equal(logits, expected)


def test_texts_begin_with_the_beginning_and_come_back_as_text(folder, tokenizer):
    lm = qiusuo.load(str(folder))
    ids = [tokenizer.bos_id, *tokenizer.encode("求索")]
    by_text, by_ids = lm.generate(["求索"], max_tokens=9), lm.generate([ids], max_tokens=9)
    assert by_text == by_ids
    assert isinstance(by_text[0], qiusuo.Completion)
    assert len(by_text[0].token_ids) == 9
    assert by_text[0].text == tokenizer.decode(by_text[0].token_ids)
    assert by_text[0].text


def test_end_token_is_in_the_ids_and_not_in_the_text(folder, tokenizer, tmp_path):
    free = qiusuo.load(folder).generate(["路"], max_tokens=6)[0].token_ids
    end = free[4]
    model = tiny_model(eos_token_id=(end,), vocab_size=tokenizer.vocab_size)
    save_huggingface(model, tmp_path / "stops", tokenizer=tokenizer)
    (answer,) = qiusuo.load(tmp_path / "stops").generate(["路"], max_tokens=6)
    assert answer.token_ids == free[: free.index(end) + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == tokenizer.decode(answer.token_ids[:-1])


@pytest.mark.parametrize(
    ("eos", "stops"), [(None, set()), (5, {5}), ((5, 7), {5, 7}), (0, {0})], ids=str
)
def test_stop_ids(eos, stops):
    assert qiusuo.LanguageModel(tiny_model(eos_token_id=eos), None).stop_ids == stops


def test_settings_reach_the_sampler(folder):
    lm = qiusuo.load(folder)

    def ids(**settings: object) -> list[int]:
        return lm.generate(["漫"], max_tokens=8, **settings)[0].token_ids

    greedy = ids()
    assert ids(temperature=50.0, top_k=1) == greedy
    assert ids(temperature=50.0, top_p=1e-9) == greedy
    assert ids(temperature=50.0) != greedy
    assert ids(temperature=50.0, seed=1) != ids(temperature=50.0, seed=2)


def test_ids_that_the_tokenizer_does_not_know_have_no_text(tokenizer, tmp_path):
    """A padded vocabulary: what was generated is kept."""
    padded = tokenizer.vocab_size + 60
    model = tiny_model(vocab_size=padded, eos_token_id=None)
    lm = qiusuo.LanguageModel(model, tokenizer)
    (answer,) = lm.generate(["求"], max_tokens=40, temperature=5.0)
    known = [token for token in answer.token_ids if token < tokenizer.vocab_size]
    assert 0 < len(known) < 40
    assert answer.text == tokenizer.decode(known)


def test_run_folder_gives_its_model(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    (folder).rename(tmp_path / "run" / "model")
    lm = qiusuo.load(tmp_path / "run")
    assert lm.tokenizer is not None
    assert len(lm.generate(["求"], max_tokens=2)[0].token_ids) == 2


def test_save_and_load_again(folder, tmp_path):
    lm = qiusuo.load(folder)
    assert lm.save(tmp_path / "copy") == tmp_path / "copy"
    again = qiusuo.load(tmp_path / "copy")
    assert again.generate([TEXT], max_tokens=5) == lm.generate([TEXT], max_tokens=5)
    lm.save(tmp_path / "half", dtype="bfloat16")
    half = qiusuo.load(tmp_path / "half")
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert half.logits([1, 2]).dtype == torch.float32
    with pytest.raises(ValueError, match="format 'onnx'"):
        lm.save(tmp_path / "other", format="onnx")
    assert not (tmp_path / "other").exists()


def test_types_on_loading(folder):
    for dtype in ("bfloat16", torch.bfloat16):
        lm = qiusuo.load(folder, dtype=dtype)
        assert lm.model.lm_head.weight.dtype == torch.bfloat16
        assert len(lm.generate(["求索", "路"], max_tokens=4)[1].token_ids) == 4
    assert qiusuo.load(folder).model.lm_head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype 'int3' is not one of float32"):
        qiusuo.load(folder, dtype="int3")


def test_without_a_tokenizer_ids_only(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    lm = qiusuo.load(tmp_path / "m")
    assert lm.tokenizer is None
    (answer,) = lm.generate([[1, 2]], max_tokens=3)
    assert (len(answer.token_ids), answer.text) == (3, "")
    with pytest.raises(ValueError, match="without a tokenizer"):
        lm.generate(["求索"])


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="none is not a folder"):
        qiusuo.load(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a folder"):
        qiusuo.load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no config\.json"):
        qiusuo.load(tmp_path / "empty")


def test_model_whose_replacement_was_interrupted_is_found(folder, tmp_path):
    folder.rename(tmp_path / ".m.aside")
    assert qiusuo.load(tmp_path / "m").tokenizer is not None
    (tmp_path / "run").mkdir()
    (tmp_path / "m").rename(tmp_path / "run" / ".model.aside")
    assert qiusuo.load(tmp_path / "run").tokenizer is not None


def test_wrong_tokens_are_named():
    lm = qiusuo.LanguageModel(tiny_model(max_position_embeddings=4), None)
    assert lm.logits([1, 2, 3, 4]).shape == (4, 97)
    with pytest.raises(ValueError, match="token_ids is empty"):
        lm.logits([])
    with pytest.raises(ValueError, match="token_ids has 5 tokens; the context holds 4"):
        lm.logits([1] * 5)
    with pytest.raises(ValueError, match=r"token id 97 is outside 0\.\.96"):
        lm.logits([97])


def test_one_text_is_not_a_list_of_texts(folder):
    with pytest.raises(TypeError, match=r"write generate\(\[text\]\)"):
        qiusuo.load(folder).generate("求索")


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = qiusuo.nothing


def test_import_is_light():
    program = "import qiusuo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
