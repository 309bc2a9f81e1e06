"""Conversations, and the chat template that turns one into a prompt."""

import json

from transformers import PreTrainedTokenizerBase

from blockinfer.checks import reason, shown
from blockinfer.templates import TemplateProcess

_MESSAGE = "{'role': ..., 'content': ...}"


class ChatTemplate(TemplateProcess):
    """A tokenizer's chat template, a program that comes with a checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def render(self, conversation: list[dict[str, str]]) -> str:
        """The conversation as text for the assistant to continue.

        Raises ValueError if the template fails, is killed or renders nothing, and for messages that JSON cannot
        represent.
        """
        template = self._tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} is no text")
        tokens = json.loads(json.dumps(self._tokenizer.special_tokens_map, default=str))
        try:
            line = json.dumps({"chat_template": template, "conversation": conversation, "tokens": tokens})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its messages hold a value that JSON does not have: {reason(error)}") from error
        reply = self.reply(line)
        if "error" in reply:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} fails: {reply['error']}")
        if not reply["text"].strip():
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} makes an empty prompt of it")
        return reply["text"]


def check_conversations(messages: object) -> list[list[dict[str, str]]]:
    """One conversation, or several, as a list of conversations; raises ValueError for anything else."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages must be a list of {_MESSAGE}, got {type(messages).__name__}")
    if not messages:
        raise ValueError("chat needs at least one message, got an empty list")
    conversations = [messages] if isinstance(messages[0], dict) else messages
    for i, conversation in enumerate(conversations):
        if not isinstance(conversation, list | tuple):
            raise ValueError(f"conversation {i}: it must be a list of {_MESSAGE}, got {type(conversation).__name__}")
        if not conversation:
            raise ValueError(f"conversation {i}: it has no messages")
        for j, message in enumerate(conversation):
            if not isinstance(message, dict):
                raise ValueError(f"conversation {i}: message {j} must be {_MESSAGE}, got {type(message).__name__}")
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                kinds = [type(message[key]).__name__ for key in ("role", "content") if key in message]
                keys = f"the keys {shown(list(message))}"
                got = keys if len(kinds) < 2 else f"role of type {kinds[0]} and content of type {kinds[1]}"
                raise ValueError(f"conversation {i}: message {j} must be {_MESSAGE} with strings, got {got}")
    return list(conversations)
