"""Input of a conversation: questions, multi-line blocks and slash commands. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sollold.cli.answer import Sampling
from sollold.cli.chat_parameters import parameter
from sollold.facts import dataclass

HELP = '''\
  /set system TEXT          set the system prompt; without TEXT, remove it
  /set parameter NAME VALUE set an option, such as temperature 0.2 or num_ctx 8192
  /set think, /set nothink  turn a model's thinking on or off; think low, medium, high: effort
  /set format json          have answers in JSON; /set noformat: in any form
  /set verbose, /set quiet  show or hide the speed after each answer
  /show                     show the settings of this conversation
  /show info                describe the model; or its license, modelfile, parameters, system, template
  /load MODEL               start over with another model
  /clear                    forget the conversation
  /bye                      end the conversation (also /exit, Ctrl-D)
  """                       begin and end a multi-line text
  ./picture.png             in a question: attach the picture, for a model with vision
  Ctrl-C                    stop the answer'''


INFO = "info"
PARTS = (INFO, "license", "modelfile", "parameters", "system", "template")
"""Parts of a model's description that ``/show`` can print."""
LEVELS = ("low", "medium", "high")
_SETTINGS = "system TEXT | parameter NAME VALUE | think | nothink | format json | noformat | verbose | quiet"


class Quit(Exception):
    """The user wants to end the conversation."""


@dataclass(frozen=True, slots=True)
class LineResult:
    """The effect of a typed line.

    Attributes:
        ask: whether to ask the model now.
        words: text to print.
        show: the part of the model's description to print, one of `PARTS`.
        load: the model to switch to, with `Conversation.begin`.
    """

    ask: bool = False
    words: str = ""
    show: str = ""
    load: str = ""


class Conversation:
    """The messages so far and the settings."""

    def __init__(self, model: str, *, system: str = "", sampling: Sampling | None = None) -> None:
        self.model = model
        self.sampling = sampling or Sampling()
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._block: list[str] | None = None

    @property
    def in_block(self) -> bool:
        """Whether a multi-line block is being typed."""
        return self._block is not None

    def cancel_block(self) -> None:
        """Discard the unfinished multi-line block."""
        self._block = None

    def messages(self) -> list[dict[str, Any]]:
        """The messages to send to the model."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def begin(self, model: str) -> None:
        """Start a new conversation with ``model``, keeping the settings."""
        self.model = model
        self._messages.clear()

    def answered(self, text: str) -> None:
        """Add the model's answer, or the part of it that arrived before it was stopped."""
        self._messages.append({"role": "assistant", "content": text})

    @property
    def asked(self) -> str:
        """The text of the last question."""
        return str(self._messages[-1]["content"])

    def ask(self, question: dict[str, Any]) -> None:
        """Replace the last question with a message that includes its pictures."""
        self._messages[-1] = question

    def unasked(self) -> None:
        """Remove the last question, which was not answered."""
        if self._messages and self._messages[-1]["role"] == "user":
            self._messages.pop()

    def typed(self, line: str) -> LineResult:
        """Process one line of input.

        Raises:
            Quit: the user ended the conversation.
        """
        if self._block is not None:
            return self._in_block(line)
        text = line.strip()
        if not text:
            return LineResult()
        if text.startswith('"""'):
            return self._begin_block(text[3:])
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        return self._ask(line)

    def _ask(self, text: str) -> LineResult:
        self._messages.append({"role": "user", "content": text})
        return LineResult(ask=True)

    def _begin_block(self, first: str) -> LineResult:
        if first.endswith('"""') and len(first) >= 3:
            return self._ask(first[:-3])
        self._block = [first] if first else []
        return LineResult()

    def _in_block(self, line: str) -> LineResult:
        assert self._block is not None
        if not line.rstrip().endswith('"""'):
            self._block.append(line)
            return LineResult()
        last = line.rstrip()[:-3]
        text = "\n".join([*self._block, *([last] if last else [])])
        self._block = None
        return self._ask(text) if text.strip() else LineResult()

    def _command(self, text: str) -> LineResult:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name in ("/bye", "/exit", "/quit"):
            raise Quit
        if name in ("/?", "/help"):
            return LineResult(words=HELP)
        if name == "/clear":
            self._messages.clear()
            return LineResult(words="Forgot the conversation.")
        if name == "/show":
            return self._show(rest)
        if name == "/load":
            return LineResult(load=rest) if rest else LineResult(words="usage: /load MODEL")
        if name == "/set":
            return LineResult(words=self._set(rest))
        return LineResult(words=f"unknown command {name}; /? shows the commands")

    def _set(self, rest: str) -> str:
        key, _, value = rest.partition(" ")
        value = value.strip()
        if key == "system":
            self._system = value.strip('"')
            return "Set the system prompt." if self._system else "Removed the system prompt."
        if key == "parameter":
            return self._set_parameter(value)
        if key == "think" and value in LEVELS:
            self.sampling = replace(self.sampling, think=value)
            return f"Thinking is on ({value})."
        if key in ("think", "nothink") and not value:
            self.sampling = replace(self.sampling, think=key == "think")
            return "Thinking is on." if key == "think" else "Thinking is off."
        if (key, value) in (("format", "json"), ("noformat", "")):
            self.sampling = replace(self.sampling, format=value)
            return "Answers are JSON." if value else "Answers have no set format."
        if key in ("verbose", "quiet"):
            self.sampling = replace(self.sampling, verbose=key == "verbose")
            return "The speed is shown after each answer." if key == "verbose" else "The speed is not shown."
        return f"usage: /set {_SETTINGS}"

    def _set_parameter(self, rest: str) -> str:
        name, _, value = rest.partition(" ")
        if not name or not value.strip():
            return "usage: /set parameter NAME VALUE, such as: /set parameter temperature 0.2"
        try:
            read = parameter(name, value.strip())
        except ValueError as error:
            return str(error)
        if name == "stop":
            read = [*self.sampling.options.get("stop", []), *read]
        self.sampling = replace(self.sampling, options={**self.sampling.options, name: read})
        return f"Set {name} to {value.strip()}."

    def _show(self, part: str) -> LineResult:
        if part and part not in PARTS:
            return LineResult(words=f"usage: /show [{' | '.join(PARTS)}]")
        if part == "system" and self._system:
            return LineResult(words=self._system)
        return LineResult(show=part) if part else LineResult(words=self._summary())

    def _summary(self) -> str:
        rows = {"model": self.model, "system": self._system or "(none)", **self.sampling.options}
        think = self.sampling.think
        if think is not None:
            rows["think"] = think if isinstance(think, str) else "yes" if think else "no"
        if self.sampling.format:
            rows["format"] = self.sampling.format
        rows["messages"] = len(self._messages)
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
