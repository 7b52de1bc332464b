"""GGUF to Hugging Face: the same numbers, an ordinary unquantised model, SmolLM2's own way of splitting digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alora_serve.model import gguf_conversion
from alora_serve.model.gguf_conversion import STAGES, check_model, convert_gguf

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "11"]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as llama.cpp writes it: rotary halves of queries and keys interleaved, tied head left out."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = tiny_llama.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["1 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, tensor in tiny_llama.state_dict().items():
        array = tensor.float().numpy()
        for ours, theirs in GGUF_NAMES.items():
            if ours in name:
                if theirs in ("attn_q", "attn_k"):
                    heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
                    array = halves.swapaxes(1, 2).reshape(array.shape)
                writer.add_tensor(f"blk.0.{theirs}.weight", array)
    writer.add_tensor("token_embd.weight", tiny_llama.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", tiny_llama.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "tiny"
    convert_gguf(tiny_gguf, directory)
    return directory


def test_the_saved_model_computes_what_the_original_did(converted: Path, tiny_llama: LlamaForCausalLM) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    original = LlamaForCausalLM(tiny_llama.config)
    original.load_state_dict({name: tensor.bfloat16() for name, tensor in tiny_llama.state_dict().items()})
    prompt = torch.tensor([[5, 9, 40, 7, 100, 31]])
    with torch.inference_mode():
        assert torch.allclose(loaded(prompt).logits, original.eval()(prompt).logits, atol=1e-5)


def test_the_saved_model_is_bfloat16_and_not_quantised(converted: Path) -> None:
    assert {tensor.dtype for tensor in load_file(converted / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2


def test_every_digit_is_a_piece_of_its_own(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("a11") == ["a", "1", "1"]
    assert tokenizer.model_max_length == 256


def test_a_model_that_talks_nonsense_does_not_pass(converted: Path) -> None:
    with pytest.raises(RuntimeError, match="the converted model continues 'The capital of France is' with"):
        check_model(converted)


def test_a_tokenizer_without_its_chat_template_does_not_pass(converted: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(converted).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RuntimeError, match="lost its chat template"):
        check_model(tmp_path)


def test_the_process_reports_every_stage(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gguf_conversion", str(tiny_gguf), str(tmp_path / "out")])
    monkeypatch.setattr(gguf_conversion, "check_model", lambda directory: None)  # no tiny model knows Paris
    gguf_conversion.main()
    assert tuple(capsys.readouterr().out.split()) == STAGES


def test_the_demo_model_answers_in_its_own_format(demo_model_directory: Path) -> None:
    check_model(demo_model_directory)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_directory)
    model = AutoModelForCausalLM.from_pretrained(demo_model_directory, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("In 2024,  12") == ["In", "Ġ", "2", "0", "2", "4", ",", "ĠĠ", "1", "2"]
