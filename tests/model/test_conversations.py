"""Tests that a conversation the chat template cannot read is rejected in one sentence, on every route."""

import pytest
from jinja2 import TemplateError
from transformers import pipeline

from tests.helpers import ROOT


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


# The content, the message, and whether a tokenizer without the processor reaches the template.
UNREADABLE = {
    "no messages": ([], "A conversation must .* at least one message, .*got", False),
    "a string": ("What is it?", "A conversation must be a list .* got 'What is it\\?'", False),
    "one message": (user("What is it?")[0], "A conversation must be a list .* got {'role'", False),
    "a list of strings": (["What is it?"], "A message must be {'role': .* got 'What is it\\?'", False),
    "a batch with an empty one": ([user("What is it?"), []], "A conversation must .* got \\[\\]", False),
    "no content": (
        [{"role": "user"}],
        "content must be a text or a list of parts, one or more, got (None|\\[\\])",
        True,
    ),
    "content None": (user(None), "content must be a text or a list of parts, one or more, got (None|\\[\\])", True),
    "no parts": (user([]), "content must be a text or a list of parts, one or more, got \\[\\]", True),
    "text None": (user([{"type": "text", "text": None}]), "must have a `text`, a string, got None", True),
    "no text": (user([{"type": "text"}]), "must have a `text`, a string, got None", True),
    "a number": (user([{"type": "text", "text": 4}]), "must have a `text`, a string, got 4", True),
    "no type": (user([{"text": "What is it?"}]), "must have a type, .* got {'text'|type 'text', .* got ''", True),
    "no type of an image": (user([{"image": "a.png"}]), "must have a type|type 'text', .* got ''", True),
    "a string as a part": (user(["What is it?"]), "must have a type, .* got 'What is it|type 'text', .* got ''", True),
    "an answer without content": (
        [*user("What is it?"), {"role": "assistant", "content": None}, *user("And now?")],
        "content must be a text or a list of parts, one or more, got (None|\\[\\])",
        True,
    ),
}


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(("conversation", "message", "_"), UNREADABLE.values(), ids=UNREADABLE)
def test_the_processor_says_what_it_cannot_read(bundled_processor, conversation, message, _, tokenize):
    with pytest.raises(ValueError, match=message) as error:
        bundled_processor.apply_chat_template(conversation, tokenize=tokenize, return_dict=tokenize)
    assert str(error.value).count(". ") == 0 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [row[:2] for row in UNREADABLE.values() if row[2]],
    ids=[name for name, row in UNREADABLE.items() if row[2]],
)
def test_the_tokenizer_says_the_same(bundled_processor, conversation, message):
    with pytest.raises(TemplateError, match=message):
        bundled_processor.tokenizer.apply_chat_template(
            conversation, chat_template=bundled_processor.chat_template, tokenize=True
        )


def test_a_pipeline_rejects_an_empty_turn():
    pipe = pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True)
    for conversation in (user(None), user([{"type": "text", "text": None}])):
        with pytest.raises(ValueError, match="content must be a text|must have a `text`"):
            pipe(text=conversation, max_new_tokens=2)


def test_a_readable_conversation_is_rendered_unchanged(bundled_processor):
    parts = [{"type": "image"}, {"type": "text", "text": " What is it? "}, {"type": "video"}]
    messages = [{"role": "system", "content": "Be brief."}, *user(parts), {"role": "assistant", "content": ""}]
    assert bundled_processor.apply_chat_template(messages) == (
        "<bos><start_of_turn>user\nBe brief.\n\n<world>What is it?<world_video><end_of_turn>\n"
        "<start_of_turn>model\n<end_of_turn>\n"
    )
