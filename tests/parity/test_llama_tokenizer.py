"""Turns of a conversation are those that transformers makes of them with a template of the published form."""

from transformers import PreTrainedTokenizerFast

from data.tokenizer import Tokenizer

from ..data.llama_vocabulary import write_llama_vocabulary

# What the published template says where there is a picture and no system, in other words.
TEMPLATE = """{{ bos_token }}{% for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ "\\n\\n" }}
{%- if message.content is string %}{{ message.content | trim }}
{%- else %}{% for part in message.content %}{% if part.type == "image" %}<|image|>{% else %}{{ part.text | trim }}
{%- endif %}{% endfor %}{% endif %}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ "\\n\\n" }}{% endif %}"""


def test_a_question_has_the_ids_of_the_chat_template(tmp_path):
    for picture in (True, False):
        path = tmp_path / "tokenizer.json"
        write_llama_vocabulary(path, picture)
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(path), bos_token="<|begin_of_text|>", chat_template=TEMPLATE
        )
        ours = Tokenizer.load(path).with_ends()
        for text in ("what is it?", "  Is 1234 ≠ 5?\nSay so! ", "naïve 🟦, isn't it"):
            parts = [{"type": "image"}] * picture + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": parts if picture else text}]
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            expected = theirs(expected, add_special_tokens=False)["input_ids"]
            assert ours.encode(text, ours.count(text)).ids.tolist() == expected
