"""Continues ``/v1/chat/completions`` of llama-server or Ollama."""

from __future__ import annotations

from sollold.serving.request import Call, Delivered, Engine
from sollold.serving.resume.base import ChunkContinuation, JsonObject, NotResumable, asked_for


class ChatContinuation(ChunkContinuation):
    """A streamed chat in OpenAI's chunks.

    llama-server takes a trailing assistant message as the beginning of its answer if
    ``continue_final_message`` names the part to continue (content or reasoning), and then sends only the
    addition. A JSON schema's grammar is advanced over that beginning too. Ollama always continues a trailing
    assistant message.
    """

    def __init__(self, call: Call, engine: Engine) -> None:
        super().__init__(call, engine)
        self._role = False

    @property
    def text(self) -> str:
        """Thinking, then content, without the beginning given by the caller."""
        self.fold()
        return "".join(self._thinking) + "".join(self._content).removeprefix(self._echo)

    def measure(self) -> tuple[Call, Call] | None:
        """Needed for reasoning, which is enclosed in tags that only the template knows."""
        self.fold()
        if not any(self._thinking) or self._engine is not Engine.LLAMA:
            return None
        body = self._with_beginning(dict(self.call.body), *self._joined())
        return Call("/apply-template", dict(self.call.body)), Call("/apply-template", body)

    @property
    def _echo(self) -> str:
        """The beginning given by the caller if llama-server repeats it (no ``continue_final_message``)."""
        body = self.call.body
        if self._engine is not Engine.LLAMA or "continue_final_message" in body:
            return ""
        messages = body.get("messages") or [{}]
        last = messages[-1]
        if not isinstance(last, dict) or last.get("role") != "assistant":
            return ""
        return _text_of(last)

    def check(self) -> None:
        """Raise `NotResumable` if the stream can't be continued exactly."""
        self.fold()
        body = self.call.body
        if asked_for(body, "logprobs"):
            raise NotResumable("it contains log probabilities")
        if isinstance(body.get("n"), int) and body["n"] > 1:
            raise NotResumable("several answers were requested at once")
        if self._tool_call and not self._finished:
            raise NotResumable("a tool call was sent partially")
        if asked_for(body, "grammar") and self.text:
            raise NotResumable("it uses a grammar, whose state is lost")
        if self._engine is Engine.OLLAMA and any(self._thinking) and not any(self._content):
            raise NotResumable("it was interrupted while thinking, which Ollama can't continue")
        if self._engine is Engine.OLLAMA and asked_for(body, "response_format") and self._content:
            kind = body["response_format"]
            if not isinstance(kind, dict) or kind.get("type") != "text":
                raise NotResumable("it uses a JSON schema, which Ollama can't continue in the middle")

    def _read(self, event: JsonObject) -> None:
        self._note(event)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            self._role = self._role or "role" in delta
            self._add(delta.get("content"), _reasoning(delta), delta.get("tool_calls"))
            if choice.get("finish_reason"):
                self._finished = True

    def _restore(self, delivered: Delivered) -> None:
        super()._restore(delivered)
        self._role = True

    def _continuation(self) -> Call:
        body = dict(self.call.body)
        content, reasoning = self._joined()
        self._limit(body, "n_predict" if self._engine is Engine.LLAMA else "max_tokens")
        if not content and not reasoning:
            return Call(self.call.path, body)
        return Call(self.call.path, self._with_beginning(body, content, reasoning))

    def _with_beginning(self, body: JsonObject, content: str, reasoning: str) -> JsonObject:
        """Set the delivered part as the beginning of the answer in ``body``, and return it."""
        messages = list(body.get("messages") or ())
        beginning: JsonObject = {"role": "assistant"}
        prefix = ""
        if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            # The caller began the answer; two assistant messages in a row are an error.
            beginning = dict(messages.pop())
            prefix = _text_of(beginning)
        if self._echo and content.startswith(self._echo):
            prefix = ""
        beginning["content"] = prefix + content
        thinking = (_reasoning(beginning) or "") + reasoning
        if beginning["content"]:
            # Templates put a newline before the tag that ends reasoning; in the stream it was part of the
            # reasoning.
            thinking = thinking.removesuffix("\n")
        if self._engine is Engine.LLAMA:
            if thinking:
                beginning["reasoning_content"] = thinking
            body["add_generation_prompt"] = False
            body["continue_final_message"] = "content" if beginning["content"] else "reasoning_content"
        elif thinking:
            beginning["reasoning"] = thinking
        body["messages"] = [*messages, beginning]
        return body

    def cut_short(self) -> list[bytes]:
        """A last chunk."""
        self.fold()
        return self._last_chunk("chat.completion.chunk", delta={})

    def _merge(self, event: JsonObject) -> JsonObject | None:
        choices = self._correct(event)
        if not choices:
            return event if event.get("usage") and not self._usage else None
        passed = []
        for choice in choices:
            delta = choice.get("delta") or {}
            if self._role and "role" in delta:
                delta = {key: value for key, value in delta.items() if key != "role"}
                if not delta.get("content"):
                    delta.pop("content", None)
                choice["delta"] = delta
            finish = choice.get("finish_reason")
            if self.exhausted:
                choice["delta"] = delta = {}
                choice["finish_reason"] = finish = "length" if finish else None
            if self._finished or not (delta or finish):
                continue
            passed.append(choice)
        event["choices"] = passed
        return event if passed else None


def _text_of(message: JsonObject) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _reasoning(delta: JsonObject) -> str | None:
    """The reasoning in a delta or message: llama-server and Ollama use different names."""
    return delta.get("reasoning_content") or delta.get("reasoning")
