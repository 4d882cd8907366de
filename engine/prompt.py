"""What a model can be asked: a text, its token ids, or a chat."""

from __future__ import annotations

from ..model.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict]
"""A text, its token ids, or a chat: [{"role": "user", "content": "…"}, …]."""


def is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], dict)


def one_or_several(prompts: Prompt | list[Prompt]) -> list[Prompt]:
    """The prompts as a list, where there may be one; ValueError for what is neither."""
    if not isinstance(prompts, (str, list, tuple)):
        raise ValueError(f"prompts must be a text, token ids, a chat, or a list of these, not {prompts!r}")
    one = isinstance(prompts, str) or (prompts and isinstance(prompts[0], (int, dict)))
    return [prompts] if one else list(prompts)


def encode(
    prompt: Prompt, tokenizer: Tokenizer | None, max_tokens: int, *, add_special_tokens: bool = True
) -> list[int]:
    """The prompt's token ids; ValueError where it is no prompt, or clearly too long a text.

    add_special_tokens: whether a text's tokens come after those that the model's texts begin with
    """
    if isinstance(prompt, (list, tuple)) and not is_chat(prompt):
        return list(prompt)
    if not isinstance(prompt, (str, list, tuple)):
        raise ValueError(f"a prompt is a text, a list of token ids or a chat, not {prompt!r}")
    if tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer: give the prompt as token ids")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, max_tokens=max_tokens, add_special_tokens=add_special_tokens)
    return tokenizer.encode_chat(list(prompt), max_tokens=max_tokens)
