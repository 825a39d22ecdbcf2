"""Parameters that change nothing at certain values, because clients send them.

One table for every place. A parameter at a neutral value, or null, is accepted and has no effect. At any other value it is
refused with its name and the value: no parameter is ignored that would change an answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

Values = tuple[Any, ...]
"""Neutral values; a type stands for every value of that type. Null is always neutral."""

REQUEST: dict[str, Values] = {
    # For the records of OpenAI's accounts. No request is stored, and all are of one tier.
    "store": (False,),
    "metadata": (dict,),
    "service_tier": ("auto", "default"),
    "user": (str,),
    "safety_identifier": (str,),
    "prompt_cache_key": (str,),
    "prompt_cache_retention": (str,),
    "cache_control": (dict,),
    "request_id": (str,),
    "priority": (0,),
    # Without reasoning, audio, images, search and other versions of an answer.
    "reasoning_effort": ("none",),
    "thinking": ({"type": "disabled"},),
    "include_reasoning": (bool,),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    # One tool is called at most.
    "parallel_tool_calls": (bool,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    # Decoding as it is here, in the words of vLLM, SGLang and transformers.
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "num_beams": (1,),
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "clean_up_tokenization_spaces": (False,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": ({},),
}
"""Of every request that asks for an answer."""

COMPLETION: dict[str, Values] = REQUEST | {"add_special_tokens": (True,)}
CHAT: dict[str, Values] = REQUEST | {
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "separate_reasoning": (bool,),
}
RESPONSES: dict[str, Values] = REQUEST | {
    # Nothing is kept between two requests.
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "max_tool_calls": (),
    "context_management": ([],),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
}
CLASSIFY: dict[str, Values] = {
    name: REQUEST[name] for name in ("user", "metadata", "safety_identifier", "request_id", "priority")
}

JOB: dict[str, Values] = {"integrations": ([],)}

MESSAGE: dict[str, Values] = {
    "name": (str,),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "cache_control": (dict,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "prefix": (False,),
    "id": (str,),
    "status": ("completed", "incomplete"),
    "phase": (str,),
}
"""Of a message: what a client appends that appends the whole answer."""

PART: dict[str, Values] = {"cache_control": (dict,), "annotations": ([],), "logprobs": (list,), "detail": (str,)}
"""Of a part of a message."""

STREAM_OPTIONS: dict[str, Values] = {"include_obfuscation": (False,)}


class NotNeutral(ValueError):
    """A parameter has a value that is not supported. `param`: its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


def without_neutral(body: Any, table: Mapping[str, Values], known: Collection[str]) -> Any:
    """A parsed body without its neutral parameters; `known`: the parameters of this route, which its shape checks.

    Raises:
        NotNeutral: one has another value.
    """
    if not isinstance(body, dict):
        return body
    kept = _checked(body, {name: values for name, values in table.items() if name not in known})
    if isinstance(kept.get("stream_options"), dict):
        kept["stream_options"] = _checked(kept["stream_options"], STREAM_OPTIONS, "stream_options.")
    _clean_messages(kept, "messages")
    if table is RESPONSES:
        _clean_messages(kept, "input")
    elif isinstance(found := kept.get("input"), dict | list):  # texts, fields and conversations to classify
        for each in found if isinstance(found, list) else [found]:
            if isinstance(each, dict):
                _clean_messages(each, "messages")
    return kept


def _clean_messages(owner: dict[str, Any], key: str) -> None:
    if isinstance(owner.get(key), list):
        owner[key] = [_message(item, f"{key}.{at}.") if isinstance(item, dict) else item for at, item in enumerate(owner[key])]


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    kept = _checked(item, MESSAGE, place)
    if isinstance(kept.get("content"), list):
        parts = enumerate(kept["content"])
        kept["content"] = [
            _checked(part, PART, f"{place}content.{at}.") if isinstance(part, dict) else part for at, part in parts
        ]
    return kept


def _checked(values: dict[str, Any], table: Mapping[str, Values], place: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        if name not in table:
            kept[name] = value
        elif not is_neutral(value, table[name]):
            neutral = [shown(each) for each in table[name] if not isinstance(each, type)]
            fix = f"send {' or '.join(neutral)}, or leave it out" if neutral else "leave it out"
            raise NotNeutral(f"{place}{name}", f"is not supported at {shown(value)}; {fix}")
    return kept


def is_neutral(value: Any, values: Values) -> bool:
    """Whether a value is null or one of these. A number is not a truth value."""
    return value is None or any(
        isinstance(value, each)
        if isinstance(each, type)
        else value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in values
    )


def shown(value: Any) -> str:
    """A value of a client in a sentence: as JSON, short and printable."""
    text = json.dumps(value, default=str)
    return printable(text if len(text) <= 40 else f"{text[:37]}...")


def printable(text: str) -> str:
    """Text from a client, made safe for an answer: short and printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])


def described(table: Mapping[str, Values]) -> dict[str, Any]:
    """The parameters of a table as properties of a JSON schema."""
    names = {str: "string", dict: "object", bool: "boolean", list: "array"}
    return {
        name: {
            "description": "Accepted at these values, without effect.",
            "anyOf": [
                {"type": "null"},
                *({"type": names[each]} for each in values if isinstance(each, type)),
                *({"const": each} for each in values if not isinstance(each, type)),
            ],
        }
        for name, values in table.items()
    }
