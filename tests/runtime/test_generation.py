"""Completions: the choices of sampling do what they say, and a system prompt goes through the chat template."""

import pytest
from tiny import tiny_model, tiny_tokenizer

from dlr_lock.common.errors import DLRError
from dlr_lock.runtime.generation import generate

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}>"


def test_one_token_to_sample_from_is_the_likeliest() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    greedy = generate(model, tokenizer, "The river", max_new_tokens=8)
    hot = {"max_new_tokens": 8, "temperature": 1000.0}
    assert generate(model, tokenizer, "The river", top_k=1, **hot) == greedy
    assert generate(model, tokenizer, "The river", top_p=1e-9, **hot) == greedy
    assert generate(model, tokenizer, "The river", top_k=0, **hot) != greedy


def test_a_penalty_keeps_tokens_from_coming_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    complete, seen = model.generate, []
    monkeypatch.setattr(model, "generate", lambda *a, **k: seen.append(complete(*a, **k)) or seen[-1])
    generate(model, tokenizer, "The river", max_new_tokens=32, repetition_penalty=1000.0)
    ids = seen[0][0].tolist()[-32:]
    assert len(set(ids)) == len(ids)  # the tokens themselves: bytes of a tiny vocabulary are no text


def test_a_system_prompt_changes_the_completion_and_needs_a_template() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(DLRError, match="no chat template"):
        generate(model, tokenizer, "Hi", system="Be brief.")
    tokenizer.chat_template = TEMPLATE
    by_hand = generate(model, tokenizer, "[system] Be brief.\n[user] Hi\n>", max_new_tokens=8)
    assert generate(model, tokenizer, "Hi", system="Be brief.", max_new_tokens=8) == by_hand
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DLRError, match="System role not supported"):
        generate(model, tokenizer, "Hi", system="Be brief.")


@pytest.mark.parametrize("words", [{"prompt": "caf\udce9"}, {"prompt": "Hi", "system": "caf\udce9"}])
def test_bytes_that_are_no_text_are_refused(words: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DLRError, match="not UTF-8"):
        generate(tiny_model("llama"), tokenizer, **words)
