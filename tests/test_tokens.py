"""Token ids: equal to those the MOSS-Audio processor gave, and true to their rules on a small tokenizer."""

import json
import pickle
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.prompts import Turn, audio_span, build_conversation, build_prompt
from moss_audio_jax.tokenizer import DIGITS, ENDOFTEXT, IM_END, IM_START, StreamDecoder, Tokenizer

AUDIO, AUDIO_BOS, AUDIO_EOS = 151654, 151669, 151670
THINK = 151667
SPAN = "<|audio_bos|><|AUDIO|><|audio_eos|>"
SPECIAL = {
    "<|endoftext|>": ENDOFTEXT,
    "<|im_start|>": IM_START,
    "<|im_end|>": IM_END,
    "<|vision_pad|>": AUDIO,
}


def write_small_tokenizer(directory: Path) -> None:
    """A tokenizer in the released layout: single bytes, three merges, and added tokens at Qwen's ids."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "Ċ Ċ"]
    tokens = alphabet + [merge.replace(" ", "") for merge in merges]
    added = SPECIAL | {"<think>": THINK}
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (directory / "added_tokens.json").write_text(json.dumps(added), "utf-8")
    decoder = {
        str(token_id): {"content": token, "normalized": False, "special": token in SPECIAL}
        for token, token_id in added.items()
    }
    config = {"added_tokens_decoder": decoder, "add_bos_token": False, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.fixture
def small_dir(tmp_path) -> Path:
    write_small_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_small_tokenizer(directory)
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def released(goldens_dir) -> Tokenizer:
    return Tokenizer.from_dir(goldens_dir / "tiny-hf")


class TestAudioSpan:
    def test_equals_the_recorded_spans(self, data_dir):
        recorded = json.loads((data_dir / "time_markers.json").read_text())
        assert len(recorded) == 20
        for num_audio_tokens, ids in recorded.items():
            assert audio_span(int(num_audio_tokens)) == ids

    def test_without_markers_it_is_audio_alone(self):
        assert audio_span(126, time_markers=False) == [AUDIO] * 126

    def test_a_marker_follows_every_two_seconds_and_can_be_the_end(self):
        assert audio_span(24) == [AUDIO] * 24
        assert audio_span(25) == [AUDIO] * 25 + [DIGITS[2]]
        assert audio_span(250)[-28:] == [DIGITS[8], *[AUDIO] * 25, DIGITS[2], DIGITS[0]]

    def test_length_of_ten_minutes_is_the_published_budget(self):
        assert len(audio_span(7500)) == 8347

    def test_the_audio_id_is_the_checkpoints(self):
        assert audio_span(3, processor=ProcessorConfig(audio_token_id=511)) == [511] * 3

    @pytest.mark.parametrize("num_audio_tokens", [0, -3])
    def test_an_empty_clip_is_an_error(self, num_audio_tokens):
        with pytest.raises(MossAudioError, match=f"has {num_audio_tokens}: leave out empty clips"):
            audio_span(num_audio_tokens)


class TestReleasedTokenizer:
    def test_prompts_equal_the_recorded_ones(self, data_dir, released):
        recorded = json.loads((data_dir / "prompts.json").read_text("utf-8"))
        assert len(recorded) == 12
        for case in recorded:
            clips = [-(-(samples // 160) // 8) for samples in case["num_samples"]]
            ids = build_prompt(released, case["text"], clips, time_markers=case["time_markers"])
            assert ids == case["input_ids"], case["text"]

    def test_the_constants_are_its_ids(self, released):
        assert released.encode("<|endoftext|><|im_start|><|im_end|>") == [ENDOFTEXT, IM_START, IM_END]
        assert released.encode("0123456789") == list(DIGITS)

    def test_every_model_id_decodes(self, released):
        texts = [released.decode([token_id], skip_special_tokens=False) for token_id in range(151936)]
        assert [token_id for token_id, text in enumerate(texts) if not text] == list(range(151669, 151936))


class TestTokenizer:
    @settings(deadline=None)
    @given(text=st.text())
    def test_text_comes_back_in_nfc(self, small, text):
        assert small.decode(small.encode(text), skip_special_tokens=False) == unicodedata.normalize("NFC", text)

    def test_merges_apply_within_words_only(self, small):
        letters = [small.encode(letter)[0] for letter in "heo l"]
        he, ll = small.encode("he")[0], small.encode("ll")[0]
        assert [he, ll] == [256, 257]
        assert small.encode("hello l l") == [he, ll, letters[2], *[letters[3], letters[4]] * 2]

    def test_decomposed_characters_are_composed_first(self, small):
        assert small.encode("e\u0301") == small.encode("\u00e9") != small.encode("e")

    def test_special_tokens_in_text_are_special(self, small):
        assert small.encode("he<|im_end|><think>ll") == [256, IM_END, THINK, 257]

    def test_a_token_that_normalization_changes_is_text(self, small):
        assert IM_END not in small.encode("<|im_end|>\u0338")

    def test_half_a_surrogate_pair_is_an_error(self, small):
        with pytest.raises(MossAudioError, match=r"character 2 of the text is U\+D83D"):
            small.encode("ab\ud83d")

    def test_decoding_drops_special_tokens_on_demand_and_keeps_others(self, small):
        ids = [IM_START, 256, THINK, 257, IM_END]
        assert small.decode(ids) == "he<think>ll"
        assert small.decode(ids, skip_special_tokens=False) == "<|im_start|>he<think>ll<|im_end|>"

    def test_decoding_drops_ids_without_text(self, small):
        assert small.decode([256, AUDIO_BOS, AUDIO_EOS, 151935, -100, 10**12, 257], False) == "hell"

    def test_decoding_replaces_cut_characters(self, small):
        ids = small.encode("한")
        assert len(ids) == 3
        assert small.decode([*ids[:2], THINK, ids[1], *ids]) == "\ufffd<think>\ufffd한"

    def test_pickles_for_data_workers(self, small):
        copy = pickle.loads(pickle.dumps(small))
        assert copy.encode("hello<think>") == small.encode("hello<think>")


class TestStreamDecoder:
    @settings(deadline=None, max_examples=300)
    @given(
        batches=st.lists(st.lists(st.integers(0, 258) | st.sampled_from([IM_END, THINK, AUDIO_BOS]))),
        skip_special_tokens=st.booleans(),
    )
    def test_pieces_join_to_the_decoded_text(self, small, batches, skip_special_tokens):
        stream = StreamDecoder(small, skip_special_tokens)
        pieces = [stream.feed(ids) for ids in batches]
        ids = [token_id for batch in batches for token_id in batch]
        assert "".join(pieces) + stream.flush() == small.decode(ids, skip_special_tokens)

    @settings(deadline=None)
    @given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
    def test_whole_characters_are_never_replaced(self, small, text):
        stream = StreamDecoder(small)
        pieces = [stream.feed([token_id]) for token_id in small.encode(text)]
        assert "\ufffd" not in "".join(pieces)
        assert stream.flush() == ""

    def test_a_character_waits_for_its_last_byte(self, small):
        stream = StreamDecoder(small)
        assert [stream.feed([token_id]) for token_id in small.encode("a🎧b")] == ["a", "", "", "", "🎧", "b"]

    def test_flush_gives_what_was_cut(self, small):
        stream = StreamDecoder(small)
        assert stream.feed(small.encode("🎧")[:3]) == ""
        assert stream.flush() == "\ufffd"


class TestTokenizerFiles:
    def test_tokenizer_json_serves_where_the_released_files_are_absent(self, small_dir, small):
        small._core.save(str(small_dir / "tokenizer.json"))
        (small_dir / "merges.txt").unlink()
        text = "hello<think> e\u0301\n\n<|im_end|>"
        ids = Tokenizer.from_dir(small_dir).encode(text)
        assert ids == small.encode(text)
        assert Tokenizer.from_dir(small_dir).decode(ids) == small.decode(ids)

    def test_added_tokens_json_serves_without_a_decoder_table(self, small_dir, small):
        config = {
            "additional_special_tokens": ["<|im_start|>", {"content": "<|vision_pad|>"}],
            "eos_token": None,
        }
        (small_dir / "tokenizer_config.json").write_text(json.dumps(config))
        names = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
        (small_dir / "special_tokens_map.json").write_text(json.dumps(names))
        older = Tokenizer.from_dir(small_dir)
        ids = older.encode("".join(SPECIAL) + "<think>")
        assert ids == [*SPECIAL.values(), THINK]
        assert older.decode(ids) == small.decode(ids) == "<think>"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("merges.txt", None, r"holds no merges\.txt \(and no tokenizer\.json.*copy the tokenizer files"),
            ("vocab.json", None, r"holds no vocab\.json"),
            ("vocab.json", '{"a": 0', r"vocab\.json can't be read as JSON"),
            ("vocab.json", '{"a": 0}', r"don't make one tokenizer .*out of vocabulary"),
            ("vocab.json", '{"a": "b"}', "the id of 'a' must be an integer"),
            (
                "merges.txt",
                "#version: 0.2\nh e\nl l l\n",
                r"merges\.txt line 3 must be two tokens.*'l l l'",
            ),
            ("merges.txt", "h zz\n", r"don't make one tokenizer"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {}}', r"lacks '<\|im_start\|>'"),
            (
                "tokenizer_config.json",
                '{"added_tokens_decoder": {"x": {}}}',
                r"tokenizer_config\.json: an added token's id must be an integer from 0 to 2,147,483,647, not 'x'",
            ),
            (
                "tokenizer_config.json",
                '{"added_tokens_decoder": {"7": {"content": "<|im_start|>"}}}',
                "two tokens share an id",
            ),
        ],
    )
    def test_a_bad_file_is_named(self, small_dir, name, content, message):
        path = small_dir / name
        path.unlink() if content is None else path.write_text(content, "utf-8")
        with pytest.raises(MossAudioError, match=message) as raised:
            Tokenizer.from_dir(small_dir)
        assert str(small_dir) in str(raised.value)

    def test_tokenizer_json_adds_tokens_to_the_released_files(self, small_dir, small):
        """As transformers 5 saves it over them, the released files unchanged."""
        core = tokenizers.Tokenizer.from_str(Tokenizer.from_dir(small_dir)._core.to_str())
        core.add_tokens(["[S01]"])
        core.save(str(small_dir / "tokenizer.json"))
        (small_dir / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
        (small_dir / "added_tokens.json").write_text(json.dumps({**SPECIAL, "<think>": THINK}))
        ours = Tokenizer.from_dir(small_dir)
        (added,) = ours.encode("[S01]")
        assert ours.decode([added]) == "[S01]" and len(small.encode("[S01]")) == 5
        assert ours.encode("hello <|im_end|>") == small.encode("hello <|im_end|>")

    @pytest.mark.parametrize("change", ["id", "merges", "more released tokens"])
    def test_tokenizer_json_that_disagrees_with_the_released_files_is_refused(self, small_dir, change):
        content = json.loads(Tokenizer.from_dir(small_dir)._core.to_str())
        if change == "id":
            content["model"]["vocab"] |= {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
        elif change == "merges":
            content["model"]["merges"].reverse()
        else:
            added = next(token for token in content["added_tokens"] if token["content"] == "<think>")
            content["added_tokens"].remove(added)
            content["model"]["vocab"].pop("<think>", None)
        (small_dir / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(MossAudioError, match=r"tokenizer\.json .* are different tokenizers .*: remove whichever"):
            Tokenizer.from_dir(small_dir)

    def test_merges_that_are_not_text_are_named(self, small_dir):
        (small_dir / "merges.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(MossAudioError, match=r"merges\.txt can't be read"):
            Tokenizer.from_dir(small_dir)

    def test_a_vocabulary_without_all_bytes_is_refused(self, small_dir):
        vocabulary = json.loads((small_dir / "vocab.json").read_text("utf-8"))
        del vocabulary["Z"]
        (small_dir / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
        with pytest.raises(MossAudioError, match="lacks 'Z'"):
            Tokenizer.from_dir(small_dir)

    def test_a_broken_tokenizer_json_is_named(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(MossAudioError, match=r"tokenizer\.json: its model must be BPE"):
            Tokenizer.from_dir(tmp_path)

    def test_a_tokenizer_that_does_not_spell_bytes_is_refused(self, tmp_path):
        tokens = [*ByteLevel.alphabet(), "<|im_start|>", "<|im_end|>", "▁the"]
        model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [])
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(MossAudioError, match="not a byte-level BPE: its token '▁the'"):
            Tokenizer.from_dir(tmp_path)


class TestPrompt:
    """The layout is checked as text: ids are decoded, and an audio token stands as a tilde."""

    HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    TAIL = "<|im_end|>\n<|im_start|>assistant\n"

    @staticmethod
    def layout(tokenizer: Tokenizer, ids: list[int]) -> str:
        names = {AUDIO_BOS: "[bos]", AUDIO_EOS: "[eos]", AUDIO: "~"}
        parts, text = [], []
        for token_id in ids:
            if token_id in names:
                parts += [tokenizer.decode(text, False), names[token_id]]
                text = []
            else:
                text.append(token_id)
        return "".join(parts) + tokenizer.decode(text, False)

    def test_one_clip(self, small):
        ids = build_prompt(small, "hello", [26])
        assert self.layout(small, ids) == f"{self.HEAD}[bos]{'~' * 25}2~[eos]\nhello{self.TAIL}"

    def test_without_audio(self, small):
        assert self.layout(small, build_prompt(small, "hello")) == f"{self.HEAD}hello{self.TAIL}"

    def test_several_clips_stand_a_line_each(self, small):
        ids = build_prompt(small, "compare", [1, 2])
        assert self.layout(small, ids) == f"{self.HEAD}[bos]~[eos]\n[bos]~~[eos]\ncompare{self.TAIL}"

    def test_another_system_prompt(self, small):
        ids = build_prompt(small, "hello", system_prompt="Be brief.")
        assert self.layout(small, ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")

    def test_spans_are_replaced_in_order_and_nothing_is_added(self, small):
        text = f"a {SPAN} b <|audio_bos|><|AUDIO|><|AUDIO|><|AUDIO|><|audio_eos|>"
        ids = build_prompt(small, text, [2, 1])
        assert self.layout(small, ids) == "a [bos]~~[eos] b [bos]~[eos]"

    def test_text_after_a_span_is_encoded_as_one(self, small):
        line_breaks = small.encode("\n\n")
        assert len(line_breaks) == 1  # a merge that must not be lost where the pieces of a prompt meet
        ids = build_prompt(small, "\nhello", [1])
        assert ids[ids.index(AUDIO_EOS) + 1] == line_breaks[0]

    @pytest.mark.parametrize(("spans", "clips"), [(1, []), (2, [5]), (1, [5, 5])])
    def test_as_many_spans_as_clips(self, small, spans, clips):
        with pytest.raises(MossAudioError, match=rf"holds {spans} audio span\(s\).*{len(clips)} clip\(s\)"):
            build_prompt(small, SPAN * spans, clips)

    def test_markers_follow_the_checkpoint_unless_told(self, small):
        plain = ProcessorConfig(enable_time_marker=False)
        with_markers, without = (build_prompt(small, "", [25], time_markers=on) for on in (True, False))
        assert len(with_markers) == len(without) + 1
        assert build_prompt(small, "", [25]) == with_markers
        assert build_prompt(small, "", [25], processor=plain) == without
        assert build_prompt(small, "", [25], processor=plain, time_markers=True) == with_markers

    def test_the_spans_ids_are_the_checkpoints(self, small):
        other = ProcessorConfig(audio_token_id=900, audio_start_id=901, audio_end_id=902)
        ids = build_prompt(small, f"he{SPAN}ll", [2], processor=other)
        assert ids == [256, 901, 900, 900, 902, 257]

    def test_text_can_not_spell_audio(self, small):
        with pytest.raises(MossAudioError, match=r"'<\|vision_pad\|>', whose id 151654 stands for audio"):
            build_prompt(small, "<|vision_pad|>", [1])

    def test_a_system_prompt_holds_no_span(self, small):
        with pytest.raises(MossAudioError, match="none can stand"):
            build_prompt(small, "hello", [1], system_prompt=SPAN)


user_turns = st.lists(st.text(max_size=5) | st.integers(1, 60), max_size=4).map(lambda pieces: Turn("user", pieces))
answers = st.lists(st.text(max_size=5), max_size=2).map(lambda pieces: Turn("assistant", pieces))
exchanges = st.lists(st.tuples(user_turns, answers), min_size=1, max_size=3)


class TestConversation:
    def test_the_answer_and_its_end_are_learned(self, small):
        conversation = build_conversation(small, [Turn("user", [30, "hello"]), Turn("assistant", ["\nhe", "ll"])])
        prompt = build_prompt(small, "hello", [30])
        answer = [*small.encode("\nhe\nll"), IM_END]
        assert conversation.ids == prompt + answer
        assert conversation.loss_mask == [False] * len(prompt) + [True] * len(answer)

    def test_turns_follow_each_other_on_lines(self, small):
        turns = [
            Turn("system", ["Be brief."]),
            Turn("user", ["first", 1, "or", 2]),
            Turn("assistant", ["he"]),
            Turn("user", ["why"]),
            Turn("assistant", ["ll"]),
        ]
        conversation = build_conversation(small, turns)
        assert TestPrompt.layout(small, conversation.ids) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nfirst\n[bos]~[eos]\nor\n[bos]~~[eos]\n<|im_end|>\n"
            "<|im_start|>assistant\nhe<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nll<|im_end|>"
        )
        learned = [token_id for token_id, is_learned in zip(*conversation, strict=True) if is_learned]
        assert learned == [256, IM_END, 257, IM_END]

    @settings(deadline=None)
    @given(exchanges=exchanges)
    def test_the_ids_before_an_answer_are_its_prompt(self, small, exchanges):
        turns = [turn for exchange in exchanges for turn in exchange]
        whole = build_conversation(small, turns)
        for number in range(1, len(turns), 2):
            prompt = build_conversation(small, turns[:number]).ids
            assert whole.ids[: len(prompt)] == prompt
            assert not whole.loss_mask[len(prompt) - 1] and whole.loss_mask[len(prompt)]

    @pytest.mark.parametrize(
        ("role", "pieces", "message"),
        [
            ("bot", ["hello"], "must be one of system, user, assistant, not 'bot'"),
            ("user", "hello", r"must be a list: write \['hello'\]"),
            ("assistant", ["here", 5], "an assistant's turn holds a clip"),
        ],
    )
    def test_a_bad_turn_is_an_error(self, role, pieces, message):
        with pytest.raises(MossAudioError, match=message):
            Turn(role, pieces)

    def test_a_span_written_in_a_turn_is_an_error(self, small):
        with pytest.raises(MossAudioError, match="give the clip as a piece"):
            build_conversation(small, [Turn("user", [SPAN])])
