"""A conversation on the terminal: typed input and detection of loops."""

from __future__ import annotations

import pytest

from sollold.cli.answer import Sampling, loops
from sollold.cli.chat_parameters import FRACTIONS, WHOLE
from sollold.cli.conversation import Conversation, Quit
from sollold.client.request_arguments import OPTIONS


def test_messages_are_kept_and_the_system_prompt_comes_first() -> None:
    talk = Conversation("m", system="be brief")
    assert talk.typed("hi").ask
    talk.answered("hello")
    assert talk.typed("more").ask
    assert [message["role"] for message in talk.messages()] == ["system", "user", "assistant", "user"]
    talk.unasked()
    assert talk.messages()[-1] == {"role": "assistant", "content": "hello"}
    assert not talk.typed("   ").ask, "an empty line is not a question and does not end it"
    assert talk.typed("/clear").words and [message["role"] for message in talk.messages()] == ["system"]


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit"])
def test_a_command_ends_it(word: str) -> None:
    with pytest.raises(Quit):
        Conversation("m").typed(word)


def test_a_multiline_block_is_one_question() -> None:
    talk = Conversation("m")
    assert not talk.typed('"""first').ask and talk.in_block
    assert not talk.typed("/bye").ask, "a command within a text is text"
    assert talk.typed('last"""').ask and not talk.in_block
    assert talk.messages()[-1]["content"] == "first\n/bye\nlast"
    assert talk.typed('"""one line"""').ask
    assert talk.messages()[-1]["content"] == "one line"
    talk.typed('"""never ended')
    talk.cancel_block()
    assert talk.typed("hi").ask and talk.messages()[-1]["content"] == "hi"


def test_settings_reach_the_request() -> None:
    talk = Conversation("m", sampling=Sampling())
    for line in ("/set parameter temperature 0.2", "/set parameter stop END", "/set parameter num_ctx 8192"):
        assert not talk.typed(line).ask
    talk.typed("/set think")
    talk.typed("/set system You are kind.")
    body = talk.sampling.body("m", talk.messages())
    assert body["think"] is True and body["messages"][0]["content"] == "You are kind."
    assert body["options"] == {"num_predict": 32_768, "temperature": 0.2, "stop": ["END"], "num_ctx": 8192}
    talk.typed("/set nothink")
    assert talk.sampling.think is False
    assert "usage" in talk.typed("/set nonsense").words and "usage" in talk.typed("/set parameter x").words
    assert "unknown command /foo" in talk.typed("/foo").words and "/set" in talk.typed("/?").words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("num_ctx abc", "num_ctx must be a whole number, not 'abc'"),
        ("top_k 1.5", "top_k must be a whole number, not '1.5'"),
        ("temperature warm", "temperature must be a number, not 'warm'"),
        ("temperature nan", "temperature must be a number"),
        ("tmeperature 1", "unknown parameter tmeperature; did you mean temperature?"),
        ("num_gpu 99", "sollold decides how layers are placed"),
    ],
)
def test_an_invalid_parameter_is_not_set(line: str, words: str) -> None:
    talk = Conversation("m")
    assert words in talk.typed(f"/set parameter {line}").words
    assert talk.sampling.options == {}


def test_every_option_of_the_api_can_be_set() -> None:
    assert {*WHOLE, *FRACTIONS, "stop"} == OPTIONS
    talk = Conversation("m")
    for line in ("stop a b", 'stop "c d"', "stop 5"):
        talk.typed(f"/set parameter {line}")
    assert talk.sampling.options == {"stop": ["a", "b", "c d", "5"]}


def test_other_commands_of_ollama() -> None:
    talk = Conversation("m")
    talk.typed("/set think high")
    talk.typed("/set format json")
    body = talk.sampling.body("m", [])
    assert (body["think"], body["format"]) == ("high", "json")
    talk.typed("/set noformat")
    assert "format" not in talk.sampling.body("m", [])
    assert "usage" in talk.typed("/set think deeply").words and talk.sampling.think == "high"
    shown = talk.typed("/show").words.splitlines()
    assert len({len(line) - len(line.split(None, 1)[1]) for line in shown}) == 1, "the values are aligned"
    assert talk.typed("/show license").show == "license" and talk.typed("/show info").show == "info"
    assert "usage: /show" in talk.typed("/show licence").words
    talk.typed("/set system Be brief.")
    assert talk.typed("/show system").words == "Be brief."
    talk.typed("hi")
    assert talk.typed("/load other").load == "other" and "usage" in talk.typed("/load").words
    talk.begin("other")
    assert talk.model == "other" and [message["role"] for message in talk.messages()] == ["system"]


@pytest.mark.parametrize("text", ["ha" * 40, "yes, " * 40, "The same line again.\n" * 13])
def test_a_loop_is_detected(text: str) -> None:
    assert loops("It began well. " + text)


@pytest.mark.parametrize(
    "text", ["-" * 400, "\n" * 100, "a,b,c\n" * 30, "word " * 20, " ".join(map(str, range(200)))]
)
def test_rules_tables_and_counting_are_not_loops(text: str) -> None:
    assert not loops(text)
