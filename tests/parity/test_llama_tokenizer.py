"""Turns of a conversation are those that transformers makes of them with a template of the published form."""

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from data.llama_tokenizer import CHAT_TEMPLATE
from data.tokenizer import Tokenizer
from weights.formats.contract import write_files
from weights.formats.transformers_llama import tokenizer_files

from ..data.llama_vocabulary import write_llama_vocabulary


def test_a_question_has_the_ids_of_the_chat_template(tmp_path):
    for picture in (True, False):
        path = tmp_path / "tokenizer.json"
        write_llama_vocabulary(path, picture)
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(path), bos_token="<|begin_of_text|>", chat_template=CHAT_TEMPLATE
        )
        ours = Tokenizer.load(path).with_ends()
        for text in ("what is it?", "  Is 1234 ≠ 5?\nSay so! ", "naïve 🟦, isn't it"):
            parts = [{"type": "image"}] * picture + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": parts if picture else text}]
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            expected = theirs(expected, add_special_tokens=False)["input_ids"]
            assert ours.encode(text, ours.count(text)).ids.tolist() == expected


def test_what_is_written_reads_and_frames_texts_as_ours(tmp_path):
    ids = write_llama_vocabulary(tmp_path / "tokenizer.json")
    alone = Tokenizer.load(tmp_path / "tokenizer.json")
    for ours, folder in ((alone, tmp_path / "alone"), (alone.with_ends(), tmp_path / "turns")):
        write_files(folder, tokenizer_files(ours))
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in ("what is it?", "naïve 🟦, isn't it"):
            assert theirs(text)["input_ids"] == alone.encode(text, alone.count(text)).ids.tolist()
        ends = [ours.end_id, *ours.stop_ids] if ours.in_turns else ours.end_id
        assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
        assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end_id, ids["<|finetune_right_pad_id|>"])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = theirs(asked, add_special_tokens=False)["input_ids"]
    assert asked == ours.encode("what is it?", ours.count("what is it?")).ids.tolist()
