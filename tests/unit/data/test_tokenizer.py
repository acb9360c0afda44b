import json
from pathlib import Path

import pytest

from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.errors import UserError
from tests.tiny_models import EOS_ID, PAD_ID, make_tiny_tokenizer


def test_hugging_face(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tiny_tokenizer(tmp_path, vocab_size=64))
    ids = tokenizer.encode("1 2 + answer")
    assert tokenizer.decode(ids) == "1 2 + answer"
    assert tokenizer.decode([*ids, EOS_ID]).endswith("<eos>")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (64, EOS_ID, PAD_ID)


def test_chat_templates(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tiny_tokenizer(tmp_path))
    messages = [{"role": "user", "content": "1"}]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "user : 1 assistant :"
    assert tokenizer.decode(tokenizer.encode_chat(messages, add_generation_prompt=False)) == "user : 1"
    # A file of its own goes before the one in the settings.
    (tmp_path / "chat_template.jinja").write_text(
        "{%- for message in messages %}\n    {%- if loop.last %}{% break %}{% endif %}\n{%- endfor %}"
        "{{ messages | tojson }} {{ eos_token }}{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_chat(messages)[-1] == EOS_ID
    with pytest.raises(UserError, match="refuses the messages: no messages"):
        tokenizer.encode_chat([])


def test_without_a_chat_template(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == EOS_ID and tokenizer.pad_id is None
    with pytest.raises(UserError, match="has no chat template; give prompts as text"):
        tokenizer.encode_chat([{"role": "user", "content": "1"}])


def test_sentence_piece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the sum of {i} and {i + 1} is {2 * i + 1}" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, minloglevel=2
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("the sum of 4 and 5")
    assert ids[0] == 1 and tokenizer.decode(ids) == "the sum of 4 and 5"
    assert tokenizer.encode("the sum", add_special_tokens=False) == tokenizer.encode("the sum")[1:]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (60, 2, None)
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.encode_chat([])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("nonsense")
    with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("nonsense")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
