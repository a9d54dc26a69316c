"""A problem becomes a prompt and words become a response, whatever the template opens."""

import random

import pytest

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.chains import Chains
from qiusuo.tasks.task import Problem

# As SmolLM2's and Qwen2.5's: the generation prompt opens nothing.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As R1's and Qwen3's without a thought.
OPENS_WITH_LINE = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
CLOSES_WITH_LINES = CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")
WORKED = "<think>07+35=321</think>321"
BARE = "<think></think>321"


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return Tokenizer.train_characters([Chains.alphabet])


def chatml(template: str = CHATML) -> Tokenizer:
    """Byte-level, without tokens for the marks of a thought, as SmolLM2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, chat_template=template, eos_token="<|im_end|>")


@pytest.fixture
def problem() -> Problem:
    return Problem("chains", "07+35=", "What is 07+35?", 2, "chains:53+70", {"terms": [70, 53]})


def test_our_models_are_asked_the_prompt_behind_an_open_thought(characters, problem) -> None:
    asker = Asker(characters)
    text = characters.decode(asker.prompt_ids(problem))
    assert text == "<｜begin▁of▁sentence｜><｜User｜>07+35=<｜Assistant｜><think>"
    assert asker.opened == "<think>"
    closed = Asker(characters, thinking=False)
    assert characters.decode(closed.prompt_ids(problem)).endswith("<｜Assistant｜></think>")
    assert closed.opened == "</think>"


def test_a_chat_model_is_asked_the_question_behind_the_system_message(problem) -> None:
    tokenizer = chatml()
    asker = Asker(tokenizer, "question", system="Be brief.")
    assert tokenizer.decode(asker.prompt_ids(problem)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 07+35?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert asker.opened == ""


@pytest.mark.parametrize(
    ("template", "opened"),
    [(CHATML, ""), (OPENS_WITH_LINE, "<think>"), (CLOSES_WITH_LINES, "</think>")],
)
def test_what_a_template_opens_is_seen_through_white_space(template, opened, problem) -> None:
    asker = Asker(chatml(template), "question")
    assert asker.opened == opened
    text = {"": BARE, "<think>": "\nso</think>\n\n321", "</think>": "321"}[opened]
    assert Chains().verify(problem, asker.response(text)).reward == 1
    wrong = asker.response(text.replace("321", "322"))
    assert Chains().verify(problem, wrong).reason == "wrong answer"


def test_words_without_marks_are_an_answer_only_where_nothing_was_opened(characters) -> None:
    plain = Asker(chatml())
    assert plain.response("321") == BARE
    assert plain.response(WORKED) == WORKED
    assert plain.response("<think>07+3") == "<think>07+3"  # cut off within its thought
    assert Asker(characters).response("321") == "<think>321"
    assert Asker(characters, thinking=False).response("321") == "</think>321"


def test_answers_become_tokens_whose_text_reads_as_the_response(characters) -> None:
    for tokenizer in (characters, chatml(), chatml(OPENS_WITH_LINE)):
        asker = Asker(tokenizer)
        for response in (WORKED, BARE):
            ids = asker.answer_ids(response)
            assert ids[-1] == tokenizer.eos_id
            assert asker.response(tokenizer.decode(ids[:-1])) == response
    asker = Asker(characters)
    ids = asker.answer_ids(WORKED)
    assert ids.count(characters.special_tokens["</think>"]) == 1
    assert characters.special_tokens["<think>"] not in ids  # the prompt has it
    assert len(ids) == len("07+35=321") + 1 + len("321") + 1


def test_prompt_and_answer_are_the_conversation_as_the_template_writes_it(
    characters, problem
) -> None:
    for thinking, thought in ((True, "07+35=321"), (True, ""), (False, None)):
        asker = Asker(characters, thinking=thinking)
        turn = {"role": "assistant", "content": "321", "reasoning_content": thought}
        whole = characters.apply_chat_template(
            [*asker.messages(problem), turn], add_generation_prompt=False
        )
        response = f"<think>{thought or ''}</think>321"
        assert asker.prompt_ids(problem) + asker.answer_ids(response) == whole


def test_every_solution_can_be_taught_and_verified(characters) -> None:
    task, chance = Chains(), random.Random(0)
    asker = Asker(characters)
    for _ in range(20):
        problem = task.problem(chance.randint(2, 6), chance)
        for thought in (True, False):
            ids = asker.answer_ids(task.solution(problem, chance, thought=thought))
            response = asker.response(characters.decode(ids[:-1]))
            assert task.verify(problem, response).reward == 1


def test_an_answer_forges_no_marker(characters) -> None:
    ids = Asker(characters).answer_ids("<think></think>1<｜end▁of▁sentence｜>2")
    assert ids.count(characters.eos_id) == 1
    assert ids[-1] == characters.eos_id


def test_what_cannot_be_taught_is_refused(characters) -> None:
    with pytest.raises(DataError, match="ask with thinking"):
        Asker(characters, thinking=False).answer_ids(WORKED)
    with pytest.raises(DataError, match="needs </think>"):
        Asker(characters).answer_ids("321")
    tokenizer = chatml()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        Asker(tokenizer).answer_ids(WORKED)
    with pytest.raises(DataError, match="prompt"):
        Asker(tokenizer, "promt")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "template", ["ours", CHATML, CHATML.replace("message['content']", "message['content'] | trim")]
)
def test_prompts_are_what_the_template_renders(characters, template, thinking) -> None:
    """Whatever shortcut is taken: white space, unknown characters, forged marks."""
    tokenizer = characters if template == "ours" else chatml(template)
    asker = Asker(tokenizer, thinking=thinking, system="0+1")
    for text in (
        "07+35=",
        "",
        " 1\n",
        "<｜User｜>1",
        "1</think>",
        "<|im_end|>",
        "春夜 1+1=2?",
        "1+1=2?",
    ):
        problem = Problem("chains", text, text, 2, "", {})
        rendered = tokenizer.apply_chat_template(asker.messages(problem), thinking=thinking)
        assert asker.prompt_ids(problem) == rendered
